"""Formats of labelled images. To add one: a file with its scan, and one line in `FORMATS`."""

import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

from vca.data.formats.folder import scan_folder
from vca.data.formats.pages import CODECS, blocks_of, read_blocks
from vca.data.formats.tables import scan_arrow, scan_parquet
from vca.data.formats.tar import holds_samples, scan_tar, scan_webdataset
from vca.data.formats.zip import scan_zip, unpack
from vca.data.scan import Scan

OPEN_FILES = 512  # per process; the usual limit is 1024

# name -> (files, split) -> the images of the split
FORMATS: dict[str, Callable[[Sequence[Path], str], Scan]] = {
    "folder": scan_folder,
    "zip": scan_zip,
    "tar": scan_tar,
    "webdataset": scan_webdataset,
    "parquet": scan_parquet,
    "arrow": scan_arrow,
}


def format_of(path: Path) -> str | None:
    """Return the format of a file or of a folder of class folders; None for other files."""
    if path.is_dir():
        return "folder"
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return "webdataset" if holds_samples(path) else "tar"
    return suffix.removeprefix(".") if suffix in (".zip", ".parquet", ".arrow") else None


def read_file(file: str, name: str, offset: int, size: int) -> bytes:
    """Read an image of a class folder; `file` is the folder of the split."""
    with open(f"{file}/{name}", "rb", buffering=0) as content:
        return content.read()


def read_span(file: str, name: str, offset: int, size: int) -> bytes:
    """Read the bytes `offset .. offset + size` of a file, in one system call."""
    opened = open_file(file)  # held until it is read: another thread may drop it from the cache
    content = os.pread(opened.fileno(), size, offset)
    if len(content) < size:
        raise ValueError(f"{file} is truncated")
    return content


def read_compressed(file: str, name: str, offset: int, size: int, codec: str) -> bytes:
    """Read an image of a compressed parquet file."""
    return read_blocks(read_span(file, name, *blocks_of(offset, size)), offset, size, codec)


# how an entry is read: (file, name, offset, size) -> bytes of the image
ACCESS: dict[str, Callable[[str, str, int, int], bytes]] = {
    "file": read_file,
    "span": read_span,
    "zip": lambda file, name, offset, size: unpack(read_span(file, name, offset, size)),
    **{codec: partial(read_compressed, codec=codec) for codec in CODECS},
}


@lru_cache(maxsize=OPEN_FILES)
def open_file(path: str) -> BinaryIO:
    """Open a file, once per process; loader workers share the files that were open when they started."""
    return open(path, "rb", buffering=0)
