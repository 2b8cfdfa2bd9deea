"""The paper's tables from run directories and evaluation records: the paper's figure beside the measured one.

A row is found by what a run was, not by what it is called: model, attention, data. Runs that differ in their seed alone
are one row with a spread. Figures that were not measured alike do not stand in one table: that is an error, which names
the fields.
"""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vca.attention import DifferentialStagesConfig, SoftmaxConfig, VCAConfig
from vca.evaluation.record import FORMAT, INCIDENTAL, read_record
from vca.runtime.errors import ConfigError
from vca.runtime.rundir import RESUME_IGNORED_KEYS, RunDirectory, diff_configs, read_config, to_dict

VCA, SOFTMAX = to_dict(VCAConfig()), to_dict(SoftmaxConfig())


def vca(**options: str) -> dict[str, Any]:
    """The attention of an ablation."""
    return to_dict(VCAConfig(**options))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Cell:
    """A figure of the paper, and what a run must be to measure it.

    Attributes:
        paper: the figure; None where it is not at hand.
        model: its name.
        attention: its config.
        objective: of a generator; None for a classifier.
        size: pixels of an image.
    """

    paper: float | None
    model: str
    attention: Any
    objective: str | None = None
    size: int = 224


@dataclass(frozen=True)
class Table:
    """A table of the paper: rows of `(label, cells)`, a cell for each column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def classified(label: str, model: str, base: float, ours: float) -> tuple[str, tuple[Cell, ...]]:
    """A row of Table 1."""
    return label, (Cell(base, model, SOFTMAX), Cell(ours, model, VCA))


def generated(label: str, base: float | None, ours: float | None, size: int = 256) -> tuple[str, tuple[Cell, ...]]:
    """A row of Table 2; SiT is the network of DiT."""
    kind, _, rest = label.split(" ")[0].partition("-")
    model, objective = f"dit_{rest.replace('/', '_').lower()}", {"DiT": "diffusion", "SiT": "interpolant"}[kind]
    return label, (Cell(base, model, SOFTMAX, objective, size), Cell(ours, model, VCA, objective, size))


def ablated(label: str, top1: float, fid: float, attention: Any) -> tuple[str, tuple[Cell, ...]]:
    """A row of Tables 3 and 4."""
    return label, (Cell(top1, "deit_tiny", attention), Cell(fid, "dit_s_2", attention, "diffusion", 256))


ABLATION = ("DeiT-Tiny top-1", "DiT-S/2 FID-50K")
TABLES = {
    "table1": Table(
        "Table 1: ImageNet-1K, top-1 (%)",
        ("softmax", "VCA"),
        (
            classified("DeiT-Tiny", "deit_tiny", 72.2, 75.6),
            classified("DeiT-Small", "deit_small", 79.8, 80.7),
            classified("PVT-Tiny", "pvt_tiny", 75.1, 78.2),
            classified("Swin-Tiny", "swin_tiny", 81.3, 82.3),
            classified("CSwin-Tiny", "cswin_tiny", 82.7, 83.3),
        ),
    ),
    "table2": Table(
        "Table 2: ImageNet-1K, FID-50K without guidance",
        ("softmax", "VCA"),
        (
            generated("DiT-S/2", 67.2, 62.3),
            generated("DiT-S/4", 97.9, 92.7),
            generated("DiT-S/8", None, None),
            generated("DiT-B/2", 42.9, 38.9),
            generated("DiT-B/4", None, None),
            generated("DiT-B/8", None, None),
            generated("DiT-S/2 at 512 px", None, None, 512),
            generated("SiT-S/2", 57.3, 53.0),
            generated("SiT-B/2", 35.3, 32.7),
        ),
    ),
    "table3": Table(
        "Table 3: the two stages",
        ABLATION,
        (
            ablated("Stage I only", 75.4, 64.6, vca(stage2="plain")),
            ablated("Stage II only", 75.5, 64.3, vca(stage1="plain")),
            ablated("Differential Attention in both stages", 75.1, 63.9, to_dict(DifferentialStagesConfig())),
            ablated("VCA", 75.6, 62.3, VCA),
        ),
    ),
    "table4": Table(
        "Table 4: content of the streams",
        ABLATION,
        (
            ablated("embedding only", 75.1, 63.7, vca(positive_stream="embedding", negative_stream="embedding")),
            ablated("pool + embedding", 75.6, 62.3, VCA),
        ),
    ),
}
PROTOCOLS = {"diffusion": "dit_table", "interpolant": "sit_sde250"}  # of the figures without guidance
IMAGENET = {"name": "imagefolder", "num_classes": 1000}

# What may differ between two runs of one row, and between two records of one row and of one table.
NOT_COMPARED = (*RESUME_IGNORED_KEYS, "seed", "trainer.micro_batch_size")
RUN_FREE = (*NOT_COMPARED, "name", "attention")
RECORD_FREE = (
    *INCIDENTAL,
    "metrics",
    "settings",  # of the other figures
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
    """One figure, of one run or record.

    Attributes:
        path: where it is from.
        value: the figure.
        training: what is the same for two figures of one training, which count as one seed.
        settings: what must agree, and what may differ between any two of a table, and of a row.
        model, attention, objective, size: as in `Cell`.
    """

    path: Path
    value: float
    training: str
    settings: dict[str, Any]
    model: str
    attention: dict[str, Any]
    objective: str | None
    size: int

    def fits(self, cell: Cell) -> bool:
        """Whether this is a measurement of the cell."""
        return (self.model, self.attention, self.objective, self.size) == (
            cell.model,
            cell.attention,
            cell.objective,
            cell.size,
        )


@dataclass
class Found:
    """What lies in the folders: figures that belong into a table, and lines about the rest."""

    measured: list[Measurement] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def gather(folders: Iterable[Path], weights: str = "raw") -> Found:
    """All runs and records below some folders.

    Args:
        folders: where to look.
        weights: `raw` or `ema`: which accuracy of a classifier counts.

    Raises:
        ConfigError: if a folder is not there, or a record is incomplete or was changed.
    """
    found = Found()
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder")
        for path in sorted(folder.rglob("config.json")):
            read_classifier_run(path.parent, weights, found)
        for path in sorted(folder.rglob("*.json")):
            if "evaluation-" in path.name or f'"{FORMAT}"' in path.read_text(errors="ignore"):
                read_evaluation(path, found)
    return found


def read_classifier_run(folder: Path, weights: str, found: Found) -> None:
    """A finished ImageNet run of `train_cls.py`."""
    config = read_config(folder)
    if not {"data", "model", "attention", "trainer", "seed"} <= set(config) or "inputs" in config:
        return  # a generator's, or none of ours
    if {key: config["data"].get(key) for key in IMAGENET} != IMAGENET:
        return
    records = RunDirectory(folder).records()
    last = next((record for record in reversed(records) if "val/top1" in record), None)
    if last is None or last["step"] < total_steps(config, records):
        at = records[-1]["step"] if records else 0
        found.left_out.append(f"{folder}: not finished (step {at})")
        return
    key = {"raw": "val/top1", "ema": "ema/top1"}[weights]
    if key not in last:
        raise ConfigError(f"{folder} keeps no average of its weights; --weights raw")
    if "val/images" not in last:
        raise ConfigError(f"{folder} does not name val/images; evaluate again with trainer.eval_only=true")
    settings = {**config, "images": last["val/images"], "weights": weights}
    model, size = config["model"]["name"], config["data"]["img_size"]
    found.measured.append(
        Measurement(folder, last[key], str(folder.resolve()), settings, model, config["attention"], None, size)
    )


def total_steps(config: Mapping[str, Any], records: list[dict[str, Any]]) -> float:
    """Updates of a whole training, from its config and its reports."""
    if config["trainer"]["steps"] is not None:
        return config["trainer"]["steps"]
    report = next((record for record in reversed(records) if record.get("epoch")), None)
    return round(config["trainer"]["epochs"] * report["step"] / report["epoch"]) if report else math.inf


def read_evaluation(path: Path, found: Found) -> None:
    """An FID-50K of a table's protocol."""
    record = read_record(path)
    made = record["samples"]["made"]
    if made is None:
        found.left_out.append(f"{path}: nothing says how its samples were made")
        return
    objective = made["objective"]["name"]
    wanted = PROTOCOLS.get(objective)
    if not record["extractor"]["published"] or record["count"] != 50_000 or made["protocol"] != wanted:
        what = "" if record["extractor"]["published"] else f" by {record['extractor']['name']}"
        value = f"{record['metrics']['frechet']:.4g}"
        said = f"{value} of {record['count']:,} samples{what}, protocol {made['protocol']}"
        found.left_out.append(f"{path}: {said}; the tables hold FID-50K by {wanted}")
        return
    found.measured.append(
        Measurement(
            path,
            record["metrics"]["frechet"],
            made["origin"]["weights_sha256"],
            record,
            made["model"]["name"],
            made["attention"],
            objective,
            record["samples"]["shape"][0],
        )
    )


