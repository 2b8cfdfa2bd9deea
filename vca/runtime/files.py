"""Writing files so that a kill or a crash leaves the old one or the new one, never a part; reading tensors safely."""

import errno
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch


class UnreadableError(RuntimeError):
    """A file of tensors that cannot be read; one line that says why."""


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write under a temporary name, flush to the disk, rename, flush the folder.

    Raises:
        OSError: on a full disk, for example, with the space that is needed and free. The old file is still there, and
            the temporary one is removed.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, f"{error.strerror}, {space(len(content), path.parent)}", str(path)) from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, or leave the file as it is.

    Raises:
        OSError: as `write_bytes`.
    """
    content = f"{line}\n".encode()
    try:
        with open(path, "ab", buffering=0) as file:
            end = file.tell()
            if file.write(content) < len(content):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, {space(len(content), path.parent)}", str(path)) from error


def space(needed: int, folder: Path) -> str:
    """`12.3 MB needed, 4.0 MB free`."""
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB"
    except OSError:
        free = "unknown space"
    return f"{needed / 1e6:.1f} MB needed, {free} free"


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text."""
    write_bytes(path, text.encode())


def load_tensors(file: Path | BinaryIO) -> Any:
    """Read a file of `torch.save` to the CPU: tensors and plain values only (`weights_only=True`), no code is run.

    Raises:
        UnreadableError: if it is not such a file, is cut short or damaged, or holds anything else.
        OSError: if it cannot be opened or read.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever the parser of unknown bytes ran into
        reason = why_unreadable(error)
    raise UnreadableError(reason)  # without torch's own text, which advises to run whatever the file holds


def why_unreadable(error: Exception) -> str:
    """What a failed `torch.load` means, in one line."""
    if blocked := re.search(r"unsupported GLOBAL (\S+) whose module \S+ is blocked", str(error)):
        return f"loading it would run {blocked[1]}; do not use it"
    if unsupported := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
        return (
            f"it holds a {unsupported[1]}, which is not loaded from a file; keep its weights alone, where you trust "
            f"it: torch.save(torch.load(FILE, weights_only=False)['model'], NEW)"
        )
    if "TorchScript" in str(error):
        return "it is a TorchScript archive; save its state_dict() instead"
    return "it is cut short, damaged, or not a file of torch.save"
