"""Prepared images: equal to their source, independent of kills and workers, recorded if they were resized."""

import json
import resource
import shutil
import tarfile
from concurrent.futures.process import BrokenProcessPool

import pyarrow.parquet as pq
import pytest
from PIL import Image

import train_cls
from scripts import prepare_images
from scripts.export import export
from tests.data.forms import CLASSES, photos, write_form
from tests.processes import run_script
from tests.support import start_and_kill, write_png16
from vca.config import compose
from vca.data import load_dataset
from vca.data.config import DataConfig
from vca.runtime.errors import ConfigError, known_cause
from vca.runtime.files import lock_folder

FORMS = ("tar", "parquet")


def options(root, out, *more):
    return [f"data.root={root}", f"data.num_classes={len(CLASSES)}", f"out={out}", "images_per_shard=5", *more]


def prepare(root, out, *more):
    return prepare_images.run(compose("prepare_images", [*options(root, out), "workers=0", *more]))


def load(root, train=True, **more):
    return load_dataset(DataConfig("imagefolder", str(root), num_classes=len(CLASSES), **more), train)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Twelve images per split; the shorter side of all is 24 pixels. One is a PNG with the name of a JPEG."""
    root = photos(tmp_path_factory.mktemp("photos") / "data")
    file = root / "train" / CLASSES[0] / f"{CLASSES[0]}_1.JPEG"
    Image.open(file).save(file, "PNG")
    return root


@pytest.mark.parametrize("form", FORMS)
def test_prepared_images_equal_their_source(folders, tmp_path, form):
    manifests = prepare(folders, tmp_path / "out", f"format={form}")
    for train in (True, False):
        expected, images = load(folders, train), load(tmp_path / "out", train)
        assert images.classes == expected.classes == list(CLASSES)
        assert images.labels.tolist() == expected.labels.tolist()
        assert images.index.meta.access == "span"  # read by place
        for index in range(len(expected)):
            assert images.index.read(index) == expected.index.read(index)
            suffix = ".JPEG" if form == "parquet" else ".png" if train and index == 1 else ".jpg"
            assert images.index.name(index) == expected.index.name(index).replace(".JPEG", suffix)
        identity, source = images.index.meta.identity, expected.index.meta.identity
        assert set(identity) == set(source)
        assert (identity == source) == (form == "parquet")  # a run can be resumed on the same names
        assert identity["bytes"] == source["bytes"]
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert manifest["source"] == load(folders).index.meta.identity
    assert manifest["resized"] == 0
    assert {name: file["bytes"] for name, file in manifest["files"].items()} == {
        path.name: path.stat().st_size for path in (tmp_path / "out" / "train").glob(f"*.{form}")
    }
    assert len(manifests["train"].files) == 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    prepare(folders, tmp_path / "out", f"format={form}")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.name != "lock"} == {
        path: time for path, time in before.items() if path.name != "lock"
    }


def test_prepared_shards_are_webdataset_and_hugging_face(folders, tmp_path):
    """The layout that other readers expect: pairs of members, and the features of `datasets`."""
    for form in FORMS:
        prepare(folders, tmp_path / form, f"format={form}")
    shard = tmp_path / "tar" / "train" / "train-000000.tar"
    with tarfile.open(shard) as archive:
        names = archive.getnames()
        assert [name.rpartition(".")[0] for name in names[0::2]] == [name.rpartition(".")[0] for name in names[1::2]]
        label = CLASSES.index(names[0].partition("/")[0])
        assert archive.extractfile(names[1]).read() == str(label).encode()
    assert (tmp_path / "tar" / "train" / "classes.txt").read_text().split() == list(CLASSES)
    file = pq.ParquetFile(tmp_path / "parquet" / "train" / "train-00000-of-00003.parquet")
    chunk = file.metadata.row_group(0).column(0)
    assert (chunk.path_in_schema, chunk.compression) == ("image.bytes", "UNCOMPRESSED")
    features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert features == {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    rows = file.read().to_pylist()
    stems = [name.rpartition(".")[0] for name in names[0::2]]
    assert [row["image"]["path"] for row in rows] == [f"{stem}.JPEG" for stem in stems]
    assert stems != sorted(stems)  # shuffled


@pytest.mark.parametrize("form", FORMS)
def test_prepared_images_max_side(folders, tmp_path, form):
    """Larger images are resized to the limit, others are copied, also those of another mode."""
    root = shutil.copytree(folders, tmp_path / "data")
    folder = root / "train" / CLASSES[1]
    sizes = {"wide": (90, 40), "tall": (33, 60), "exact": (24, 50), "one_side": (80, 20)}
    for number, (name, size) in enumerate(sizes.items()):
        mode = ("RGB", "L", "RGBA", "CMYK")[number]
        Image.new(mode, size, ("red", 90, "blue", (1, 2, 3, 4))[number]).save(
            folder / f"x_{name}.{'png' if mode == 'RGBA' else 'JPEG'}"
        )
    Image.new("RGBA", (48, 48), "green").save(folder / "y_clear.png")
    source = load(root)
    manifest = prepare(root, tmp_path / "out", f"format={form}", "max_side=24")["train"]
    assert manifest.resized == 3
    images = load(tmp_path / "out")
    assert images.labels.tolist() == source.labels.tolist()
    for index in range(len(source)):
        (before, _), (after, _) = source[index], images[index]
        if min(before.size) <= 24:
            assert images.index.read(index) == source.index.read(index)
        else:
            assert min(after.size) == 24
            assert abs(after.width / after.height - before.width / before.height) < 0.03
            assert images.index.name(index).endswith(".jpg")
            assert max(abs(a - b) for a, b in zip(before.getpixel((5, 5)), after.getpixel((5, 5)), strict=True)) < 4
    assert images.index.meta.identity["prepared"] == {
        "max_side": 24,
        "quality": 95,
        "source": source.index.meta.identity,
    }
    assert "prepared" not in load(tmp_path / "out", train=False).index.meta.identity  # nothing was resized


def test_prepared_images_of_a_table_have_unique_names_and_class_folders(folders, tmp_path):
    """Names that a table repeats or that have dots; labels stay with their images; and from shards to shards again."""
    table = pq.read_table(write_form("snappy parquet", folders, tmp_path / "source") / "train-00000-of-00002.parquet")
    names = ["a.b.JPEG", "a.b.JPEG", "/a-b.png", "../up.JPEG", None, "deep/er/x"]
    images = [{**row, "path": name} for row, name in zip(table["image"].to_pylist(), names, strict=True)]
    table = table.set_column(0, table.schema.field("image"), [images])
    (tmp_path / "table").mkdir()
    pq.write_table(table, tmp_path / "table" / "train.parquet", row_group_size=2, compression="zstd")
    prepare(tmp_path / "table", tmp_path / "tar")
    prepare(tmp_path / "tar", tmp_path / "again", "format=parquet")
    rows = list(zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True))
    expected = {(image["bytes"], label) for image, label in rows}
    for out in ("tar", "again"):
        images = load(tmp_path / out)
        assert {(images.index.read(index), int(images.labels[index])) for index in range(6)} == expected
        found = [images.index.name(index) for index in range(6)]
        assert all(name.startswith(f"{CLASSES[images.labels[index]]}/") for index, name in enumerate(found))
        stems = {name.partition("/")[2].rpartition(".")[0] for name in found}
        assert {"a-b", "up", "deep/er/x", "train/00000004"} < stems
        assert sum(name.partition("/")[2].startswith("a-b") for name in found) == 3


def test_prepared_images_keep_names_of_class_folders(tmp_path):
    """Class names in the order of the folders' names, though the WordNet ids of the files have another order."""
    for folder, name in (("a_dog", "n02102040"), ("b_fish", "n01440764"), ("c_radio", "n03888257")):
        (tmp_path / "data" / "train" / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / "train" / folder / f"{name}_1.JPEG")
    assert list(prepare(tmp_path / "data", tmp_path / "out")) == ["train"]  # there is no val
    assert load(tmp_path / "out").classes == ["a_dog", "b_fish", "c_radio"]


