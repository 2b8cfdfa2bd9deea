"""The objective of generation on a batch: times, noise and dropped labels by address, the network, the loss."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vca.data.augment import AugmentConfig, train_transform
from vca.data.config import DataConfig
from vca.data.latents import LatentCache, RandomVersion
from vca.data.loader import Batch
from vca.generation.autoencoder import Autoencoder
from vca.generation.objective import Objective
from vca.runtime.seeding import derive_seed


@dataclass(frozen=True)
class GenerationData:
    """What a generator trains on: images, which the autoencoder encodes in each step, or cached latents.

    Attributes:
        dataset: of `(image, label)`, or of `(moments, label)`.
        transform: of one item.
        item_bytes: of one item after the transform.
        cached: whether the items are moments of latents.
        cache: identity of the cache, None for images.
    """

    dataset: Any
    transform: Any
    item_bytes: int
    cached: bool
    cache: dict[str, Any] | None


def generation_data(dataset: Any, data: DataConfig, augment: AugmentConfig, autoencoder: Autoencoder) -> GenerationData:
    """A training split for an autoencoder.

    Raises:
        ConfigError: if a latent cache was made by another autoencoder, or the augmentation does not fit it.
    """
    if not isinstance(dataset, LatentCache):
        return GenerationData(dataset, train_transform(augment, data), data.image_bytes, False, None)
    dataset.check(autoencoder.identity(), augment)
    item_bytes = 4 * math.prod(dataset.manifest.shape[1:])
    return GenerationData(dataset, RandomVersion(augment.hflip), item_bytes, True, dataset.manifest.identity())


class GenerationLoss:
    """`loss_of` for `TrainState.train_step`.

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
