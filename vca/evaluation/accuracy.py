"""Classification accuracy, exact on any number of ranks."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca.runtime.distributed import World


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], world: World, autocast: Callable[[], Any] = nullcontext
) -> dict[str, float]:
    """Compute top-1, top-5 (with more than five classes), mean cross entropy, and the number of images.

    Each rank counts its own images and the integer counts are summed over ranks, so every image counts exactly once.

    Args:
        model: maps images to logits `(b, K)`.
        batches: this rank's `(images, labels)`.
        world: rank and device of this process.
        autocast: returns the context manager of the forward pass.

    Returns:
        `top1` and `top5` in percent, `loss` in nats, `images`.
    """
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=world.device)  # correct in top-1, correct in top-5, images
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    classes = 0
    for images, labels in batches:
        images, labels = images.to(world.device, non_blocking=True), labels.to(world.device, non_blocking=True)
        with autocast():
            logits = model(images).float()
        classes = logits.shape[1]
        hits = logits.topk(min(5, classes), dim=1).indices == labels[:, None]  # (b, 5)
        counts += torch.stack((hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=world.device)))
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
    world.sum(counts)
    world.sum(loss)
    correct1, correct5, total = counts.tolist()
    result = {"top1": 100 * correct1 / total, "loss": loss.item() / total, "images": total}
    if classes > 5:
        result["top5"] = 100 * correct5 / total
    return result
