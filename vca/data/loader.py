"""The step-addressed loader: which image stands where in the batch of step s, and how it is augmented, are functions
of `(seed, s)` alone. They depend on neither workers, nor ranks, nor on where a run was interrupted.

The training images form one endless stream of positions. Epoch e holds `num_images` positions, a new permutation of
the images (with repeated augmentation: of the first part of them, each standing `repeats` times). The global batch of
step s is positions `s B .. (s + 1) B`; a rank takes its share of it in micro-batches.
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
    """One training image: the `repeat`-th version of image number `image` in `epoch`."""

    epoch: int
    image: int
    repeat: int


class Batch(NamedTuple):
    """Images `(b, in_chans, H, W)`, labels `(b,)`, indices `(b,)`, and the fingerprints `(b,)` of their addresses."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    fingerprints: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Images and labels on a device; indices and fingerprints stay on the CPU, where they are read."""
        images, labels = (tensor.to(device, non_blocking=True) for tensor in self[:2])
        return Batch(images, labels, self.indices, self.fingerprints)


class TrainOrder:
    """The stream of training positions as a pure function.

    Args:
        num_images: size of the training set.
        global_batch_size: B.
        seed: the run's.
        repeats: of repeated augmentation.
    """

    def __init__(self, num_images: int, global_batch_size: int, seed: int, repeats: int = 1) -> None:
        self.num_images, self.global_batch_size, self.seed, self.repeats = num_images, global_batch_size, seed, repeats
        self.permutation = lru_cache(maxsize=2)(self._permutation)

    @property
    def steps_per_epoch(self) -> int:
        """Updates that count as an epoch, at least 1."""
        return max(1, self.num_images // self.global_batch_size)

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        return torch.randperm(self.num_images, generator=generator).tolist()

    def address(self, position: int) -> Address:
        """What stands at a position of the stream."""
        epoch, offset = divmod(position, self.num_images)
        return Address(epoch, self.permutation(epoch)[offset // self.repeats], offset % self.repeats)

    def batch(self, step: int, start: int, stop: int) -> list[Address]:
        """Places `start .. stop` of the global batch of a step.

        With repeated augmentation the places are shuffled, so that the versions of an image are not neighbours, which
        Mixup would mix with each other.
        """
        places = list(range(self.global_batch_size))
        if self.repeats > 1:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "places", step))
            places = torch.randperm(self.global_batch_size, generator=generator).tolist()
        return [self.address(step * self.global_batch_size + place) for place in places[start:stop]]


class MicroBatches(Sampler[list[Address]]):
    """This rank's micro-batches from `first_step` to `last_step`, `accumulation` of them a step.

    Micro-batch m of a step (counted over all ranks) holds places `m b .. (m + 1) b`, even places first and odd ones
    last, backwards: timm's Mixup pairs the i-th with the i-th from the end, here always places 2 j and 2 j + 1.
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
    """An image of a data set and its label.

    Raises:
        ImageError: if it cannot be read; names its file.
    """
    try:
        return images[index]
    except Exception as error:  # PIL's parsers of unknown bytes raise anything
        files = getattr(images, "samples", None)
        file = files[index][0] if files else f"image {index} of the data set"
        reason = " ".join(str(error).removeprefix(f"{file}: ").split()) or type(error).__name__
        raise ImageError(f"{file} cannot be read ({reason}); restore it, then rerun the command to resume") from error


class AddressedImages(Dataset):
    """Training images by address: everything random in the transform is seeded by `(seed, epoch, image, repeat)`."""

    def __init__(self, images: Any, transform: Any, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, address: Address) -> tuple[Tensor, int, int, int]:
        picture, label = read_image(self.images, address.image)
        seed_everything(self.seed, "augment", *address)
        return self.transform(picture), label, address.image, derive_seed(*address)


class EvalImages(Dataset):
    """`(transformed image, label)` in the order of the data set."""

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
    """Yield, for each step, this rank's micro-batches on the CPU."""
    loader: DataLoader = DataLoader(
        AddressedImages(images, transform, seed),
        batch_sampler=micro_batches,
        num_workers=workers,
        worker_init_fn=start_worker,
        pin_memory=micro_batches.world.device.type == "cuda",
    )
    batches = iter(loader)
    for _ in micro_batches.steps:
        yield [Batch(*next(batches)) for _ in range(micro_batches.accumulation)]


def eval_loader(images: Any, transform: Any, world: World, batch_size: int, workers: int) -> DataLoader:
    """This rank's share of an evaluation set: every image on exactly one rank, nothing padded."""
    share = Subset(EvalImages(images, transform), range(world.rank, len(images), world.size))
    pin = world.device.type == "cuda"
    return DataLoader(share, batch_size, num_workers=workers, pin_memory=pin, worker_init_fn=start_worker)
