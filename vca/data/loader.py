"""The step-addressed loader: the images of step s, their order and their augmentation depend on `(seed, s)` alone.

They do not depend on the number of workers or ranks, or on where a run was interrupted.

The training images form an endless stream of positions. Each epoch is `num_images` positions: a new permutation of the
images, or with repeated augmentation the first part of one, each image `repeats` times in a row. The global batch of
step s is positions `s B .. (s + 1) B`; each rank loads its part of it in micro-batches.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from vca.runtime.distributed import World
from vca.runtime.errors import ImageError
from vca.runtime.seeding import derive_seed, seed_everything
from vca.runtime.signals import start_worker


class Address(NamedTuple):
    """Address of an augmented training image: version `repeat` of image `image` in `epoch`."""

    epoch: int
    image: int
    repeat: int


class Batch(NamedTuple):
    """Images `(b, in_chans, H, W)`, labels `(b,)`, indices `(b,)` and hashes of their addresses `(b,)`."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    fingerprints: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Move images and labels; indices and fingerprints are read on the CPU."""
        images, labels = (tensor.to(device, non_blocking=True) for tensor in self[:2])
        return Batch(images, labels, self.indices, self.fingerprints)


class TrainOrder:
    """The order of the training images, as a pure function of seed and position.

    `global_batch_size` is B, the images per step over all ranks; `repeats` the copies of an image (repeated
    augmentation).
    """

    def __init__(self, num_images: int, global_batch_size: int, seed: int, repeats: int = 1) -> None:
        self.num_images, self.global_batch_size, self.seed, self.repeats = num_images, global_batch_size, seed, repeats
        self.permutation = lru_cache(maxsize=2)(self._permutation)

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.num_images // self.global_batch_size)

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        return torch.randperm(self.num_images, generator=generator).tolist()

    def address(self, position: int) -> Address:
        """Return the image at a position of the stream."""
        epoch, offset = divmod(position, self.num_images)
        return Address(epoch, self.permutation(epoch)[offset // self.repeats], offset % self.repeats)

    def batch(self, step: int, start: int, stop: int) -> list[Address]:
        """Return the images at places `start .. stop` of the global batch of a step.

        With repeated augmentation the places are shuffled: Mixup mixes neighbours, which would be copies of one image.
        """
        places = list(range(self.global_batch_size))
        if self.repeats > 1:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "places", step))
            places = torch.randperm(self.global_batch_size, generator=generator).tolist()
        return [self.address(step * self.global_batch_size + place) for place in places[start:stop]]


class MicroBatches(Sampler[list[Address]]):
    """This rank's micro-batches of the steps `first_step .. last_step`, `accumulation` per step.

    Micro-batch m of a step, counted over all ranks, is places `m b .. (m + 1) b`: the even ones in order, then the odd
    ones in reverse, because timm's Mixup pairs image i with image b - 1 - i and the pairs must be places 2 j, 2 j + 1.
    """

    def __init__(
        self, order: TrainOrder, world: World, micro_batch_size: int, accumulation: int, first_step: int, last_step: int
    ) -> None:
        self.order, self.world = order, world
        self.micro_batch_size, self.accumulation = micro_batch_size, accumulation
        self.steps = range(first_step, last_step)

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[Address]]:
        for step in self.steps:
            for index in range(self.accumulation):
                start = (self.world.rank * self.accumulation + index) * self.micro_batch_size
                addresses = self.order.batch(step, start, start + self.micro_batch_size)
                yield addresses[0::2] + addresses[1::2][::-1]


def read_image(images: Any, index: int) -> tuple[Any, int]:
    """Read an image and its label.

    Raises:
        ImageError: if the image cannot be read; the message has its file.
    """
    try:
        return images[index]
    except Exception as error:  # PIL raises many kinds of errors on corrupt files
        files = getattr(images, "samples", None)
        file = files[index][0] if files else f"image {index} of the data set"
        reason = " ".join(str(error).removeprefix(f"{file}: ").split()) or type(error).__name__
        raise ImageError(f"{file} cannot be read ({reason}); restore it, then rerun the command to resume") from error


class AddressedImages(Dataset):
    """Augmented training images by address; the transform is seeded by `(seed, epoch, image, repeat)`."""

    def __init__(self, images: Any, transform: Any, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, address: Address) -> tuple[Tensor, int, int, int]:
        image, label = read_image(self.images, address.image)
        seed_everything(self.seed, "augment", *address)
        return self.transform(image), label, address.image, derive_seed(*address)


class EvalImages(Dataset):
    """Evaluation images as `(transformed image, label)`, in the order of the data set."""

    def __init__(self, images: Any, transform: Any) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = read_image(self.images, index)
        return self.transform(image), label


def train_loader(
    images: Any, transform: Any, seed: int, micro_batches: MicroBatches, workers: int
) -> Iterator[list[Batch]]:
    """Yield this rank's micro-batches of each step, on the CPU."""
    loader: DataLoader = DataLoader(
        AddressedImages(images, transform, seed),
        batch_sampler=micro_batches,
        num_workers=workers,
        worker_init_fn=start_worker,
        pin_memory=micro_batches.world.device.type == "cuda",
    )
    batches = iter(loader)
    for _ in micro_batches.steps:
        try:
            of_step = [Batch(*next(batches)) for _ in range(micro_batches.accumulation)]
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            raise RuntimeError("DataLoader worker exited while it sent a batch") from error
        yield of_step


def eval_loader(images: Any, transform: Any, world: World, batch_size: int, workers: int) -> DataLoader:
    """Build the loader of this rank's part of an evaluation set; each image is on exactly one rank, without padding."""
    part = Subset(EvalImages(images, transform), range(world.rank, len(images), world.size))
    pin = world.device.type == "cuda"
    return DataLoader(part, batch_size, num_workers=workers, pin_memory=pin, worker_init_fn=start_worker)
