"""Write the same labelled images in each form that `vca/data/formats` reads."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("n01440764", "n02102040", "n03888257")


def photos(root: Path, per_class: int = 4, size: int = 24, classes: tuple[str, ...] = CLASSES) -> Path:
    """Write class folders `root/{train,val}/<class>/*.JPEG` of noise."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                pixels = rng.integers(0, 256, (size, size + number, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}_{number}.JPEG", quality=90)
    return root


def files_of(folder: Path) -> list[tuple[str, str, bytes]]:
    """Return `(class, file name, content)` of class folders."""
    return [(file.parent.name, file.name, file.read_bytes()) for file in sorted(folder.glob("*/*"))]


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def write_zip(folder: Path, out: Path, deflated: bool = False) -> None:
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as archive:
        for name, file, content in files_of(folder):
            archive.writestr(f"{folder.name}/{name}/{file}", content)


def write_class_tars(folder: Path, out: Path) -> None:
    """Write a tar of class tars, as ILSVRC2012_img_train.tar."""
    with tarfile.open(out, "w") as outer:
        for one in sorted(folder.iterdir()):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for file in sorted(one.iterdir()):
                    add(inner, file.name, file.read_bytes())
            add(outer, f"{one.name}.tar", content.getvalue())


def write_webdataset(folder: Path, out: Path, per_shard: int = 5) -> None:
    """Write shards `out-000000.tar` with `.jpg` and `.cls`, in shuffled order, and `classes.txt`."""
    files = files_of(folder)
    classes = sorted({name for name, _, _ in files})
    order = np.random.default_rng(1).permutation(len(files))
    for shard, start in enumerate(range(0, len(files), per_shard)):
        with tarfile.open(f"{out}-{shard:06d}.tar", "w") as archive:
            for index in order[start : start + per_shard]:
                name, file, content = files[index]
                key = f"{name}/{Path(file).stem}"
                add(archive, f"{key}.cls", str(classes.index(name)).encode())
                add(archive, f"{key}.jpg", content)
    (out.parent / "classes.txt").write_text("\n".join(classes) + "\n")


def table(folder: Path) -> pa.Table:
    """Return the images as a table of the Hugging Face layout, in shuffled order."""
    files = files_of(folder)
    files = [files[index] for index in np.random.default_rng(2).permutation(len(files))]
    classes = sorted({name for name, _, _ in files})
    images = [{"bytes": content, "path": file} for _, file, content in files]
    columns = {
        "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "label": pa.array([classes.index(name) for name, _, _ in files], pa.int64()),
    }
    features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_parquet(folder: Path, out: Path, compression: str = "none") -> None:
    """Write two parquet files of row groups of two images."""
    rows = table(folder)
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        pq.write_table(part, f"{out}-{number:05d}-of-00002.parquet", row_group_size=2, compression=compression)


def write_arrow(folder: Path, out: Path) -> None:
    rows = table(folder)
    with pa.OSFile(f"{out}-00000-of-00001.arrow", "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=4)


# form -> (write the class folders of a split at a path, name of the path)
WRITERS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "zip": (write_zip, "{}.zip"),
    "deflated zip": (lambda folder, out: write_zip(folder, out, deflated=True), "{}.zip"),
    "class tars": (write_class_tars, "ILSVRC2012_img_{}.tar"),
    "webdataset": (write_webdataset, "shards-{}"),
    "parquet": (write_parquet, "{}"),
    "snappy parquet": (lambda folder, out: write_parquet(folder, out, "snappy"), "{}"),
    "arrow": (write_arrow, "{}"),
}
ARCHIVES = ("zip", "class tars", "webdataset", "parquet", "arrow")  # one of each format


def write_form(form: str, folders: Path, out: Path) -> Path:
    """Write both splits of class folders in a form to a new folder, and return it."""
    out.mkdir(parents=True)
    write, name = WRITERS[form]
    for split in ("train", "val"):
        write(folders / split, out / name.format(split))
    return out
