"""Broken and wrong archives and tables: each gives its line when it is opened, or in the check before a run."""

import gzip
import os
import re
import shutil
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.damage import (
    arrow_of,
    compressed,
    corrupt_first_image,
    corrupt_header,
    corrupt_jpeg,
    corrupt_offsets,
    dangling,
    encrypted,
    future_version,
    half,
    in_header,
    in_member,
    link,
    mixed_forms,
    no_end,
    options,
    other_data_set,
    overwrite,
    parquet_of,
    patch,
    shard,
    shards,
    shuffled_classes,
    sorted_rows,
    sparse,
    streamed_zip,
    tar_of,
    truncated_class_tar,
    unlabelled_shards,
    with_column,
    without_bytes,
    without_first_header,
    write_tar,
    zip_of,
)
from tests.data.forms import CLASSES, photos, table
from vca.data import load_dataset
from vca.data.config import DataConfig
from vca.data.doctor import check_before_training
from vca.data.loader import read_image
from vca.runtime.distributed import ONE
from vca.runtime.errors import ConfigError, ImageError

NAME = f"{CLASSES[0]}/{CLASSES[0]}_0.JPEG"
FIRST = f"train/{NAME}"
SAMPLE = rf"train-000000.tar: sample {CLASSES[1]}_0"
ROWS = "train-00000-of-00001"

