"""Image folders in ImageNet's layout: `root/train/<class>/*.jpg` and `root/val/<class>/*.jpg`."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from vca.data.config import DataConfig
from vca.data.doctor import examine_image, is_16_bit_color
from vca.runtime.errors import ConfigError

SPLITS = ("train", "val")


def load_imagefolder(config: DataConfig, train: bool) -> Dataset:
    """Load a split as `(RGB PIL image, label)`; labels are the sorted names of the folders in `train/`."""
    from torchvision.datasets import ImageFolder

    check_class_folders(config, train)
    split = "train" if train else "val"
    try:
        return ImageFolder(str(Path(config.root or "", split)), loader=read_rgb)
    except FileNotFoundError as error:  # a class without an image
        raise ConfigError(f"data.root={config.root}: {split}/: {error}") from error


def check_class_folders(config: DataConfig, train: bool) -> None:
    """Check the class folders of an image folder; `val/` is optional for training, as generation does not read it.

    Raises:
        ConfigError: if a folder is missing or has no class folders, the splits have different classes, or their number
            is not `data.num_classes`.
    """
    root = Path(config.root or "")
    splits = SPLITS if not train or (root / "val").is_dir() else SPLITS[:1]
    if config.root is None or not all((root / split).is_dir() for split in splits):
        raise ConfigError(f"data.root must be a folder with train/ and val/ class folders, got {config.root!r}")
    classes = {split: {entry.name for entry in os.scandir(root / split) if entry.is_dir()} for split in splits}
    for split in splits:
        if not classes[split]:
            files = sum(1 for entry in os.scandir(root / split) if entry.is_file())
            raise ConfigError(
                f"data.root={config.root}: {split}/ has {files} files and no class folders; "
                f"sort them into {split}/<class>/"
            )
    if odd := sorted(classes["train"] ^ classes[splits[-1]]):
        present, absent = SPLITS if odd[0] in classes["train"] else SPLITS[::-1]
        others = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise ConfigError(
            f"data.root={config.root}: class folder '{odd[0]}'{others} is in {present}/ but not in {absent}/; "
            f"complete {absent}/ or remove it"
        )
    if len(classes["train"]) != config.num_classes:
        count = len(classes["train"])
        raise ConfigError(
            f"data.num_classes is {config.num_classes}, but {root / 'train'} has {count} class folders; "
            f"complete it or set data.num_classes={count}"
        )


def read_rgb(path: str) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        ConfigError: if it has 16 bits per channel, which Pillow truncates to 8 without a warning.
    """
    with open(path, "rb") as file:
        if is_16_bit_color(file):
            raise ConfigError(f"{path}: has 16 bits per channel, which would be truncated; convert it to 8 bits")
        image = Image.open(file)
        image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # `convert` copies RGB too


def files_identity(images: Any) -> dict[str, Any] | None:
    """Return number, total bytes, and a sha256 over paths and sizes of an image folder's files; None for other data.

    Raises:
        ConfigError: if a file is missing.
    """
    if not hasattr(images, "samples"):
        return None
    paths, prefix = [path for path, _ in images.samples], f"{images.root}/"
    chunks = [paths[start : start + 4096] for start in range(0, len(paths), 4096)]
    with ThreadPoolExecutor(16) as threads:  # hides the latency of a network file system
        sizes = [size for chunk in threads.map(file_sizes, chunks) for size in chunk]
    digest = hashlib.sha256()
    for path, size in zip(paths, sizes, strict=True):
        digest.update(os.fsencode(path.removeprefix(prefix)) + b"\0%d\0" % size)
    return {"files": len(paths), "bytes": sum(sizes), "sha256": digest.hexdigest()}


def file_sizes(paths: Sequence[str]) -> list[int]:
    sizes = []
    for path in paths:
        try:
            sizes.append(Path(path).stat().st_size)
        except OSError as error:
            raise ConfigError("; ".join(map(str, examine_image(path))) or str(error)) from error
    return sizes
