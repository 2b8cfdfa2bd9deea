"""Published results: accepted evaluation records, and the tables of README.md and docs/ made from them.

A folder in `docs/results/` contains the records of one run and the log of its training. The tables are between
`<!-- results: NAME -->` and `<!-- end -->`; `scripts/table.py --update` writes them, and a test compares them with the
records, so a figure without a record cannot be in a table.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vca.evaluation.record import ACCURACY_FORMAT, read_record
from vca.report.acceptable import accepted_name, check_acceptable, log_of, not_of_tables
from vca.report.accepted import (
    COMPARED,
    REFERENCE,
    Result,
    by_config,
    different_options,
    label_of,
    mean_std,
    read_results,
    with_seeds,
)
from vca.report.attentions import attentions_table
from vca.report.sweep_table import flatten_config
from vca.report.tables import TABLES, Measurement, as_markdown, gather, lines_of, row_of
from vca.runtime.errors import ConfigError
from vca.runtime.files import write_text

FOLDER = Path("docs") / "results"
DOCUMENTS = ("README.md", "docs/results.md", "docs/attentions.md")
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
MARKER = "<!-- results:"


class Experiments(NamedTuple):
    """Config and estimated GPU-hours of an experiment, such as `table1/deit_tiny_vca`."""

    config: Callable[..., Mapping[str, Any]]  # of a name and further overrides
    gpu_hours: Callable[[str], int]


def accept(folders: Iterable[Path], root: Path, experiments: Experiments) -> list[Path]:
    """Copy the records of runs, with their logs, to `docs/results/` of a checkout; return the files written.

    Records of other steps and EMA decays than those of the tables are skipped with a printed line.

    Raises:
        ConfigError: if a folder has no record, a record cannot be accepted, see `check_acceptable`, or the tables
            cannot be made from the old and the new records; nothing is written then.
    """
    sources: list[tuple[Path, dict[str, Any]]] = []
    for folder in folders:
        paths = sorted(folder.rglob("evaluation-*.json"))
        if not paths:
            raise ConfigError(f"no evaluation-*.json in {folder}")
        records = {path: read_record(path) for path in paths}
        skipped = {path: reason for path in paths if (reason := not_of_tables(path, records[path])) is not None}
        if len(skipped) == len(paths):
            check_acceptable(paths[0], records[paths[0]])
        for path, reason in skipped.items():
            print(f"skipped: {path}: {reason}")
        sources += [(path, record) for path, record in records.items() if path not in skipped]
    for path, record in sources:
        check_acceptable(path, record)
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name) / FOLDER
        if (root / FOLDER).is_dir():
            shutil.copytree(root / FOLDER, staged)
        written = []
        for path, record in sources:
            (staged / accepted_name(record)).mkdir(parents=True, exist_ok=True)
            for file in (path, log_of(path, record)):
                written.append(FOLDER / accepted_name(record) / file.name)
                write_text(Path(name) / written[-1], file.read_text())
        try:
            render(Path(name), experiments)
        except ConfigError as error:
            raise ConfigError(str(error).replace(name, str(root))) from error
        shutil.copytree(staged, root / FOLDER, dirs_exist_ok=True)
    return [root / file for file in dict.fromkeys(written)]


def records_table(results: list[Result], folder: Path) -> str:
    """Return the table of all results: one row per config, with the records of each seed."""
    columns = "run | metric | EMA | raw | seeds | trained on | commit | command | weights and records"
    lines = [f"| {columns} |", "|---" * 9 + "|"]
    for group in sorted(by_config(results), key=lambda ones: label_of(ones[0], results)):
        values = [[one.values[name] for one in group if name in one.values] for name in ("ema", "raw")]
        starts = [first_start(one.any_record()) for one in group]
        devices, commits = (sorted({start[key] for start in starts}) for key in ("device", "commit"))
        links = [f"seed {one.seed}: {record_links(one, folder)}" for one in group]
        cells = [label_of(group[0], results), group[0].metric, *(mean_std(ones) if ones else "-" for ones in values)]
        cells += [str(len(group)), "; ".join(devices), ", ".join(commit[:7] for commit in commits)]
        script, *overrides = starts[0]["command"].split(" ", 1)
        cells += [f"`python {' '.join([Path(script).name, *overrides])}`", ", ".join(links)]  # a sweep runs a snapshot
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if results else "No record has been accepted yet.\n"


def first_start(record: Mapping[str, Any]) -> dict[str, str]:
    """Return command, commit and device of the training, or of the evaluation if the record has none."""
    launches = (record.get("training") or {}).get("launches")
    start = launches[0] if launches else record["compute"]
    hardware = start["processor"] if start["device"] == "cpu" else start["device"]
    ranks, threads = (f"{start[key]} {key[:-1] if start[key] == 1 else key}" for key in ("ranks", "threads"))
    return {**start, "device": ", ".join([hardware, ranks, *([threads] if start["device"] == "cpu" else [])])}


def record_links(result: Result, folder: Path) -> str:
    """Return links from docs/results.md to the records, by weights and digits of their sha256, and to the log."""
    links = []
    for weights, (path, record) in result.records.items():
        is_accuracy = record["format"] == ACCURACY_FORMAT
        sha256 = record["weights"]["sha256"] if is_accuracy else record["samples"]["made"]["origin"]["weights_sha256"]
        links.append(f"[{weights} {sha256[:8]}]({folder.name}/{path.relative_to(folder)})")
    path, record = next(iter(result.records.values()))
    links.append(f"[log]({folder.name}/{path.parent.relative_to(folder)}/{record['log']['file']})")
    return " ".join(links)


def measured_table(results: list[Result]) -> str:
    """Return VCA beside softmax attention, a row per config of the rest, for results outside the paper's tables."""
    lines = ["| task | VCA | softmax |", "|---|---|---|"]
    both = [one for one in results if one.config["attention"] in ("vca", "softmax")]
    for group in by_config(both, without="attention"):
        cells = [f"{label_of(group[0], both, attention=False)}: {group[0].metric}"]
        for attention in ("vca", "softmax"):
            values = [one.value for one in group if one.config["attention"] == attention]
            cells.append(with_seeds(values) if values else "not run")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else "No record has been accepted yet.\n"