# kind -> (writes the file in a folder, and returns options of the data; message)
BROKEN = {
    "zip: truncated": (zip_of(half), r"train.zip: is not a zip or is truncated .*; copy it again"),
    "zip: text": (zip_of(lambda _: b"no zip"), r"train.zip: is not a zip or is truncated .*; copy it again"),
    "zip: empty file": (zip_of(lambda _: b""), r"train.zip: is not a zip or is truncated .*; copy it again"),
    "zip: encrypted": (zip_of(encrypted), rf"train.zip: {FIRST} is encrypted; zip the folder without a password"),
    "zip: bzip2": (zip_of(compression=zipfile.ZIP_BZIP2), rf"train.zip: {FIRST} has compression method 12; zip the f"),
    "zip: future version": (
        zip_of(future_version),
        r"train.zip: cannot be read .*version 25.5.; zip the folder with `zip -0 -r`",
    ),
    "zip: twice": (zip_of(more=[(FIRST, b"")]), rf"train.zip: {FIRST} exists twice; zip the folder again"),
    "zip: no header": (zip_of(without_first_header), rf"train.zip: {FIRST} has no header; copy it again"),
    "zip: bad CRC": (zip_of(corrupt_first_image), rf"train.zip: {NAME}: .*bad CRC.*; copy it again"),
    "zip: bad CRC, streamed": (streamed_zip(corrupt_first_image), rf"train.zip: {NAME}: .*bad CRC.*; copy it again"),
    "zip: corrupt stream": (
        zip_of(corrupt_first_image, zipfile.ZIP_DEFLATED),
        rf"train.zip: {NAME}: .*corrupt in the zip .*; copy it again",
    ),
    "zip: a class too few": (
        zip_of(leave_out=CLASSES[0]),
        r"data.num_classes is 3, but .*train.zip has 2 classes .n02102040, n03888257.; complete it or set data",
    ),
    "zip: no image": (zip_of(leave_out="JPEG"), r"train.zip: no images of train found"),
    "zip: another split": (zip_of(more=[("val/a/b.jpg", b"")], leave_out="train"), r"train.zip: no images of train f"),
    "zip: corrupt member": (zip_of(more=[(f"train/{CLASSES[0]}/x.jpg", b"no")]), r"train.zip: .*/x.jpg: is not an"),
    "tar: truncated in a member": (
        tar_of(in_member),
        rf"train.tar: is truncated in train/{CLASSES[1]}.*; copy it again",
    ),
    "tar: truncated in a header": (tar_of(in_header), r"train.tar: .*truncated.*; copy it again"),
    "tar: corrupt header": (tar_of(corrupt_header), r"train.tar: has no end of archive at byte \d+: .*; copy it again"),
    "tar: no end": (tar_of(no_end), r"train.tar: has no end of archive at byte \d+: .*; copy it again"),
    "tar: text": (tar_of(lambda _: b"no tar"), r"train.tar: is not a tar or is truncated .*; copy it again"),
    "tar: 0 bytes": (tar_of(lambda _: b""), r"train.tar: is not a tar or is truncated .*; copy it again"),
    "tar: no member": (tar_of(lambda _: b"\0" * 10240), r"train.tar: no images of train found"),
    "parquet: metadata": (
        parquet_of(lambda rows: rows.replace_schema_metadata({"huggingface": '{"info": null}'})),
        r"train-00000-of-0000\d.parquet: has corrupt metadata of datasets \(.*\); write it again",
    ),
    "tar: twice": (tar_of(more=[(FIRST, b"")]), rf"train.tar: {CLASSES[0]}/{CLASSES[0]}_0.JPEG exists twice"),
    "tar: gz": (compressed("train.tar.gz"), r"train.tar.gz is compressed and cannot be read at random; decompress it"),
    "tar: tgz": (compressed("train.tgz"), r"train.tgz is compressed and cannot be read at random; decompress it"),
    "tar: gz that is called tar": (tar_of(gzip.compress), r"train.tar: is not a tar or is truncated .*; copy it again"),
    "tar: sparse member": (sparse, r"train.tar: has the sparse member .*sparse.JPEG; create it without --sparse"),
    "tar: symbolic link": (
        link(tarfile.SYMTYPE),
        r"train.tar: has the link .*link.JPEG, must be a file; .*--dereference",
    ),
    "tar: hard link": (
        link(tarfile.LNKTYPE),
        r"train.tar: has the link .*link.JPEG, must be a file; .*--hard-dereference",
    ),
    "tar: truncated class tar": (
        truncated_class_tar,
        rf"train.tar: {CLASSES[1]}.tar: has no end of archive at byte 2048: .*",
    ),
    "tar: no class folders": (
        lambda folder, root: write_tar(root / "train.tar", [(f"{k}.jpg", b"") for k in range(4)]),
        r"train.tar: has 4 files and no class folders; .* set data.labels=FILE",
    ),
    "shard: no label": (
        shard(lambda _, sample: sample.pop("cls") and None),
        rf"{SAMPLE} has no label, an integer in .cls or .*; write the shard again",
    ),
    "shard: no image": (shard(lambda _, sample: sample.pop("jpg") and None), rf"{SAMPLE} has no image, must be one"),
    "shard: two images": (shard(lambda _, sample: sample.update(png=b"")), rf"{SAMPLE} has 2 images, must be one"),
    "shard: label is a name": (
        shard(lambda _, sample: sample.update(cls=b"cat")),
        rf"{SAMPLE} has the label 'cat' in .cls, m",
    ),
    "shard: label is -1": (
        shard(lambda _, sample: sample.update(cls=b"-1")),
        rf"{SAMPLE} has the label -1 in .cls, must",
    ),
    "shard: label is 1000000000": (
        shard(lambda _, sample: sample.update(cls=b"1000000000")),
        r"train-000000.tar: .* has label 1000000000, but there are 9 images, and each class needs one; correct",
    ),
    "shard: a label without image": (
        shard(lambda every, _: [own.update(cls=b"7") for own in every.values() if own["cls"] == b"2"] and None),
        r"train-000000.tar: 5 classes have no image, such as 2, 3, 4; complete it",
    ),
    "shard: twice": (
        shard(lambda _, sample: [(f"{CLASSES[1]}_0.jpg", sample["jpg"])]),
        rf"train-000000.tar: {CLASSES[1]}_0.jpg exists twice; write the shard again",
    ),
    "shard: labels in another order": (
        shard(shuffled_classes),
        r"train-000000.tar: .*not in the order of ImageNet's classes \(.*\); set data.classes=FILE",
    ),
    "shards: no label at all": (
        unlabelled_shards,
        r"num_classes is 3, but .* has 2 classes .train-000000, train-00000",
    ),
    "shards: one is missing in a range": (
        shards(lambda root: (root / "train-000001.tar").unlink(), train="train-{000000..000002}.tar"),
        r"data.train=train-\{000000..000002\}.tar: .*train-000001.tar does not exist",
    ),
    "shards: one is missing": (
        shards(lambda root: (root / "train-000001.tar").unlink()),
        r"train-000001.tar is missing; copy it, or",
    ),
    "shards: a dangling link": (dangling, r"train-000001.tar does not exist"),
    "shards: classes.txt too short": (
        shards(lambda root: (root / "classes.txt").write_text("\n".join(CLASSES[:2]))),
        r"train-000000.tar: .*.jpg has label 2, but there are 2 class names; correct it",
    ),
    "parquet: truncated": (parquet_of(damage=half), rf"{ROWS}.parquet: cannot be read as parquet .*; copy it again"),
    "parquet: 0 bytes": (
        parquet_of(damage=lambda _: b""),
        rf"{ROWS}.parquet: cannot be read as parquet .*; copy it ag",
    ),
    "parquet: no image column": (
        parquet_of(lambda rows: rows.drop_columns("image")),
        rf"{ROWS}.parquet: .*must have columns image and label, got label; rename them",
    ),
    "parquet: no label column": (
        parquet_of(lambda rows: rows.drop_columns("label")),
        rf"{ROWS}.parquet: .*must have columns image and label, got image; rename them",
    ),
    "parquet: images are integers": (
        parquet_of(with_column("image", lambda images: [0] * len(images), pa.int64())),
        rf"{ROWS}.parquet: .*column image must have the type {{bytes, path}}, got int64; write it with datasets",
    ),
    "parquet: labels are floats": (
        parquet_of(with_column("label", lambda labels: labels, pa.float32())),
        rf"{ROWS}.parquet: .*column label must have integers or strings, got float; convert it",
    ),
    "parquet: path only": (
        parquet_of(with_column("image", without_bytes)),
        rf"{ROWS}.parquet: row 1 has no image bytes; embed the images in the file",
    ),
    "parquet: null label": (
        parquet_of(with_column("label", lambda labels: [*labels[:3], None, *labels[4:]])),
        rf"{ROWS}.parquet: row 3 has no label, got None; remove the row",
    ),
    "parquet: label -1": (
        parquet_of(with_column("label", lambda labels: [-1] * len(labels))),
        rf"{ROWS}.parquet: row 0 has no label, got -1; remove the row",
    ),
    "parquet: label beyond the names": (
        parquet_of(with_column("label", lambda labels: [5, *labels[1:]])),
        rf"{ROWS}.parquet: .* has label 5, but there are 3 class names; correct it",
    ),
    "parquet: another data set": (
        other_data_set,
        r"train-00001-of-00002.parquet: has other class names than .*; do no",
    ),
    "parquet: a file is missing": (
        lambda folder, root: pq.write_table(table(folder), root / "train-00000-of-00002.parquet"),
        r"train-00001-of-00002.parquet is missing; copy it, or choose files with data.train",
    ),
    "parquet: corrupt image": (
        parquet_of(damage=corrupt_jpeg),
        rf"{ROWS}.parquet: .*.JPEG: is not an image; replace it",
    ),
    "parquet: corrupt page": (
        parquet_of(damage=lambda content: overwrite(content, len(content) // 2, b"\0" * 500), compression="snappy"),
        rf"{ROWS}.parquet: cannot be read as parquet from row [2468] on \(.*\); copy it again",
    ),
    "arrow: truncated": (arrow_of(damage=half), rf"{ROWS}.arrow: cannot be read as an Arrow file .*; copy it again"),
    "arrow: corrupt offsets": (
        arrow_of(damage=corrupt_offsets),
        rf"{ROWS}.arrow: cannot be read as an Arrow file .*; copy it again",
    ),
    "arrow: compressed": (
        arrow_of(compression="zstd"),
        rf"{ROWS}.arrow: has compressed buffers; write it without compression",
    ),
    "arrow: paths only": (
        arrow_of(with_column("image", lambda images: [{"bytes": None, "path": "a.jpg"} for _ in images])),
        rf"{ROWS}.arrow: row 0 has no image bytes; embed the images in the file",
    ),
    "root: s3": (options(root="s3://bucket/imagenet"), r"data.root must be files of this machine.*'s3://bucket/im"),
    "root: hf": (options(root="hf://datasets/ILSVRC/imagenet-1k"), r"data.root must be .*; download them first"),
    "train: https": (options(train="https://host/{000..100}.tar"), r"data.train must be .*; download them first"),
    "train: pipe": (options(train="pipe:cat a.tar"), r"data.train must be .*'pipe:cat a.tar'; download them first"),
    "train: unknown extension": (
        lambda folder, root: ((root / "x.rar").write_text("") and None) or {"train": "x.rar"},
        r"data.train: .*x.rar must be a folder, .zip, .tar, .parquet or .arrow",
    ),
    "train: nowhere": (options(train="nowhere.zip"), r"data.train=nowhere.zip: .*nowhere.zip does not exist"),
    "train: no match": (options(train="no*.tar"), r"data.train=no\*.tar: .*no\*.tar does not exist"),
    "train: two forms": (mixed_forms, r"data.train must be files of one format, got .*.parquet and .*.zip; choose one"),
    "format: zip is no parquet": (
        options(format="parquet"),
        r"data.format=parquet, but .*train.zip is a zip; set data.format=auto",
    ),
    "format: zip is no folder": (
        options(format="folder"),
        r"data.format=folder, but .*train.zip is a zip; set data.format=auto",
    ),
    "format: folder is no zip": (
        lambda folder, root: {"format": "zip", "train": str(folder)},
        r"data.format=zip, but .*train is a folder; set data",
    ),
}


def use(root, /, **options):
    """Open the training split and check all its images, as the start of a run does."""
    config = DataConfig("imagefolder", **{"root": str(root), "num_classes": 3, "check_seconds": 60.0} | options)
    check_before_training(config, [load_dataset(config, train=True)], 0, 0, ONE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("photos") / "data", per_class=3) / "train"


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_archive_gives_one_line(folder, tmp_path, kind):
    write, message = BROKEN[kind]
    given = write(folder, tmp_path) or {}
    with pytest.raises(ConfigError) as refused:
        use(tmp_path, **given)
    assert "\n" not in str(refused.value)
    assert re.search(message, str(refused.value)), refused.value


def corrupt_zip(root):
    patch(root / "train.zip", corrupt_first_image)


def shorten_tar(root):
    patch(root / "train.tar", lambda content: content[:600])


def corrupt_row_group(root):
    patch(root / f"{ROWS}.parquet", lambda content: overwrite(content, 200, b"\0" * 500))


# Damage after the start. kind -> (writer, damage, message about image 0)
LATER = {
    "zip": (zip_of(), corrupt_zip, rf"train.zip: {NAME} cannot be read \(bad CRC in the zip\); restore it, then rerun"),
    "tar": (tar_of(), shorten_tar, rf"train.tar: {NAME} cannot be read \(.*is truncated\); restore it, then rerun"),
    "parquet": (
        parquet_of(sorted_rows, compression="snappy"),
        corrupt_row_group,
        rf"{ROWS}.parquet: .*_0.JPEG cannot be read \(Corrupt snappy compressed data.\); restore it, then rerun",
    ),
}


@pytest.mark.parametrize("kind", LATER)
def test_archive_damaged_during_run_names_member(folder, tmp_path, kind):
    write, change, message = LATER[kind]
    write(folder, tmp_path)
    images = load_dataset(DataConfig("imagefolder", str(tmp_path), num_classes=3), train=True)
    change(tmp_path)
    with pytest.raises(ImageError, match=message) as stopped:
        read_image(images, 0)
    assert "\n" not in str(stopped.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_unreadable_folder_of_class_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "train")
    hidden = tmp_path / "train" / CLASSES[0] / "more"
    hidden.mkdir(mode=0)
    message = rf"data.train: {hidden} cannot be read \(Permission denied\); make it readable"
    with pytest.raises(ConfigError, match=message):
        use(tmp_path)
    hidden.chmod(0o700)  # pytest removes it


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("write", [zip_of(), tar_of(), parquet_of(), arrow_of()])
def test_unreadable_archive_refused(folder, tmp_path, write):
    write(folder, tmp_path)
    (path,) = tmp_path.glob("train*")
    path.chmod(0)
    with pytest.raises(ConfigError, match=rf"{path}.*[Pp]ermission") as refused:
        use(tmp_path)
    assert "\n" not in str(refused.value)
