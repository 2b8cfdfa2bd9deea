"""The paper's tables from run directories and evaluation records: published and measured values side by side.

Runs are matched to rows by model, attention and data, not by name. Runs that differ only in the seed give mean ± std.
Values measured with different settings in one table are an error that names the settings.
"""

import csv
import io
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vca.attention import DifferentialStagesConfig, SoftmaxConfig, VCAConfig, variant_name
from vca.evaluation.record import ACCURACY_FORMAT, FIELDS_OF, INCIDENTAL, read_record
from vca.report import paper
from vca.report.acceptable import not_final, total_steps
from vca.report.accuracy import accuracy_at, ema_warning
from vca.runtime.errors import ConfigError
from vca.runtime.rundir import RESUME_IGNORED_KEYS, RunDirectory, diff_configs, read_config, to_dict

VCA, SOFTMAX = to_dict(VCAConfig()), to_dict(SoftmaxConfig())


def vca(**options: str) -> dict[str, Any]:
    """Return the config of a VCA variant."""
    return to_dict(VCAConfig(**options))  # type: ignore[arg-type]


class Cell(NamedTuple):
    """What a cell of a table measures, and its published value; a classifier has no objective."""

    model: str
    attention: dict[str, Any]
    objective: str | None
    size: int  # of an image, in pixels
    paper: float | None = None


class Table(NamedTuple):
    """A table of the paper: rows of `(label, cells)`, one cell per column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def cell(row: str, attention: dict[str, Any]) -> Cell:
    """Return the cell of a row of the paper's tables, such as `deit_tiny`, `sit_s_2` or `dit_s_2_512`."""
    published = paper.PAPER[row, variant_name(attention)].value
    objective = OBJECTIVES.get(row[:3])
    if objective is None:
        return Cell(row, attention, None, 224, published)
    model, size = (row.removesuffix("_512"), 512) if row.endswith("_512") else (row, 256)
    return Cell(model.replace("sit", "dit"), attention, objective, size, published)


def row_of(model: str, objective: str | None, size: int) -> str:
    """Return the row of a model in the paper's tables, the opposite of `cell`; for other sizes, a row in no table."""
    row = model.replace("dit", "sit") if objective == "interpolant" else model
    return row if size == (224 if objective is None else 256) else f"{row}_{size}"


def paper_table(title: str, rows: Mapping[str, str]) -> Table:
    """Return Table 1 or 2: softmax attention and VCA for each of `rows`, row -> its label."""
    cells = tuple((label, (cell(row, SOFTMAX), cell(row, VCA))) for row, label in rows.items())
    return Table(title, ("softmax", "VCA"), cells)


def ablation_table(title: str, rows: Mapping[str, dict[str, Any]]) -> Table:
    """Return Table 3 or 4 for `rows`, label -> attention."""
    cells = tuple((label, (cell("deit_tiny", a), cell("dit_s_2", a))) for label, a in rows.items())
    return Table(title, ("DeiT-Tiny top-1", "DiT-S/2 FID-50K"), cells)


OBJECTIVES = {"dit": "diffusion", "sit": "interpolant"}  # SiT uses the networks of DiT
STAGES = {
    "Stage I only": vca(stage2="plain"),
    "Stage II only": vca(stage1="plain"),
    "Differential Attention in both stages": to_dict(DifferentialStagesConfig()),
    "VCA": VCA,
}
STREAMS = {
    "embedding only": vca(positive_stream="embedding", negative_stream="embedding"),
    "pool + embedding": VCA,
}
TABLES = {
    "table1": paper_table("Table 1: ImageNet-1K, top-1 (%)", paper.CLASSIFIERS),
    "table2": paper_table("Table 2: ImageNet-1K, FID-50K without guidance", paper.GENERATORS),
    "table3": ablation_table("Table 3: the two stages", STAGES),
    "table4": ablation_table("Table 4: content of the streams", STREAMS),
}
PROTOCOLS = {"diffusion": "dit_table", "interpolant": "sit_sde250"}  # protocols of FID without guidance
IMAGENET = {"name": "imagefolder", "num_classes": 1000}
IMAGENET_IMAGES = 50_000  # of its validation split

# Settings that may differ between runs of one row, and between records of one row and of one table.
NOT_COMPARED = (*RESUME_IGNORED_KEYS, "data.check", "trainer.eval_batch_size", "trainer.micro_batch_size", "seed")
RUN_FREE = (*NOT_COMPARED, "name", "attention")
RECORD_FREE = (
    *INCIDENTAL,
    "metrics",
    "settings",  # of the other metrics
    "reference.features",
    "sha256",
    "warnings",
    "samples.sha256",
    *(f"samples.made.{key}" for key in ("seed", "attention", "device", "torch", "compute_batch_size", "nfe")),
    *(f"samples.made.{key}" for key in ("autoencoder.source", "origin.run", "origin.checkpoint")),
    "samples.made.origin.weights_sha256",
    *(f"samples.made.origin.training.{key}" for key in NOT_COMPARED),
)
TABLE_FREE = (*RECORD_FREE, "samples.made.model")


