"""Images of an archive are those of the folder that it was made from."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vca.evaluation.images import PngImages
from vca.evaluation.sources import open_source
from vca.runtime.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:06d}.png")
    return folder


def archive(folder, form):
    if form == "parquet":
        rows = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted(folder.iterdir())]
        pq.write_table(pa.table({"image": rows, "label": [0] * len(rows)}), folder.parent / "a.parquet")
        return str(folder.parent / "a.parquet")
    return shutil.make_archive(str(folder.parent / "a"), form, folder)


@pytest.mark.parametrize("form", ["zip", "tar", "parquet"])
def test_open_source_archive_equals_folder(folder, form):
    expected, images = open_source(str(folder), "samples", None), open_source(archive(folder, form), "samples", None)
    assert isinstance(images, PngImages)
    assert images.shape == (8, 8, 3)
    assert np.array_equal(images.read(range(5)), expected.read(range(5)))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("000005.jpg", 8, r"samples: \S+a.zip: 000005.jpg must be a PNG file, got JPEG content; save images as PNG"),
        ("000005.png", 9, r"samples: \S+a.zip: 000005.png must be 8 x 8 RGB like \S*000000.png, got 9 x 9 RGB"),
    ],
)
def test_open_source_archive_of_other_images_refused(folder, name, size, message):
    Image.new("RGB", (size, size)).save(folder / name)
    with pytest.raises(ConfigError, match=message):
        open_source(archive(folder, "zip"), "samples", None)


def test_open_source_archive_of_splits_refused(tmp_path, folder):
    for split in ("train", "val"):
        shutil.copytree(folder, tmp_path / "splits" / split / "class")
    with pytest.raises(ConfigError, match=r"samples: \S+a.zip has folders of splits; use data:train or data:test with"):
        open_source(shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path / "splits"), "samples", None)


def test_open_source_archive_without_images_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").write_text("")
    with pytest.raises(ConfigError, match=r"samples: \S+a.zip contains no images"):
        open_source(shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path / "empty"), "samples", None)
