"""Checkpoints that survive a kill at any moment.

A checkpoint is one file of tensors and plain values, `step_00001000.pt`. It is written under a temporary name, flushed
to the disk and renamed, so a file with the final name is complete. If the disk loses part of it all the same, a run
resumes from the newest checkpoint that is intact.
"""

import errno
import io
import re
import time
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError
from vca.runtime.files import load_tensors, write_bytes

NAME = re.compile(r"step_(\d+)\.pt")
KEYS = ("step", "model", "ema", "optimizer", "scaler", "consumed", "report")
NOT_A_FILE = (errno.ENOENT, errno.EISDIR, errno.ELOOP)  # a dangling link, a folder, a link to itself


class CorruptCheckpointError(Exception):
    """A file that is not, or no longer, a checkpoint."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return folder / f"step_{step:08d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first, by the number in the name."""
    found = [(int(m[1]), path) for path in folder.glob("step_*.pt") if (m := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write `state` atomically and delete all but the newest `keep`; one `OSError` while writing is retried.

    Raises:
        OSError: if the second try fails too; the earlier checkpoints are still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path(folder, step)
    try:
        write_checkpoint(path, state)
    except OSError as error:
        warnings.warn(f"writing {path.name} failed ({error}); trying once more", stacklevel=2)
        time.sleep(1.0)
        write_checkpoint(path, state)
    older = [other for other in list_checkpoints(folder) if other != path]
    for old in older[: max(0, len(older) + 1 - keep)]:
        old.unlink(missing_ok=True)
    return path


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save as a whole file; a full disk is an `OSError`."""
    content = io.BytesIO()  # torch.save hides the OSError of a file that it writes to itself
    torch.save(state, content)
    write_bytes(path, content.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, tensors and plain values only (`weights_only=True`).

    Raises:
        CorruptCheckpointError: if it is cut short, a byte of it changed (torch does not check the zip's checksums), or
            it is something else than a checkpoint of the step in its name.
        OSError: if the disk refuses to read it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (member := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {member}")
            if any(info.external_attr for info in archive.infolist()):  # torch reads a folder as uninitialized memory
                raise zipfile.BadZipFile("a tensor is marked as a folder")
        saved = load_tensors(path)
    except Exception as error:  # the parsers raise anything on unknown bytes, for example UnicodeDecodeError
        disk = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, *NOT_A_FILE)
        if disk or isinstance(error, MemoryError):
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
    """The newest intact checkpoint, or None if there has been no checkpoint.

    A corrupt one is skipped with a warning and renamed to `<name>.damaged`; a reader that is not the run itself does
    not rename it (`set_aside=False`).

    Raises:
        ConfigError: if there are checkpoints and all of them are corrupt: starting at step 0 would overwrite the run.
        OSError: if the disk refuses to read a file.
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
            f"all checkpoints in {folder} are corrupt; restore one from a copy, remove the run directory, or choose "
            f"another name=..."
        )
    return None


@contextmanager
def must_fit(path: Path) -> Iterator[None]:
    """Raise a `ConfigError` of one line if a checkpoint's state does not fit what loads it."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = lines[1] if len(lines) > 1 else lines[0]  # torch's first line names the class only
        raise ConfigError(f"{path} is the checkpoint of another model ({reason[:200]})") from error


def load_latest_for_all(folder: Path, world: World, set_aside: bool = True) -> dict[str, Any] | None:
    """`load_latest` of rank 0, on every rank: ranks that see the folder differently cannot take different steps."""
    saved: Any = None

    def newest() -> int | None:
        nonlocal saved
        saved = load_latest(folder, set_aside)
        return saved["step"] if saved is not None else None

    step = world.from_main(newest)
    return saved if step is None or world.is_main else load_checkpoint(checkpoint_path(folder, step))
