"""Exponential moving average of the weights: `ema <- decay ema + (1 - decay) model` after every step."""

import copy
from typing import Any

import torch
from torch import nn


class Ema:
    """Moving average of a model's parameters, in `module`.

    Args:
        model: the bare model, not its DDP or compiled wrapper; the average starts as a copy.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards `model`; copy the buffers."""
        averages: list[Any] = list(self.module.parameters())
        torch._foreach_lerp_(averages, list(model.parameters()), 1 - self.decay)
        for average, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
