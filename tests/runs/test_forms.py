"""Runs on the same images in each form are equal to the bit, also after a kill and a resume."""

import pytest

import train_cls
import train_gen
from tests.data.forms import CLASSES, WRITERS, photos, write_form
from tests.processes import run_script
from tests.support import SMALL_DIT, TINY, assert_same, metrics, train_and_kill, untimed
from vca.config import compose
from vca.runtime.errors import ConfigError
from vca.training.checkpoint import list_checkpoints, load_latest

pytestmark = pytest.mark.process
SIZED = ("data=imagefolder", f"data.num_classes={len(CLASSES)}", "data.img_size=16")
CLASSIFIER = (
    *TINY,
    *SIZED,
    "augment=imagenet",
    "trainer.global_batch_size=8",
    "trainer.eval_every=5",
    "optim.warmup_epochs=0",
)
GENERATOR = (
    *SMALL_DIT,
    *SIZED,
    f"sampled_classes={len(CLASSES)}",
    "augment.hflip=0.5",
    "trainer.global_batch_size=8",
    "trainer.log_every=1",
    "trainer.eval_every=0",
)
# name -> (script, its options)
RUNS = {"train_cls": (train_cls, CLASSIFIER), "train_gen": (train_gen, GENERATOR)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the images in each form, in a folder named after the form."""
    root = tmp_path_factory.mktemp("forms")
    photos(root / "folder", per_class=10, size=32)
    for form in WRITERS:
        write_form(form, root / "folder", root / form)
    return root


def five_steps(name, data, out, *overrides):
    """Run five steps on the data; return the losses and the last checkpoint."""
    script, options = RUNS[name]
    length = ("trainer.steps=5", "trainer.workers=0", f"data.root={data}", f"out_dir={out}", "name=run")
    script.run(compose(name, [*options, *length, *overrides]))
    losses = [record["loss"] for record in metrics(out / "run") if "loss" in record]
    return losses, load_latest(out / "run" / "checkpoints")


@pytest.fixture(scope="module")
def expected(root, tmp_path_factory):
    """Losses and state of five steps on class folders, by script."""
    return {name: five_steps(name, root / "folder", tmp_path_factory.mktemp("folder")) for name in RUNS}


@pytest.mark.parametrize(
    ("name", "form"), [*(("train_cls", form) for form in WRITERS), ("train_gen", "zip"), ("train_gen", "parquet")]
)
def test_run_equal_in_each_form(root, expected, tmp_path, name, form):
    losses, state = five_steps(name, root / form, tmp_path)
    assert len(losses) == 5
    assert losses == expected[name][0]
    assert_same(state, expected[name][1])


LONG = (
    *CLASSIFIER,
    "trainer.steps=28",
    "trainer.checkpoint_every=5",
    "trainer.eval_every=0",
    "trainer.workers=2",
    "trainer.micro_batch_size=4",
    "data.check_seconds=0",
)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """An uninterrupted run on class folders, on two ranks with two workers each."""
    out = tmp_path_factory.mktemp("whole")
    done = run_script("train_cls.py", *LONG, f"data.root={root}/folder", f"out_dir={out}", "name=run", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / "run"


@pytest.mark.parametrize("form", ["class tars", "snappy parquet"])
def test_resume_after_kill_equals_class_folders(root, whole, tmp_path, form):
    command = ("train_cls.py", *LONG, f"data.root={root}/{form}", f"out_dir={tmp_path}", "name=run")
    reached = train_and_kill(tmp_path / "run", 8, *command, ranks=2)
    assert 8 <= reached < 28
    resumed = run_script(*command, ranks=2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resumed from step" in resumed.stdout
    one, other = (load_latest(folder / "checkpoints") for folder in (whole, tmp_path / "run"))
    assert one["step"] == 28
    assert_same(one, other)
    assert untimed(whole) == untimed(tmp_path / "run")


@pytest.mark.parametrize("form", ["zip", "class tars"])
def test_run_on_class_folders_resumes_on_archive(root, expected, tmp_path, capsys, form):
    """Images with the same names, sizes and labels are the same data."""
    five_steps("train_cls", root / "folder", tmp_path, "trainer.checkpoint_every=3")
    list_checkpoints(tmp_path / "run" / "checkpoints")[-1].unlink()  # as if it was killed before the last save
    losses, state = five_steps("train_cls", root / form, tmp_path, "trainer.checkpoint_every=3")
    assert "resumed from step 3, 2 steps left" in capsys.readouterr().out
    assert losses == expected["train_cls"][0]
    assert_same(state, expected["train_cls"][1])


def test_resume_on_other_data_refused(root, tmp_path):
    five_steps("train_cls", root / "folder", tmp_path)
    photos(tmp_path / "more", per_class=11, size=32)
    write_form("zip", tmp_path / "more", tmp_path / "zip")
    changed = (
        r"the files changed since the run .* \(data_files.train.bytes: \d+ -> \d+; data_files.train.files: 30 -> 33; "
    )
    with pytest.raises(ConfigError, match=changed):
        five_steps("train_cls", tmp_path / "zip", tmp_path)
    with pytest.raises(ConfigError, match=r"data_files\.train\.sha256"):  # its names end in .jpg
        five_steps("train_cls", root / "webdataset", tmp_path)
