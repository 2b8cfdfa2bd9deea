"""Every form of the same images has the same images, labels, classes and order."""

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from tests.data.forms import CLASSES, WRITERS, photos, write_form
from vca.data import load_dataset
from vca.data.config import DataConfig


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
