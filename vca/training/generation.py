"""Generation loss: time, noise and label dropout of each image are functions of its address."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vca.data.augment import AugmentConfig
from vca.data.config import DataConfig
from vca.data.latents import LatentCache, RandomVersion
from vca.data.loader import Batch, Inputs, image_inputs
from vca.generation.autoencoder import Autoencoder
from vca.generation.objective import Objective
from vca.runtime.seeding import derive_seed


@dataclass(frozen=True)
class GenerationDraws:
    """Draws the random numbers that an image needs in training, from the seed and its fingerprint, in a loader worker.

    They are the same at any world size, and for cached latents and images. `shape` is the shape `(n, C, h, w)` of the
    noise: that of the diffusion and, with n = 2, that of the posterior.
    """

    seed: int
    shape: tuple[int, ...]

    def __call__(self, fingerprint: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw `u` in [0, 1), which selects the time, the uniform number of the label dropout, and the noise."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "generation", fingerprint))
        u, drop = torch.rand(2, generator=generator).unbind()
        return u, drop, torch.randn(self.shape, generator=generator)


def generation_inputs(
    dataset: Any, data: DataConfig, augment: AugmentConfig, autoencoder: Autoencoder, seed: int
) -> tuple[Inputs, dict[str, Any] | None]:
    """Return the operations on images or cached latents, and the identity of a cache or None.

    Raises:
        ConfigError: if a latent cache was made by another autoencoder or does not support the augmentation.
    """
    side = data.img_size // autoencoder.factor
    draw = GenerationDraws(seed, (1 + autoencoder.has_posterior, autoencoder.channels, side, side))
    draw_bytes = 4 * (2 + math.prod(draw.shape))
    if not isinstance(dataset, LatentCache):
        inputs = image_inputs(augment, data, seed, autoencoder.device)
        return replace(inputs, draw=draw, item_bytes=inputs.item_bytes + draw_bytes), None
    dataset.check(autoencoder.identity(), augment)
    item_bytes = dataset.manifest.item_bytes + draw_bytes
    return Inputs(RandomVersion(augment.hflip), Tensor.float, item_bytes, draw=draw), dataset.manifest.identity()


class GenerationLoss:
    """`loss_of` of `TrainState.train_step` for generation.

    Args:
        cached: the batches contain moments instead of images.
        class_dropout: probability of replacing a label by `null_label`.
    """

    def __init__(
        self, objective: Objective, autoencoder: Autoencoder, cached: bool, class_dropout: float, null_label: int
    ) -> None:
        self.objective, self.autoencoder, self.cached = objective, autoencoder, cached
        self.class_dropout, self.null_label = class_dropout, null_label

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> Tensor:
        """Return the mean loss of a micro-batch of images in [-1, 1] or of moments, with `GenerationDraws`."""
        latents, noise, u, labels = self.prepare(batch)
        losses = self.objective.losses(lambda x, t: model(x, t, labels), latents, noise, u)
        return losses["loss"].mean()

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return latents and noise `(b, C, h, w)`, `u` `(b,)` in [0, 1), which selects the time, and labels `(b,)`."""
        moments = batch.images if self.cached else self.autoencoder.encode(batch.images)
        u, drop, noise = batch.draws
        labels = torch.where(drop < self.class_dropout, self.null_label, batch.labels)
        return self.autoencoder.latents(moments, noise[:, -1]), noise[:, 0], u, labels
