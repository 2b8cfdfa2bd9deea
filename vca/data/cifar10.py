"""CIFAR-10 in torchvision's layout: `data.root` contains `cifar-10-batches-py`."""

from pathlib import Path

from torch.utils.data import Dataset

from vca.data.config import DataConfig
from vca.runtime.distributed import ONE, World
from vca.runtime.errors import ConfigError, check


def load_cifar10(config: DataConfig, train: bool, world: World = ONE) -> Dataset:
    """Load the 50,000 training or 10,000 test images as `(PIL image, label)`.

    Raises:
        ConfigError: if the files are not in `data.root`, or are not the published ones.
    """
    from torchvision.datasets import CIFAR10

    check(config.in_chans == 3, "data.in_chans", "3 for cifar10", config.in_chans)
    check(config.num_classes == 10, "data.num_classes", "10 for cifar10", config.num_classes)
    if config.root is None or not (Path(config.root) / CIFAR10.base_folder).is_dir():
        raise ConfigError(f"data.root must be a folder with {CIFAR10.base_folder}/, got {config.root!r}")
    try:
        return CIFAR10(config.root, train=train)
    except RuntimeError as error:
        raise ConfigError(
            f"data.root={config.root}: {CIFAR10.base_folder}/ is incomplete or corrupt; download it again"
        ) from error
