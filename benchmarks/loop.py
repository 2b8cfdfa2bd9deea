"""Overhead of the trainer over a bare loop on the same batches."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Budget, compare

STEPS = 10  # per round


def benchmark_loop(device: torch.device, budget: Budget) -> list[dict]:
    """Measure the overhead of seeds, norms, clipping, EMA and logging for two model sizes.

    A round is `STEPS` steps of the trainer, and of a bare loop on a copy of the model and the same batches.
    """
    from models.deit import DeiTConfig

    small = DeiTConfig(img_size=8, patch_size=2, depth=4, **SMALL)
    large = DeiTConfig(img_size=32, patch_size=4, depth=6, **SMALL)
    rows = [("8 px, 16 tokens", small, 64), ("32 px, 64 tokens", large, 128)]
    return [loop_row(device, budget.share(1 / (2 - index)), *row) for index, row in enumerate(rows)]


SMALL: dict[str, Any] = {"embed_dim": 96, "num_heads": 3, "num_classes": 10, "contrast_grid": [2, 2]}


def loop_row(device: torch.device, budget: Budget, name: str, model_config: Any, batch: int) -> dict:
    """Time the trainer and the bare loop for one model."""
    from models import build_model
    from vca import VCAConfig
    from vca.data.augment import AugmentConfig, BatchMixer
    from vca.data.loader import Batch
    from vca.runtime.distributed import World
    from vca.runtime.metrics_log import WandbConfig
    from vca.runtime.rundir import RunDirectory
    from vca.training.classification import ClassificationLoss
    from vca.training.config import TrainerConfig
    from vca.training.optim import OptimConfig, build_optimizer
    from vca.training.run import TrainingRun
    from vca.training.step import TrainState

    trainer = TrainerConfig(steps=1_000_000, global_batch_size=batch, ema_decay=0.99, log_every=20)
    optim = OptimConfig(lr=1e-3, clip_grad=1.0)
    state = TrainState(build_model(model_config, VCAConfig()), trainer, optim, World(0, 0, 1, device), 100)
    bare = copy.deepcopy(state.model)
    optimizer = build_optimizer(optim, bare, 1e-3)
    loss_of = ClassificationLoss(BatchMixer(AugmentConfig(), 10, 0))
    numbers = torch.arange(batch)
    size = model_config.img_size
    batches = [Batch(torch.randn(batch, 3, size, size), numbers % 10, numbers, numbers) for _ in range(STEPS)]

    def to_device(batch: Batch) -> Batch:
        images, labels = (tensor.to(device, non_blocking=True) for tensor in batch[:2])
        return batch._replace(images=images, labels=labels)

    def bare_loop() -> None:
        for step, cpu_batch in enumerate(batches):
            loss = loss_of(bare, to_device(cpu_batch), step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    with tempfile.TemporaryDirectory() as folder:
        training = TrainingRun(RunDirectory(Path(folder)), state, trainer, state.world)

        def trainer_loop() -> None:
            for cpu_batch in batches:
                training.record(state.train_step([to_device(cpu_batch)], loss_of, 0), [cpu_batch])

        with training.open("benchmark", {}, WandbConfig()):
            training.reporter.log = lambda line: None  # type: ignore[method-assign]
            times = compare(trainer_loop, bare_loop, budget, device)
    overhead, low, high = (100 * (times[key] - 1) for key in ("ratio", "low", "high"))
    print(
        f"{name:<18} trainer {times['ms'] / STEPS:.2f} ms/step, bare {times['other_ms'] / STEPS:.2f} ms/step: "
        f"{overhead:+.1f} % ({low:+.1f} to {high:+.1f})",
        flush=True,
    )
    return {"loop": name, "batch": batch, **times}
