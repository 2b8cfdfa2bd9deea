"""Count parameters and multiply-adds of a model on the meta device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Complexity:
    """Parameters, and multiply-adds (MACs) of the forward pass of one image of shape `input`."""

    params: int
    macs: int
    input: tuple[int, ...]


def count(build: Callable[[], nn.Module], inputs: Callable[[], tuple[Tensor, ...]]) -> Complexity:
    """Count parameters and MACs of a model on the meta device.

    MACs are those of matrix products and convolutions; norms, softmax, pooling and additions are not counted, as in
    the papers.

    Args:
        build: returns the model.
        inputs: returns its arguments for one image.
    """
    with torch.device("meta"):
        model, arguments = build().eval(), inputs()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*arguments)
    params = sum(p.numel() for p in model.parameters())
    return Complexity(params, counter.get_total_flops() // 2, tuple(arguments[0].shape[1:]))
