"""The objective of generation on a batch: times, noise and dropped labels by address, the network, the loss."""

import torch
from torch import Tensor, nn

from vca.data.loader import Batch
from vca.generation.autoencoder import Autoencoder
from vca.generation.objective import Objective
from vca.runtime.seeding import derive_seed


class GenerationLoss:
    """`loss_of` for `TrainState.update`.

    Whether the label is dropped, the time, the noise and the sample of the posterior depend on the seed and on the
    address of the image (epoch, image, repeat), which is its place in the stream of global batches: they are the same
    on any number of ranks, and from cached latents as from images.

    Args:
        objective: diffusion or interpolant.
        autoencoder: between the images and what the network sees.
        cached: the batches hold moments already.
        class_dropout: how often a label is replaced by the null label.
        null_label: the number of classes.
        seed: the run's.
    """

    def __init__(
        self,
        objective: Objective,
        autoencoder: Autoencoder,
        cached: bool,
        class_dropout: float,
        null_label: int,
        seed: int,
    ) -> None:
        self.objective, self.autoencoder, self.cached = objective, autoencoder, cached
        self.class_dropout, self.null_label, self.seed = class_dropout, null_label, seed

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """Mean loss of a micro-batch of images in [-1, 1], or of moments."""
        latents, noise, u, labels = self.prepare(batch)
        losses = self.objective.losses(lambda x, t: model(x, t, labels), latents, noise, u)
        return losses["loss"].mean()

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents `(b, C, h, w)`, noise `(b, C, h, w)`, `u` `(b,)` in [0, 1) that picks the time, labels `(b,)`."""
        moments = batch.images if self.cached else self.autoencoder.encode(batch.images)
        kinds = 1 + self.autoencoder.has_posterior(moments)  # of noise: the second samples the posterior
        shape = (kinds, self.autoencoder.channels, *moments.shape[2:])
        draws = [self.draw(fingerprint, shape) for fingerprint in batch.fingerprints.tolist()]
        u, drop, noise = (torch.stack(column).to(moments.device) for column in zip(*draws, strict=True))
        labels = torch.where(drop < self.class_dropout, self.null_label, batch.labels)
        return self.autoencoder.latents(moments, noise[:, -1]), noise[:, 0], u, labels

    def draw(self, fingerprint: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Two uniform numbers and the noise of one image."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "generation", fingerprint))
        u, drop = torch.rand(2, generator=generator).unbind()
        return u, drop, torch.randn(shape, generator=generator)
