"""Classification loss: Mixup or CutMix, soft targets, cross entropy."""

import torch
from torch import Tensor, nn

from vca.data.augment import BatchMixer
from vca.data.loader import Batch


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute `-sum(targets log_softmax(logits))`, mean over the batch, in float32; both `(b, K)`."""
    return torch.sum(-targets * logits.float().log_softmax(-1), dim=-1).mean()


class ClassificationLoss:
    """`loss_of` of `TrainState.train_step` for classification."""

    def __init__(self, mixer: BatchMixer) -> None:
        self.mixer = mixer

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        images, targets = self.mixer(batch.images, batch.labels, step)
        return soft_cross_entropy(model(images), targets)
