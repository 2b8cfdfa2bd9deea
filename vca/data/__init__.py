"""Data sets, augmentation and the step-addressed loader. To add a data set: one file, and one line in `DATASETS`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from vca.data.cifar10 import load_cifar10
from vca.data.classes import check_same_classes
from vca.data.config import DataConfig
from vca.data.digits import load_digits_images
from vca.data.imagefolder import IndexedImages, load_imagefolder
from vca.data.latents import load_latents
from vca.runtime.digest import image_sha256, images_sha256
from vca.runtime.distributed import ONE, World
from vca.runtime.errors import check

# name -> (config, train, world) -> data set of (PIL image, label); for `latents`: (moments, label)
DATASETS: dict[str, Callable[[DataConfig, bool, World], Any]] = {
    "cifar10": load_cifar10,
    "digits": load_digits_images,
    "imagefolder": load_imagefolder,
    "latents": load_latents,
}


def load_dataset(config: DataConfig, train: bool, world: World = ONE) -> Any:
    """Load the training or the evaluation split as a data set of `(PIL image, label)`.

    Every rank of `world` must call it: rank 0 indexes files, the others read its index.
    """
    check(config.name in DATASETS, "data.name", f"one of {sorted(DATASETS)}", config.name)
    return DATASETS[config.name](config, train, world)


def identify_files(**splits: Any) -> dict[str, Any]:
    """Return `{"data_files": {split: identity}}` for images in files, `{}` for other data; compared at resume.

    Raises:
        ConfigError: if the splits have different classes.
    """
    indexes = {name: images.index for name, images in splits.items() if isinstance(images, IndexedImages)}
    if len(indexes) == 2:
        check_same_classes(*(index.meta.classes for index in indexes.values()))
    return {"data_files": {name: index.meta.identity for name, index in indexes.items()}} if indexes else {}


def images_identity(images: Any) -> dict[str, Any]:
    """Return what identifies a split of images: of files their names and sizes, else a sha256 of pixels and labels."""
    if isinstance(images, IndexedImages):
        return images.index.meta.identity
    numbered = (images[index] for index in range(len(images)))
    digests = (image_sha256(np.asarray(image)) + str(label).encode() for image, label in numbered)
    return {"images": len(images), "sha256": images_sha256(digests)}
