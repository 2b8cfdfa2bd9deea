"""Writing files so that a kill or a crash leaves the old one or the new one, never a part."""

import os
from pathlib import Path


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write under a temporary name, flush to the disk, rename, flush the folder.

    Raises:
        OSError: on a full disk, for example; what was there is still there.
    """
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text."""
    write_bytes(path, text.encode())
