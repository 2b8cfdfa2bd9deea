"""Write shards of images: WebDataset tars or parquet files of the Hugging Face layout, see `vca/data/prepared.py`."""

import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import PIL
from PIL import Image, features

from vca.data.decode import is_16_bit_color
from vca.data.doctor import HIGH_DEPTH, examine_image
from vca.data.formats.tables import import_pyarrow
from vca.data.index import ImageIndex
from vca.data.prepared import Manifest, digest_path
from vca.data.scan import is_image
from vca.runtime.digest import file_sha256
from vca.runtime.errors import ConfigError
from vca.runtime.files import open_atomic, write_text

SUFFIXES = {"PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "PPM": ".ppm", "TIFF": ".tif"}  # of Pillow's formats
ROWS = 100  # images in a row group of a parquet file; readers that decode row groups keep one in memory


class Sample(NamedTuple):
    """An image of a shard: its name `class/stem.jpg`, the file, its label."""

    name: str
    content: bytes
    label: int


def encoder_version() -> str:
    """Name the libraries that resize images and encode JPEG files."""
    return f"Pillow {PIL.__version__}, libjpeg {features.version('libjpeg_turbo') or features.version('jpg')}"


def sample_keys(index: ImageIndex, shard_format: str) -> list[str]:
    """Return a unique name `class/stem` for each image: without extension in tars, as in the source in parquet files.

    In tars dots become hyphens, since WebDataset ends a name at the first dot of the file name. Images with equal names
    get numbers.
    """
    keys: dict[str, None] = {}
    for number, label in enumerate(index.rows["label"].tolist()):
        folder, name = f"{index.meta.classes[label]}/", index.name(number)
        name = os.path.normpath("/" + name.lstrip("/"))[1:].encode(errors="replace").decode()  # without .. and bytes
        stem, suffix = split_suffix(name if name.startswith(folder) else folder + name)
        if shard_format == "tar":
            above, slash, stem = stem.rpartition("/")
            stem, suffix = above + slash + stem.replace(".", "-"), ""
        key, copies = stem + suffix, itertools.count(1)
        while key in keys:
            key = f"{stem}-{next(copies)}{suffix}"
        keys[key] = None
    return list(keys)


def split_suffix(name: str) -> tuple[str, str]:
    """Split the extension of an image from a name; it is empty if the name has none."""
    return os.path.splitext(name) if is_image(name) else (name, "")  # noqa: PTH122 - a string is faster


def shard_order(index: ImageIndex) -> np.ndarray:
    """Return the order of the images in the shards, `(images,)`: a permutation that no version of NumPy changes."""
    return np.random.RandomState(0).permutation(len(index))


def write_shard(
    index: ImageIndex, manifest: Manifest, folder: Path, name: str, images: Sequence[tuple[int, str]]
) -> tuple[str, dict[str, Any]]:
    """Write a shard unless it exists with its digest; return its name and digest.

    Args:
        index: the source.
        images: index and key of each image, in their order.

    Raises:
        ConfigError: if an image is unusable.
        OSError: if the shard cannot be written.
    """
    path = folder / name
    digest = manifest.files.get(name)
    if digest is None:
        with suppress(OSError, ValueError):
            digest = json.loads(digest_path(path).read_text())
    if digest is not None and path.is_file() and file_sha256(path) == digest["sha256"]:
        return name, digest
    resized = 0

    def samples() -> Iterator[Sample]:
        nonlocal resized
        for number, key in images:
            content, suffix, changed = prepare_image(index, number, manifest.max_side, manifest.quality)
            resized += changed
            stem, given = split_suffix(key)
            yield Sample(stem + (given if given and not changed else suffix), content, int(index.rows[number]["label"]))

    with open_atomic(path) as file:
        (write_tar if manifest.format == "tar" else write_parquet)(file, samples(), manifest.classes)
    digest = {"bytes": path.stat().st_size, "sha256": file_sha256(path), "resized": resized}
    write_text(digest_path(path), json.dumps(digest) + "\n")
    return name, digest


def prepare_image(index: ImageIndex, number: int, max_side: int | None, quality: int | None) -> tuple[bytes, str, bool]:
    """Read an image, and resize it if its shorter side is larger than `max_side`.

    As in training, EXIF orientation and colour profile are not applied; resized images lose them.

    Returns:
        The file, its extension, and whether it was resized.

    Raises:
        ConfigError: if the image cannot be decoded or has more than 8 bits per channel.
    """
    try:
        content = index.read(number)
        image: Image.Image = Image.open(io.BytesIO(content))
        if max_side is None or min(image.size) <= max_side:
            return content, SUFFIXES.get(str(image.format), ".jpg"), False
        if image.mode in HIGH_DEPTH or is_16_bit_color(content):
            raise ValueError("more than 8 bits per channel")
        scale = max_side / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
        encoded = io.BytesIO()
        image.resize((width, height), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=quality)
        return encoded.getvalue(), ".jpg", True
    except Exception as error:  # PIL raises many kinds of errors on corrupt files
        source = index.source(number)
        findings = [str(finding) for finding in examine_image(source, lambda: index.read(number)) if finding.fatal]
        raise ConfigError((findings or [f"{source}: cannot be resized ({error}); replace it"])[0]) from error


def write_tar(file: BinaryIO, samples: Iterator[Sample], classes: list[str]) -> None:
    """Write a WebDataset shard: `KEY.jpg` and `KEY.cls` of each sample."""
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content, label in samples:
            for member, part in ((name, content), (f"{split_suffix(name)[0]}.cls", b"%d" % label)):
                info = tarfile.TarInfo(member)
                info.size = len(part)
                archive.addfile(info, io.BytesIO(part))
            archive.members = []  # type: ignore[attr-defined]  # else it grows


def write_parquet(file: BinaryIO, samples: Iterator[Sample], classes: list[str]) -> None:
    """Write a parquet file of the Hugging Face layout.

    Images are not compressed, so that they are read by their place in the file.
    """
    pa = import_pyarrow()
    info = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    metadata = {"huggingface": json.dumps({"info": {"features": info}})}
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata)
    with pa.parquet.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        while rows := list(itertools.islice(samples, ROWS)):
            images = [{"bytes": row.content, "path": row.name} for row in rows]
            columns = {"image": pa.array(images, image), "label": pa.array([row.label for row in rows], pa.int64())}
            writer.write_table(pa.table(columns, schema=schema))
