"""Checkpoints that survive a kill at any moment.

A checkpoint is one file of tensors and plain values, `step_00001000.pt`. It is written to a temporary name, synced and
renamed, so a file with the final name is complete. A run resumes from the newest intact checkpoint.
"""

import errno
import io
import re
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError
from vca.runtime.files import load_tensors, write_bytes

NAME = re.compile(r"step_(\d+)\.pt")
KEYS = ("step", "model", "ema", "optimizer", "scaler", "consumed", "report")
NOT_A_FILE = (errno.ENOENT, errno.EISDIR, errno.ELOOP)  # dangling link, folder, link to itself


class CorruptCheckpointError(Exception):
    """The file is not a valid checkpoint; the message has the reason."""


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """List complete checkpoints, oldest first, by the step in the name."""
    numbered = [(int(m[1]), path) for path in folder.glob("step_*.pt") if (m := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write a checkpoint atomically, retry once on `OSError`, and delete all but the newest `keep`.

    Raises:
        OSError: if the second try fails; the earlier checkpoints are intact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path(folder, step)
    retry_once(path, lambda: write_checkpoint(path, state))
    older = [other for other in list_checkpoints(folder) if other != path]
    for old in older[: max(0, len(older) + 1 - keep)]:
        old.unlink(missing_ok=True)
    return path


def retry_once(path: Path, write: Callable[[], None]) -> None:
    """Call `write`, which writes `path`, and once more after an `OSError`."""
    try:
        write()
    except OSError as error:
        warnings.warn(f"writing {path.name} failed ({error}); retrying once", stacklevel=3)
        time.sleep(1.0)
        write()


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically; a full disk is an `OSError`."""
    content = io.BytesIO()  # torch.save to a file hides its OSError
    torch.save(state, content)
    write_bytes(path, content.getbuffer())


def ema_weights(saved: dict[str, Any], decay: float, decays: Sequence[float]) -> dict[str, Tensor]:
    """Return the EMA weights of one of the run's decays; `ema` has those of the first one, as in older checkpoints."""
    return saved["ema"] if decay == decays[0] else saved["further_emas"][str(decay)]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint to the CPU, tensors and plain values only (`weights_only=True`).

    Raises:
        CorruptCheckpointError: if the file is truncated, fails the zip's checksums (torch does not check them), or is
            not a checkpoint of the step in its name.
        OSError: if the disk cannot read it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (member := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {member}")
            if any(info.external_attr for info in archive.infolist()):  # torch reads uninitialized memory
                raise zipfile.BadZipFile("a tensor is marked as a folder")
        saved = load_tensors(path)
    except Exception as error:  # zipfile and torch raise many kinds of errors on corrupt files
        disk_error = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, *NOT_A_FILE)
        if disk_error or isinstance(error, MemoryError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CorruptCheckpointError(f"{path} is corrupt ({reason})") from error
    missing = [key for key in KEYS if key not in saved] if isinstance(saved, dict) else ["a dict of the state"]
    if missing:
        raise CorruptCheckpointError(f"{path} is not a checkpoint of a run ({missing[0]} is missing)")
    if not isinstance(saved["step"], int) or checkpoint_path(path.parent, saved["step"]) != path:
        raise CorruptCheckpointError(f"{path} is the checkpoint of another step ({saved['step']})")
    return saved


def load_latest(folder: Path, set_aside: bool = True) -> dict[str, Any] | None:
    """Load the newest intact checkpoint, or return None if there has been no checkpoint.

    A corrupt one is skipped with a warning and renamed to `<name>.damaged`; with `set_aside=False`, for readers other
    than the run itself, it is not renamed.

    Raises:
        ConfigError: if all checkpoints are corrupt, since starting at step 0 would overwrite the run.
        OSError: if the disk cannot read a file.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path)
        except CorruptCheckpointError as error:
            warnings.warn(f"{error}; falling back to the previous checkpoint", stacklevel=2)
            if set_aside:
                path.rename(path.with_name(f"{path.name}.damaged"))
    if list_checkpoints(folder) or any(folder.glob("step_*.damaged")):
        raise ConfigError(
            f"all checkpoints in {folder} are corrupt; restore one from a backup, delete the run directory, or choose "
            f"another name=..."
        )
    return None


@contextmanager
def must_fit(path: Path) -> Iterator[None]:
    """Turn the error of loading a checkpoint into another model into a one-line `ConfigError`."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = lines[1] if len(lines) > 1 else lines[0]  # torch's first line has only the class name
        raise ConfigError(f"{path} is the checkpoint of another model ({reason[:200]})") from error


def load_latest_for_all(folder: Path, world: World, set_aside: bool = True) -> dict[str, Any] | None:
    """Load the checkpoint that `load_latest` chooses on rank 0, on every rank."""
    saved: Any = None

    def newest() -> int | None:
        nonlocal saved
        saved = load_latest(folder, set_aside)
        return saved["step"] if saved is not None else None

    step = world.from_main(newest)
    return saved if step is None or world.is_main else load_checkpoint(checkpoint_path(folder, step))
