"""Images in class folders, as ImageNet is laid out: `root/train/<class>/*.jpg` and `root/val/<class>/*.jpg`."""

import os
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from torch.utils.data import Dataset

from vca.data.config import DataConfig
from vca.runtime.errors import ConfigError

SPLITS = ("train", "val")


def load_imagefolder(config: DataConfig, train: bool) -> Dataset:
    """`(RGB PIL image, label)`; classes are numbered by the sorted names of the folders in `train`.

    For the training split `val/` need not be there (generation has no use for it); where it is, it must fit.

    Raises:
        ConfigError: if a folder is missing or has no class folders, a class has no image, or the classes are not
            `data.num_classes` ones or not the same in both splits.
    """
    from torchvision.datasets import ImageFolder

    root = Path(config.root or "")
    splits = SPLITS if not train or (root / "val").is_dir() else SPLITS[:1]
    if config.root is None or not all((root / split).is_dir() for split in splits):
        raise ConfigError(f"data.root must be a folder that holds train/ and val/ class folders, got {config.root!r}")
    classes = {split: {entry.name for entry in os.scandir(root / split) if entry.is_dir()} for split in splits}
    for split in splits:
        if not classes[split]:
            files = sum(1 for entry in os.scandir(root / split) if entry.is_file())
            raise ConfigError(
                f"data.root={config.root}: {split}/ holds {files} files and no class folders; "
                f"sort them into {split}/<class>/"
            )
    if odd := sorted(classes["train"] ^ classes[splits[-1]]):
        there, lacking = SPLITS if odd[0] in classes["train"] else SPLITS[::-1]
        others = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise ConfigError(
            f"data.root={config.root}: class folder '{odd[0]}'{others} is in {there}/ and not in {lacking}/; "
            f"complete {lacking}/ or remove it"
        )
    if len(classes["train"]) != config.num_classes:
        raise ConfigError(
            f"data.num_classes is {config.num_classes}, but {root / 'train'} holds {len(classes['train'])} class "
            f"folders; complete it, or set data.num_classes={len(classes['train'])}"
        )
    split = "train" if train else "val"
    try:
        return ImageFolder(str(root / split), loader=read_rgb)
    except FileNotFoundError as error:  # a class without an image
        raise ConfigError(f"data.root={config.root}: {split}/: {error}") from error


def read_rgb(path: str) -> Image.Image:
    """An image file as RGB.

    Raises:
        ConfigError: if it has 16 bits a channel, of which Pillow would drop half without a word.
    """
    with open(path, "rb") as file:
        if is_16_bit_color(file):
            raise ConfigError(f"{path}: has 16 bits a channel, and half of them would be lost; convert it to 8 bits")
        return Image.open(file).convert("RGB")


def is_16_bit_color(file: BinaryIO) -> bool:
    """Whether a file is a PNG of 16 bits a channel; grey ones, which Pillow opens with a mode of their own, left out.

    Pillow opens the others as mode `RGB`, like those of 8 bits: bit depth and colour type are read from the header.
    """
    position = file.tell()
    file.seek(0)
    header = file.read(26)
    file.seek(position)
    return header[:8] == b"\x89PNG\r\n\x1a\n" and header[24:25] == b"\x10" and header[25:26] != b"\0"