@pytest.mark.parametrize("splits", [(), ("train",), ("train", "val")])
def test_prepare_images_splits_of_an_archive(folders, tmp_path, splits):
    """An archive without folders of splits is `train`."""
    parent = tmp_path / "tree"
    for split in splits or ("train",):
        shutil.copytree(folders / split, parent / split)
    root = parent if splits else parent / "train"
    file = shutil.make_archive(str(tmp_path / "data"), "zip", root)
    assert tuple(prepare(file, tmp_path / "out")) == (splits or ("train",))


@pytest.mark.process
@pytest.mark.parametrize("form", FORMS)
def test_prepare_images_after_kill_is_exact(folders, tmp_path, form):
    """With another number of workers, and a last shard that was cut short or has another content."""
    more = [f"format={form}", "images_per_shard=1", "max_side=20"]
    prepare(folders, tmp_path / "whole", *more)
    broken, script = tmp_path / "broken", "scripts/prepare_images.py"
    command = [script, *options(folders, broken), *more]
    start_and_kill(lambda: len(list(broken.glob("train/train-*.json"))) >= 2, *command, "workers=1")
    shards = sorted((broken / "train").glob(f"*.{form}"))
    assert 2 <= len(shards) < 12
    refusal = "is not complete; rerun scripts/prepare_images.py" if form == "tar" else ".* is missing; copy it"
    with pytest.raises(ConfigError, match=f"{broken}/train.?{refusal}"):
        load(broken)
    kept, cut = (path.with_suffix(f".{form}") for path in sorted((broken / "train").glob("train-*.json"))[:2])
    cut.write_bytes(cut.read_bytes()[:-1] + b"x")
    before = kept.stat().st_mtime_ns
    with lock_folder(broken):
        refused = run_script(*command, "workers=1")
    assert refused.returncode == 2
    assert refused.stderr == f"config error: {broken} is in use by another process; wait for it or stop it\n"
    done = run_script(*command, "workers=3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert kept.stat().st_mtime_ns == before, "a finished shard was written again"
    assert contents(broken) == contents(tmp_path / "whole")


def test_prepare_images_other_options_refused(folders, tmp_path):
    out, root = tmp_path / "out", shutil.copytree(folders, tmp_path / "data")
    prepare(root, out)
    before = contents(out)
    wrong = {
        "max_side=16": r"has other shards \(encoder: None -> 'Pillow .+'; max_side: None -> 16; quality: None -> 95\)",
        "format=parquet": r"has other shards \(format: 'tar' -> 'parquet'\); choose another out=...",
        "images_per_shard=6": r"\(images_per_shard: 5 -> 6\)",
    }
    for option, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            prepare(root, out, option)
    (root / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG").unlink()
    with pytest.raises(
        ConfigError, match=r"the images changed since .*/out/train was started \(.*source.files: 12 -> 11"
    ):
        prepare(root, out)
    assert contents(out) == before
    with pytest.raises(ConfigError, match=rf"out: {root}/train has files of another origin; choose another out"):
        prepare(root, root)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out: .*/file cannot be written: File exists"):
        prepare(folders, tmp_path / "file")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("max_side=0", "max_side must be >= 1 or null, got 0"),
        ("quality=96", "quality must be from 1 to 95, got 96"),
        ("images_per_shard=0", "images_per_shard must be >= 1, got 0"),
        ("data=digits data.num_classes=10", "data must be images in files, got 'digits'"),
    ],
)
def test_prepare_images_wrong_options_refused(folders, tmp_path, option, message):
    with pytest.raises(ConfigError, match=message):
        prepare(folders, tmp_path / "out", *option.split())
    assert not (tmp_path / "out").exists()


