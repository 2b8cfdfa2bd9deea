"""Table of any runs: one row per config, mean ± std over its seeds, and the paired difference to softmax attention."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vca.attention import variant_name
from vca.report.tables import NOT_COMPARED, total_steps
from vca.runtime.renamed import with_new_names
from vca.runtime.rundir import RunDirectory, read_config

Records = list[dict[str, Any]]


# Column -> key of its values in `metrics.jsonl`, and number of decimals.
COLUMNS = {
    "top-1 (%)": ("val/top1", 2),
    "EMA top-1 (%)": ("ema/top1", 2),
    "evaluation loss": ("val/loss", 4),
    "training loss": ("loss", 4),
    "Frechet distance": ("frechet", 2),
}
BASELINE = "softmax"
# Columns of the paired difference; the first one that all runs have is used.
PAIRED = ("EMA top-1 (%)", "top-1 (%)", "Frechet distance", "evaluation loss", "training loss")


def final_value(records: list[dict[str, Any]], key: str) -> float | None:
    """Return the value of the last record with this key, None if there is none.

    The training loss is averaged over the last tenth of the steps, as a single record is too noisy.
    """
    if key == "loss":
        start = 0.9 * records[-1]["step"] if records else 0
        losses = [record["loss"] for record in records if record.get("loss") is not None and record["step"] > start]
        return statistics.mean(losses) if losses else None
    return next((record[key] for record in reversed(records) if key in record), None)


@dataclass
class FinishedRun:
    """A finished run: its flattened config, and its values by column."""

    path: Path
    seed: int
    config: dict[str, Any]
    values: dict[str, float | None]


def flatten_config(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a config by full key, with today's names, without keys that cannot change results."""
    leaves: dict[str, Any] = {}
    config = config if prefix else with_new_names(config)
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key in (*NOT_COMPARED, "name"):
            continue
        if key == "attention":
            leaves[key] = variant_name(value)
        elif isinstance(value, dict):
            leaves |= flatten_config(value, f"{key}.")
        else:
            leaves[key] = value
    return leaves


