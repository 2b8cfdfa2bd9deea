"""Handwritten digits: the 1,797 images of 8 x 8 pixels in scikit-learn; nothing is downloaded."""

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vca.data.config import DataConfig
from vca.runtime.distributed import ONE, World
from vca.runtime.errors import check


class Digits(Dataset):
    """Digits as `(grey PIL image, label)`; every fifth image (index 4 modulo 5) is held out for evaluation."""

    def __init__(self, train: bool) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        held_out = np.arange(len(digits.target)) % 5 == 4
        chosen = ~held_out if train else held_out
        # Pixels are from 0 to 16.
        self.images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self.labels = digits.target[chosen].tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.labels[index]


def load_digits_images(config: DataConfig, train: bool, world: World = ONE) -> Dataset:
    """Load the 1,438 training or the 359 held-out digits."""
    check(config.in_chans == 1, "data.in_chans", "1 for digits", config.in_chans)
    check(config.num_classes == 10, "data.num_classes", "10 for digits", config.num_classes)
    return Digits(train)
