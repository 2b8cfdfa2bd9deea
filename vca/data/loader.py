"""The step-addressed loader: the images of step s, their order and their augmentation depend on `(seed, s)` alone.

They do not depend on the number of workers or ranks, or on where a run was interrupted.

The training images form an endless stream of positions. Each epoch is `num_images` positions: a new permutation of the
images, or with repeated augmentation the first part of one, each image `repeats` times in a row. The global batch of
step s is positions `s B .. (s + 1) B`; each rank loads its part of it in micro-batches.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from vca.data.augment import AugmentConfig, Normalize, RandomErasing, train_transform, worker_transform
from vca.data.config import DataConfig
from vca.data.imagefolder import IndexedImages
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
    """A micro-batch.

    Attributes:
        images: `(b, in_chans, H, W)`; uint8 from the workers, normalised on the device.
        labels: `(b,)`.
        indices, fingerprints: indices of the images and hashes of their addresses, `(b,)`, always on the CPU.
        boxes: rectangles of random erasing, `(b, count, 4)`, on the CPU.
        draws: further random numbers of each image, such as the noise of a generator.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    fingerprints: Tensor
    boxes: Tensor | None = None
    draws: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """The operations that turn images into network inputs: in the loader workers, then on the device.

    Attributes:
        transform: image to tensor, in the worker, seeded by the image's address.
        on_device: tensors of a batch, moved to the device, to the network's float32 input.
        erasing: random erasing, or None.
        draw: maps the fingerprint of an image to further random numbers, or None.
        item_bytes: size of an item that a worker sends.
    """

    transform: Callable[[Any], Tensor]
    on_device: Callable[[Tensor], Tensor]
    item_bytes: int
    erasing: RandomErasing | None = None
    draw: Callable[[int], tuple[Tensor, ...]] | None = None

    def to_device(self, batch: Batch, device: torch.device) -> Batch:
        """Move a batch from the workers to the device, and finish its images there."""
        images = self.on_device(batch.images.to(device, non_blocking=True))
        if self.erasing is not None and batch.boxes is not None:
            self.erasing.fill(images, batch.boxes, batch.fingerprints)
        labels, *draws = (x.to(device, non_blocking=True) for x in (batch.labels, *batch.draws))
        return batch._replace(images=images, labels=labels, draws=tuple(draws))


def image_inputs(augment: AugmentConfig, data: DataConfig, seed: int, device: torch.device) -> Inputs:
    """Return the operations of `train_transform`, split between worker and device."""
    erasing = RandomErasing(augment, seed) if augment.re_prob > 0 else None
    transform = worker_transform(train_transform(augment, data))
    return Inputs(transform, Normalize(data, device), data.image_bytes, erasing)


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
        file = images.index.source(index) if isinstance(images, IndexedImages) else f"image {index} of the data set"
        reason = " ".join(str(error).removeprefix(f"{file}: ").split()) or type(error).__name__
        raise ImageError(f"{file} cannot be read ({reason}); restore it, then rerun the command to resume") from error


class AddressedImages(Dataset):
    """Augmented training images by address; the transform is seeded by `(seed, epoch, image, repeat)`."""

    def __init__(self, images: Any, inputs: Inputs, seed: int) -> None:
        self.images, self.inputs, self.seed = images, inputs, seed

    def __getitem__(self, address: Address) -> tuple[Any, ...]:
        """Return the fields of a `Batch` for one image."""
        image, label = read_image(self.images, address.image)
        seed_everything(self.seed, "augment", *address)
        item = self.inputs.transform(image)
        erasing, draw, fingerprint = self.inputs.erasing, self.inputs.draw, derive_seed(*address)
        boxes = erasing.draw(*item.shape[1:]) if erasing is not None else torch.zeros(0, 4, dtype=torch.int64)
        return item, label, address.image, fingerprint, boxes, draw(fingerprint) if draw is not None else ()


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
    images: Any, inputs: Inputs, seed: int, micro_batches: MicroBatches, workers: int
) -> Iterator[list[Batch]]:
    """Yield this rank's micro-batches of each step, on the device.

    On a GPU, batches are copied from pinned memory on a stream of their own, one step ahead.
    """
    device = micro_batches.world.device
    steps = worker_batches(images, inputs, seed, micro_batches, workers)
    if device.type == "cpu":
        for step in steps:
            yield [inputs.to_device(batch, device) for batch in step]
        return
    stream = torch.cuda.Stream(device)
    ready: list[Batch] = []
    for step in itertools.chain(steps, [[]]):
        with torch.cuda.stream(stream):
            following = [inputs.to_device(batch, device) for batch in step]
        if ready:
            yield ready
        torch.cuda.current_stream(device).wait_stream(stream)
        for batch in following:
            for tensor in (batch.images, batch.labels, *batch.draws):
                tensor.record_stream(torch.cuda.current_stream(device))
        ready = following


def worker_batches(
    images: Any, inputs: Inputs, seed: int, micro_batches: MicroBatches, workers: int
) -> Iterator[list[Batch]]:
    """Yield this rank's micro-batches of each step, on the CPU."""
    loader: DataLoader = DataLoader(
        AddressedImages(images, inputs, seed),
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
    """Build the loader of this rank's part of an evaluation set; each image is on exactly one rank, without padding.

    Its workers stay for the next evaluation.
    """
    part = Subset(EvalImages(images, transform), range(world.rank, len(images), world.size))
    return DataLoader(
        part,
        batch_size,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=start_worker,
        persistent_workers=workers > 0,
    )
