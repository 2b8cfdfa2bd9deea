"""Atomic file writes (a kill leaves the old file or the new one) and safe reading of tensors."""

import errno
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch


class UnreadableError(RuntimeError):
    """A file of tensors cannot be read; the message is one line with the reason."""


def write_bytes(path: Path, content: bytes | memoryview, sync: bool = True) -> None:
    """Write a file atomically: write to a temporary name, sync, rename, sync the folder.

    Without `sync`, a kill leaves the old file or the new one, but after a power loss the file may be empty.

    Raises:
        OSError: if the write fails; the message has the needed and the free space. The old file is unchanged and the
            temporary file is removed.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, f"{error.strerror}, {space(len(content), path.parent)}", str(path)) from error
    if not sync:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file; on failure the file is unchanged.

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
    """Format the needed and the free space, such as `12.3 MB needed, 4.0 MB free`."""
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB"
    except OSError:
        free = "unknown space"
    return f"{needed / 1e6:.1f} MB needed, {free} free"


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, see `write_bytes`."""
    write_bytes(path, text.encode())


def load_tensors(file: Path | BinaryIO) -> Any:
    """Load a `torch.save` file to the CPU with `weights_only=True`: tensors and plain values only, no code is run.

    Raises:
        UnreadableError: if the file is not from `torch.save`, is truncated or corrupt, or contains other objects.
        OSError: if it cannot be opened or read.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the parser of unknown bytes raises many types
        reason = why_unreadable(error)
    raise UnreadableError(reason)  # without torch's own text, which recommends weights_only=False


def why_unreadable(error: Exception) -> str:
    """Explain a failed `torch.load` in one line."""
    if blocked := re.search(r"unsupported GLOBAL (\S+) whose module \S+ is blocked", str(error)):
        return f"loading it would run {blocked[1]}; do not use it"
    if unsupported := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
        return (
            f"it contains a {unsupported[1]}, which weights_only=True rejects; if you trust the file, convert it: "
            f"torch.save(torch.load(FILE, weights_only=False)['model'], NEW)"
        )
    if "TorchScript" in str(error):
        return "it is a TorchScript archive; save its state_dict() instead"
    return "it is truncated, corrupt, or not a torch.save file"
