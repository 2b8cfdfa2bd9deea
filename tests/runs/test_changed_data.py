"""A resume on changed data is an error."""

import shutil

import pytest
from PIL import Image

import train_cls
import train_gen
from tests.data.test_loader import write_image_folder
from tests.support import SMALL_DIT
from vca.config import compose
from vca.runtime.errors import ConfigError

pytestmark = pytest.mark.process


def add_image(root):
    shutil.copy(root / "train" / "cat" / "1.jpg", root / "train" / "cat" / "0b.jpg")


def rename_image(root):
    (root / "train" / "dog" / "0.jpg").rename(root / "train" / "dog" / "9.jpg")


def replace_image(root):
    Image.new("RGB", (30, 30)).save(root / "val" / "cat" / "1.jpg")


CHANGED = {
    "added": (add_image, r"data_files.train.files: 8 -> 9; data_files.train.sha256"),
    "renamed": (rename_image, r"\(data_files.train.sha256: '\w+' -> '\w+'\)"),
    "replaced": (replace_image, r"\(data_files.val.bytes: \d+ -> \d+; data_files.val.sha256"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_resume_with_changed_images_refused(tmp_path, change):
    """Added, renamed or replaced images are an error; the same files in another folder are not."""
    root, moved = tmp_path / "data", tmp_path / "moved"
    write_image_folder(root)
    options = ["data=imagefolder", "data.num_classes=2", f"out_dir={tmp_path}/out", "name=run", "model=deit_mini"]
    options += [
        "augment=none",
        "data.img_size=8",
        "trainer.steps=1",
        "trainer.global_batch_size=2",
        "trainer.workers=0",
    ]

    def go(root, *more):
        return train_cls.run(compose("train_cls", [*options, f"data.root={root}", *more]))

    result = go(root)
    assert go(shutil.copytree(root, moved)) == result
    alter, what = CHANGED[change]
    alter(root)
    with pytest.raises(ConfigError, match=what) as refused:
        go(root)
    line = str(refused.value)
    assert "\n" not in line
    assert line.startswith(f"data.root={root}: the files changed since the run {tmp_path}/out/run was started (")
    assert line.endswith("; restore them, or choose another name=...")
    assert "val/top1" in go(root, "trainer.eval_only=true")  # an evaluation may use other images


def test_resume_with_changed_images_refused_in_generation(tmp_path):
    root = tmp_path / "data"
    write_image_folder(root, splits=("train",))
    options = [*SMALL_DIT, "data=imagefolder", f"data.root={root}", "data.num_classes=2", "data.img_size=8"]
    options += [
        "sampled_classes=2",
        "trainer.steps=1",
        "trainer.global_batch_size=2",
        f"out_dir={tmp_path}/out",
        "name=run",
    ]
    train_gen.run(compose("train_gen", options))
    add_image(root)
    with pytest.raises(ConfigError, match=r"the files changed since .*train.files: 8 -> 9"):
        train_gen.run(compose("train_gen", options))
