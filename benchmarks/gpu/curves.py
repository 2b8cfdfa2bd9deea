"""Stage 4: every attention of the project trained under one recipe.

All images are on the device. Crops, flips, noise and times come from generators that only the seed and the step decide,
so that runs of one seed see the same. `root` has `cifar10.xz` (of `scripts/gpu_bundle.py`) or `cifar-10-batches-py/`,
and for Imagenette `train/` and `val/`.
"""

import lzma
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import cache, partial
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_cls
import train_gen
from benchmarks.gpu.runner import Context, Measurement, Row
from benchmarks.timing import graphed
from models import build_model
from scripts.gpu_bundle import unpack_images
from vca.config import compose
from vca.data import load_dataset
from vca.data.augment import BatchMixer, Normalize, eval_transform, worker_transform
from vca.data.loader import Batch
from vca.evaluation.accuracy import evaluate
from vca.generation.autoencoder import load_autoencoder
from vca.generation.objective import build_objective
from vca.runtime.distributed import World
from vca.runtime.seeding import derive_seed, seed_torch
from vca.training import step
from vca.training.classification import ClassificationLoss
from vca.training.generation import GenerationLoss
from vca.training.optim import learning_rate
from vca.training.step import TrainState

ROWS = 6  # of a run
# Attentions whose authors use no depthwise convolution of v, with it and without it; then those with it.
OPTIONAL = ["softmax", "differential", "differential_v2", "linear", "linear_softmax", "linear_relu", "circulant"]
OPTIONAL += ["inline", "ttt"]
INCLUDED = ["agent", "focused_linear", "polaformer", "mala", "mhla", "vca", "vca_token_lambda", "vca_no_norm", "vca_v2"]


class Images(NamedTuple):
    """Images `(N, 3, H, W)` uint8 and labels `(N,)` int64 of a split, on the device."""

    images: Tensor
    labels: Tensor


class Case(NamedTuple):
    """A run of a task."""

    task: str
    attention: str
    local_branch: bool
    seed: int
    backend: str = "eager"  # triton: VCA in the fused kernels


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


def augmented(images: Tensor, task: "Task", seed: int, step: int) -> Tensor:
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


class Task(NamedTuple):
    """An experiment, its data, and the crops of training: smallest area, and shift in pixels."""

    script: str
    overrides: tuple[str, ...]
    load: Callable[[Context], tuple[Images, Images]]
    area: float = 1.0
    shift: int = 0


CIFAR = ("experiment=cifar10", "model.class_token=false", "trainer.global_batch_size=256")
IMAGENETTE = ("experiment=imagenette", "trainer.epochs=100", "trainer.global_batch_size=128")
TASKS = {
    "CIFAR-10": Task("train_cls", (*CIFAR, "trainer.ema_decay=null"), load_cifar, shift=4),
    "CIFAR-10, DiT": Task("train_gen", ("experiment=cifar10_dit", "trainer.ema_decay=null"), load_cifar),
    "Imagenette": Task("train_cls", IMAGENETTE, load_imagenette, area=0.25),
}
TINY = ("model.depth=1", "model.patch_size=8", "trainer.global_batch_size=32", "trainer.precision=fp32")
TINY_CLASSIFIER = ("model=deit_mini", "augment=cifar", "data.img_size=32", "trainer.epochs=1")


def cases() -> Iterator[Case]:
    """Yield the runs, seed by seed, so that a stage that is cut off has all attentions with the first seeds."""
    for seed in range(3):
        for name in OPTIONAL:
            yield from (Case("CIFAR-10", name, local, seed) for local in (True, False))
        yield from (Case("CIFAR-10", name, True, seed) for name in INCLUDED)
        yield Case("CIFAR-10", "vca", True, seed, "triton")
        if seed < 2:
            kinds = [("softmax", False), ("softmax", True), ("inline", True), ("vca", True)]
            yield from (Case("CIFAR-10, DiT", name, local, seed) for name, local in kinds)
    yield Case("Imagenette", "vca", True, 0, "triton")
    yield Case("Imagenette", "softmax", False, 0)


def settings(case: Case, context: Context) -> Any:
    """Return the config of a run; that of a rehearsal has one layer and two steps."""
    task = TASKS[case.task]
    overrides = [*task.overrides, f"attention={case.attention}", f"attention.local_branch={case.local_branch}"]
    overrides += ["data.root=-", f"seed={case.seed}"]
    if case.attention.startswith("vca"):
        overrides.append(f"attention.backend={case.backend if context.device.type == 'cuda' else 'eager'}")
    if context.tiny:
        overrides += [*TINY, *(TINY_CLASSIFIER if task.script == "train_cls" else ("trainer.steps=2",))]
    (train_cls if task.script == "train_cls" else train_gen).register_configs()
    return compose(task.script, overrides)


def loss_function(config: Any, model: Any, device: torch.device) -> Callable[[nn.Module, Batch, int], Tensor]:
    """Return the loss of `TrainState.train_step`."""
    if not hasattr(config, "objective"):
        return ClassificationLoss(BatchMixer(config.augment, config.data.num_classes, config.seed))
    objective, autoencoder = build_objective(config.objective, device), load_autoencoder(config.autoencoder, device)
    return GenerationLoss(objective, autoencoder, False, model.config.class_dropout_prob, model.null_label)