def deep(file):
    write_png16(file, size=24)


def cut(file):
    file.write_bytes(file.read_bytes()[:-200])


UNUSABLE = {
    "text": (lambda file: file.write_text("text"), "is not an image; replace it or remove it", []),
    "empty": (lambda file: file.write_bytes(b""), "is empty; copy it again", []),
    "truncated": (cut, r"cannot be decoded \(.*\); copy it again", ["max_side=20"]),
    "16 bits": (deep, "has 16 bits per channel, which would be truncated; convert it to 8 bits", ["max_side=20"]),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_prepare_images_unusable_image_one_line(folders, tmp_path, kind):
    root, (spoil, message, more) = shutil.copytree(folders, tmp_path / "data"), UNUSABLE[kind]
    file = root / "train" / CLASSES[2] / f"{CLASSES[2]}_3.JPEG"
    content = file.read_bytes()
    spoil(file)
    with pytest.raises(ConfigError, match=f"^{file}: {message}$"):
        prepare(root, tmp_path / "out", *more)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    with pytest.raises(ConfigError, match="out/train is not complete"):
        load(tmp_path / "out")
    if kind == "truncated":  # a copy of another size is another source
        file.write_bytes(content)
        prepare(root, tmp_path / "other", *more)


def test_prepare_images_full_disk_one_line(folders, tmp_path):
    """A limit on the size of files fails a write as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            prepare(folders, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert known_cause(error.value).endswith("train-000000.tar'")
    assert not list((tmp_path / "out").rglob("*.tmp"))
    prepare(folders, tmp_path / "out")
    assert len(load(tmp_path / "out")) == 12


def test_prepared_images_missing_or_cut_shard_refused(folders, tmp_path):
    """On opening, in one line; a rerun writes it again."""
    prepare(folders, tmp_path / "out")
    before, (first, second, _) = contents(tmp_path / "out"), sorted((tmp_path / "out" / "train").glob("*.tar"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:1024])
    with pytest.raises(ConfigError, match=r"2 of 3 files are missing or have another size, such as train-000000.tar"):
        load(tmp_path / "out")
    prepare(folders, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    load(tmp_path / "out", format="webdataset", train="train/train-{000000..000002}.tar")
    (tmp_path / "out" / "train" / "manifest.json").write_text('{"images_per_shard": 5}')
    with pytest.raises(ConfigError, match=r"train/manifest.json cannot be read \(.*\); restore it"):
        load(shutil.copytree(tmp_path / "out", tmp_path / "copy", ignore=shutil.ignore_patterns(".vca_index")))


def test_prepare_images_killed_worker_is_explained():
    line = "a worker process was killed, probably out of memory; rerun the command to resume"
    assert known_cause(BrokenProcessPool("abruptly")) == line


@pytest.mark.process
def test_run_on_resized_images_records_it(folders, tmp_path):
    """It is another data set: the run's config has the source, and a run cannot be resumed on the other one."""
    prepare(folders, tmp_path / "copied")
    prepare(folders, tmp_path / "resized", "max_side=16")
    train = ["data=imagefolder", "data.num_classes=3", "data.img_size=8", "model=deit_mini", "augment=none"]
    train += ["trainer.steps=1", "trainer.global_batch_size=2", "trainer.workers=0", f"out_dir={tmp_path}/runs"]

    def go(name, root):
        train_cls.run(compose("train_cls", [*train, f"name={name}", f"data.root={root}"]))
        return json.loads((tmp_path / "runs" / name / "config.json").read_text())["data_files"]

    source = {split: load(folders, split == "train").index.meta.identity for split in ("train", "val")}
    assert "prepared" not in go("copied", tmp_path / "copied")["train"]
    recorded = go("resized", tmp_path / "resized")
    for name, copies in (("copied", 0), ("resized", 2)):
        export(tmp_path / "runs" / name, None, tmp_path / "export" / name)
        lines = (tmp_path / "export" / name / "README.md").read_text().splitlines()
        assert sum(line.startswith(("- train files: 12, ", "- val files: 12, ")) for line in lines) == 2
        of = [f"JPEG quality 95, of files with sha256 `{one['sha256']}`)" for one in source.values()]
        assert sum(line.endswith(tuple(of)) for line in lines) == copies
    for split in ("train", "val"):
        assert recorded[split]["prepared"] == {"max_side": 16, "quality": 95, "source": source[split]}
    with pytest.raises(
        ConfigError, match=r"the files changed since .*data_files.train.prepared: None -> \{'max_side': 16"
    ):
        go("copied", tmp_path / "resized")
