"""Exponential moving average of the weights: `ema <- decay ema + (1 - decay) model` after every update."""

import copy
from typing import Any

import torch
from torch import nn


class Ema:
    """A second copy of the bare model that follows the first.

    Built from, and updated with, the model itself, never its DDP or compiled wrapper, so that names always agree.

    Args:
        model: the bare model; the average starts as its copy.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards `model`; buffers are copied."""
        averages: list[Any] = list(self.module.parameters())
        torch._foreach_lerp_(averages, list(model.parameters()), 1 - self.decay)
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