def fill(table: Table, measured: list[Measurement]) -> list[tuple[str, list[tuple[Cell, list[Measurement]]]]]:
    """The rows of a table with what was measured of each cell.

    Raises:
        ConfigError: if two figures that stand together were not measured alike; names both and the fields.
    """
    rows = [
        (label, [(cell, [one for one in measured if one.fits(cell)]) for cell in cells]) for label, cells in table.rows
    ]
    compute_batch_size: dict[tuple[str | None, int], list[Measurement]] = {}  # the FIDs of a table, and its accuracies
    for _, cells in rows:
        by_kind: dict[str | None, list[Measurement]] = {}
        for cell, ones in cells:
            by_kind.setdefault(cell.objective, []).extend(ones)
            compute_batch_size.setdefault((cell.objective, cell.size), []).extend(ones)
        for kind, ones in by_kind.items():
            check_alike(ones, RUN_FREE if kind is None else RECORD_FREE)
    for (kind, _), ones in compute_batch_size.items():
        if kind is None:  # each backbone has its recipe and its evaluation crop
            counts = [replace(one, settings={key: one.settings[key] for key in ("images", "weights")}) for one in ones]
            check_alike(counts, ())
        else:
            check_alike(ones, TABLE_FREE)
    return rows


def check_alike(measured: list[Measurement], free: Iterable[str]) -> None:
    """Raise `ConfigError` unless all of these have the same settings but for the free ones."""
    for one in measured[1:]:
        if differences := diff_configs(measured[0].settings, one.settings, tuple(free)):
            raise ConfigError(
                f"{measured[0].path} and {one.path} were not measured alike ({'; '.join(differences)}); name only "
                f"folders that belong together"
            )


def lines_of(table: Table, measured: list[Measurement]) -> list[dict[str, str]]:
    """A dict a row: the paper's figure, the measured one, its standard deviation and of how many it is the mean."""
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
        lines.append(line)
    return lines


def as_markdown(table: Table, lines: list[dict[str, str]]) -> str:
    """A Markdown table under its title; a spread stands behind its mean, with the number of seeds."""
    rows = [["", *(f"{column}: {what}" for column in table.columns for what in ("paper", "measured"))]]
    rows.append(["---"] * len(rows[0]))
    for line in lines:
        row = [line["row"]]
        for column in table.columns:
            mean, std, seeds = (line[f"{column} {key}"] for key in ("measured", "std", "seeds"))
            row += [line[f"{column} paper"] or "-", f"{mean} +- {std} ({seeds} seeds)" if std else mean or "-"]
        rows.append(row)
    return "\n".join([f"## {table.title}", "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def as_csv(lines: list[dict[str, str]]) -> str:
    """The same as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
