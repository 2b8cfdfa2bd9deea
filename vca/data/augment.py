"""Image transforms and batch mixing, built from timm.

Loader workers decode and augment, and deliver uint8; normalisation, random erasing and mixing run on the device.
"""

import math
import random
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vca.data.config import DataConfig
from vca.runtime.errors import check
from vca.runtime.seeding import derive_seed

if TYPE_CHECKING:
    from torchvision.transforms import Compose


class Crop(Enum):
    """Training crop: random resized crop, random crop after zero padding, ADM's centre crop, or none."""

    resized = "resized"
    padded = "padded"
    adm = "adm"
    none = "none"


@dataclass
class AugmentConfig:
    """Augmentation of the training images; off by default.

    Attributes:
        crop: `resized` (area in `scale`, aspect ratio in `ratio`), `padded` (by `padding` pixels), `adm` (centre crop
            of the shorter side) or `none` (the image resized to a square).
        scale, ratio: `[min, max]` of the `resized` crop: area as a fraction (`scale`), aspect ratio (`ratio`).
        padding: pixels of zero padding on each side before the `padded` crop.
        interpolation: `bicubic`, `bilinear` or `random`, for the resized crop.
        hflip: probability of a horizontal flip.
        color_jitter: strength of the color jitter; ignored if `auto_augment` is set, as in timm.
        auto_augment: timm's policy string, such as `rand-m9-mstd0.5-inc1`; null disables it.
        re_prob, re_mode, re_count: probability, fill mode (`re_mode`) and boxes (`re_count`) of random erasing.
        mixup, cutmix: alpha of Mixup (`mixup`) and of CutMix (`cutmix`); 0 disables it.
        mixup_prob: probability of mixing a batch.
        mixup_switch_prob: probability of CutMix instead of Mixup if both are on.
        label_smoothing: smoothing of the targets of `train_cls.py`; `train_gen.py` has none.
        aug_repeats: repeated augmentation: copies of an image per batch; an epoch contains 1 / `aug_repeats` of the
            images.
    """

    crop: Crop = Crop.none
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    padding: int = 4
    interpolation: str = "bicubic"
    hflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    re_prob: float = 0.0
    re_mode: str = "pixel"
    re_count: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    label_smoothing: float = 0.0
    aug_repeats: int = 1

    def __post_init__(self) -> None:
        for key in ("hflip", "re_prob", "mixup_prob", "mixup_switch_prob"):
            check(0 <= getattr(self, key) <= 1, f"augment.{key}", "in [0, 1]", getattr(self, key))
        for key in ("color_jitter", "mixup", "cutmix", "padding"):
            check(getattr(self, key) >= 0, f"augment.{key}", ">= 0", getattr(self, key))
        for key in ("re_count", "aug_repeats"):
            check(getattr(self, key) >= 1, f"augment.{key}", ">= 1", getattr(self, key))
        check(0 <= self.label_smoothing < 1, "augment.label_smoothing", "in [0, 1)", self.label_smoothing)
        for key in ("scale", "ratio"):
            low_high = list(getattr(self, key))
            rule = "two numbers, 0 < low <= high"
            check(len(low_high) == 2 and 0 < low_high[0] <= low_high[1], f"augment.{key}", rule, low_high)
        if self.auto_augment is not None:
            policy = self.auto_augment.split("-")[0]
            policies = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")
            rule = f"null or a policy of timm ({', '.join(policies)}), such as rand-m9-mstd0.5-inc1"
            check(policy in policies, "augment.auto_augment", rule, self.auto_augment)
        known = ("bicubic", "bilinear", "random")
        check(self.interpolation in known, "augment.interpolation", "one of " + ", ".join(known), self.interpolation)
        check(self.re_mode in ("pixel", "const", "rand"), "augment.re_mode", "pixel, const or rand", self.re_mode)

    @property
    def mixes(self) -> bool:
        """Whether Mixup or CutMix is on."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass
class GeneratorAugmentConfig(AugmentConfig):
    """Augmentation for `train_gen.py`, which does not mix images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("mixup", "cutmix"):
            check(getattr(self, key) == 0, f"augment.{key}", "0 in generation", getattr(self, key))


def timm_options(augment: AugmentConfig, data: DataConfig) -> dict[str, Any]:
    """Return the arguments of timm's `create_transform` and `create_loader` for the training transform."""
    return {
        "is_training": True,
        "scale": tuple(augment.scale),
        "ratio": tuple(augment.ratio),
        "hflip": augment.hflip,
        "color_jitter": augment.color_jitter or None,
        "auto_augment": augment.auto_augment,
        "interpolation": augment.interpolation,
        "mean": tuple(data.mean),
        "std": tuple(data.std),
        "re_prob": augment.re_prob,
        "re_mode": augment.re_mode,
        "re_count": augment.re_count,
    }


def train_transform(augment: AugmentConfig, data: DataConfig) -> "Compose":
    """Build the training transform: PIL image to a normalised `(in_chans, img_size, img_size)` tensor."""
    from timm.data import create_transform
    from torchvision import transforms

    size = data.img_size
    transform = create_transform(size, **timm_options(augment, data))
    if augment.crop is not Crop.resized:  # the first of timm's transforms is the resized crop
        whole: Any = AdmCrop(size) if augment.crop is Crop.adm else transforms.Resize((size, size))
        crop = [transforms.RandomCrop(size, padding=augment.padding)] if augment.crop is Crop.padded else []
        transform.transforms[:1] = [whole, *crop]
    return transform


