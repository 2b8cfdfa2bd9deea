"""Data sets, augmentation and the step-addressed loader. To add a data set: one file, and one line in `DATASETS`."""

from collections.abc import Callable
from typing import Any

from vca.data.cifar10 import load_cifar10
from vca.data.config import DataConfig
from vca.data.digits import load_digits_images
from vca.data.imagefolder import files_identity, load_imagefolder
from vca.data.latents import load_latents
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
