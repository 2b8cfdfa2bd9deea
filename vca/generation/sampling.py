"""Samples addressed by index: what `(seed, index)` gives depends on neither the batch nor the number of ranks."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vca.generation.objective import Method, Objective, SamplerConfig
from vca.generation.samplers import Samples
from vca.runtime.errors import NonFiniteError, check
from vca.runtime.files import write_bytes
from vca.runtime.seeding import derive_seed


def check_sampler(objective: Objective, sampler: SamplerConfig, class_dropout: float) -> None:
    """Raise `ConfigError` if the sampler does not belong to the objective, or asks a model for guidance that has none.

    `class_dropout` is how often the model's training replaced a label by the null label.
    """
    guidable = sampler.guidance == 1 or class_dropout > 0
    check(guidable, "sampler.guidance", "1 for a model with class_dropout_prob=0", sampler.guidance)
    names = ", ".join(method.value for method in objective.methods)
    files = "sampler=ddpm or ddim" if Method.ddpm in objective.methods else "sampler=ode, dopri5 or sde"
    check(sampler.method in objective.methods, "sampler.method", f"one of {names} ({files})", sampler.method.value)
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
        NonFiniteError: if there is a NaN or an infinity, which would become a black pixel unseen.
    """
    if not torch.isfinite(images).all():
        raise NonFiniteError("samples are NaN or infinite")
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


def label_of(scheme: str | Sequence[int], index: int, seed: int, num_classes: int) -> int:
    """The class of sample number `index`: `random`, `balanced` (0, 1, 2, ... in turn), or a list that is repeated."""
    if scheme == "random":
        return derive_seed(seed, "label", index) % num_classes
    if scheme == "balanced":
        return index % num_classes
    return int(scheme[index % len(scheme)])


def save_grid(images: Tensor, path: Path, columns: int, labels: Sequence[object] | None = None, zoom: int = 1) -> None:
    """Write images `(B, I, H, W)`, uint8, as one PNG, `columns` in a row, a pixel apart; grey or RGB.

    Each may carry a label above it, and be enlarged by a whole factor.
    """
    from PIL import Image, ImageDraw

    pixels = images.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3).permute(0, 2, 3, 1).cpu().numpy()
    count, height, width, channels = pixels.shape
    head = 12 if labels is not None else 0  # the default font is 11 pixels high
    rows, step = -(-count // columns), head + height + 1
    sheet = np.full((rows * step - 1, columns * (width + 1) - 1, channels), 255, dtype=np.uint8)
    corners = [(index // columns * step, index % columns * (width + 1)) for index in range(count)]
    for image, (top, left) in zip(pixels, corners, strict=True):
        sheet[top + head : top + head + height, left : left + width] = image
    picture = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    for label, (top, left) in zip(labels or (), corners, strict=False):
        ImageDraw.Draw(picture).text((left + width // 2, top), str(label), fill=0, anchor="ma")
    content = io.BytesIO()
    picture.save(content, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content.getbuffer())
