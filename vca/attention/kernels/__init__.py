"""Fused Triton kernels of VCA, and the selection of the backend (`attention.backend`).

    tiles.py             building blocks: rows of a head, matrix products, softmaxes, the norm
    forward.py           contrast tokens, Stage I, Stage II
    backward_stage1.py   backward of Stage I
    backward_stage2.py   backward of Stage II and of the pooling
    block_sizes.py       block sizes, warps and stages: measured ones of tiles.json, else defaults
    launch.py            splits, scratch memory and kernel launches
    operator.py          the operator `torch.ops.vca.contrast_attention`

The scores, `N x n` per head, stay in registers; memory traffic is linear in N.
"""

import functools
import importlib.util
import os
import warnings
from enum import Enum

import torch

LARGEST_HEAD, LARGEST_CONTRAST = 128, 256
CHECKED_HEAD, CHECKED_CONTRAST = 64, range(33, 65)  # compared with float64 on a GPU; `auto` uses no others
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INSTALLED = importlib.util.find_spec("triton") is not None


class Backend(Enum):
    """Implementation of VCA: `auto` uses Triton on GPU calls that are supported and checked, and PyTorch otherwise."""

    auto = "auto"
    eager = "eager"
    triton = "triton"


def is_interpreted() -> bool:
    """Return whether Triton runs kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int, num_contrast: int) -> str | None:
    """Return why the kernels do not support a call, or None if they do."""
    if not INSTALLED:
        return "triton is not installed"
    if device.type != "cuda" and not is_interpreted():
        return f"device must be cuda, got {device.type}"
    if dtype not in DTYPES:
        return f"dtype must be float32, float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"
    if head_dim > LARGEST_HEAD:
        return f"head dim must be <= {LARGEST_HEAD}, got {head_dim}"
    if num_contrast > LARGEST_CONTRAST:
        return f"number of contrast tokens must be <= {LARGEST_CONTRAST}, got {num_contrast}"
    return None


def unchecked_reason(head_dim: int, num_contrast: int) -> str | None:
    """Return why nobody has compared the kernels of a call with float64 on a GPU, or None if somebody has."""
    if head_dim == CHECKED_HEAD and num_contrast in CHECKED_CONTRAST:
        return None
    checked = f"head dim {CHECKED_HEAD} and {CHECKED_CONTRAST[0]} to {CHECKED_CONTRAST[-1]} contrast tokens"
    here = f"head dim {head_dim} and {num_contrast} contrast tokens"
    return f"the kernels are checked on a GPU for {checked}, not for {here}; attention.backend=triton uses them"


def use_triton(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, num_contrast: int) -> bool:
    """Return whether to use the kernels. `auto` warns once if a call on a GPU is not supported or not checked.

    Raises:
        ValueError: if the backend is `triton` and the kernels do not support the call.
    """
    if backend is Backend.eager or (backend is Backend.auto and device.type != "cuda"):
        return False
    reason = unsupported_reason(device, dtype, head_dim, num_contrast)
    if reason is not None and backend is Backend.triton:
        raise ValueError(f"attention.backend=triton: {reason}; use attention.backend=auto")
    if reason is None and backend is Backend.auto:
        reason = unchecked_reason(head_dim, num_contrast)
    if reason is not None and not torch.compiler.is_compiling():
        warn_once(f"attention.backend=auto uses plain PyTorch: {reason}")
    return reason is None


@functools.cache
def warn_once(message: str) -> None:
    """Warn once per message."""
    warnings.warn(message, stacklevel=2)
