"""The data check: each kind of broken folder gives its message, in the script and at the start of a run."""

import os
import platform
import re
import shutil
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import train_cls
from scripts import doctor as scripts_doctor
from tests.data.forms import CLASSES, add, photos, write_webdataset, write_zip
from tests.data.test_loader import write_image_folder
from tests.processes import run_command, run_script
from tests.support import write_png16
from vca.config import DoctorConfig, compose
from vca.data import load_dataset
from vca.data.config import DataConfig
from vca.data.doctor import examine_datasets, examine_file, shared_memory_note
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError
from vca.training import cluster_check

TINY_RUN = ("model=deit_mini", "augment=none", "data.img_size=8", "trainer.steps=1", "trainer.global_batch_size=2")


def doctor(root, *options):
    return run_script("scripts/doctor.py", "data=imagefolder", f"data.root={root}", *options)


def flat_val(root):
    for name in ("cat", "dog"):
        for file in (root / "val" / name).iterdir():
            file.rename(root / "val" / f"{name}{file.name}")
        (root / "val" / name).rmdir()


def truncate(root):
    file = root / "train" / "cat" / "1.jpg"
    file.write_bytes(file.read_bytes()[:-300])


def sixteen_bits(root):
    (root / "val" / "dog" / "1.jpg").unlink()
    Image.fromarray(np.full((30, 30), 40_000, dtype=np.uint16)).save(root / "val" / "dog" / "deep.png")


def sixteen_bits_rgb(root):
    (root / "train" / "dog" / "1.jpg").unlink()
    write_png16(root / "train" / "dog" / "deep.png")


def dangling_link(root):
    file = root / "train" / "dog" / "2.jpg"
    file.unlink()
    file.symlink_to(root / "nowhere.jpg")


def cmyk(root):
    Image.new("CMYK", (30, 30), (10, 20, 30, 40)).save(root / "train" / "cat" / "press.jpg")


def bad_exif(root):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0" + b"\xff" * 40  # a directory of five entries that are nonsense
    Image.new("RGB", (30, 30), (9, 9, 9)).save(root / "train" / "cat" / "camera.jpg", exif=exif)


