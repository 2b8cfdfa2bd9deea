"""Parameters and multiply-adds of a model, counted without computing anything."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Complexity:
    """Number of parameters, and of multiply-adds (MACs) in the forward pass of one image."""

    params: int
    macs: int


def count(build: Callable[[], nn.Module], image_shape: tuple[int, int, int]) -> Complexity:
    """Count a model on the meta device.

    Multiply-adds are those of matrix products and convolutions; norms, softmaxes, pooling and additions are not
    counted, as in the papers' figures.

    Args:
        build: makes the model.
        image_shape: `(in_chans, height, width)`.
    """
    with torch.device("meta"):
        model = build().eval()
        image = torch.empty(1, *image_shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return Complexity(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)
