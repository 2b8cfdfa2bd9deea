"""Atomic file writes (a kill leaves the old file or the new one), locks, and safe reading of tensors."""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from vca.runtime.errors import ConfigError


class UnreadableError(RuntimeError):
    """A file of tensors cannot be read; the message is one line with the reason."""


def write_bytes(path: Path, content: bytes | memoryview, sync: bool = True) -> None:
    """Write a file atomically: write to a temporary name, sync, rename, sync the folder.

    Without `sync`, a kill leaves the old file or the new one, but after a power loss the file may be empty.

    Raises:
        OSError: if the write fails; the message has the needed and the free space. The old file is unchanged and the
            temporary file is removed.
    """
    with open_atomic(path, sync, len(content)) as file:
        file.write(content)


@contextmanager
def open_atomic(path: Path, sync: bool = True, size: int | None = None) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` when the context ends without an error, as `write_bytes`.

    Raises:
        OSError: if the write fails; the message has the free space if `size` is given.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            more = f", {space(size, path.parent)}" if size is not None else ""
            raise OSError(error.errno, f"{error.strerror}{more}", str(path)) from error
        raise
    if not sync:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def lock_folder(folder: Path) -> BinaryIO:
    """Lock a folder while the returned file is open; processes that this one starts do not hold the lock.

    Raises:
        ConfigError: if another process holds the lock. File systems without locks are not protected.
    """
    file = open(folder / "lock", "wb")  # noqa: SIM115 - the lock lasts while the file is open
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            file.close()
            raise ConfigError(f"{folder} is in use by another process; wait for it or stop it") from error
    return file


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
