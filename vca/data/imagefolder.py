"""Images in class folders, as ImageNet is laid out: `root/train/<class>/*.jpg` and `root/val/<class>/*.jpg`."""

from pathlib import Path

from torch.utils.data import Dataset

from vca.data.config import DataConfig
from vca.runtime.errors import ConfigError


def load_imagefolder(config: DataConfig, train: bool) -> Dataset:
    """`(RGB PIL image, label)`; classes are numbered by the sorted names of the folders in `train`.

    Raises:
        ConfigError: if a folder is missing, a class has no image, or the classes are not `data.num_classes` ones or
            not the same in both splits.
    """
    from torchvision.datasets import ImageFolder

    root = Path(config.root or "")
    if config.root is None or not (root / "train").is_dir() or not (root / "val").is_dir():
        raise ConfigError(f"data.root must be a folder that holds train/ and val/ class folders, got {config.root!r}")
    folder = root / ("train" if train else "val")
    try:
        images = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise ConfigError(f"data.root={config.root}: {folder.name}/: {error}") from error
    splits = [{entry.name for entry in (root / split).iterdir() if entry.is_dir()} for split in ("train", "val")]
    if splits[0] != splits[1]:
        odd = sorted(splits[0] ^ splits[1])[0]
        raise ConfigError(f"data.root={config.root}: class folder '{odd}' is in only one of train/ and val/")
    if len(images.classes) != config.num_classes:
        raise ConfigError(
            f"data.num_classes is {config.num_classes}, but {folder} holds {len(images.classes)} class folders; "
            f"set data.num_classes={len(images.classes)} or mend the folder"
        )
    return images