def reproduction_table(measured: list[Measurement], experiments: Experiments) -> str:
    """Return the rows of Tables 1 and 2 that have a published figure, with ours if it has a record.

    Raises:
        ConfigError: if a record was trained with another config than the row's experiment.
    """
    lines = ["| table | row | config | paper | ours | GPU-hours | command |", "|---" * 7 + "|"]
    for number, data, unit in ((1, "imagenet", " %"), (2, "latents", "")):
        table = TABLES[f"table{number}"]
        for line, (label, cells) in zip(lines_of(table, measured), table.rows, strict=True):
            for column, cell in zip(table.columns, cells, strict=True):
                if cell.paper is None:
                    continue
                row = f"{row_of(cell.model, cell.objective, cell.size)}_{cell.attention['name']}"
                for one in (one for one in measured if one.fits(cell)):
                    check_experiment(one, f"table{number}/{row}", experiments.config(f"table{number}/{row}"))
                texts = [str(number), f"{label}, {column}", f"`table{number}/{row}`", f"{cell.paper:.1f}{unit}"]
                texts += [ours(line, column, unit), str(experiments.gpu_hours(f"table{number}/{row}"))]
                command = f"`ROWS={row} scripts/reproduce_table{number}.sh data.root=/data/{data}`"
                lines.append(f"| {' | '.join([*texts, command])} |")
    return "\n".join(lines) + "\n"


def ours(line: Mapping[str, str], column: str, unit: str) -> str:
    """Return the measured cell of a row of `lines_of`."""
    mean, std, seeds = (line[f"{column} {key}"] for key in ("measured", "std", "seeds"))
    return f"{mean} ± {std}{unit} ({seeds} seeds)" if std else f"{mean}{unit} (1 seed)" if mean else "not run"


def check_experiment(one: Measurement, name: str, config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless a measurement has the config of its row's experiment, and ADM's file as reference."""
    made = (one.settings.get("samples") or {}).get("made")
    if made and (source := Path(one.settings["reference"]["source"]).name) != REFERENCE:
        raise ConfigError(f"{one.path} must have reference={REFERENCE} for {name}, got {source}; evaluate again")
    trained = {**made, **made["origin"]["training"]} if made else one.settings
    different = different_options(config, flatten_config({key: trained[key] for key in COMPARED if key in trained}))
    if different:
        key, (wanted, got) = next(iter(different.items()))
        raise ConfigError(f"{one.path} must have {key}={wanted} for {name}, got {got}")


def paper_tables(measured: list[Measurement], folder: Path) -> str:
    """Return the paper's tables that have a measured value."""
    texts = []
    for table in TABLES.values():
        lines = lines_of(table, measured)
        if any(line[f"{column} measured"] for line in lines for column in table.columns):
            text = as_markdown(table, lines).replace("## ", "### ").replace("+-", "±")
            texts.append(text.replace(f"{folder}/", f"{folder.name}/"))
    return "\n".join(texts) or "No record of a row of Tables 1 to 4 has been accepted yet.\n"


def render(root: Path, experiments: Experiments) -> dict[str, str]:
    """Return the content of each block, from the records in `docs/results/` of a checkout."""
    folder = root / FOLDER
    results = read_results(folder)
    measured = gather([folder]).measured if folder.is_dir() else []
    in_tables = {one.path for one in measured}
    others = [one for one in results if not in_tables & {path for path, _ in one.records.values()}]
    return {
        "reproduction": reproduction_table(measured, experiments),
        "measured": measured_table(others),
        "records": records_table(results, folder),
        "tables": paper_tables(measured, folder),
        "attentions": attentions_table(results, experiments.config),
    }


def rewrite(text: str, blocks: Mapping[str, str]) -> str:
    """Return a document with the content of its blocks replaced.

    Raises:
        ConfigError: if a block has no end or an unknown name.
    """
    if text.count(MARKER) != len(found := BLOCK.findall(text)):
        raise ConfigError(f"a block must be '{MARKER} NAME -->', its content and '<!-- end -->' on lines of their own")
    for _, name, content, _ in found:
        if name not in blocks or MARKER in content:
            raise ConfigError(f"a block must be one of {', '.join(blocks)} and have an end, got {name}")
    return BLOCK.sub(lambda match: f"{match[1]}{blocks[match[2]]}{match[4]}", text)


def stale_documents(root: Path, experiments: Experiments) -> dict[Path, str]:
    """Return the documents of a checkout whose blocks differ from the records, with the text that they should have."""
    blocks = render(root, experiments)
    texts = {root / name: (root / name).read_text() for name in DOCUMENTS}
    renewed = {path: rewrite(text, blocks) for path, text in texts.items()}
    return {path: text for path, text in renewed.items() if text != texts[path]}
