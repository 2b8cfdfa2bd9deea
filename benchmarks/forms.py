"""Write class folders in the other forms of images that are read, each to a new folder."""

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SHARD, ROW_GROUP = 500, 100  # images of a WebDataset shard, and of a row group as the Hugging Face hub has them


class Photo(NamedTuple):
    """An image file: its class, label, name and content."""

    folder: str
    label: int
    name: str
    content: bytes


def copy_folders(source: Path, out: Path, images: int) -> list[Photo]:
    """Copy about `images` images of class folders, as many of each class, to `out/train`; return them."""
    folders = sorted(folder for folder in source.iterdir() if folder.is_dir())
    photos = []
    for label, folder in enumerate(folders):
        files = sorted(file for file in folder.iterdir() if file.is_file())
        (out / "train" / folder.name).mkdir(parents=True)
        for file in files[: -(-images // len(folders))]:
            photos.append(Photo(folder.name, label, file.name, file.read_bytes()))
            shutil.copyfile(file, out / "train" / folder.name / file.name)
    return photos


def write_zip(photos: list[Photo], out: Path, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(out / "train.zip", "w", method) as archive:
        for photo in photos:
            archive.writestr(f"train/{photo.folder}/{photo.name}", photo.content)


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_class_tars(photos: list[Photo], out: Path) -> None:
    """Write a tar of class tars, as ImageNet's."""
    with tarfile.open(out / "ILSVRC2012_img_train.tar", "w") as outer:
        for folder in sorted({photo.folder for photo in photos}):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for photo in photos:
                    if photo.folder == folder:
                        add_member(inner, photo.name, photo.content)
            add_member(outer, f"{folder}.tar", content.getvalue())


def write_webdataset(photos: list[Photo], out: Path) -> None:
    """Write shards in random order."""
    for shard, start in enumerate(range(0, len(photos), SHARD)):
        with tarfile.open(out / f"train-{shard:06d}.tar", "w") as archive:
            for photo in shuffled(photos)[start : start + SHARD]:
                key = f"{photo.folder}_{Path(photo.name).stem}"
                add_member(archive, f"{key}.cls", str(photo.label).encode())
                add_member(archive, f"{key}.jpg", photo.content)


def make_table(photos: list[Photo]) -> Any:
    """Return the images in random order, as a table of the Hugging Face layout."""
    import pyarrow as pa

    photos = shuffled(photos)
    names = sorted({photo.folder for photo in photos})
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    images = [{"bytes": photo.content, "path": photo.name} for photo in photos]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), "label": [photo.label for photo in photos]})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_parquet(photos: list[Photo], out: Path, compression: str) -> None:
    import pyarrow.parquet

    file = out / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(make_table(photos), file, row_group_size=ROW_GROUP, compression=compression)


def write_arrow(photos: list[Photo], out: Path) -> None:
    import pyarrow as pa

    table = make_table(photos)
    with pa.ipc.new_stream(out / "train-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=ROW_GROUP)


def shuffled(photos: list[Photo]) -> list[Photo]:
    return [photos[index] for index in np.random.default_rng(0).permutation(len(photos))]


# form -> (write it to a folder, class of timm's readers that reads it or None)
FORMS: dict[str, tuple[Callable[[list[Photo], Path], None], str | None]] = {
    "zip": (write_zip, None),
    "deflated zip": (lambda photos, out: write_zip(photos, out, zipfile.ZIP_DEFLATED), None),
    "class tars": (write_class_tars, "ReaderImageInTar"),
    "WebDataset": (write_webdataset, "ReaderWds"),
    "parquet": (lambda photos, out: write_parquet(photos, out, "none"), "ReaderHfds"),
    "snappy parquet": (lambda photos, out: write_parquet(photos, out, "snappy"), "ReaderHfds"),
    "zstd parquet": (lambda photos, out: write_parquet(photos, out, "zstd"), "ReaderHfds"),
    "Arrow": (write_arrow, "ReaderHfds"),
}
