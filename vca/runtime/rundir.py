"""The directory of a run: config, launches, metrics and checkpoints.

config.json       the resolved config and the identity of the data (image files, latent cache, autoencoder); a run that
                  differs in them is refused
launches.jsonl    one line per start: command, commit, versions, machine, ranks, first step
uncommitted.diff  uncommitted changes at the last start
metrics.jsonl     one line per record; the source of truth, of which loggers and curves.png are copies
checkpoints/      see vca.training.checkpoint
snapshots/        see vca.training.snapshots
"""

import dataclasses
import itertools
import json
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Collection
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from vca.runtime.devices import device_name, processor_name
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError
from vca.runtime.files import append_line, lock_folder, write_bytes, write_text
from vca.runtime.provenance import code_sha256, provenance
from vca.runtime.renamed import with_new_names

# Keys that may change on resume: they cannot change the results of a run.
RESUME_IGNORED_KEYS = (
    "attention.backend",
    "autoencoder.source",  # its sha256 is compared
    "autoencoder.weights",
    "cluster",
    "extractor",
    "fid",
    "logger",
    "out_dir",
    "data.check_seconds",
    "data.classes",  # names, sizes and labels of images are compared
    "data.format",
    "data.index",
    "data.labels",
    "data.root",
    "data.train",
    "data.val",
    "data_files",  # compared separately
    "sampled_classes",
    "sampler",
    "samples_per_class",
    "trainer.checkpoint_every",
    "trainer.device",
    "trainer.eval_every",
    "trainer.eval_only",
    "trainer.eval_snapshots",
    "trainer.fid_every",
    "trainer.grad_checkpointing",
    "trainer.keep_checkpoints",
    "trainer.log_every",
    "trainer.profile",
    "trainer.snapshot_every",
    "trainer.timeout_minutes",
    "trainer.workers",
    "wandb",
)

# Strings of these keys that come from environment variables are stored as `${oc.env:...}`, since they may be secrets.
# Values of other keys can change results, so they are stored, and compared on resume.
REFERENCE_KEYS = (*RESUME_IGNORED_KEYS, "trainer.init_from")


class RunDirectory:
    """The files of a run; only rank 0 writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.snapshots = path / "snapshots"
        self.metrics_file = path / "metrics.jsonl"
        self.locked: Any = None

    def check(self, config: dict[str, Any]) -> None:
        """Raise `ConfigError`, with the differences, if the directory contains a run with another config or other data.

        `data_files` are compared only if both the run and the config have them.
        """
        if not (self.path / "config.json").exists():
            return
        try:
            saved = read_config(self.path)
        except ConfigError as error:
            raise ConfigError(f"{error}; remove it to resume this run with the config of this command") from error
        if differences := diff_configs(saved, config, RESUME_IGNORED_KEYS):
            remedy = "choose another name=... or remove the folder"
            if all(line.startswith(("trainer.steps:", "trainer.epochs:")) for line in differences):
                remedy = "a run cannot be extended, its schedule depends on its length: start a new one with name=..."
                if "objective" not in config and (saved_steps := sorted(self.checkpoints.glob("step_*.pt"))):
                    remedy += f" trainer.init_from={saved_steps[-1]}"
            raise ConfigError(f"{self.path} contains a run with another config ({'; '.join(differences)}); {remedy}")
        old, new = saved.get("data_files"), config.get("data_files")
        if old and new and (differences := diff_configs(old, new, key="data_files")):
            raise ConfigError(
                f"data.root={config['data']['root']}: the files changed since the run {self.path} was started "
                f"({'; '.join(differences)}); restore them, or choose another name=..."
            )

    def begin(self, config: dict[str, Any], world: World, step: int) -> float:
        """Create the directory, or rewind it to a step, and lock it against other processes.

        Returns:
            The device-hours of the earlier starts.
        """
        try:
            self.create(config)
            device_hours = self.device_hours()
            self.rewind(step)
            self.record_launch(world, step, device_hours)
            return device_hours
        except OSError as error:
            raise ConfigError(f"out_dir: {self.path} cannot be written ({error})") from error

    def create(self, config: dict[str, Any]) -> None:
        """Create and lock the directory, write the config, and remove temporary files of a killed process."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.lock()
        for folder in (self.path, self.checkpoints, self.snapshots):
            for interrupted in folder.glob("*.tmp"):
                interrupted.unlink()
        write_text(self.path / "config.json", json.dumps(config, indent=2) + "\n")

    def lock(self) -> None:
        """Lock the directory until this process exits; loader workers do not hold the lock.

        Raises:
            ConfigError: if another process holds the lock. File systems without locks are not protected.
        """
        self.locked = lock_folder(self.path)

    def device_hours(self) -> float:
        """Return the device-hours of all starts, up to the last record of each, also of steps that were repeated."""
        return max([float(record.get("device_hours", 0)) for record in [*self.launches(), *self.records()]] or [0.0])

    def launches(self) -> list[dict[str, Any]]:
        """Return the valid lines of `launches.jsonl`, oldest first."""
        file = self.path / "launches.jsonl"
        lines = file.read_bytes().split(b"\n") if file.exists() else []
        return [launch for line in lines if (launch := parse_json(line)) is not None]

    def record_launch(self, world: World, step: int, device_hours: float) -> None:
        """Append this start to `launches.jsonl` and write `uncommitted.diff`."""
        commit, diff = provenance()
        launch = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": shlex.join(sys.argv),
            "first_step": step,
            "device_hours": device_hours,  # of the earlier starts
            "ranks": world.size,
            "device": device_name(world.device),
            "host": platform.node(),
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "commit": commit,
            "uncommitted": bool(diff),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
            "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        }
        append_line(self.path / "launches.jsonl", json.dumps(launch))
        write_text(self.path / "uncommitted.diff", diff)

    def append(self, record: dict[str, Any]) -> None:
        """Append a record to `metrics.jsonl`."""
        append_line(self.metrics_file, json.dumps(record))

    def lines(self) -> list[dict[str, Any] | None]:
        """Return the records of `metrics.jsonl`, None for a corrupt line; an unfinished last line is ignored."""
        content = self.metrics_file.read_bytes() if self.metrics_file.exists() else b""
        return [parse_record(line) for line in content.split(b"\n")[:-1]]

    def records(self) -> list[dict[str, Any]]:
        """Return the valid records of `metrics.jsonl`."""
        return [record for record in self.lines() if record is not None]

    def rewind(self, step: int) -> None:
        """Remove corrupt lines and the records after `step`, which the run writes again.

        If lines are corrupt, or the run restarts at step 0, the file is first copied to `metrics.jsonl.<n>`.
        """
        lines = self.lines()
        corrupt = lines.count(None)
        if corrupt or (lines and step == 0):
            copies = (self.metrics_file.with_name(f"metrics.jsonl.{number}") for number in itertools.count(1))
            copy = next(path for path in copies if not path.exists())
            write_bytes(copy, self.metrics_file.read_bytes())
            why = f"{corrupt} corrupt line(s)" if corrupt else "the run restarts at step 0"
            warnings.warn(f"{self.metrics_file}: {why}; old file saved as {copy.name}", stacklevel=2)
        kept = [json.dumps(record) + "\n" for record in lines if record is not None and record["step"] <= step]
        write_text(self.metrics_file, "".join(kept))


