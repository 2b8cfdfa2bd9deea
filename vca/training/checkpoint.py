"""Checkpoints that survive a kill at any moment.

A checkpoint is one file of tensors and plain values, `step_00001000.pt`. It is written under a temporary name, flushed
to the disk and renamed, so a file with the final name is complete. Should the disk lose part of it all the same, the
newest file that loads is taken, and the damaged one is passed over with a warning.
"""

import io
import pickle
import re
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError
from vca.runtime.files import write_bytes

NAME = re.compile(r"step_(\d+)\.pt")


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
        zipfile.BadZipFile: if the file is cut short, or a byte of it changed (torch does not look at the checksums).
    """
    with zipfile.ZipFile(path) as archive:
        if (member := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {member}")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_latest(folder: Path, set_aside: bool = True) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None if there is no checkpoint.

    A damaged one is passed over with a warning, and set aside as `<name>.damaged` so that it does not count as newest;
    a reader that is not the run itself leaves it where it is (`set_aside=False`).

    Raises:
        ConfigError: if there are checkpoints and all of them are damaged: starting over would lose the run's history.
        OSError: if a file cannot be read at all.
    """
    found = list_checkpoints(folder)
    for path in reversed(found):
        try:
            return load_checkpoint(path)
        except (zipfile.BadZipFile, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            warnings.warn(f"{path.name} is damaged ({str(error).splitlines()[0]}); passing it over", stacklevel=2)
            if set_aside:
                path.rename(path.with_suffix(".pt.damaged"))
    if found:
        raise ConfigError(f"all checkpoints in {folder} are damaged; choose another name=... or remove the folder")
    return None


def load_latest_for_all(folder: Path, world: World, set_aside: bool = True) -> dict[str, Any] | None:
    """`load_latest` of rank 0, on every rank: ranks that see the folder differently cannot take different steps."""
    saved: Any = None

    def newest() -> int | None:
        nonlocal saved
        saved = load_latest(folder, set_aside)
        return saved["step"] if saved is not None else None

    step = world.from_main(newest)
    return saved if step is None or world.is_main else load_checkpoint(checkpoint_path(folder, step))
