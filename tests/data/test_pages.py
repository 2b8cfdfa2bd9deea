"""Images of compressed parquet equal those that pyarrow reads, whatever the layout of the pages."""

import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vca.data.config import DataConfig
from vca.data.formats.pages import BLOCK, CODECS, CompressedPlaces, find_blocks
from vca.data.formats.tables import Places
from vca.data.indexing import open_index
from vca.runtime.errors import ConfigError

LAYOUTS = {
    "one page": {"use_dictionary": False},
    "dictionary": {},
    "small pages": {
        "use_dictionary": False,
        "data_page_size": 100_000,
        "write_batch_size": 1,
        "write_page_index": True,
    },
    "page headers of version 2": {"use_dictionary": False, "data_page_version": "2.0"},
    "some pages not compressed": {"use_dictionary": False, "data_page_version": "2.0", "row_group_size": 1},
}


def images():
    """Random bytes of 0 to 4 blocks, some of which repeat themselves or earlier images, as headers do."""
    rng = np.random.default_rng(0)
    sizes = [0, 1, 60, 61, 256, 257, BLOCK - 4, BLOCK, *rng.integers(1, 4 * BLOCK, 52)]
    values = [rng.bytes(int(size)) for size in sizes]
    for index in range(8, 60, 3):
        values[index] = values[index][: len(values[index]) // 2] * 2 + values[index - 1][:700]
    values[40] = values[20]
    values[41] = bytes(BLOCK)
    return values


def write(path, values, struct_column=True, kind=None, **options):
    labels = [index % 2 for index in range(len(values))]
    array = pa.array(values, kind or pa.binary())
    if struct_column:
        array = pa.StructArray.from_arrays([array], ["bytes"])
    pq.write_table(pa.table({"image": array, "label": labels}), path, **{"row_group_size": 25, **options})


def open_parquet(tmp_path):
    return open_index(DataConfig("imagefolder", str(tmp_path), num_classes=2), "train")


def check_contents(index, values):
    """Compare each image with pyarrow's; the name of an image without a path is its row."""
    for number in range(len(values)):
        row = int(index.name(number).rpartition("/")[2])
        assert index.read(number) == values[row]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compressed_images_are_read_by_place(tmp_path, codec, layout):
    values = images()
    struct_column = layout != "small pages"
    kind = pa.binary() if struct_column else pa.large_binary()
    write(tmp_path / "train.parquet", values, struct_column, kind, compression=codec, **LAYOUTS[layout])
    index = open_parquet(tmp_path)
    assert index.meta.access == codec
    check_contents(index, values)
    if codec == "snappy":
        assert (index.rows["size"] >> 32).max() <= 6 * (BLOCK + 100)  # bytes that are read


@pytest.mark.parametrize("compression", ["lz4", ["snappy", "none"]])
def test_other_compression_is_refused(tmp_path, compression):
    values = images()
    for number, name in enumerate([compression] if isinstance(compression, str) else compression):
        write(tmp_path / f"train-{number}.parquet", values, compression=name)
    with pytest.raises(ConfigError, match=r"train-0.parquet: images of these files cannot be read in any order; write"):
        open_parquet(tmp_path)


def varint(value):
    return bytes([*(value >> shift & 127 | 128 for shift in (0, 7, 14, 21)), value >> 28])


def literal(content):
    """An element of Snappy for bytes that follow."""
    return bytes([62 << 2]) + (len(content) - 1).to_bytes(3, "little") + content


def copy_64(offset):
    """An element of Snappy that repeats the 64 bytes from `offset` bytes ago."""
    return bytes([63 << 2 | 2]) + offset.to_bytes(2, "little")


def page(length, elements):
    """A page: type, uncompressed and compressed size, end of the header; content."""
    content = varint(length) + elements
    return b"\x15\x00\x15" + varint(2 * length) + b"\x15" + varint(2 * len(content)) + b"\0" + content


def test_snappy_with_copies_across_blocks_is_refused():
    rng = np.random.default_rng(0)
    values = [rng.bytes(size) for size in (BLOCK - 4, BLOCK - 4 - 64 - 4, 64)]
    plain = b"".join(struct.pack("<I", len(value)) + value for value in values[:2])
    start, rest = plain[:BLOCK], plain[BLOCK:] + struct.pack("<I", 64)

    def places(elements):
        content = page(2 * BLOCK, elements)
        return CompressedPlaces(content, 0, len(content), "snappy", Places)

    found = places(literal(start) + literal(rest + values[2]))
    assert all(found.find(0, pa.py_buffer(value)) is not None for value in values)
    found = places(literal(start) + literal(rest) + copy_64(BLOCK - 1))  # which starts in the first block
    assert found.find(0, pa.py_buffer(values[0])) is not None
    assert found.find(0, pa.py_buffer((start + rest)[-BLOCK + 1 :][:64])) is None
    with pytest.raises(ValueError, match="crosses the end of a block"):
        find_blocks(varint(BLOCK + 1) + literal(start + b"1"))
