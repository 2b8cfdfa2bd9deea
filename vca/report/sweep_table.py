"""The table of a sweep: a row for each config, with the mean and the spread over its seeds."""

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vca.attention import variant_name
from vca.report.tables import NOT_COMPARED, total_steps
from vca.runtime.rundir import RunDirectory, read_config

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
    seed: int
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
            leaves[key] = variant_name(value)
        elif isinstance(value, dict):
            leaves |= flat(value, f"{key}.")
        else:
            leaves[key] = value
    return leaves


def read(folder: Path) -> Run | str:
    """A run, or a line that says why it has no figures yet."""
    file = folder / "config.json"
    if not file.exists():
        return f"{folder}: not begun"
    try:
        config, records = read_config(folder), RunDirectory(folder).records()
        last_step, steps = records[-1]["step"] if records else 0, total_steps(config, records)
        whole = "objective" in config or any(r["step"] == last_step and "val/top1" in r for r in records)
        if not records or last_step < steps or not whole:
            return f"{folder}: not finished (step {last_step})"
        return Run(folder, config["seed"], flat(config), {name: figure(records) for name, figure in COLUMNS.items()})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"{folder}: is no run of this project or is damaged ({type(error).__name__})"


def sweep_table(folders: Iterable[Path]) -> str:
    """Markdown: a row for each config among the runs, named by what tells it from the others.

    Runs that were evaluated on other data stand in a table of their own. Below are the runs without figures.
    """
    found = [read(folder) for folder in dict.fromkeys(folder.resolve() for folder in folders)]
    by_data: dict[str, list[Run]] = {}
    for run in found:
        if isinstance(run, Run):
            by_data.setdefault(json.dumps(only_data(run), sort_keys=True), []).append(run)
    firsts = [only_data(runs[0]) for runs in by_data.values()]
    keys = sorted({key for first in firsts for key in first})
    told_apart = [key for key in keys if len({str(first.get(key)) for first in firsts}) > 1]
    parts = []
    for runs in by_data.values():
        title = ", ".join(f"{key}={runs[0].config.get(key)}" for key in told_apart)
        parts.append("\n".join([*([title, ""] if title else []), *rows(runs)]))
    return "\n\n".join(parts) + "".join(f"\n{line}" for line in found if isinstance(line, str))


def only_data(run: Run) -> dict[str, Any]:
    """What a run was evaluated on."""
    return {key: value for key, value in run.config.items() if key.startswith("data.")}


def rows(runs: list[Run]) -> list[str]:
    """The lines of one table; a second run of one config and seed is named below it and not counted."""
    alike: dict[str, dict[int, Run]] = {}
    twice = []
    for run in runs:
        seeds = alike.setdefault(json.dumps(run.config, sort_keys=True), {})
        if run.seed in seeds:
            twice.append(f"{run.path}: the same config and seed as {seeds[run.seed].path}, left out")
        seeds.setdefault(run.seed, run)
    keys = sorted({key for run in runs for key in run.config})
    told_apart = [key for key in keys if len({json.dumps(run.config.get(key)) for run in runs}) > 1]
    columns = [name for name in COLUMNS if any(run.figures[name] is not None for run in runs)]

    lines = [["", *columns, "seeds"], ["---"] * (len(columns) + 2)]
    for ones in alike.values():
        config = next(iter(ones.values())).config
        label = ", ".join(config[key] if key == "attention" else f"{key}={config.get(key)}" for key in told_apart)
        figures = [mean_std([run.figures[name] for run in ones.values()]) for name in columns]
        lines.append([label or str(config["attention"]), *figures, str(len(ones))])
    return [*(f"| {' | '.join(line)} |" for line in lines), *twice]


def mean_std(values: list[float | None]) -> str:
    """`mean +- standard deviation`, the mean alone of one, `-` where a run has no such figure."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    mean = f"{statistics.mean(known):.4g}"
    return f"{mean} +- {statistics.stdev(known):.2g}" if len(known) > 1 else mean
