"""Logging of a run: `metrics.jsonl` (the source of truth), the terminal, and loggers (optional copies)."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vca.runtime.loggers import Backend, LoggerThread, close_loggers, table_of
from vca.runtime.rundir import RunDirectory


def progress_bar(total: int, unit: str, show: bool) -> Any:
    """Return a tqdm bar that appears after one second; without a terminal it prints once a minute."""
    from tqdm import tqdm

    every = 0.1 if sys.stderr.isatty() else 60.0
    return tqdm(total=total, unit=unit, mininterval=every, delay=1.0, disable=not show)


class Reporter:
    """Writes rank 0's records. Without a run directory, as on the other ranks, it does nothing.

    `step` is the first step of this process, `batch` the number of images per step.
    """

    def __init__(self, folder: RunDirectory | None = None, step: int = 0, total_steps: int = 0, batch: int = 0) -> None:
        self.folder, self.total_steps, self.batch = folder, total_steps, batch
        self.loggers: list[LoggerThread] = []
        self.evaluations: list[dict[str, Any]] = []  # records other than reports of training, for the loggers' table
        self.bar: Any = None
        self.unwritable: set[Path] = set()
        if folder is not None and sys.stderr.isatty():
            from tqdm import tqdm

            images, done = total_steps * batch, step * batch
            self.bar = tqdm(total=images, initial=done, unit="img", unit_scale=True, dynamic_ncols=True)

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        if self.bar is not None:
            self.bar.update(self.batch)

    def write(self, record: dict[str, Any]) -> None:
        """Write a record to `metrics.jsonl`, the terminal and the loggers; an evaluation also to the loggers' table."""
        if self.folder is None:
            return
        with self.expendable(self.folder.metrics_file):
            self.folder.append(record)
        self.put(lambda backend: backend.record(record))
        if is_evaluation(record):
            self.evaluations.append(record)
            table = table_of(self.evaluations)
            self.put(lambda backend: backend.table(record["step"], "evaluations", table))
        self.log(format_record(record, self.total_steps))

    def picture(self, step: int, key: str, file: Path) -> None:
        """Send a PNG file to the loggers."""
        self.put(lambda backend: backend.picture(step, key, file))

    def put(self, call: Callable[[Backend], None]) -> None:
        """Queue a call for each logger."""
        for logger in self.loggers:
            logger.put(call)

    @contextmanager
    def expendable(self, file: Path) -> Iterator[None]:
        """Write an optional file: a failure is a warning, once per file."""
        try:
            yield
        except OSError as error:
            if file not in self.unwritable:
                warnings.warn(f"{file} cannot be written ({error}); the run continues without it", stacklevel=3)
            self.unwritable.add(file)

    def log(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        elif self.folder is not None:
            print(line, flush=True)

    def close(self) -> None:
        """Close the progress bar and the loggers."""
        if self.bar is not None:
            self.bar.close()
        close_loggers(self.loggers)


def is_evaluation(record: dict[str, Any]) -> bool:
    """Whether a record is of an evaluation, not of training steps."""
    return "lr" not in record


# Keys of a record that the terminal does not print.
FILE_ONLY = ("step", "consumed", "flops_per_second", "peak_memory", "device_hours", "device_hours_total")


def format_record(record: dict[str, Any], total_steps: int) -> str:
    """Format a record as one line of the terminal."""
    parts = [f"step {record['step']}/{total_steps}"]
    for key, value in record.items():
        if key not in FILE_ONLY and not (key == "mfu" and value is None):
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return "  ".join(parts)
