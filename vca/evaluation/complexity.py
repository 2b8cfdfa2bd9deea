"""Count parameters and multiply-adds of a model on the meta device."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

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


def example_inputs(model: Any, batch: int = 1, device: torch.device | None = None) -> tuple[Tensor, ...]:
    """Create a batch for a model config: images `(b, C, H, W)`, or latents, times and labels for a generator."""
    if hasattr(model, "in_chans"):
        return (torch.randn(batch, model.in_chans, *model.size, device=device),)
    latents = torch.randn(batch, model.in_channels, *model.size, device=device)
    return latents, torch.rand(batch, device=device), torch.zeros(batch, dtype=torch.long, device=device)


def in_plain_torch(attention: Any) -> Any:
    """Return an attention config that uses PyTorch on every device, such as the meta device."""
    return replace(attention, backend="eager") if hasattr(attention, "backend") else attention


def count_macs(build: Callable[[Any, Any], nn.Module], model: Any, attention: Any) -> int | None:
    """MACs of one image of a run's network; None with a warning if the meta device does not support a layer of it.

    Args:
        build: builds a network from the configs of model and attention.
        model, attention: the configs.
    """
    try:
        return count(lambda: build(model, in_plain_torch(attention)), lambda: example_inputs(model)).macs
    except (NotImplementedError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        warnings.warn(f"MACs of model.name={model.name} cannot be counted ({reason}); mfu is null", stacklevel=2)
        return None
