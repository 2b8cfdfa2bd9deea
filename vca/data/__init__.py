"""Data sets, augmentation and the step-addressed loader. To add a data set: one file, and one line in `DATASETS`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from vca.data.cifar10 import load_cifar10
from vca.data.config import DataConfig
from vca.data.digits import load_digits_images
from vca.data.imagefolder import files_identity, load_imagefolder
from vca.data.latents import load_latents
from vca.runtime.digest import image_sha256, images_sha256
from vca.runtime.distributed import World
from vca.runtime.errors import check

# name -> (config, train) -> data set of (PIL image, label); for `latents`: (moments, label)
DATASETS: dict[str, Callable[[DataConfig, bool], Any]] = {
    "cifar10": load_cifar10,
    "digits": load_digits_images,
    "imagefolder": load_imagefolder,
    "latents": load_latents,
}


def load_dataset(config: DataConfig, train: bool) -> Any:
    """Load the training or the evaluation split as a data set of `(PIL image, label)`."""
    check(config.name in DATASETS, "data.name", f"one of {sorted(DATASETS)}", config.name)
    return DATASETS[config.name](config, train)


def identify_files(world: World, **splits: Any) -> dict[str, Any]:
    """Return `{"data_files": {split: identity}}` for image folders, `{}` for other data; compared at resume."""
    identities = world.from_main(lambda: {name: files_identity(images) for name, images in splits.items()})
    return {"data_files": identities} if all(identities.values()) else {}


def images_identity(images: Any) -> dict[str, Any]:
    """Return what identifies a split of images: of image folders their files, else a sha256 of pixels and labels."""
    if (files := files_identity(images)) is not None:
        return files
    numbered = (images[index] for index in range(len(images)))
    digests = (image_sha256(np.asarray(image)) + str(label).encode() for image, label in numbered)
    return {"images": len(images), "sha256": images_sha256(digests)}
