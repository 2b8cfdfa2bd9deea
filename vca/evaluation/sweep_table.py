"""The table of a sweep: a row for each config, with the mean and the spread over its seeds."""

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vca.attention import describe
from vca.evaluation.tables import NOT_COMPARED, total_steps
from vca.runtime.errors import ConfigError
from vca.runtime.rundir import RunDirectory

Records = list[dict[str, Any]]


def last(key: str) -> Callable[[Records], float | None]:
    """The figure of the last report that has it."""
    return lambda records: next((record[key] for record in reversed(records) if key in record), None)


def final_loss(records: Records) -> float | None:
    """Mean training loss over the last tenth of the updates: one report alone is noise."""
    begin = 0.9 * records[-1]["step"] if records else 0
    losses = [record["loss"] for record in records if record.get("loss") is not None and record["step"] > begin]
    return statistics.mean(losses) if losses else None


# Column -> the figure of a run, None where it has none.
COLUMNS: dict[str, Callable[[Records], float | None]] = {
    "top-1 (%)": last("val/top1"),
    "top-1 of the EMA (%)": last("ema/top1"),
    "evaluation loss": last("val/loss"),
    "training loss": final_loss,
    "Frechet distance": last("frechet"),
}


@dataclass
class Run:
    """A finished run: its config, flat, and its figures."""

    path: Path
    config: dict[str, Any]
    figures: dict[str, float | None]


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of a config by their full key, without those that do not tell one row from another."""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key in (*NOT_COMPARED, "name"):
            continue
        if key == "attention":
            leaves[key] = describe(value)
        elif isinstance(value, dict):
            leaves |= flat(value, f"{key}.")
        else:
            leaves[key] = value
    return leaves


def read(folder: Path) -> Run | str:
    """A run, or a line that says why it has no figures yet."""
    if not (folder / "config.json").exists():
        return f"{folder}: not begun"
    config, records = json.loads((folder / "config.json").read_text()), RunDirectory(folder).records()
    if not records or records[-1]["step"] < total_steps(config, records):
        return f"{folder}: not finished (step {records[-1]['step'] if records else 0})"
    return Run(folder, flat(config), {name: figure(records) for name, figure in COLUMNS.items()})


def sweep_table(folders: Iterable[Path]) -> str:
    """Markdown: a row for each config among the runs, named by what tells it from the others.

    Raises:
        ConfigError: if runs were evaluated on other data than the first: such figures do not stand in one table.
    """
    found = [read(folder) for folder in folders]
    runs = [run for run in found if isinstance(run, Run)]
    for run in runs[1:]:
        for key in sorted({*run.config, *runs[0].config}):
            one, other = runs[0].config.get(key), run.config.get(key)
            if key.startswith("data.") and one != other:
                raise ConfigError(f"{runs[0].path} and {run.path} do not fit one table: {key} is {one} and {other}")

    rows: dict[str, list[Run]] = {}
    for run in runs:
        rows.setdefault(json.dumps(run.config, sort_keys=True), []).append(run)
    keys = sorted({key for run in runs for key in run.config})
    told_apart = [key for key in keys if len({json.dumps(run.config.get(key)) for run in runs}) > 1]
    columns = [name for name in COLUMNS if any(run.figures[name] is not None for run in runs)]

    lines = [["", *columns, "seeds"]] if runs else []
    lines += [["---"] * len(lines[0])] if runs else []
    for ones in rows.values():
        parts = [
            f"{key}={ones[0].config.get(key)}" if key != "attention" else ones[0].config[key] for key in told_apart
        ]
        label = ", ".join(parts) or str(ones[0].config["attention"])
        figures = [spread([run.figures[name] for run in ones]) for name in columns]
        lines.append([label, *figures, str(len(ones))])
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*text, *(line for line in found if isinstance(line, str))])


def spread(values: list[float | None]) -> str:
    """`mean +- standard deviation`, the mean alone of one, `-` where a run has no such figure."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    mean = f"{statistics.mean(known):.4g}"
    return f"{mean} +- {statistics.stdev(known):.2g}" if len(known) > 1 else mean