class AdmCrop:
    """Centre crop of the shorter side, resized to `size` pixels, as in ADM (arXiv 2105.05233).

    The image is halved by box averaging while its shorter side is at least twice `size`, then resized bicubically. DiT,
    SiT and ADM's reference statistics of ImageNet use this crop.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __repr__(self) -> str:
        return f"AdmCrop({self.size})"

    def __call__(self, image: Image.Image) -> Image.Image:
        while min(image.size) >= 2 * self.size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = self.size / min(image.size)
        width, height = round(image.width * scale), round(image.height * scale)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))


def eval_transform(data: DataConfig) -> "Compose":
    """Build the evaluation transform: resize, centre crop, to a normalised `(in_chans, img_size, img_size)` tensor."""
    from timm.data import create_transform

    return create_transform(
        data.img_size,
        is_training=False,
        interpolation=data.interpolation,
        mean=tuple(data.mean),
        std=tuple(data.std),
        crop_pct=data.crop_pct,
    )


def worker_transform(transform: "Compose") -> "Compose":
    """Return the part of a transform that loader workers run: PIL image to uint8 `(in_chans, img_size, img_size)`."""
    from timm.data.random_erasing import RandomErasing as TimmErasing
    from timm.data.transforms import MaybeToTensor
    from torchvision import transforms

    on_device = (MaybeToTensor, transforms.Normalize, TimmErasing)
    steps = [step for step in transform.transforms if not isinstance(step, on_device)]
    return transforms.Compose([*steps, transforms.PILToTensor()])


class Normalize:
    """Normalise uint8 images `(b, in_chans, H, W)` to float32 on a device, as ToTensor and Normalize do on a CPU."""

    def __init__(self, data: DataConfig, device: torch.device) -> None:
        self.mean, self.std = (torch.tensor(list(x), device=device)[:, None, None] for x in (data.mean, data.std))

    def __call__(self, images: Tensor) -> Tensor:
        return images.to(self.mean.device, torch.float32, non_blocking=True).div_(255).sub_(self.mean).div_(self.std)


class RandomErasing:
    """Random erasing (arXiv 1708.04896) with timm's distribution of boxes.

    A loader worker draws the boxes, the device fills them. The fill of an image depends on the seed and its
    fingerprint.
    """

    def __init__(self, augment: AugmentConfig, seed: int) -> None:
        self.probability, self.mode, self.max_count = augment.re_prob, augment.re_mode, augment.re_count
        self.seed = seed

    def draw(self, height: int, width: int) -> Tensor:
        """Draw the boxes of an image from `random`: `(re_count, 4)`, top, left, height, width; unused rows are 0."""
        boxes = torch.zeros(self.max_count, 4, dtype=torch.int64)
        if random.random() > self.probability:
            return boxes
        count = random.randint(1, self.max_count) if self.max_count > 1 else 1
        for index in range(count):
            for _ in range(10):
                area = random.uniform(0.02, 1 / 3) * height * width / count
                aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if h < height and w < width:
                    top, left = random.randint(0, height - h), random.randint(0, width - w)
                    boxes[index] = torch.tensor([top, left, h, w])
                    break
        return boxes

    def fill(self, images: Tensor, boxes: Tensor, fingerprints: Tensor) -> None:
        """Fill the boxes `(b, re_count, 4)` of normalised images in place; boxes and fingerprints are on the CPU."""
        generator = torch.Generator(images.device)
        for image, fingerprint, rows in zip(images, fingerprints.tolist(), boxes.tolist(), strict=True):
            generator.manual_seed(derive_seed(self.seed, "erase", fingerprint))
            for top, left, height, width in rows:
                box = image[:, top : top + height, left : left + width]
                if not box.numel():
                    continue
                if self.mode == "const":
                    box.zero_()
                elif self.mode == "rand":
                    box.copy_(torch.randn(len(box), 1, 1, generator=generator, device=box.device).expand_as(box))
                else:
                    box.copy_(torch.randn(box.shape, generator=generator, device=box.device))


class BatchMixer:
    """Apply Mixup or CutMix to a micro-batch, and build its soft targets.

    The random choices (Mixup or CutMix, lambda, the box) depend on `(seed, step)` only: one choice per global batch.
    timm pairs image i with image b - 1 - i; the loader orders a micro-batch so that these are always places 2 j and
    2 j + 1 of the global batch, on any number of ranks.
    """

    def __init__(self, augment: AugmentConfig, num_classes: int, seed: int) -> None:
        self.num_classes, self.smoothing, self.seed = num_classes, augment.label_smoothing, seed
        self.mixup = None
        if augment.mixes:
            from timm.data import Mixup

            self.mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mixup_prob,
                switch_prob=augment.mixup_switch_prob,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Images `(b, in_chans, H, W)` and labels `(b,)` to mixed images and soft targets `(b, num_classes)`."""
        if self.mixup is None:
            off = self.smoothing / self.num_classes
            targets = F.one_hot(labels, self.num_classes).to(images.dtype)
            return images, targets * (1 - self.smoothing) + off
        np.random.seed(derive_seed(self.seed, "mix", step) % 2**32)  # timm's Mixup draws from numpy's global state
        return self.mixup(images.clone(), labels)  # timm mixes in place