# Unusable data. kind -> (damage, message)
BROKEN = {
    "flat val": (flat_val, r"val/ has 8 files and no class folders; sort them into val/<class>/"),
    "a class too few": (
        lambda root: [shutil.rmtree(root / split / "dog") for split in ("train", "val")],
        r"data.num_classes is 2, but .*train has 1 class folders; complete it or set data.num_classes=1",
    ),
    "a class in val only": (lambda root: shutil.rmtree(root / "train" / "dog"), r"'dog' is in val/ but not in train/"),
    "an empty class": (
        lambda root: [file.unlink() for file in (root / "val" / "cat").iterdir()],
        r"val/: .*no valid file for the classes cat",
    ),
    "a missing file": (dangling_link, r"train/dog/2.jpg: is a dangling link; restore or remove it"),
    "an empty file": (lambda root: (root / "val" / "cat" / "0.jpg").write_bytes(b""), r"val/cat/0.jpg: is empty; copy"),
    "a truncated file": (truncate, r"train/cat/1.jpg: cannot be decoded \(.*truncated.*\); copy it again"),
    "no image": (lambda root: (root / "val" / "cat" / "0.jpg").write_text("hello"), r"0.jpg: is not an image; replace"),
    "16-bit grey": (
        sixteen_bits,
        r"val/dog/deep.png: has more than 8 bits per pixel .*values up to 40000\); it would be clipped",
    ),
    "16-bit RGB": (
        sixteen_bits_rgb,
        r"train/dog/deep.png: has 16 bits per channel, which would be truncated; convert it to 8 bits$",
    ),
}
NOTED = {
    "CMYK": (cmyk, r"note: .*train/cat/press.jpg: is CMYK; harmless"),
    "bad EXIF": (bad_exif, r"note: .*train/cat/camera.jpg: has bad EXIF data .*; harmless"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_data_check_broken_folder_stops_run(tmp_path, kind):
    root = tmp_path / "data"
    write_image_folder(root)
    damage, message = BROKEN[kind]
    damage(root)
    options = ["data=imagefolder", f"data.root={root}", "data.num_classes=2", f"out_dir={tmp_path}/out", *TINY_RUN]
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=message) as stopped:
        train_cls.run(compose("train_cls", options))
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists(), "something was written"
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize("kind", NOTED)
def test_data_check_harmless_image_noted(tmp_path, kind, capsys):
    """ImageNet has such images: they are reported and read."""
    root = tmp_path / "data"
    write_image_folder(root)
    damage, message = NOTED[kind]
    damage(root)
    options = ["data=imagefolder", f"data.root={root}", "data.num_classes=2", f"out_dir={tmp_path}/out", *TINY_RUN]
    train_cls.run(compose("train_cls", options))
    said = capsys.readouterr().out
    assert "0 errors, 1 notes, such as " in said
    assert re.search(message.removeprefix("note: "), said), said


@pytest.mark.process
def test_doctor_lists_every_damaged_file(tmp_path):
    """One line per corrupt file and exit code 2; exit code 0 for an intact folder."""
    write_image_folder(tmp_path)
    sound = doctor(tmp_path, "data.num_classes=2")
    assert sound.returncode == 0, sound.stderr
    assert "read all 16 images" in sound.stdout
    assert "0 errors, 0 notes" in sound.stdout
    for damage in (truncate, sixteen_bits, dangling_link, cmyk, bad_exif):
        damage(tmp_path)
    done = doctor(tmp_path, "data.num_classes=2")
    assert done.returncode == 2
    assert done.stdout.count("\nerror: ") == 3
    assert done.stdout.count("\nnote: ") == 2
    for kind, pattern in {**BROKEN, **NOTED}.items():
        if kind in ("a missing file", "a truncated file", "16-bit grey", *NOTED):
            assert re.search(pattern[1], done.stdout), (kind, done.stdout)
    assert done.stderr.count("\n") == 1
    assert done.stderr == f"config error: data.root={tmp_path}: 3 errors\n"


@pytest.mark.process
def test_doctor_reports_folder_and_file_errors(tmp_path):
    """Errors of folders do not hide errors of files."""
    write_image_folder(tmp_path)
    truncate(tmp_path)
    flat_val(tmp_path)
    done = doctor(tmp_path, "data.num_classes=2")
    assert done.returncode == 2
    assert done.stdout.count("val/ has 8 files and no class folders") == 1
    assert re.search(r"error: .*train/cat/1.jpg: cannot be decoded", done.stdout)
    assert "read all 16 images" in done.stdout
    assert done.stderr == f"config error: data.root={tmp_path}: 2 errors\n"
    nowhere = doctor(tmp_path / "nowhere")
    assert nowhere.returncode == 2
    assert "must be a folder with train/ and val/" in nowhere.stdout


def lines_of(root, capsys, **options):
    """Run the data check in this process; return the lines that it prints, the last being the error."""
    with pytest.raises(ConfigError) as refused:
        scripts_doctor.run(DoctorConfig(DataConfig("imagefolder", str(root), **{"num_classes": 3} | options)))
    return [*capsys.readouterr().out.splitlines(), str(refused.value)]


def damaged_zip(folders, root):
    """Write an intact zip of training images, and one with three broken members of validation images."""
    write_zip(folders / "train", root / "train.zip")
    write_zip(folders / "val", root / "val.zip")
    with zipfile.ZipFile(root / "val.zip", "a") as archive:
        archive.writestr(f"val/{CLASSES[0]}/empty.JPEG", b"")
        twice = f"val/{CLASSES[0]}/{CLASSES[0]}_0.JPEG"
        archive.writestr(twice, archive.read(twice))
        archive.writestr(f"val/{CLASSES[0]}/bzip2.JPEG", b"packed", zipfile.ZIP_BZIP2)


def damaged_shards(folders, root):
    """Write intact training shards, and a validation shard without a label, that is truncated."""
    write_webdataset(folders / "train", root / "train")
    with tarfile.open(root / "val-000000.tar", "w") as archive:
        for name in ("a", "b", "c"):
            add(archive, f"{name}.jpg", (folders / "val" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG").read_bytes())
            if name != "b":
                add(archive, f"{name}.cls", b"0")
    content = (root / "val-000000.tar").read_bytes()
    (root / "val-000000.tar").write_bytes(content[: content.index(b"c.cls") + 100])


def wrong_class_count(folders, root):
    for split in ("train", "val"):
        write_zip(folders / split, root / f"{split}.zip")
    return {"num_classes": 4}


# Damaged archives. kind -> (writer, messages, images that are read)
DAMAGED = {
    "zip": (
        damaged_zip,
        ["_0.JPEG exists twice; zip", "bzip2.JPEG has compression method 12", "empty.JPEG: is empty; copy it again"],
        13,
    ),
    "shards": (
        damaged_shards,
        ["sample b has no label, an integer in .cls", "val-000000.tar: .*truncated.*; copy it again"],
        7,
    ),
    "class count": (wrong_class_count, [f"data.num_classes is 4, but .*{s}.zip has 3" for s in ("train", "val")], 12),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", DAMAGED)
def test_doctor_lists_every_problem_of_archives(tmp_path, capsys, kind):
    """One line for each problem; all readable images are examined."""
    write, messages, images = DAMAGED[kind]
    root = tmp_path / "data"
    root.mkdir()
    options = write(photos(tmp_path / "photos", per_class=2), root) or {}
    lines = lines_of(root, capsys, **options)
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == len(messages), lines
    for message in messages:
        assert any(re.search(message, line) for line in errors), (message, lines)
    assert any(line.startswith(f"read all {images} images") for line in lines), lines
    assert lines[-1] == f"data.root={root}: {len(messages)} errors"


def test_examine_time_limit_leaves_files_unread(tmp_path):
    """The summary counts the files that were not read."""
    write_image_folder(tmp_path)
    config = compose("train_cls", ["data=imagefolder", f"data.root={tmp_path}", "data.num_classes=2"])
    examination = examine_datasets([load_dataset(config.data, True), object()], seconds=0)
    assert str(examination).startswith("read 0 of 8 images")


def test_examine_image_valid_images_pass(tmp_path):
    for mode in ("RGB", "L", "P", "RGBA", "1"):
        path = tmp_path / f"{mode}.png"
        Image.new(mode, (40, 30)).save(path)
        assert examine_file(os.fspath(path)) == []
    for size in ((6, 6), (7, 100)):
        Image.new("RGB", size).save(tmp_path / "small.jpg")
        assert examine_file(os.fspath(tmp_path / "small.jpg")) == []
    Image.fromarray(np.full((30, 30), 200, dtype=np.uint16)).save(tmp_path / "eight_of_sixteen.png")
    assert examine_file(os.fspath(tmp_path / "eight_of_sixteen.png")) == []


def test_examine_image_decompression_bomb_refused(tmp_path):
    """PIL raises its own error."""
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    (finding,) = examine_file(os.fspath(tmp_path / "huge.png"))
    assert finding.fatal
    assert "decompression bomb" in finding.problem


def test_shared_memory_note_when_too_little():
    """pytorch#5040: workers die with a bus error when the batches they hold ready do not fit."""
    free = shutil.disk_usage("/dev/shm").free
    assert shared_memory_note(4, free // 10) is None
    note = shared_memory_note(4, free)
    assert re.fullmatch(r"/dev/shm has \d+ MiB free, but 4 workers may need \d+ MiB; give .*", note)
    assert shared_memory_note(0, 10 * free) is None
    assert shared_memory_note(4, 10 * free, folder="/nowhere") is None


def test_imagefolder_without_val_loads_train_split(tmp_path):
    """`val/` is required only by its readers."""
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "0.png")
    config = DataConfig(name="imagefolder", root=str(tmp_path), num_classes=2)
    assert len(load_dataset(config, train=True)) == 2
    with pytest.raises(ConfigError, match="must be a folder with train/ and val/ class folders"):
        load_dataset(config, train=False)


@pytest.mark.process
def test_doctor_cluster_all_checks_pass_on_two_ranks(tmp_path):
    """The script starts two local ranks, prints one line per check, and leaves no files."""
    command = ("scripts/doctor.py", "--cluster", "trainer.device=cpu", f"out_dir={tmp_path}")
    done = run_command(sys.executable, *command)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    checks = ["ranks", "rendezvous", "all-reduce", "bandwidth", "speed", "bf16", "data", "disk", "resume"]
    assert [line.split()[:2] for line in lines[:-1]] == [["ok", check] for check in checks]
    assert lines[0].split()[2] == "2"
    assert lines[-1].startswith("total ")
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_doctor_cluster_failed_checks_reported(tmp_path):
    """Missing data and an invalid folder are reported, and the other checks still run."""
    (tmp_path / "file").write_text("")
    command = ("scripts/doctor.py", "--cluster", "trainer.device=cpu", f"out_dir={tmp_path}/file/runs")
    done = run_script(*command, "data=cifar10", "data.root=/nowhere", ranks=2)
    assert done.returncode != 0
    state = {line.split()[1]: line.split()[0] for line in done.stdout.splitlines() if line.startswith(("ok", "error"))}
    assert {name for name, what in state.items() if what == "error"} == {"data", "disk", "resume"}
    assert "config error: failed checks: data, disk, resume" in done.stderr


def test_doctor_cluster_checks_detect_faults(tmp_path, monkeypatch):
    one = World(0, 0, 1, torch.device("cpu"))
    monkeypatch.setattr(World, "sum", lambda self, tensor: tensor + 1)
    with pytest.raises(cluster_check.CheckError, match="wrong by 1"):
        cluster_check.all_reduce(one)
    with pytest.raises(cluster_check.CheckError, match=r"checkpoints need .* GiB"):
        cluster_check.disk(one, tmp_path, 10**13, keep=2, ema=True)
    weights = iter([{"w": torch.zeros(2), "b": torch.ones(1)}, {"w": torch.tensor([0.0, 1e-7]), "b": torch.ones(1)}])

    def train(folder):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        return next(weights)

    with pytest.raises(cluster_check.CheckError, match="1 of 2 tensors differ after a resume, such as w"):
        cluster_check.resume(one, train, tmp_path / "resume")


ONE_BAD_NODE = """
from vca.runtime import distributed
from vca.runtime.errors import ConfigError
from vca.training import cluster_check
from vca.training import cluster_check

with distributed.start("cpu", 0.5) as world:
    def load():
        if world.rank == 1:
            raise ConfigError("data.root is empty here")
        return [[1], [2]]

    cluster_check.report("data", lambda: cluster_check.data(world, load, None, 0, 0), world)
    cluster_check.report("after", lambda: cluster_check.all_reduce(world), world)
"""


@pytest.mark.process
def test_doctor_cluster_error_on_one_rank_reported(tmp_path):
    """The message has the rank and its node, and the following checks run."""
    script = tmp_path / "bad.py"
    script.write_text(ONE_BAD_NODE)
    done = run_script(script, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = done.stdout.splitlines()
    assert first == f"error  data           rank 1 on {platform.node()}: data.root is empty here"
    assert second.startswith("ok     after")
