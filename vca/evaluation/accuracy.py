"""Classification accuracy, exact on any number of ranks."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca.runtime.distributed import World


@torch.inference_mode()
def evaluate(
    models: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    world: World,
    autocast: Callable[[], Any] = nullcontext,
) -> dict[str, float]:
    """Compute top-1, top-5 (with more than five classes), mean cross entropy, and the number of images of each model.

    Each rank counts its own images and the integer counts are summed over ranks, so every image counts exactly once.

    Args:
        models: prefix of the results to network, which maps images to logits `(b, K)`.
        batches: this rank's `(images, labels)` on the device; each is used for all models.
        world: rank and device of this process.
        autocast: returns the context manager of the forward pass.

    Returns:
        For each model `<prefix>/top1` and `<prefix>/top5` in percent, `<prefix>/loss` in nats, `<prefix>/images`.
    """
    counts = {prefix: torch.zeros(3, dtype=torch.int64, device=world.device) for prefix in models}
    losses = {prefix: torch.zeros((), dtype=torch.float64, device=world.device) for prefix in models}
    for model in models.values():
        model.eval()
    classes = 0
    for images, labels in batches:
        for prefix, model in models.items():
            with autocast():
                logits = model(images).float()
            classes = logits.shape[1]
            hits = logits.topk(min(5, classes), dim=1).indices == labels[:, None]  # (b, 5)
            counts[prefix] += torch.stack((hits[:, 0].sum(), hits.sum(), torch.ones_like(labels).sum()))
            losses[prefix] += F.cross_entropy(logits, labels, reduction="sum").double()
    result = {}
    for prefix in models:
        correct1, correct5, total = world.sum(counts[prefix]).tolist()
        result[f"{prefix}/top1"] = 100 * correct1 / total
        result[f"{prefix}/loss"] = world.sum(losses[prefix]).item() / total
        result[f"{prefix}/images"] = total
        if classes > 5:
            result[f"{prefix}/top5"] = 100 * correct5 / total
    return result