def draws(images: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw what `GenerationLoss` needs for each image: two uniform numbers and the noise `(b, 1, C, H, W)`."""
    generator = torch.Generator(images.device).manual_seed(derive_seed(seed, "draws", step))
    u, drop = torch.rand(2, len(images), generator=generator, device=images.device)
    return u, drop, torch.randn(images[:, None].shape, generator=generator, device=images.device)


def step_function(state: TrainState, loss_of: Any, seed: int, example: Batch) -> Callable[[Batch], Tensor]:
    """Return the training step, from batch to loss. On a GPU it is a CUDA graph.

    The host needs longer for the launches of a small network than the GPU for its work. The step is captured with
    `example`, and runs once with a learning rate of 0, which only changes the moments of the optimizer.
    """
    device = state.world.device
    if device.type == "cpu":
        return lambda batch: state.train_step([batch], loss_of, seed).loss
    lr, loss = torch.zeros((), device=device), torch.zeros((), device=device)
    draws = tuple(x.clone() for x in example.draws)
    static = example._replace(images=example.images.clone(), labels=example.labels.clone(), draws=draws)
    for group in state.optimizer.param_groups:
        group.update(lr=lr, capturable=True)

    def run() -> None:
        loss.copy_(state.train_step([static], loss_of, seed).loss)

    with mock.patch.object(state, "set_learning_rates", return_value=0.0), mock.patch.object(step, "seed_torch"):
        replay = graphed(run, device)
    state.step = 0

    def replayed(batch: Batch) -> Tensor:
        for old, new in zip((*static[:2], *static.draws), (*batch[:2], *batch.draws), strict=True):
            old.copy_(new)
        lr.fill_(learning_rate(state.optim, state.step, state.total_steps, state.steps_per_epoch, state.peak_lr))
        replay()
        state.step += 1
        return loss.clone()

    return replayed


def train(context: Context, case: Case) -> Iterator[Row]:
    """Train a network; yield rows with the mean loss since the row before, the last one with a classifier's top-1."""
    task, config, device = TASKS[case.task], settings(case, context), context.device
    training, held_out = task.load(context)
    count, size, normalize = len(training.labels), config.trainer.global_batch_size, Normalize(config.data, device)
    seed_torch(case.seed, "model")
    model = build_model(config.model, config.attention)
    state = TrainState(model, config.trainer, config.optim, World(0, 0, 1, device), count // size)
    order, permutation = torch.Generator().manual_seed(case.seed), torch.empty(0, dtype=torch.int64)
    loss_of, run, losses, start = loss_function(config, model, device), None, [], time.perf_counter()
    for number in range(1, state.total_steps + 1):
        if len(permutation) < size:
            permutation = torch.randperm(count, generator=order).to(device)
        chosen, permutation = permutation[:size], permutation[size:]
        images = normalize(augmented(training.images[chosen], task, case.seed, number))
        noise = draws(images, case.seed, number) if task.script == "train_gen" else ()
        batch = Batch(images, training.labels[chosen], torch.empty(0), torch.empty(0), None, noise)
        run = run or step_function(state, loss_of, case.seed, batch)
        losses.append(run(batch))
        if ROWS * number // state.total_steps == ROWS * (number - 1) // state.total_steps:
            continue
        row = {**case._asdict(), "step": number, "epoch": round(number * size / count, 2), "batch_size": size}
        row |= {"images": count, "loss": torch.stack(losses).mean().item()}
        if number == state.total_steps and task.script == "train_cls":
            pairs = zip(held_out.images.split(1000), held_out.labels.split(1000), strict=True)
            batches = ((normalize(images), labels) for images, labels in pairs)
            result = evaluate({"val": state.model}, batches, state.world, state.autocast)
            row |= {"test_images": len(held_out.labels), "val/top1": result["val/top1"]}
        losses = []
        yield {**row, "seconds": time.perf_counter() - start}


@cache
def worker() -> ProcessPoolExecutor:
    """Return the process of the runs, whose crash ends one run instead of the stage."""
    return ProcessPoolExecutor(1, get_context("spawn"))


def rows_of(context: Context, case: Case) -> list[Row]:
    return list(train(context, case))


def measure(context: Context, case: Case) -> list[Row]:
    """Train a network in the process of the runs.

    Raises:
        BrokenProcessPool: if the process crashes; the next call starts another one.
    """
    try:
        return worker().submit(rows_of, context, case).result()
    except BrokenProcessPool:
        worker.cache_clear()
        raise


def measurements() -> Iterator[Measurement]:
    """Yield the runs, seed by seed; a rehearsal has those of VCA and of softmax attention."""
    minutes = {"CIFAR-10": 0.15, "CIFAR-10, DiT": 0.25, "Imagenette": 1.5}
    for case in cases():
        local, backend = "local branch" if case.local_branch else "no local branch", case.backend
        name = f"{case.task}, {case.attention}, {local}, backend {backend}, seed {case.seed}"
        yield Measurement(name, partial(measure, case=case), minutes[case.task], case.attention in ("softmax", "vca"))
