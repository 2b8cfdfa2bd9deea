"""Every form of the same images has the same images, labels, classes and order."""

import shutil
import zipfile

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from tests.data.forms import CLASSES, WRITERS, photos, write_class_tars, write_form, write_webdataset
from vca.data import load_dataset
from vca.data.config import DataConfig
from vca.runtime.errors import ConfigError


def load(root, train=True, **options):
    return load_dataset(DataConfig("imagefolder", str(root), **{"num_classes": len(CLASSES), **options}), train)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("photos") / "data")


def test_folder_equals_torchvision(folders):
    for split in ("train", "val"):
        expected, images = ImageFolder(folders / split), load(folders, split == "train")
        assert images.classes == expected.classes
        assert [images.index.source(index) for index in range(len(images))] == [path for path, _ in expected.samples]
        assert images.labels.tolist() == expected.targets


@pytest.mark.parametrize("form", WRITERS)
def test_form_equals_class_folders(folders, tmp_path, form):
    root = write_form(form, folders, tmp_path / "data")
    for train in (True, False):
        expected, images = load(folders, train), load(root, train)
        assert images.classes == list(CLASSES)
        assert images.labels.tolist() == expected.labels.tolist()
        for index in range(len(expected)):
            assert images.index.read(index) == expected.index.read(index)
        assert np.array_equal(images[3][0], expected[3][0])


def write_zip(file, names):
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return file


@pytest.mark.parametrize("other", ["", "test/ant/3.jpg"])
def test_archive_of_the_training_split_has_no_evaluation_split(tmp_path, other):
    """It would be evaluated on its training images, or on classes called train and test."""
    file = write_zip(tmp_path / "data.zip", filter(None, ["train/ant/1.jpg", "train/bee/2.jpg", other]))
    assert load(file, num_classes=2).classes == ["ant", "bee"]
    with pytest.raises(ConfigError, match=f"{file}: no images of val found"):
        load(file, train=False, num_classes=2)


def test_archive_class_called_train(tmp_path):
    """It is a class beside other classes, and a split if it contains classes."""
    file = write_zip(tmp_path / "data.zip", ["train/1.jpg", "tram/2.jpg"])
    assert load(file, num_classes=2).classes == ["train", "tram"]
    file = write_zip(tmp_path / "both.zip", ["train/train/1.jpg", "train/tram/2.jpg", "val/3.jpg", "doc/4.jpg"])
    assert load(file, num_classes=2).classes == ["train", "tram"]


def test_archive_without_splits_is_not_evaluated_on_its_training_images(tmp_path):
    file = write_zip(tmp_path / "data.zip", ["ant/1.jpg", "bee/2.jpg"])
    assert len(load(file, num_classes=2)) == 2
    with pytest.raises(ConfigError, match=f"{file}: has no folders train/ and val/; set data.train and data.val"):
        load(file, train=False, num_classes=2)
    assert len(load(None, train=False, num_classes=2, val=str(file))) == 2


def test_name_of_a_split_is_a_word(folders, tmp_path):
    """The training shards of `carnival` are not evaluation shards too."""
    for split in ("train", "val"):
        write_webdataset(folders / split, tmp_path / f"carnival-{split}")
    for train, split in ((True, "train"), (False, "val")):
        assert all(f"carnival-{split}-" in file for file in load(tmp_path, train).index.files)


def test_archive_beside_class_folders_is_not_read(folders, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(folders / "train", root / "train")
    write_class_tars(folders / "val", root / "train" / "backup.tar")
    assert load(root).index.meta.format == "folder"
    shutil.copyfile(root / "train" / "backup.tar", tmp_path / "backup.tar")
    (tmp_path / "train").mkdir()
    (tmp_path / "backup.tar").rename(tmp_path / "train" / "backup.tar")
    assert load(tmp_path).index.meta.format == "tar"
