"""Stage 4: training curves of VCA, with and without the kernels, and of softmax attention.

All images are on the device. Crops and flips are made there, from a generator that only the seed and the step decide,
so that runs of one seed see the same images. `root` has `cifar10.xz` (of `scripts/gpu_bundle.py`) or
`cifar-10-batches-py/`, and for Imagenette `train/` and `val/`.
"""

import lzma
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import train_cls
from benchmarks.gpu.runner import Context, Row
from models import build_model
from scripts.gpu_bundle import unpack_images
from vca.config import compose
from vca.data import load_dataset
from vca.data.augment import BatchMixer, Normalize, eval_transform, worker_transform
from vca.data.loader import Batch
from vca.evaluation.accuracy import evaluate
from vca.runtime.distributed import World
from vca.runtime.seeding import seed_torch
from vca.training.classification import ClassificationLoss
from vca.training.step import TrainState

KINDS = {"VCA fused": "vca", "VCA eager": "vca", "softmax": "softmax"}


class Images(NamedTuple):
    """Images `(N, 3, H, W)` uint8 and labels `(N,)` int64 of a split, on the device."""

    images: Tensor
    labels: Tensor


class Task(NamedTuple):
    """An experiment, its epochs and batch size, and the crops: smallest area, and shift in pixels."""

    experiment: str
    epochs: int
    batch: int
    area: float
    shift: int


CIFAR = Task("cifar10", 50, 512, 1.0, 4)
IMAGENETTE = Task("imagenette", 100, 128, 0.25, 0)


@cache
def load_cifar(context: Context) -> tuple[Images, Images]:
    """Load CIFAR-10, or 64 random images for a rehearsal."""
    if context.tiny:
        random = np.random.default_rng(0)
        splits = [(random.integers(0, 256, (64, 3, 32, 32), dtype=np.uint8), np.arange(64) % 10) for _ in range(2)]
    elif context.root is None:
        raise FileNotFoundError("--root must be a folder with cifar10.xz or cifar-10-batches-py/")
    elif (context.root / "cifar10.xz").is_file():
        splits = unpack_images(lzma.decompress((context.root / "cifar10.xz").read_bytes()))
    else:
        from torchvision.datasets import CIFAR10

        sets = [CIFAR10(context.root, train=train) for train in (True, False)]
        splits = [(one.data.transpose(0, 3, 1, 2), np.array(one.targets)) for one in sets]
    return on_device(*splits[0], context), on_device(*splits[1], context)


@cache
def load_imagenette(context: Context) -> tuple[Images, Images]:
    """Load both splits of an image folder at the evaluation crop of 224 px, decoded once."""
    if context.tiny:
        return load_cifar(context)
    config = compose("train_cls", ["experiment=imagenette", f"data.root={context.root}", "trainer.device=cpu"]).data
    transform, splits = worker_transform(eval_transform(config)), []
    for train in (True, False):
        data = load_dataset(replace(config, index=str(context.folder / "index")), train)

        def read(number: int, data: Any = data) -> tuple[np.ndarray, int]:
            image, label = data[number]
            return transform(image).numpy(), label

        with ThreadPoolExecutor(16) as pool:
            images, labels = zip(*pool.map(read, range(len(data))), strict=True)
        splits.append(on_device(np.stack(images), np.array(labels), context))
    return splits[0], splits[1]


def on_device(images: np.ndarray, labels: np.ndarray, context: Context) -> Images:
    return Images(*(torch.from_numpy(np.ascontiguousarray(x)).to(context.device) for x in (images, labels.astype(int))))


def augmented(images: Tensor, task: Task, seed: int, step: int) -> Tensor:
    """Crop, shift and flip uint8 images; returns float32 pixels from 0 to 255."""
    count, generator = len(images), torch.Generator().manual_seed(seed * 1_000_003 + step)
    scale = (torch.rand(count, generator=generator) * (1 - task.area) + task.area).sqrt()
    corner = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - scale)[:, None]
    side = images.shape[-1]
    corner += torch.randint(-task.shift, task.shift + 1, (count, 2), generator=generator) * 2 / side
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = scale * (1 - 2 * torch.randint(2, (count,), generator=generator))
    theta[:, 1, 1], theta[:, :, 2] = scale, corner
    grid = F.affine_grid(theta.to(images.device, non_blocking=True), [count, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False)


def train(context: Context, task: Task, kind: str, seed: int, data: tuple[Images, Images]) -> Iterator[Row]:
    """Train a network; yield a row with loss and accuracy ten times in the run."""
    epochs, batch = (1, 32) if context.tiny else (task.epochs, task.batch)
    device, (training, held_out) = context.device, data
    overrides = [f"experiment={task.experiment}", f"attention={KINDS[kind]}", "data.root=-"]
    overrides += [f"trainer.epochs={epochs}", f"trainer.global_batch_size={batch}", f"seed={seed}"]
    if kind != "softmax":
        backend = "triton" if kind == "VCA fused" and device.type == "cuda" else "eager"
        overrides.append(f"attention.backend={backend}")
    if context.tiny:
        overrides += ["model=deit_mini", "model.depth=1", "model.patch_size=8", "data.img_size=32", "augment=cifar"]
    config = compose("train_cls", overrides)
    seed_torch(seed, "model")
    model = build_model(config.model, config.attention)
    steps = len(training.labels) // batch
    state = TrainState(model, config.trainer, config.optim, World(0, 0, 1, device), steps)
    loss_of = ClassificationLoss(BatchMixer(config.augment, config.data.num_classes, seed))
    normalize, order = Normalize(config.data, device), torch.Generator().manual_seed(seed)
    start, losses = time.perf_counter(), []
    for epoch in range(1, epochs + 1):
        permutation = torch.randperm(len(training.labels), generator=order).to(device)
        for chosen in permutation[: steps * batch].view(steps, batch):
            images = normalize(augmented(training.images[chosen], task, seed, state.step))
            one = Batch(images, training.labels[chosen], torch.empty(0), torch.empty(0))
            losses.append(state.train_step([one], loss_of, seed).loss)
        if epoch % max(1, epochs // 10) == 0:
            batches = (
                (normalize(images), labels)
                for images, labels in zip(held_out.images.split(500), held_out.labels.split(500), strict=True)
            )
            result = evaluate({"val": state.model}, batches, state.world, state.autocast)
            row = {"name": kind, "seed": seed, "epoch": epoch, "step": state.step, "images": len(training.labels)}
            row |= {"loss": torch.stack(losses).mean().item(), "val/top1": result["val/top1"]}
            yield {**row, "seconds": time.perf_counter() - start}
            losses = []


def curve(
    task: Task, load: Callable[[Context], tuple[Images, Images]], kind: str, seed: int
) -> Callable[[Context], Iterator[Row]]:
    """Return the measurement of one run."""

    def measure(context: Context) -> Iterator[Row]:
        train_cls.register_configs()
        yield from train(context, task, kind, seed, load(context))

    return measure
