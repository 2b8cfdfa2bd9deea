"""CIFAR-10 in torchvision's layout: `data.root` holds `cifar-10-batches-py`."""

from pathlib import Path

from torch.utils.data import Dataset

from vca.data.config import DataConfig
from vca.runtime.errors import ConfigError, check


def load_cifar10(config: DataConfig, train: bool) -> Dataset:
    """`(PIL image, label)` of the 50,000 training or 10,000 test images.

    Raises:
        ConfigError: if the files are not at `data.root`, or are not the published ones.
    """
    from torchvision.datasets import CIFAR10

    check(config.in_chans == 3, "data.in_chans", "3 for cifar10", config.in_chans)
    check(config.num_classes == 10, "data.num_classes", "10 for cifar10", config.num_classes)
    if config.root is None or not (Path(config.root) / CIFAR10.base_folder).is_dir():
        raise ConfigError(f"data.root must be a folder that holds {CIFAR10.base_folder}/, got {config.root!r}")
    try:
        return CIFAR10(config.root, train=train)
    except RuntimeError as error:
        raise ConfigError(f"data.root={config.root}: {CIFAR10.base_folder}/ is incomplete or damaged") from error
