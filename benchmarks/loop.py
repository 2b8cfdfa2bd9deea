"""Time of the trainer's steps compared with loops that do the same arithmetic and nothing else."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.timing import Budget, compare
from models import build_model
from models.deit import DeiTConfig
from models.dit import DiTConfig
from vca import VCAConfig
from vca.attention.softmax import SoftmaxConfig
from vca.data.augment import AugmentConfig, BatchMixer
from vca.data.loader import Batch
from vca.generation.autoencoder import AutoencoderConfig, load_autoencoder
from vca.generation.objective import DiffusionConfig, build_objective
from vca.runtime.distributed import World
from vca.runtime.rundir import RunDirectory
from vca.training.classification import ClassificationLoss
from vca.training.config import TrainerConfig
from vca.training.generation import GenerationLoss
from vca.training.optim import OptimConfig, build_optimizer
from vca.training.run import TrainingRun
from vca.training.step import TrainState

STEPS = 10  # per round
SMALL: dict[str, Any] = {"embed_dim": 96, "num_heads": 3, "num_classes": 10, "contrast_grid": [2, 2]}
# Name, model, images per step: for a CPU.
ROWS: list[tuple[str, Any, int]] = [
    ("DeiT, 8 px, 16 tokens", DeiTConfig(img_size=8, patch_size=2, depth=4, **SMALL), 64),
    ("DeiT, 32 px, 64 tokens", DeiTConfig(img_size=32, patch_size=4, depth=6, **SMALL), 128),
    ("DiT, 32 px, 64 tokens", DiTConfig(input_size=32, patch_size=4, hidden_size=96, depth=6, num_heads=3), 128),
    ("DiT-S/2, softmax", DiTConfig(), 2),
]


def benchmark_loop(device: torch.device, budget: Budget) -> list[dict]:
    """Compare the trainer with a bare loop (forward, backward, fused AdamW), and DiT's step with its original form.

    The first three rows are the overhead of seeds, norms, clipping, EMA, checks and logging. The last one is softmax
    DiT-S/2 with EMA and without clipping, beside the step of DiT's own `train.py`: the default AdamW, and an EMA
    updated parameter by parameter.
    """
    return [loop_row(device, budget.share(1 / (len(ROWS) - index)), *row) for index, row in enumerate(ROWS)]


def loop_row(device: torch.device, budget: Budget, name: str, config: Any, batch: int) -> dict:
    """Time the trainer and the other loop for one model."""
    original, batch = name.endswith("softmax"), batch * (16 if device.type == "cuda" else 1)
    optim = OptimConfig(lr=1e-4, weight_decay=0.0) if original else OptimConfig(lr=1e-3, clip_grad=1.0)
    trainer = TrainerConfig(steps=1_000_000, global_batch_size=batch, ema_decay=0.9999, log_every=20)
    model = build_model(config, SoftmaxConfig() if original else VCAConfig())
    state = TrainState(model, trainer, optim, World(0, 0, 1, device), 100)
    other = copy.deepcopy(state.model)
    average = copy.deepcopy(other)
    loss_of, batches = data_of(config, batch, device)
    if original:
        optimizer = torch.optim.AdamW(other.parameters(), lr=1e-4, weight_decay=0)
    else:
        optimizer = build_optimizer(optim, other, 1e-3)

    def other_loop() -> None:
        for step, cpu_batch in enumerate(batches):
            loss = loss_of(other, to_device(cpu_batch, device), step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if original:
                with torch.no_grad():
                    for mean, parameter in zip(average.parameters(), other.parameters(), strict=True):
                        mean.mul_(0.9999).add_(parameter, alpha=1 - 0.9999)

    with tempfile.TemporaryDirectory() as folder:
        training = TrainingRun(RunDirectory(Path(folder)), state, trainer, state.world)

        def trainer_loop() -> None:
            for cpu_batch in batches:
                training.record(state.train_step([to_device(cpu_batch, device)], loss_of, 0), [cpu_batch])

        with training.open("benchmark", {}):
            training.reporter.log = lambda line: None  # type: ignore[method-assign]
            times = compare(trainer_loop, other_loop, budget, device)
    overhead, low, high = (100 * (times[key] - 1) for key in ("ratio", "low", "high"))
    print(
        f"{name:<22} trainer {times['ms'] / STEPS:.2f} ms/step, {'original' if original else 'bare'} "
        f"{times['other_ms'] / STEPS:.2f} ms/step: {overhead:+.1f} % ({low:+.1f} to {high:+.1f})",
        flush=True,
    )
    return {"loop": name, "batch": batch, **times}


def data_of(
    config: Any, batch: int, device: torch.device
) -> tuple[Callable[[nn.Module, Batch, int], Any], list[Batch]]:
    """Return the loss function of a model, and random batches for it on the CPU."""
    numbers = torch.arange(batch)
    if isinstance(config, DeiTConfig):
        shape = (batch, 3, config.img_size, config.img_size)
        batches = [Batch(torch.randn(shape), numbers % 10, numbers, numbers) for _ in range(STEPS)]
        return ClassificationLoss(BatchMixer(AugmentConfig(), 10, 0)), batches
    pixels = load_autoencoder(AutoencoderConfig(channels=config.in_channels), device)
    loss_of = GenerationLoss(build_objective(DiffusionConfig(), device), pixels, True, 0.1, config.num_classes)
    shape = (batch, config.in_channels, *config.size)
    batches = []
    for _ in range(STEPS):
        draws = (*torch.rand(2, batch), torch.randn(shape)[:, None])
        batches.append(Batch(torch.randn(shape), numbers % 10, numbers, numbers, draws=draws))
    return loss_of, batches


def to_device(batch: Batch, device: torch.device) -> Batch:
    images, labels, *draws = (x.to(device, non_blocking=True) for x in (batch.images, batch.labels, *batch.draws))
    return batch._replace(images=images, labels=labels, draws=tuple(draws))
