"""Parquet and Arrow files of the Hugging Face layout: columns `image: {bytes, path}` and `label`.

An image that the file contains verbatim is read by its place in the file, without pyarrow: those of Arrow files and of
parquet files whose images are not compressed. Of compressed ones, the blocks that contain the image are decompressed,
see `pages.py`.
"""

import json
import mmap
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vca.data.formats.pages import CODECS, CompressedPlaces
from vca.data.scan import Entry, Scan, one_line
from vca.runtime.errors import ConfigError

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels")
THREADS = 4  # files that are indexed at once
PREFIX = 64  # bytes of an image that are searched for in a file


class ContentError(ValueError):
    """A table has other contents than images and labels; the message has the remedy."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns, the path of the image bytes, and names of the classes."""

    image: str
    label: str
    image_bytes: str
    classes: list[str] | None


@dataclass
class Rows:
    """Images of a file: entries, problems, whether each image has a place for the access, and names of the classes."""

    entries: list[Entry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    placed: bool = True
    classes: list[str] | None = None


def import_pyarrow() -> Any:
    """Import pyarrow with its parquet reader."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("parquet and arrow files need pyarrow: pip install pyarrow") from error
    return pyarrow


def scan_parquet(paths: Sequence[Path], split: str) -> Scan:
    """Index parquet files whose images are not compressed, or all with one of `CODECS`."""
    return scan_tables(paths, index_parquet, tuple(PLACES))


def scan_arrow(paths: Sequence[Path], split: str) -> Scan:
    """Index Arrow files, as `Dataset.save_to_disk` and the cache of `datasets` contain."""
    return scan_tables(paths, index_arrow, ("span",))


def scan_tables(paths: Sequence[Path], index_file: Any, accesses: Sequence[str]) -> Scan:
    scan = Scan(accesses[0], list(paths), watched=[*paths, *{path.parent for path in paths}])
    import_pyarrow()
    for access in accesses:
        scan.access = access
        with ThreadPoolExecutor(THREADS) as threads:
            files = list(threads.map(partial(index_file, access=access), paths, range(len(paths))))
        if all(rows.placed for rows in files):
            break
    else:
        remedy = "write all files again without compression of the images"
        scan.problems.append(f"{paths[0]}: images of these files cannot be read in any order; {remedy}")
    for path, rows in zip(paths, files, strict=True):
        scan.entries += rows.entries
        scan.problems += rows.problems
        if rows.classes is not None and scan.classes not in (None, rows.classes):
            scan.problems.append(f"{path}: has other class names than {paths[0]}; do not mix data sets")
        scan.classes = scan.classes or rows.classes
    return scan


def index_parquet(path: Path, number: int, access: str) -> Rows:
    """Index a parquet file for an access; stop at the first row group that it cannot read."""
    pa = import_pyarrow()
    rows, first, place = Rows(), 0, ""
    try:
        file = pa.parquet.ParquetFile(path, memory_map=True)
        columns = find_columns(file.schema_arrow)
        chunk = next(k for k in range(file.metadata.num_columns) if column_path(file, k) == columns.image_bytes)
        with open(path, "rb") as content, mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            for group in range(file.num_row_groups):
                place = f" from row {first} on"
                metadata = file.metadata.row_group(group).column(chunk)
                codec = metadata.compression.lower()
                rows.placed = rows.placed and access == ("span" if codec == "uncompressed" else codec)
                if not rows.placed:
                    break
                table = file.read_row_group(group, columns=[columns.image, columns.label], use_threads=False)
                start = metadata.dictionary_page_offset or metadata.data_page_offset
                stop = start + metadata.total_compressed_size
                find = PLACES[access](mapped, start, stop).find
                for batch in table.to_batches():
                    add_rows(rows, batch, columns, path, number, first, find)
                    first += batch.num_rows
        rows.classes = columns.classes
    except (OSError, ValueError, pa.ArrowException) as error:
        rows.problems.append(describe(error, path, f"parquet{place}"))
    return rows


def index_arrow(path: Path, number: int, access: str) -> Rows:
    """Index a file of Arrow's stream or file format; entries are places of images."""
    pa = import_pyarrow()
    rows, first = Rows(), 0
    try:
        with pa.memory_map(str(path)) as mapped:
            base, size = mapped.read_buffer(1).address, mapped.size()
            mapped.seek(0)
            stream = mapped.read(6) != b"ARROW1"
            mapped.seek(0)
            reader = pa.ipc.open_stream(mapped) if stream else pa.ipc.open_file(mapped)
            columns = find_columns(reader.schema)
            batches = reader if stream else map(reader.get_batch, range(reader.num_record_batches))
            for batch in batches:
                batch.validate(full=True)  # invalid offsets would crash the process
                starts = places_in(image_array(batch, columns), base, size)

                def find(row: int, value: Any, starts: np.ndarray = starts) -> tuple[int, int]:
                    return int(starts[row]), value.size

                add_rows(rows, batch, columns, path, number, first, find)
                first += batch.num_rows
        rows.classes = columns.classes
    except (OSError, ValueError, pa.ArrowException) as error:
        rows.problems.append(describe(error, path, "an Arrow file"))
    return rows


def describe(error: Exception, path: Path, form: str) -> str:
    """Describe the error of reading a file: its content is unsuitable, or the file is damaged."""
    reason = (
        str(error)
        if isinstance(error, ContentError)
        else f"cannot be read as {form} ({one_line(error)}); copy it again"
    )
    return f"{path}: {reason}"


def places_in(images: Any, base: int, size: int) -> np.ndarray:
    """Return the offsets of the images of an Arrow array in a file that is mapped to the address `base`.

    Raises:
        ContentError: if the file does not contain them verbatim.
    """
    pa = import_pyarrow()
    _, offsets, data = images.buffers()
    if data is None or not data.size:  # all are null or empty
        return np.zeros(len(images), np.int64)
    if not base <= data.address <= base + size:
        raise ContentError("has compressed buffers; write it without compression")
    kind = np.int64 if images.type == pa.large_binary() else np.int32
    return np.frombuffer(offsets, kind)[images.offset :].astype(np.int64) + (data.address - base)


class Places:
    """Finds images, in their order, between `start` and `stop` of bytes or of a memory-mapped file."""

    def __init__(self, mapped: mmap.mmap | bytes, start: int, stop: int) -> None:
        self.mapped, self.start, self.stop, self.position = mapped, start, stop, start

    def find(self, row: int, value: Any) -> tuple[int, int] | None:
        """Return offset and size of an image's bytes, a pyarrow buffer; None if they are encoded.

        Parquet stores a value behind its length. Equal images may be stored once.
        """
        pattern = struct.pack("<I", value.size) + value.slice(0, min(PREFIX, value.size)).to_pybytes()
        for start in (self.position, self.start):
            while (found := self.mapped.find(pattern, start, self.stop)) >= 0:
                offset = found + 4
                if self.mapped[offset : offset + value.size] == value.to_pybytes():
                    self.position = offset + value.size
                    return offset, value.size
                start = found + 1
        return None


# access -> finds places of images in (file, start and end of a column chunk)
PLACES: dict[str, Any] = {
    "span": Places,
    **{codec: partial(CompressedPlaces, codec=codec, search=Places) for codec in CODECS},
}


def add_rows(rows: Rows, batch: Any, columns: Columns, path: Path, number: int, first: int, find: Any) -> None:
    """Append the entries of a batch, whose first row is row `first` of the file.

    `find` maps a row of the batch and its image, a buffer, to its place `(offset, size)`, or None.
    """
    images, labels = image_array(batch, columns), batch.column(columns.label).to_pylist()
    names = paths_of(batch, columns) or [None] * len(labels)
    for row, (label, name) in enumerate(zip(labels, names, strict=True)):
        image = images[row]
        if not image.is_valid:
            rows.problems.append(f"{path}: row {first + row} has no image bytes; embed the images in the file")
        elif label is None or (isinstance(label, int) and label < 0):
            rows.problems.append(f"{path}: row {first + row} has no label, got {label}; remove the row")
        else:
            value = image.as_buffer()
            place = find(row, value)
            if place is None:
                rows.placed = False
                return
            name = name or f"{path.stem}/{first + row:08d}"
            rows.entries.append(Entry(name, label, number, place[0], place[1], value.size))


def find_columns(schema: Any) -> Columns:
    """Find the columns of images and labels.

    Raises:
        ContentError: if they are missing or have another type.
    """
    pa = import_pyarrow()
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if image is None or label is None:
        raise ContentError(f"must have columns image and label, got {', '.join(schema.names) or 'none'}; rename them")
    kind, binary = schema.field(image).type, (pa.binary(), pa.large_binary())
    in_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if kind not in binary and not (in_struct and kind.field("bytes").type in binary):
        raise ContentError(f"column {image} must have the type {{bytes, path}}, got {kind}; write it with datasets")
    if not (pa.types.is_integer(schema.field(label).type) or pa.types.is_string(schema.field(label).type)):
        raise ContentError(f"column {label} must have integers or strings, got {schema.field(label).type}; convert it")
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        classes = described.get("info", {}).get("features", {}).get(label, {}).get("names")
    except (AttributeError, ValueError) as error:
        raise ContentError(f"has corrupt metadata of datasets ({one_line(error)}); write it again") from error
    return Columns(image, label, f"{image}.bytes" if in_struct else image, classes)


def column_path(file: Any, index: int) -> str:
    path: str = file.metadata.schema.column(index).path
    return path


def image_array(batch: Any, columns: Columns) -> Any:
    """Return the array of image bytes of a batch."""
    column = batch.column(columns.image)
    return column if columns.image_bytes == columns.image else column.field("bytes")


def paths_of(batch: Any, columns: Columns) -> list[str | None] | None:
    """Return the paths that a batch stores beside its images, or None."""
    column = batch.column(columns.image)
    has_paths = columns.image_bytes != columns.image and column.type.get_field_index("path") >= 0
    return column.field("path").to_pylist() if has_paths else None
