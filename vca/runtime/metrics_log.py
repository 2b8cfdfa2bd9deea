"""Logging of a run: `metrics.jsonl` (the source of truth), the terminal, and wandb (an optional copy)."""

import queue
import sys
import threading
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from vca.runtime.errors import check
from vca.runtime.files import write_text
from vca.runtime.rundir import RunDirectory


class WandbMode(Enum):
    """`off`, or a mode of wandb."""

    off = "off"
    offline = "offline"
    online = "online"


@dataclass
class WandbConfig:
    """Settings of the copy on wandb.

    Attributes:
        mode: `off`, `offline` or `online`.
        project, entity: wandb project and entity of the run.
        timeout_seconds: maximum time to wait for wandb at the end of a run.
    """

    mode: WandbMode = WandbMode.off
    project: str = "vca"
    entity: str | None = None
    timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        check(self.timeout_seconds > 0, "wandb.timeout_seconds", "> 0", self.timeout_seconds)


class WandbMirror:
    """Sends records to wandb from a separate thread, so that a failing or hanging wandb does not affect the run.

    A resumed run keeps its id (`wandb_id` in the run directory). The step is an ordinary metric that the others are
    plotted against, because resuming from an earlier checkpoint would conflict with wandb's own step counter.
    """

    def __init__(self, config: WandbConfig, folder: Path, name: str, run_config: dict[str, Any]) -> None:
        self.config, self.folder, self.name, self.run_config = config, folder, name, run_config
        self.queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, name="wandb", daemon=True)
        self.thread.start()

    def run_id(self) -> str:
        """Return the run's id on wandb; create it on first use."""
        file = self.folder / "wandb_id"
        known = file.read_text().strip() if file.exists() else ""
        if not known:
            write_text(file, known := uuid.uuid4().hex[:8])
        return known

    def work(self) -> None:
        """Send the queued records until `close`; the body of the thread."""
        try:
            import wandb

            mode: Any = self.config.mode.value
            run = wandb.init(
                project=self.config.project,
                entity=self.config.entity,
                name=self.name,
                id=self.run_id(),
                resume="allow",
                mode=mode,
                dir=str(self.folder),
                config=self.run_config,
            )
            run.define_metric("*", step_metric="step")
            while (record := self.queue.get()) is not None:
                run.log(record)
            run.finish()
        except Exception as error:  # the run continues whatever wandb raises
            warnings.warn(f"wandb is off for the rest of this run: {type(error).__name__}: {error}", stacklevel=2)

    def log(self, record: dict[str, Any]) -> None:
        """Queue a record; does not block."""
        if self.thread.is_alive():
            self.queue.put(record)

    def close(self) -> None:
        """Wait at most `timeout_seconds` for wandb to finish."""
        limit = self.config.timeout_seconds
        print(f"waiting for wandb (at most {limit:g} s)", flush=True)
        self.queue.put(None)
        self.thread.join(limit)
        if self.thread.is_alive():
            warnings.warn(f"wandb did not finish within {limit:g} s; the metrics are in metrics.jsonl", stacklevel=2)


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
        self.wandb: WandbMirror | None = None
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
        """Write a record to `metrics.jsonl`, the terminal and wandb."""
        if self.folder is None:
            return
        with self.expendable(self.folder.metrics_file):
            self.folder.append(record)
        if self.wandb is not None:
            self.wandb.log(record)
        self.log(format_record(record, self.total_steps))

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
        """Close the progress bar and wandb."""
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.close()


# Keys of a record that the terminal does not print.
FILE_ONLY = ("step", "consumed", "flops_per_second", "peak_memory", "device_hours", "device_hours_total")


def format_record(record: dict[str, Any], total_steps: int) -> str:
    """Format a record as one line of the terminal."""
    parts = [f"step {record['step']}/{total_steps}"]
    for key, value in record.items():
        if key not in FILE_ONLY and not (key == "mfu" and value is None):
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return "  ".join(parts)
