"""Exponential moving average of the weights: `ema <- decay ema + (1 - decay) model` after every step."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vca.runtime.errors import ConfigError, check


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


def list_decays(value: Any, key: str = "trainer.ema_decay") -> list[float]:
    """Return the decays of `trainer.ema_decay`: null, a number or a list of numbers.

    Raises:
        ConfigError: about `key`, unless they are distinct numbers in [0, 1).
    """
    listed = isinstance(value, (list, tuple))
    numbers: list[Any] = list(value) if listed else [] if value is None else [value]
    try:
        decays = [float("nan") if isinstance(number, bool) else float(number) for number in numbers]
    except (TypeError, ValueError) as error:
        rule = "null, a number or a list of numbers such as [0.9999,0.999]"
        raise ConfigError(f"{key} must be {rule}, got {value!r}") from error
    if not listed:
        check(all(0 <= decay < 1 for decay in decays), key, "in [0, 1) or null", value)
        return decays
    valid = decays and all(0 <= decay < 1 for decay in decays) and len(set(decays)) == len(decays)
    check(bool(valid), key, "one or more distinct numbers in [0, 1)", value)
    return decays
