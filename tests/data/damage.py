"""Writers of broken and wrong archives and tables.

A writer takes class folders and an empty folder, writes `train*` into it, and may return options of the data. Functions
named `..._of` return a writer.
"""

import gzip
import io
import json
import struct
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.forms import CLASSES, add, files_of, table, write_class_tars, write_webdataset


def members(folder):
    """Return `(name, content)` of an archive of class folders."""
    return [(f"train/{name}/{file}", content) for name, file, content in files_of(folder)]


def write_tar(path, contents, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, content in contents:
            add(archive, name, content)


def patch(path, change):
    """Replace the content of a file by a function of it."""
    path.write_bytes(change(path.read_bytes()))


def overwrite(content, place, value):
    return content[:place] + value + content[place + len(value) :]


def half(content):
    return content[: len(content) // 2]


# Zips. They are written to `root / "train.zip"`.


def zip_of(change=None, compression=zipfile.ZIP_STORED, more=(), leave_out=""):
    """Return a function that writes a zip of class folders and replaces its bytes by `change(bytes)`."""

    def write(folder, root):
        with zipfile.ZipFile(root / "train.zip", "w", compression) as archive:
            for name, content in [*members(folder), *more]:
                if not leave_out or leave_out not in name:
                    archive.writestr(name, content)
        if change is not None:
            patch(root / "train.zip", change)

    return write


def streamed_zip(change):
    """Return a function that writes a zip to a pipe: its sizes and CRCs are behind the members."""

    def write(folder, root):
        stream = Pipe()
        with zipfile.ZipFile(stream, "w") as archive:
            for name, content in members(folder):
                archive.writestr(name, content)
        (root / "train.zip").write_bytes(change(b"".join(stream.parts)))

    return write


class Pipe(io.RawIOBase):
    """A stream without positions."""

    def __init__(self):
        self.parts = []

    def writable(self):
        return True

    def write(self, part):
        self.parts.append(bytes(part))
        return len(part)


def encrypted(content):
    """Set the flag of encryption in the directory of the zip."""
    return overwrite(content, content.index(b"PK\1\2") + 8, b"\1\0")


def corrupt_first_image(content):
    """Overwrite bytes in the middle of the first member."""
    return overwrite(content, content.index(b"PK\3\4", 4) // 2, b"corrupt!" * 4)


def without_first_header(content):
    return overwrite(content, 0, b"XXXX")


def future_version(content):
    """Set the version that is needed to extract the first member to 25.5."""
    return overwrite(content, content.index(b"PK\1\2") + 6, b"\xff\0")


# Tars. They are written to `root / "train.tar"`.


def tar_of(change=None, more=()):
    """Return a function that writes a tar of class folders and replaces its bytes by `change(bytes)`."""

    def write(folder, root):
        write_tar(root / "train.tar", [*members(folder), *more])
        if change is not None:
            patch(root / "train.tar", change)

    return write


def header_of(content, name):
    return content.index(name.encode())


def in_member(content):
    return content[: header_of(content, f"train/{CLASSES[1]}/{CLASSES[1]}_0.JPEG") + 600]


def in_header(content):
    return content[: header_of(content, f"train/{CLASSES[1]}/{CLASSES[1]}_0.JPEG") + 100]


def corrupt_header(content):
    """Overwrite the checksum of a header in the middle."""
    return overwrite(content, header_of(content, f"train/{CLASSES[1]}/{CLASSES[1]}_0.JPEG") + 148, b"9999999\0")


def no_end(content):
    """Remove the zero blocks of the end."""
    return content.rstrip(b"\0") + b"\0" * (-len(content.rstrip(b"\0")) % 512)


def sparse(folder, root):
    tar_of()(folder, root)
    with tarfile.open(root / "train.tar", "a") as archive:
        info = tarfile.TarInfo(f"train/{CLASSES[0]}/sparse.JPEG")
        info.type = tarfile.GNUTYPE_SPARSE
        archive.addfile(info)


def link(kind):
    def write(folder, root):
        tar_of()(folder, root)
        with tarfile.open(root / "train.tar", "a") as archive:
            info = tarfile.TarInfo(f"train/{CLASSES[0]}/link.JPEG")
            info.type, info.linkname = kind, f"{CLASSES[0]}_0.JPEG"
            archive.addfile(info)

    return write


def compressed(name):
    def write(folder, root):
        tar_of()(folder, root)
        (root / name).write_bytes(gzip.compress((root / "train.tar").read_bytes()))
        (root / "train.tar").unlink()

    return write


def truncated_class_tar(folder, root):
    """Write a tar of class tars, of which the second is cut in its second image."""
    write_class_tars(folder, root / "whole.tar")
    with tarfile.open(root / "whole.tar") as whole, tarfile.open(root / "train.tar", "w") as archive:
        for member in whole:
            content = whole.extractfile(member).read()
            add(archive, member.name, content[:2048] if member.name.startswith(CLASSES[1]) else content)
    (root / "whole.tar").unlink()


# WebDataset shards, `root / "train-000000.tar"` and so on.


def samples(folder):
    """Return `{key: {extension: content}}`."""
    files = files_of(folder)
    return {Path(file).stem: {"jpg": content, "cls": b"%d" % CLASSES.index(name)} for name, file, content in files}


def shard(change):
    """Return a function that writes a shard of samples that are changed in place."""

    def write(folder, root):
        changed = samples(folder)
        more = change(changed, changed[f"{CLASSES[1]}_0"]) or []
        contents = [(f"{key}.{ext}", content) for key, sample in changed.items() for ext, content in sample.items()]
        write_tar(root / "train-000000.tar", contents + more)

    return write


def shards(change, **options):
    def write(folder, root):
        write_webdataset(folder, root / "train", per_shard=4)
        change(root)
        return options

    return write


def shuffled_classes(content, sample):
    """Swap the labels of two classes."""
    for name, own in content.items():
        own["cls"] = {"n01440764": b"1", "n02102040": b"0"}.get(name.split("_")[0], own["cls"])


# Parquet and Arrow files, `root / "train-00000-of-00001.parquet"` and so on.


def parquet_of(change=lambda rows: rows, damage=None, **options):
    """Return a function that writes `change(rows)` as parquet and replaces the bytes of the file by `damage(bytes)`."""

    def write(folder, root):
        path = root / "train-00000-of-00001.parquet"
        pq.write_table(change(table(folder)), path, row_group_size=2, **{"compression": "none", **options})
        if damage is not None:
            patch(path, damage)

    return write


def with_column(name, values, kind=None):
    """Return a function that replaces a column; `values` maps the list of old values to the new ones."""

    def change(rows):
        place = rows.schema.get_field_index(name)
        array = pa.array(values(rows.column(name).to_pylist()), kind or rows.schema.field(name).type)
        return rows.set_column(place, name, array).replace_schema_metadata(rows.schema.metadata)

    return change


def sorted_rows(rows):
    """Sort rows by label and name."""
    return rows.take(pa.array(sorted(range(len(rows)), key=lambda row: rows.column("image")[row].as_py()["path"])))


def without_bytes(images):
    return [images[0], {"bytes": None, "path": "elsewhere.jpg"}, *images[2:]]


def other_data_set(folder, root):
    pq.write_table(table(folder), root / "train-00000-of-00002.parquet")
    rows = table(folder)
    features = {"label": {"names": ["cat", "dog", "bird"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(rows.replace_schema_metadata(metadata), root / "train-00001-of-00002.parquet")


def corrupt_jpeg(content):
    """Overwrite the start of the first image in the file."""
    return overwrite(content, content.index(b"\xff\xd8"), b"\0" * 64)


def arrow_of(change=lambda rows: rows, damage=None, **options):
    def write(folder, root):
        path, rows = root / "train-00000-of-00001.arrow", change(table(folder))
        written = pa.ipc.IpcWriteOptions(**options)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, rows.schema, options=written) as writer:
            writer.write_table(rows, max_chunksize=4)
        if damage is not None:
            patch(path, damage)

    return write


def corrupt_offsets(content):
    """Overwrite the end of the first path, which has 16 characters, in the offsets of the column."""
    return overwrite(content, content.index(struct.pack("<3i", 0, 16, 32)) + 4, struct.pack("<i", 2**31 - 1))


# Paths and options without files.


def options(**given):
    """Return a function that writes an intact zip and returns options."""

    def write(folder, root):
        zip_of()(folder, root)
        return given

    return write


def mixed_forms(folder, root):
    zip_of()(folder, root)
    parquet_of()(folder, root)
    return {"train": "train*"}


def unlabelled_shards(folder, root):
    """Write shards of images alone, which are read as class tars."""
    for number, content in enumerate((samples(folder),) * 2):
        write_tar(root / f"train-00000{number}.tar", [(f"{key}.jpg", own["jpg"]) for key, own in content.items()])


def dangling(folder, root):
    write_webdataset(folder, root / "train", per_shard=4)
    (root / "train-000001.tar").unlink()
    (root / "train-000001.tar").symlink_to(root / "nowhere.tar")