def read_finished_run(folder: Path) -> FinishedRun | str:
    """Read a run, or return a line with the reason why it has no results."""
    file = folder / "config.json"
    if not file.exists():
        return f"{folder}: not started"
    try:
        config, records = read_config(folder), RunDirectory(folder).records()
        last_step, steps = records[-1]["step"] if records else 0, total_steps(config, records)
        evaluated = "objective" in config or any(r["step"] == last_step and "val/top1" in r for r in records)
        if not records or last_step < steps or not evaluated:
            return f"{folder}: not finished (step {last_step})"
        values = {name: final_value(records, key) for name, (key, _) in COLUMNS.items()}
        return FinishedRun(folder, config["seed"], flatten_config(config), values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"{folder}: not a run of this project, or corrupt ({type(error).__name__})"


class ResultTable(NamedTuple):
    """Runs that were evaluated on the same data.

    Attributes:
        title: the data options in which the tables differ; empty if there is one table.
        rows: cells of the header, then one row per config.
        duplicates: a line for each skipped run with the config and seed of another.
    """

    title: str
    rows: list[list[str]]
    duplicates: list[str]


def sweep_table(folders: Iterable[Path]) -> str:
    """Return Markdown with one row per config, named by the options that differ, and the skipped runs below.

    Runs that were evaluated on different data are in separate tables.
    """
    runs = [read_finished_run(folder) for folder in dict.fromkeys(folder.resolve() for folder in folders)]
    parts = []
    for title, (head, *rows), duplicates in result_tables([run for run in runs if isinstance(run, FinishedRun)]):
        table = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
        parts.append("\n".join([*([title, ""] if title else []), *table, *duplicates]))
    return "\n\n".join(parts) + "".join(f"\n{line}" for line in runs if isinstance(line, str))


def result_tables(runs: Iterable[FinishedRun]) -> list[ResultTable]:
    """Return a table for the runs of each data set."""
    by_data: dict[str, list[FinishedRun]] = {}
    for run in runs:
        by_data.setdefault(json.dumps(data_options(run), sort_keys=True), []).append(run)
    firsts = [data_options(group[0]) for group in by_data.values()]
    keys = sorted({key for first in firsts for key in first})
    differing = [key for key in keys if len({str(first.get(key)) for first in firsts}) > 1]
    tables = []
    for group in by_data.values():
        title = ", ".join(f"{key}={group[0].config.get(key)}" for key in differing)
        tables.append(ResultTable(title, *table_rows(group)))
    return tables


def data_options(run: FinishedRun) -> dict[str, Any]:
    """Return the options of the data set that a run was evaluated on."""
    return {key: value for key, value in run.config.items() if key.startswith("data.")}


def table_rows(runs: list[FinishedRun]) -> tuple[list[list[str]], list[str]]:
    """Return the cells of one table, and a line for each skipped run with the config and seed of another."""
    by_config: dict[str, dict[int, FinishedRun]] = {}
    duplicates = []
    for run in runs:
        seeds = by_config.setdefault(json.dumps(run.config, sort_keys=True), {})
        if run.seed in seeds:
            duplicates.append(f"{run.path}: skipped, same config and seed as {seeds[run.seed].path}")
        seeds.setdefault(run.seed, run)
    keys = sorted({key for run in runs for key in run.config})
    differing = [key for key in keys if len({json.dumps(run.config.get(key)) for run in runs}) > 1]
    columns = [name for name in COLUMNS if any(run.values[name] is not None for run in runs)]

    column = next((name for name in PAIRED if all(run.values[name] is not None for run in runs)), None)
    paired = paired_differences(list(by_config.values()), column) if column else []
    header = [f"{column}: difference to {BASELINE} (paired)"] if paired else []
    rows = [["", *columns, *header, "seeds", "runs"]]
    for number, seeds in enumerate(by_config.values()):
        config = next(iter(seeds.values())).config
        shown = {key: "null" if config.get(key) is None else config[key] for key in differing}
        label = ", ".join(shown[key] if key == "attention" else f"{key}={shown[key]}" for key in differing)
        cells = [mean_std([run.values[name] for run in seeds.values()], COLUMNS[name][1]) for name in columns]
        names = " ".join(run.path.name for run in seeds.values())
        cells += paired[number : number + 1]
        rows.append([label or str(config["attention"]), *cells, str(len(seeds)), names])
    return rows, duplicates


def paired_differences(groups: list[dict[int, FinishedRun]], column: str) -> list[str]:
    """Return a cell per group of seeds: mean ± std of the differences to softmax attention at the same seeds.

    The baseline has the same config except for the attention. Empty if no run has one with its seed.
    """

    def config_of(seeds: dict[int, FinishedRun], attention: str | None = None) -> str:
        config = next(iter(seeds.values())).config
        return json.dumps(config | ({"attention": attention} if attention else {}), sort_keys=True)

    baselines = {config_of(seeds): seeds for seeds in groups}
    cells = []
    for seeds in groups:
        baseline = baselines.get(config_of(seeds, BASELINE), {})
        pairs = [(run.values[column], baseline[seed].values[column]) for seed, run in seeds.items() if seed in baseline]
        differences = [value - other for value, other in pairs if value is not None and other is not None]
        cells.append("-" if baseline is seeds or not differences else paired_cell(differences, COLUMNS[column][1]))
    return cells if any(cell != "-" for cell in cells) else []


def paired_cell(differences: list[float], decimals: int) -> str:
    """Format `+1.20 +- 0.30 (3 seeds)`."""
    cell = f"{statistics.mean(differences):+.{decimals}f}"
    if len(differences) == 1:
        return f"{cell} (1 seed)"
    return f"{cell} +- {statistics.stdev(differences):.{decimals}f} ({len(differences)} seeds)"


def mean_std(values: list[float | None], decimals: int) -> str:
    """Format `mean +- std`, only the mean of a single value, `-` if a run has no value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    mean = f"{statistics.mean(known):.{decimals}f}"
    return f"{mean} +- {statistics.stdev(known):.{decimals}f}" if len(known) > 1 else mean
