"""The objective of classification: mixed images, soft targets, cross entropy."""

import torch
from torch import Tensor, nn

from vca.data.augment import BatchMixer
from vca.data.loader import Batch


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of `-sum targets log softmax(logits)`, in float32; both `(b, K)`."""
    return torch.sum(-targets * logits.float().log_softmax(-1), dim=-1).mean()


class ClassificationLoss:
    """`loss_of` for `TrainState.train_step`: mixes a micro-batch as its step says and scores the network on it."""

    def __init__(self, mixer: BatchMixer) -> None:
        self.mixer = mixer

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """Mean loss of a micro-batch."""
        images, targets = self.mixer(batch.images, batch.labels, step)
        return soft_cross_entropy(model(images), targets)