@dataclass
class Measurement:
    """A measured value of a run or record.

    Attributes:
        path: the run directory or record.
        value: the measured value.
        training: identity of the trained weights; several measurements of the same weights count as one seed.
        settings: settings to compare with the other measurements of the table.
        cell: the cell that it measures, without its published value.
    """

    path: Path
    value: float
    training: str
    settings: dict[str, Any]
    cell: Cell

    def fits(self, cell: Cell) -> bool:
        return self.cell == cell._replace(paper=None)


@dataclass
class Measurements:
    """Measurements for the tables, and a line for each run or record without one."""

    measured: list[Measurement] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    generators: list[Path] = field(default_factory=list)
    accuracies: dict[str, list[tuple[Path, dict[str, Any]]]] = field(default_factory=dict)  # records by run

    def skip(self, path: Path, reason: str) -> None:
        """Record why a run or record is in no table."""
        self.left_out.append(f"{path}: {reason}")


def gather(folders: Iterable[Path], weights: str | None = None) -> Measurements:
    """Read all runs and records below some folders.

    `weights` are those of a classifier's accuracy, `raw` or `ema`; None: EMA if the run has one, else raw.

    Raises:
        ConfigError: if a folder does not exist, or a record is incomplete or has changed.
    """
    found = Measurements()
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"not a directory: {folder}")
        for path in sorted(folder.rglob("config.json")):
            read_run(path.parent, weights, found)
        for path in sorted(folder.rglob("*.json")):
            text = path.read_text(errors="ignore")
            if "evaluation-" in path.name or any(f'"{name}"' in text for name in FIELDS_OF):
                read_evaluation(path, found)
    measure_accuracies(weights, found)
    records = [one.settings for one in found.measured if one.cell.objective is not None]
    evaluated = {str(record["samples"]["made"]["origin"].get("run")) for record in records}
    for run in found.generators:
        if run.name not in evaluated:
            found.skip(run, "no FID-50K record of a table's protocol; run eval_fid.py with protocol=...")
    cells = [cell for table in TABLES.values() for _, cells in table.rows for cell in cells]
    for one in found.measured:
        if not any(one.fits(cell) for cell in cells):
            model, attention, _, size, _ = one.cell
            found.skip(one.path, f"no table has {model} with {variant_name(attention)} at {size} px")
    return found


def read_run(folder: Path, weights: str | None, found: Measurements) -> None:
    """Add a run: a finished ImageNet run of `train_cls.py`, or the folder of a generator."""
    config = read_config(folder)
    if not {"data", "model", "attention", "trainer", "seed"} <= set(config):
        return  # a config.json of another project
    if "inputs" in config:
        found.generators.append(folder)
        return
    if {key: config["data"].get(key) for key in IMAGENET} != IMAGENET:
        found.skip(folder, f"data is not ImageNet-1K, got {config['data'].get('name')}")
        return
    records = RunDirectory(folder).records()
    last = next((record for record in reversed(records) if "val/top1" in record), None)
    if last is None or last["step"] < total_steps(config, records):
        found.skip(folder, f"not finished (step {records[-1]['step'] if records else 0})")
        return
    top1 = accuracy_at(records, last["step"])
    chosen = weights or ("ema" if "ema" in top1 else "raw")
    if chosen not in top1:
        raise ConfigError(f"--weights must be raw for {folder}, which has no EMA")
    if "val/images" not in last:
        raise ConfigError(f"{folder}: metrics.jsonl has no val/images; evaluate again with trainer.eval_only=true")
    if chosen == "ema" and (warning := ema_warning(top1)):
        found.warnings.append(f"{folder}: {warning} (--weights raw)")
    # The default is one rule for all rows; runs of one row have the same trainer.ema_decay.
    settings = {**config, "images": last["val/images"], "weights": weights}
    cell = Cell(config["model"]["name"], config["attention"], None, config["data"]["img_size"])
    found.measured.append(Measurement(folder, top1[chosen], str(folder.resolve()), settings, cell))


def read_evaluation(path: Path, found: Measurements) -> None:
    """Add a record that is an FID-50K of a table's protocol, or an accuracy outside of its run directory."""
    record = read_record(path)
    if record["format"] == ACCURACY_FORMAT:
        if record["log"] is not None and not (path.parent / "config.json").exists():
            found.accuracies.setdefault(record["log"]["sha256"], []).append((path, record))
        return
    made = record["samples"]["made"]
    if made is None:
        found.skip(path, "sampling settings unknown (not a sample.py folder)")
        return
    objective = made["objective"]["name"]
    wanted = PROTOCOLS.get(objective)
    if not record["extractor"]["published"] or record["count"] != 50_000 or made["protocol"] != wanted:
        extractor = "" if record["extractor"]["published"] else f" by {record['extractor']['name']}"
        value = f"{record['metrics']['frechet']:.2f} of {record['count']:,} samples{extractor}"
        found.skip(path, f"{value}, protocol {made['protocol']}; the tables need FID-50K with protocol={wanted}")
        return
    if (reason := not_final(made["origin"])) is not None:
        found.skip(path, reason)
        return
    cell = Cell(made["model"]["name"], made["attention"], objective, record["samples"]["shape"][0])
    weights = made["origin"]["weights_sha256"]
    found.measured.append(Measurement(path, record["metrics"]["frechet"], weights, record, cell))


