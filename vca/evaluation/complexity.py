"""Parameters and multiply-adds of a model, counted without computing anything."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Complexity:
    """Number of parameters, and of multiply-adds (MACs) in the forward pass of one image of shape `input`."""

    params: int
    macs: int
    input: tuple[int, ...]


def count(build: Callable[[], nn.Module], inputs: Callable[[], tuple[Tensor, ...]]) -> Complexity:
    """Count a model on the meta device.

    Multiply-adds are those of matrix products and convolutions; norms, softmaxes, pooling and additions are not
    counted, as in the papers' figures.

    Args:
        build: makes the model.
        inputs: makes its arguments, for one image.
    """
    with torch.device("meta"):
        model, arguments = build().eval(), inputs()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*arguments)
    params = sum(p.numel() for p in model.parameters())
    return Complexity(params, counter.get_total_flops() // 2, tuple(arguments[0].shape[1:]))
