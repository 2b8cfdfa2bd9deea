"""Samples addressed by index: what `(seed, index)` gives depends on neither the batch nor the number of ranks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vca.generation.objective import Objective, SamplerConfig
from vca.generation.samplers import Samples
from vca.runtime.errors import check
from vca.runtime.seeding import derive_seed


def check_sampler(objective: Objective, sampler: SamplerConfig) -> None:
    """Raise `ConfigError` if the sampler does not belong to the objective."""
    names = ", ".join(method.value for method in objective.methods)
    check(sampler.method in objective.methods, "sampler.method", f"one of {names}", sampler.method.value)
    most = objective.most_steps
    if most is not None and sampler.steps is not None:
        rule = f"at most {most}, the steps of the objective"
        check(sampler.steps <= most, "sampler.steps", rule, sampler.steps)


@torch.inference_mode()
def draw_samples(
    model: Any,
    objective: Objective,
    sampler: SamplerConfig,
    labels: Tensor,
    indices: Sequence[int],
    seed: int,
    shape: tuple[int, int, int],
) -> Samples:
    """Samples of the classes `labels` `(B,)`, for the sample numbers `indices`.

    All noise of a sample comes from a CPU generator of its own, seeded by `(seed, index)`: first the start, then that
    of each step.

    Args:
        model: a `DiT`, in evaluation mode.
        objective, sampler: what it was trained for, and how to read it.
        labels: on the model's device.
        indices: B of them.
        seed: of the set of samples.
        shape: `(I, H, W)` of one.

    Returns:
        `(B, I, H, W)`.
    """
    generators = [torch.Generator().manual_seed(derive_seed(seed, "sample", index)) for index in indices]

    def draw(step: int = 0) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(labels.device)

    return objective.sample(guided(model, objective, sampler, labels), draw(), sampler, draw)


def guided(model: Any, objective: Objective, sampler: SamplerConfig, labels: Tensor) -> Callable[..., Tensor]:
    """`net(x, t)` for these labels, under guidance where the sampler asks for it."""
    low, high = sampler.guidance_interval

    def net(x: Tensor, t: Tensor) -> Tensor:
        inside = low <= float(objective.noise_time(t[:1])) <= high  # one time for the whole batch
        if sampler.guidance == 1 or not inside:
            return model(x, t, labels)
        return model.forward_with_guidance(x, t, labels, sampler.guidance, sampler.guidance_channels)

    return net


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as 8-bit pixels: `127.5 x + 128`, cut off at both ends and truncated.

    Raises:
        FloatingPointError: if there is a NaN or an infinity, which would become a black pixel unseen.
    """
    if not torch.isfinite(images).all():
        raise FloatingPointError("the samples are not finite")
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images `(B, I, H, W)` in [-1, 1] as one PNG, `columns` in a row, a pixel apart; grey or RGB."""
    from PIL import Image

    pixels = to_uint8(images).cpu().numpy()
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 255, dtype=np.uint8)
    for index, image in enumerate(pixels):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(path)
