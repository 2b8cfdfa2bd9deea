"""Exponential moving average of the weights: `ema <- decay ema + (1 - decay) model` after every step."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


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
    def update(self, model: nn.Module, applied: Tensor) -> None:
        """Move the average towards `model` where `applied`, a bool `()` on the device, is true; copy the buffers."""
        averages: list[Any] = list(self.module.parameters())
        weight = torch.where(applied, 1 - self.decay, 0.0)
        torch._foreach_lerp_(averages, list(model.parameters()), [weight] * len(averages))
        for average, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
