"""Copies of a run's records elsewhere: wandb and TensorBoard. `metrics.jsonl` is the source of truth.

Each logger works in its own thread: one that is missing, fails or hangs is a warning and does not affect the run. To
add a logger: a class with the methods of `Backend`, and one line in `LOGGERS`.
"""

import json
import queue
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vca.runtime.errors import check
from vca.runtime.files import write_text

TIMEOUT_SECONDS = 60.0  # of a logger without its own setting
CHECKSUM = "consumed"  # a key of records that is no curve


class WandbMode(Enum):
    """`off`, or a mode of wandb."""

    off = "off"
    offline = "offline"
    online = "online"


@dataclass
class WandbConfig:
    """Settings of the copy on wandb.

    Attributes:
        mode: `offline` or `online`, which also start wandb without `logger=[wandb]`; with it, `off` means `online`.
        project, entity: wandb project and entity of the run.
        timeout_seconds: maximum time to wait for wandb at the end of a run.
    """

    mode: WandbMode = WandbMode.off
    project: str = "vca"
    entity: str | None = None
    timeout_seconds: float = TIMEOUT_SECONDS

    def __post_init__(self) -> None:
        check(self.timeout_seconds > 0, "wandb.timeout_seconds", "> 0", self.timeout_seconds)


class Table(NamedTuple):
    """A table of values; None is an empty cell."""

    columns: list[Any]
    rows: list[list[Any]]

    def markdown(self) -> str:
        cells = [["" if value is None else format_value(value) for value in row] for row in self.rows]
        lines = [self.columns, ["---"] * len(self.columns), *cells]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    """Return a table with a row per record, and a column per key of any record."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    return Table(columns, [[record.get(key) for key in columns] for record in records])


@dataclass
class LoggedRun:
    """What a logger needs to know about its run.

    Attributes:
        folder: the run directory.
        name: name of the run.
        config: the resolved config.
        step: step at which this process starts; later points of earlier processes are obsolete.
        wandb: settings of wandb.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    step: int
    wandb: WandbConfig


class Backend:
    """Interface of a logger; its thread alone calls it, in the order of the run."""

    def record(self, record: dict[str, Any]) -> None:
        """Log a record of `metrics.jsonl`."""
        raise NotImplementedError

    def picture(self, step: int, key: str, file: Path) -> None:
        """Log a PNG file."""
        raise NotImplementedError

    def table(self, step: int, key: str, table: Table) -> None:
        """Log a table, which replaces an earlier one with the same key."""
        raise NotImplementedError

    def close(self) -> None:
        """Finish writing."""
        raise NotImplementedError


class Wandb(Backend):
    """wandb. A resumed run keeps its id (`wandb_id` in the run directory).

    The step is an ordinary metric that the others are plotted against, because resuming from an earlier checkpoint
    would conflict with wandb's own step counter.
    """

    def __init__(self, of: LoggedRun) -> None:
        import wandb

        mode: Any = "online" if of.wandb.mode is WandbMode.off else of.wandb.mode.value
        self.run = wandb.init(
            project=of.wandb.project,
            entity=of.wandb.entity,
            name=of.name,
            id=wandb_id(of.folder),
            resume="allow",
            mode=mode,
            dir=str(of.folder),
            config=of.config,
        )
        self.run.define_metric("*", step_metric="step")
        self.tables: dict[str, Table] = {}  # sent at the end, since wandb keeps every version as a file

    def record(self, record: dict[str, Any]) -> None:
        self.run.log(record)

    def picture(self, step: int, key: str, file: Path) -> None:
        import wandb

        self.run.log({"step": step, key: wandb.Image(str(file))})

    def table(self, step: int, key: str, table: Table) -> None:
        self.tables[key] = table

    def close(self) -> None:
        import wandb

        for key, table in self.tables.items():
            self.run.summary[key] = wandb.Table(columns=table.columns, data=table.rows)
        self.run.finish()


def wandb_id(folder: Path) -> str:
    """Return the run's id on wandb; create it on first use."""
    file = folder / "wandb_id"
    known = file.read_text().strip() if file.exists() else ""
    if not known:
        write_text(file, known := uuid.uuid4().hex[:8])
    return known


class TensorBoard(Backend):
    """Event files in `tensorboard/` of the run directory; `purge_step` removes points after the step of a resume."""

    def __init__(self, of: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(of.folder / "tensorboard"), purge_step=of.step + 1)
        config = json.dumps(of.config, indent=2)
        self.writer.add_text("config", "\n".join(f"    {line}" for line in config.splitlines()), of.step)

    def record(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if isinstance(value, (int, float)) and key not in ("step", CHECKSUM):
                self.writer.add_scalar(key, value, record["step"])

    def picture(self, step: int, key: str, file: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(file) as image:
            self.writer.add_image(key, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def table(self, step: int, key: str, table: Table) -> None:
        self.writer.add_text(key, table.markdown(), step)

    def close(self) -> None:
        self.writer.close()


LOGGERS: dict[str, Callable[[LoggedRun], Backend]] = {"wandb": Wandb, "tensorboard": TensorBoard}


class LoggerThread:
    """Runs a logger in a thread: `put` never blocks, an exception ends the logger with a warning.

    Args:
        name: name of the logger, for messages.
        open_backend: opens the logger, called in the thread.
        timeout: maximum time in seconds that `close_loggers` waits.
    """

    def __init__(self, name: str, open_backend: Callable[[], Backend], timeout: float) -> None:
        self.name, self.open_backend, self.timeout = name, open_backend, timeout
        self.queue: queue.SimpleQueue[Callable[[Backend], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, name=name, daemon=True)
        self.thread.start()

    def work(self) -> None:
        """Make the queued calls until None; the body of the thread."""
        try:
            backend = self.open_backend()
            while (call := self.queue.get()) is not None:
                call(backend)
            backend.close()
        except Exception as error:  # the run continues whatever a logger raises
            warnings.warn(f"{self.name} is off for the rest of this run: {type(error).__name__}: {error}", stacklevel=2)

    def put(self, call: Callable[[Backend], None]) -> None:
        """Queue a call of the logger; does not block."""
        if self.thread.is_alive():
            self.queue.put(call)


def close_loggers(loggers: Sequence[LoggerThread]) -> None:
    """Wait for all loggers at the same time, for each at most its `timeout`."""
    start = time.monotonic()
    for logger in loggers:
        print(f"waiting for {logger.name} (at most {logger.timeout:g} s)", flush=True)
        logger.queue.put(None)
    for logger in loggers:
        logger.thread.join(max(0.0, start + logger.timeout - time.monotonic()))
        if logger.thread.is_alive():
            text = f"{logger.name} did not finish within {logger.timeout:g} s; the metrics are in metrics.jsonl"
            warnings.warn(text, stacklevel=2)


def start_loggers(names: Sequence[str], of: LoggedRun) -> list[LoggerThread]:
    """Start the named loggers of a run, and wandb if it has a mode."""
    implied = ["wandb"] if of.wandb.mode is not WandbMode.off and "wandb" not in names else []
    timeouts = {"wandb": of.wandb.timeout_seconds}
    return [
        LoggerThread(name, partial(LOGGERS[name], of), timeouts.get(name, TIMEOUT_SECONDS))
        for name in [*names, *implied]
    ]


def check_loggers(names: Sequence[str]) -> None:
    """Raise `ConfigError` if a name is unknown or repeated."""
    rule = f"a list of different names of {', '.join(LOGGERS)}"
    check(set(names) <= set(LOGGERS) and len(set(names)) == len(names), "logger", rule, list(names))