def measure_accuracies(weights: str | None, found: Measurements) -> None:
    """Add the accuracy records of finished ImageNet runs; `weights` as in `gather`."""
    for log, records in found.accuracies.items():
        names = [record["weights"]["name"] for _, record in records]
        chosen = weights or ("ema" if "ema" in names else "raw")
        path, record = records[names.index(chosen) if chosen in names else 0]
        config, images, origin = record["config"], record["count"], record["weights"]
        if {key: config["data"].get(key) for key in IMAGENET} != IMAGENET or images != IMAGENET_IMAGES:
            found.skip(
                path, f"not the {IMAGENET_IMAGES:,} images of ImageNet-1K, got {images:,} of {config['data']['name']}"
            )
        elif origin["step"] != origin["steps"] or chosen not in names:
            found.skip(path, f"{chosen} weights of step {origin['steps']} needed, got {names[0]} of {origin['step']}")
        else:
            settings = {**config, "images": images, "weights": weights}
            cell = Cell(config["model"]["name"], config["attention"], None, config["data"]["img_size"])
            found.measured.append(Measurement(path, record["metrics"]["top1"], log, settings, cell))


def fill(table: Table, measured: list[Measurement]) -> list[tuple[str, list[tuple[Cell, list[Measurement]]]]]:
    """Return the rows of a table with the measurements of each cell.

    Raises:
        ConfigError: if two measurements have different settings; names both and the settings.
    """
    rows = [
        (label, [(cell, [one for one in measured if one.fits(cell)]) for cell in cells]) for label, cells in table.rows
    ]
    by_metric: dict[tuple[str | None, int], list[Measurement]] = {}  # FIDs and accuracies of a table
    for _, cells in rows:
        by_kind: dict[str | None, list[Measurement]] = {}
        for cell, ones in cells:
            by_kind.setdefault(cell.objective, []).extend(ones)
            by_metric.setdefault((cell.objective, cell.size), []).extend(ones)
        for kind, ones in by_kind.items():
            check_alike(ones, RUN_FREE if kind is None else RECORD_FREE)
    for (kind, _), ones in by_metric.items():
        # Recipe and evaluation crop differ between backbones.
        recipe = {key for one in ones for key in one.settings} - {"images", "weights"}
        check_alike(ones, recipe if kind is None else TABLE_FREE)
    return rows


def check_alike(measured: list[Measurement], free: Iterable[str]) -> None:
    """Raise `ConfigError` unless all measurements have the same settings, except the free ones."""
    for one in measured[1:]:
        if differences := diff_configs(measured[0].settings, one.settings, tuple(free)):
            raise ConfigError(
                f"{measured[0].path} and {one.path} must have the same settings ({'; '.join(differences)}); pass only "
                f"folders that belong together"
            )


def lines_of(table: Table, measured: list[Measurement]) -> list[dict[str, str]]:
    """Return a dict per row: for each column the published value, mean, std, number of seeds, and run folders."""
    lines = []
    for label, cells in fill(table, measured):
        line = {"row": label}
        for column, (cell, ones) in zip(table.columns, cells, strict=True):
            by_training: dict[str, list[float]] = {}
            for one in ones:
                by_training.setdefault(one.training, []).append(one.value)
            values = [statistics.mean(of_one) for of_one in by_training.values()]
            line[f"{column} paper"] = "" if cell.paper is None else f"{cell.paper:.1f}"
            line[f"{column} measured"] = f"{statistics.mean(values):.2f}" if values else ""
            line[f"{column} std"] = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
            line[f"{column} seeds"] = str(len(values)) if values else ""
            line[f"{column} runs"] = " ".join(str(one.path) for one in ones)
        lines.append(line)
    return lines


def as_markdown(table: Table, lines: list[dict[str, str]]) -> str:
    """Format a table as Markdown: title, mean ± std with the number of seeds, and the run folders below."""
    rows = [["", *(f"{column}: {what}" for column in table.columns for what in ("paper", "measured"))]]
    rows.append(["---"] * len(rows[0]))
    for line in lines:
        row = [line["row"]]
        for column in table.columns:
            mean, std, seeds = (line[f"{column} {key}"] for key in ("measured", "std", "seeds"))
            row += [line[f"{column} paper"] or "-", f"{mean} +- {std} ({seeds} seeds)" if std else mean or "-"]
        rows.append(row)
    names = [(line["row"], column, line[f"{column} runs"]) for line in lines for column in table.columns]
    runs = [f"- {label}, {column}: {paths}" for label, column, paths in names if paths]
    return "\n".join([f"## {table.title}", "", *(f"| {' | '.join(row)} |" for row in rows), "", *runs, ""])


def as_csv(lines: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
