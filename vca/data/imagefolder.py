"""Labelled images in class folders or archives, read through an index; `vca/data/formats` has the formats."""

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vca.data.config import DataConfig
from vca.data.decode import decode_rgb, is_16_bit_color
from vca.data.index import ImageIndex
from vca.data.indexing import open_index
from vca.runtime.distributed import ONE, World
from vca.runtime.errors import ConfigError


class IndexedImages(Dataset):
    """Data set of `(RGB PIL image, label)`."""

    def __init__(self, index: ImageIndex) -> None:
        self.index = index

    @property
    def classes(self) -> list[str]:
        """Class names in the order of their labels."""
        return self.index.meta.classes

    @property
    def labels(self) -> np.ndarray:
        """Label of each image, `(images,)` int32."""
        return self.index.rows["label"]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        content, label = self.index.read(index), int(self.index.rows[index]["label"])
        if is_16_bit_color(content):  # which Pillow truncates without a warning
            problem = "has 16 bits per channel, which would be truncated; convert it to 8 bits"
            raise ConfigError(f"{self.index.source(index)}: {problem}")
        return decode_rgb(content), label


def load_imagefolder(config: DataConfig, train: bool, world: World = ONE) -> IndexedImages:
    """Load a split; every rank of `world` must call it."""
    return IndexedImages(open_index(config, "train" if train else "val", world))