def parse_json(line: bytes) -> dict[str, Any] | None:
    """Parse a line of JSON; return None if it is not a dict."""
    try:
        record = json.loads(line)
    except ValueError:  # neither JSON nor text
        return None
    return record if isinstance(record, dict) else None


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Parse a line of `metrics.jsonl`; return None if it is corrupt."""
    record = parse_json(line)
    return record if record is not None and isinstance(record.get("step"), int) else None


def read_config(run: Path) -> dict[str, Any]:
    """Read the `config.json` of a run directory, with old keys renamed.

    Raises:
        ConfigError: if it cannot be read or is not a JSON object.
    """
    file = run / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} must contain a config, got {type(config).__name__}")
    return with_new_names(config)


class FromEnvironment(str):
    """A config string read from environment variables; `to_dict` returns its `reference`, since it may be a secret.

    Attributes:
        reference: the text in the config, such as `${oc.env:TOKEN}`.
    """

    reference: str

    def __new__(cls, value: str, reference: str = "") -> "FromEnvironment":
        self = super().__new__(cls, value)
        self.reference = reference
        return self


def to_dict(value: Any) -> Any:
    """Convert a config dataclass to dicts, lists, numbers and strings; enums become their value."""
    if isinstance(value, FromEnvironment):
        return value.reference
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    return {key: to_dict(item) for key, item in value.items()} if isinstance(value, dict) else value


def diff_configs(old: Any, new: Any, ignored: Collection[str] = (), key: str = "") -> list[str]:
    """Return `"key: <old> -> <new>"` for each leaf that differs, except below the `ignored` keys."""
    if key in ignored:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        differences = []
        for name in sorted({*old, *new}):
            path = f"{key}.{name}" if key else name
            differences += diff_configs(old.get(name), new.get(name), ignored, path)
        return differences
    return [] if old == new else [f"{key}: {old!r} -> {new!r}"]


def config_lines(config: Any, key: str = "", ignored: Collection[str] = ()) -> list[tuple[str, str]]:
    """Return full key and value of each leaf of a config, as on the command line, except below the `ignored` keys."""
    if key in ignored:
        return []
    if isinstance(config, dict) and config:
        below = [(f"{key}.{name}" if key else name, value) for name, value in config.items()]
        return [line for path, value in below for line in config_lines(value, path, ignored)]
    return [(key, config if isinstance(config, str) else json.dumps(config))]


def check_ranks_agree(world: World, config: Any) -> None:
    """Raise `ConfigError` on every rank unless all ranks have the same config and code as rank 0."""
    if world.size == 1:
        return
    own = {"config": to_dict(config), "code": code_sha256()}
    per_rank = world.broadcast(world.gather(diff_configs(world.broadcast(own), own)))
    if different := [rank for rank, differences in enumerate(per_rank) if differences]:
        differences = per_rank[different[0]]
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        who = f"rank {different[0]} differs" if len(different) == 1 else f"ranks {different} differ"
        raise ConfigError(
            f"all ranks must have the same config and code; {who} from rank 0 ({'; '.join(differences[:5])}{more}); "
            f"start all ranks with the same command and code"
        )
