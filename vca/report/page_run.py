"""What a page shows of one run directory. Missing or corrupt parts become lines under "Failures", not errors."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vca.report.accuracy import accuracy_at, ema_warning
from vca.report.tables import total_steps
from vca.runtime.errors import ConfigError
from vca.runtime.rundir import RunDirectory, parse_json, read_config

RUN_FILES = ("config.json", "metrics.jsonl", "launches.jsonl")  # a folder with one of them may be a run
RUN_KEYS = {"data", "model", "attention", "trainer", "seed"}  # of the config of a run


@dataclass
class PageRun:
    """A run directory as far as it can be read.

    Attributes:
        path, label: the directory, and a name that is unique on the page.
        config: the config; empty if it cannot be read.
        records: of `metrics.jsonl`, only finite numbers.
        launches: of `launches.jsonl`.
        changed_lines: lines of `uncommitted.diff`, None without that file.
        failures: one line per problem.
    """

    path: Path
    label: str
    config: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)
    changed_lines: int | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        return self.records[-1]["step"] if self.records else 0

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run, None if unknown."""
        try:
            steps = total_steps(self.config, self.records)
            return int(steps) if math.isfinite(steps) else None
        except (KeyError, TypeError, ValueError, OverflowError):
            return None

    @property
    def status(self) -> str:
        steps = self.total_steps
        if steps is not None and self.last_step >= steps:
            return "finished"
        reached = f"step {self.last_step:,}{'' if steps is None else f' of {steps:,}'}"
        return f"{reached}, non-finite gradient" if list(self.path.glob("nonfinite_rank*.json")) else reached

    def get(self, key: str) -> Any:
        """Return the config value at a full key such as `model.name`, None if it is missing."""
        value: Any = self.config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def values(self, key: str) -> list[float]:
        """Return the values of a key in all records."""
        return [record[key] for record in self.records if key in record]


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Return the run directories in some folders and their subfolders.

    A folder whose `config.json` is readable and not of a run is skipped.

    Raises:
        ConfigError: if a folder does not exist.
    """
    runs: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"not a directory: {folder}")
        candidates = sorted({path.parent for name in RUN_FILES for path in folder.rglob(name)})
        runs += [path for path in candidates if path not in runs and may_be_run(path)]
    return runs


def may_be_run(folder: Path) -> bool:
    """Whether a folder has the config of a run, or an unreadable or no config beside the other files of a run."""
    try:
        return set(read_config(folder)) >= RUN_KEYS
    except ConfigError:
        return any((folder / name).exists() for name in RUN_FILES[1:])


def labels_of(runs: list[Path]) -> list[str]:
    """Return the names of run directories, or their paths if two names are equal."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def read_page_run(path: Path, label: str) -> PageRun:
    """Read a run directory."""
    run = PageRun(path, label)
    try:
        run.config = read_config(path)
        if missing := sorted(RUN_KEYS - set(run.config)):
            run.failures.append(f"config.json has no {', '.join(missing)}: not a config of this version")
    except ConfigError as error:
        run.failures.append(str(error))
    run.records = read_records(path, run.failures)
    run.launches = read_launches(path / "launches.jsonl", run.failures)
    if (path / "uncommitted.diff").is_file():
        run.changed_lines = len((path / "uncommitted.diff").read_bytes().splitlines())
    run.failures += failures_of(run)
    return run


def read_records(path: Path, failures: list[str]) -> list[dict[str, Any]]:
    """Read `metrics.jsonl` and drop values that are not finite numbers, each kind with a line in `failures`."""
    try:
        lines = RunDirectory(path).lines()
    except OSError as error:
        failures.append(f"metrics.jsonl cannot be read ({error})")
        return []
    if corrupt := lines.count(None):
        failures.append(f"metrics.jsonl has {corrupt} corrupt line(s), skipped")
    records, dropped = [], dict[str, int]()
    for line in filter(None, lines):
        kept = {key: value for key, value in line.items() if is_finite(value)}
        for key in {"loss", "frechet", "val/loss", "ema/loss"} & (set(line) - set(kept)):
            dropped[key] = dropped.get(key, 0) + 1
        records.append(kept)
    failures += [f"{key} is not finite in {count} record(s)" for key, count in sorted(dropped.items())]
    return records


def is_finite(value: Any) -> bool:
    """Whether a value of a record is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def read_launches(file: Path, failures: list[str]) -> list[dict[str, Any]]:
    """Read `launches.jsonl` without its corrupt lines."""
    if not file.is_file():
        failures.append("launches.jsonl is missing: command and commit are unknown")
        return []
    launches = RunDirectory(file.parent).launches()
    if corrupt := sum(1 for line in file.read_bytes().split(b"\n") if line.strip()) - len(launches):
        failures.append(f"launches.jsonl has {corrupt} corrupt line(s), skipped")
    return launches


def failures_of(run: PageRun) -> list[str]:
    """Return a line for each trace of a failure in a run directory, and for results that need care."""
    lines = []
    for file in sorted(run.path.glob("nonfinite_rank*.json")):
        failure = parse_json(file.read_bytes()) or {}
        step, norm, loss = (failure.get(key, "unknown") for key in ("step", "grad_norm", "loss"))
        lines.append(f"{file.name}: step {step} has gradient norm {norm} and loss {loss}")
    lines += [f"corrupt checkpoint: {file.name}" for file in sorted(run.path.glob("checkpoints/*.damaged"))]
    lines += [f"records replaced on a resume: {file.name}" for file in sorted(run.path.glob("metrics.jsonl.*"))]
    if overflows := sum(run.values("overflows")):
        lines.append(f"fp16 skipped {overflows:.0f} step(s) after an overflow")
    evaluated = [record["step"] for record in run.records if "val/top1" in record]
    if evaluated and (warning := ema_warning(accuracy_at(run.records, evaluated[-1]))):
        lines.append(warning)
    if run.status != "finished":
        lines.append(f"not finished: {run.status}")
    return lines


def cost_of(run: PageRun) -> dict[str, str]:
    """Return the measured cost of a run by column; empty where it was not recorded."""
    launch = run.launches[-1] if run.launches else {}
    speed = sorted(run.values("images_per_second"))
    hours: list[Any] = [
        value for record in [*run.launches, *run.records] if is_finite(value := record.get("device_hours"))
    ]
    memory, mfu = run.values("peak_memory"), sorted(run.values("mfu"))
    return {
        "devices": devices_of(launch),
        "device-hours": f"{max(hours):.3g}" if hours else "",
        "images/s (median)": f"{speed[len(speed) // 2]:,.1f}" if speed else "",
        "MFU (median)": f"{100 * mfu[len(mfu) // 2]:.1f} %" if mfu else "",
        "peak memory": f"{max(memory) / 2**30:.2f} GiB" if memory else "",
    }


def devices_of(launch: dict[str, Any]) -> str:
    """Return number and kind of the devices of a start, such as `8 x NVIDIA H100` or `1 x cpu, 2 threads`."""
    count = launch.get("threads")
    threads = f", {count} thread{'' if count == 1 else 's'}" if launch.get("device") == "cpu" and count else ""
    return f"{launch.get('ranks')} x {launch['device']}{threads}" if launch.get("device") else ""
