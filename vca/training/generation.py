"""The objective of generation on a batch: times, noise and dropped labels by address, the network, the loss."""

import torch
from torch import Tensor, nn

from vca.data.loader import Batch
from vca.generation.objective import Objective
from vca.runtime.seeding import derive_seed


class GenerationLoss:
    """`loss_of` for `TrainState.update`.

    The time, the noise and whether the label is dropped depend on the seed and on the address of the image (epoch,
    image, repeat), which is its place in the stream of global batches: they are the same on any number of ranks.

    Args:
        objective: diffusion or interpolant.
        class_dropout: how often a label is replaced by the null label.
        null_label: the number of classes.
        seed: the run's.
    """

    def __init__(self, objective: Objective, class_dropout: float, null_label: int, seed: int) -> None:
        self.objective, self.class_dropout, self.null_label, self.seed = objective, class_dropout, null_label, seed

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """Mean loss of a micro-batch of images in [-1, 1]."""
        draws = [self.draw(fingerprint, batch.images[0].shape) for fingerprint in batch.fingerprints.tolist()]
        u, drop, noise = (torch.stack(column).to(batch.images.device) for column in zip(*draws, strict=True))
        labels = torch.where(drop < self.class_dropout, self.null_label, batch.labels)
        losses = self.objective.losses(lambda x, t: model(x, t, labels), batch.images, noise, u)
        return losses["loss"].mean()

    def draw(self, fingerprint: int, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Two uniform numbers and the noise of one image."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "generation", fingerprint))
        u, drop = torch.rand(2, generator=generator).unbind()
        return u, drop, torch.randn(shape, generator=generator)
