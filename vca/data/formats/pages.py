"""Places of images in compressed parquet, so that an image is decompressed without its row group.

Snappy compresses each block, 64 KiB of its input, on its own. With another codec, a page is one block. The place of an
image is the blocks that contain it:

    offset = (start of the blocks in the file) * 2^26 + start of the image in their output
    size = (bytes of the blocks in the file) * 2^32 + bytes of their output, 0 if the page is not compressed

In the output, parquet stores an image behind its length, 4 bytes. Parquet describes its pages in Thrift's compact
protocol, of which page headers use integers, booleans, strings and structures.
"""

import bisect
import mmap
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

CODECS = ("snappy", "zstd", "gzip")
BLOCK = 1 << 16  # bytes of Snappy's input
START, LIMIT = 1 << 26, 1 << 37  # above all starts in the output, and in the file
LENGTH = struct.Struct("<I")
BYTES_OF_COPY = (0, 2, 3, 5)  # of an element of Snappy that repeats earlier output


class Page(NamedTuple):
    """A page.

    Attributes:
        first, length: start of its output in that of its column chunk, and bytes of its output.
        block: bytes of the output of a block; 0 if the page is not compressed.
        starts: where its blocks start in the file, and where the last one ends.
    """

    first: int
    length: int
    block: int
    starts: list[int]


class CompressedPlaces:
    """Finds images, in their order, in a column chunk: the bytes `start .. stop` of a memory-mapped file.

    `search` is the class that finds them in the decompressed chunk.
    """

    def __init__(self, mapped: mmap.mmap, start: int, stop: int, codec: str, search: Any) -> None:
        self.mapped, self.codec = mapped, codec
        self.pages: list[Page] = []
        outputs, first = [], 0
        try:
            for begin, end, length, compressed in page_bodies(mapped, start, stop):
                content = mapped[begin:end]
                starts = find_blocks(content) if compressed and codec == "snappy" else [0, len(content)]
                outputs.append(decompress(content, length, codec) if compressed else content)
                block = (BLOCK if codec == "snappy" else max(1, length)) if compressed else 0
                self.pages.append(Page(first, length, block, [begin + start for start in starts]))
                first += length
        except (IndexError, KeyError, OSError, ValueError):  # written by a program that compresses in another way
            self.pages = []
        output = b"".join(outputs)
        self.decompressed = search(output, 0, len(output))

    def find(self, row: int, value: Any) -> tuple[int, int] | None:
        """Return the place of an image's bytes, a pyarrow buffer; None if they cannot be decompressed alone."""
        found = self.decompressed.find(row, value) if self.pages else None
        if found is None:
            return None
        start = found[0] - LENGTH.size
        page = self.pages[bisect.bisect_right(self.pages, start, key=lambda page: page.first) - 1]
        start -= page.first
        if page.starts[-1] >= LIMIT:
            return None
        if not page.block:
            return (page.starts[0] + start) * START, (LENGTH.size + value.size) << 32
        first, last = start // page.block, (start + LENGTH.size + value.size - 1) // page.block
        begin, end = page.starts[first], page.starts[last + 1]
        start -= first * page.block
        if start >= START:
            return None
        length = min(page.length, (last + 1) * page.block) - first * page.block
        offset, size = begin * START + start, ((end - begin) << 32) + length
        alone = self.codec != "snappy" or self.is_read(value, begin, end, offset, size)
        return (offset, size) if alone else None

    def is_read(self, value: Any, begin: int, end: int, offset: int, size: int) -> bool:
        """Whether an image is read at a place; it is not if its blocks repeat output of earlier ones."""
        try:
            return read_blocks(self.mapped[begin:end], offset, size, self.codec) == value.to_pybytes()
        except OSError:
            return False


def blocks_of(offset: int, size: int) -> tuple[int, int]:
    """Return start and number of the bytes of the blocks of a place."""
    return offset // START, size >> 32


def output_bytes(size: Any) -> Any:
    """Return the bytes of the output of the blocks of a place, or of an array of places."""
    return size & 0xFFFFFFFF


def read_blocks(blocks: bytes, offset: int, size: int, codec: str) -> bytes:
    """Return the image at a place, whose blocks are given.

    Raises:
        OSError: if they are corrupt.
    """
    length, start = output_bytes(size), offset % START
    if codec == "snappy" and length:  # with the number of bytes of the output, 7 bits per byte, before the first block
        blocks = bytes([*(length >> shift & 127 | 128 for shift in (0, 7, 14, 21)), length >> 28]) + blocks
    output = decompress(blocks, length, codec) if length else blocks
    (count,) = LENGTH.unpack_from(output, start)
    return output[start + LENGTH.size : start + LENGTH.size + count]


def decompress(content: bytes, length: int, codec: str) -> bytes:
    import pyarrow

    output: bytes = pyarrow.decompress(content, length, codec, asbytes=True)
    return output


def find_blocks(content: bytes) -> list[int]:
    """Return where the blocks of Snappy's output start, and where the last one ends.

    Raises:
        ValueError: if an element crosses the end of a block.
    """
    length, position = read_varint(content, 0)
    starts: list[int] = []
    output = 0
    while position < len(content):
        if output == len(starts) * BLOCK:
            starts.append(position)
        kind, count = content[position] & 3, content[position] >> 2
        if kind == 0:  # bytes that follow, as many as `count`, or as 1 to 4 bytes
            width = max(0, count - 59)
            position += 1 + width
            count = int.from_bytes(content[position - width : position], "little") if width else count
            position += count + 1
        else:
            position += BYTES_OF_COPY[kind]
        output += (count & 7) + 4 if kind == 1 else count + 1
    if output != length or len(starts) != -(-length // BLOCK):
        raise ValueError("an element crosses the end of a block")
    return [*starts, position]


def page_bodies(mapped: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int, bool]]:
    """Yield start, end and length of the values of each page of a column chunk, and whether they are compressed."""
    while start < stop:
        header, start = read_struct(mapped, start)
        end = start + header[3]
        version_2 = header.get(8, {})
        levels = version_2.get(5, 0) + version_2.get(6, 0)  # not compressed
        yield start + levels, end, header[2] - levels, version_2.get(7, True)
        start = end


def read_struct(content: Any, position: int) -> tuple[dict[int, Any], int]:
    """Read a structure of Thrift's compact protocol; return its fields by number, and its end."""
    fields: dict[int, Any] = {}
    field = 0
    while content[position]:
        step, kind = content[position] >> 4, content[position] & 15
        field, position = (field + step, position + 1) if step else read_zigzag(content, position + 1)
        if kind in (1, 2):  # true, false
            fields[field] = kind == 1
        elif kind in (4, 5, 6):  # integers
            fields[field], position = read_zigzag(content, position)
        elif kind == 8:  # bytes
            size, position = read_varint(content, position)
            position += size
        elif kind == 12:
            fields[field], position = read_struct(content, position)
        else:
            raise ValueError(f"no page header: type {kind}")
    return fields, position + 1


def read_zigzag(content: Any, position: int) -> tuple[int, int]:
    value, position = read_varint(content, position)
    return (value >> 1) ^ -(value & 1), position


def read_varint(content: Any, position: int) -> tuple[int, int]:
    """Read an integer of 7 bits per byte; return it and its end."""
    value = shift = 0
    while content[position] & 128:
        value |= (content[position] & 127) << shift
        position, shift = position + 1, shift + 7
    return value | content[position] << shift, position + 1
