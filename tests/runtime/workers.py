"""The script that the ranks of `test_distributed.py` run; each rank writes its results to `<out>/<rank>.pt`."""

import os
import sys
from pathlib import Path

import torch
from torch import nn

from models import build_model
from vca.config import compose
from vca.data import load_dataset
from vca.data.augment import BatchMixer
from vca.data.loader import MicroBatches, TrainOrder, eval_loader, image_inputs, train_loader
from vca.evaluation.accuracy import evaluate
from vca.runtime import distributed
from vca.training.classification import ClassificationLoss
from vca.training.config import TrainerConfig
from vca.training.optim import OptimConfig
from vca.training.step import TrainState


class NoiseImages(torch.utils.data.Dataset):
    """103 labelled noise images."""

    def __len__(self):
        return 103

    def __getitem__(self, index):
        return torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(index)), index % 10


def gradients(world):
    """Learning rate and gradient of one step with global batch size 48 in micro-batches of 12."""
    import train_cls

    train_cls.register_configs()
    config = compose("train_cls", ["model.depth=2", "model.drop_path_rate=0.3", "augment.mixup=0.8"])
    torch.manual_seed(0)
    model = build_model(config.model, config.attention)
    trainer = TrainerConfig(steps=10, global_batch_size=48, micro_batch_size=12)
    state = TrainState(model, trainer, OptimConfig(warmup_epochs=0), world, 2)
    images = load_dataset(config.data, train=True)
    share = MicroBatches(TrainOrder(len(images), 48, 0), world, state.micro_batch_size, state.accumulation, 0, 1)
    batches = next(train_loader(images, image_inputs(config.augment, config.data, 0, world.device), 0, share, 0))
    kept = {}
    state.optimizer.step = lambda *_: kept.update({n: p.grad.clone() for n, p in model.named_parameters()})
    result = state.train_step(batches, ClassificationLoss(BatchMixer(config.augment, 10, 0)), seed=0)
    return {"lr": result.lr, "gradients": kept, "accumulation": state.accumulation}


def accuracies(world):
    """Results of an evaluation with several batch sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    results = {}
    for batch in (1, 8, 16):
        loader = eval_loader(NoiseImages(), lambda image: image, world, batch, 0)
        results[batch] = evaluate({"val": model}, loader, world)
    return results


def indices(world):
    """Images of this rank in one epoch of 12 steps with batch size 8, and in the evaluation set."""
    order = TrainOrder(96, 8, seed=0)
    micro, accumulation = TrainerConfig(global_batch_size=8).micro_batch_on(world.size)
    share = MicroBatches(order, world, micro, accumulation, 0, 12)
    return {
        "train": [address.image for batch in share for address in batch],
        "eval": list(eval_loader(NoiseImages(), None, world, 8, 0).dataset.indices),
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with distributed.start("cpu") as world:
        seen = {
            "rank": world.rank,
            "local_rank": world.local_rank,
            "size": world.size,
            "node": os.environ.get("GROUP_RANK"),
            "main": world.is_main,
            "gradients": gradients(world) if world.size in (1, 2, 4) else None,
            "accuracies": accuracies(world),
            "indices": indices(world) if world.size in (1, 2, 4) else None,
        }
        torch.save(seen, out / f"{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
