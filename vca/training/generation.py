"""Generation loss: time, noise and label dropout of each image are functions of its address."""

import math
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


def item_transform(
    dataset: Any, data: DataConfig, augment: AugmentConfig, autoencoder: Autoencoder
) -> tuple[Any, int, dict[str, Any] | None]:
    """Return the transform of images or cached latents, the bytes of its result, and the identity of a cache or None.

    Raises:
        ConfigError: if a latent cache was made by another autoencoder or does not support the augmentation.
    """
    if not isinstance(dataset, LatentCache):
        return train_transform(augment, data), data.image_bytes, None
    dataset.check(autoencoder.identity(), augment)
    return RandomVersion(augment.hflip), 4 * math.prod(dataset.manifest.shape[1:]), dataset.manifest.identity()


class GenerationLoss:
    """`loss_of` of `TrainState.train_step` for generation.

    Label dropout, time, noise and posterior sample depend on the seed and the address of the image (epoch, image,
    repeat) only. They are the same at any world size, and for cached latents and images.

    Args:
        cached: the batches contain moments instead of images.
        class_dropout: probability of replacing a label by `null_label`.
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
        """Return the mean loss of a micro-batch of images in [-1, 1] or of moments."""
        latents, noise, u, labels = self.prepare(batch)
        losses = self.objective.losses(lambda x, t: model(x, t, labels), latents, noise, u)
        return losses["loss"].mean()

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return latents and noise `(b, C, h, w)`, `u` `(b,)` in [0, 1), which selects the time, and labels `(b,)`."""
        moments = batch.images if self.cached else self.autoencoder.encode(batch.images)
        noises = 1 + self.autoencoder.has_posterior(moments)  # the second one samples the posterior
        shape = (noises, self.autoencoder.channels, *moments.shape[2:])
        draws = [self.draw_noise(fingerprint, shape) for fingerprint in batch.fingerprints.tolist()]
        u, drop, noise = (torch.stack(column).to(moments.device) for column in zip(*draws, strict=True))
        labels = torch.where(drop < self.class_dropout, self.null_label, batch.labels)
        return self.autoencoder.latents(moments, noise[:, -1]), noise[:, 0], u, labels

    def draw_noise(self, fingerprint: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Draw `u`, the uniform number of the label dropout, and the noise of one image."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "generation", fingerprint))
        u, drop = torch.rand(2, generator=generator).unbind()
        return u, drop, torch.randn(shape, generator=generator)
