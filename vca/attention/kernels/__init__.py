"""The fused core of VCA in Triton, and the choice between it and plain PyTorch (`attention.backend`).

    tiles.py      what the kernels are made of: rows of a head, products, softmaxes, the norm
    forward.py    contrast tokens, Stage I, Stage II
    backward.py   one backward for both stages, and what goes before and after it
    launch.py     tiles, splits and scratch memory of a call
    operator.py   the operator `torch.ops.vca.contrast_attention`

The scores, `N x n` a head, stay in registers; memory is read and written in proportion to N.
"""

import functools
import importlib.util
import os
import warnings
from enum import Enum

import torch

LARGEST_HEAD, LARGEST_CONTRAST = 128, 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs its kernels on a CPU, for tests


class Backend(Enum):
    """What computes VCA: Triton on a GPU where it can and PyTorch elsewhere (`auto`), or always one of the two."""

    auto = "auto"
    eager = "eager"
    triton = "triton"


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, num_contrast: int) -> str | None:
    """Why the kernels cannot serve heads of that dim with n contrast tokens; None if they can."""
    if not INSTALLED:
        return "triton is not installed"
    if device.type != "cuda" and not INTERPRETED:
        return f"the kernels need a GPU, not '{device.type}'"
    if dtype not in DTYPES:
        return f"the kernels take float32, float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim > LARGEST_HEAD:
        return f"the kernels take a head dim up to {LARGEST_HEAD}, not {head_dim}"
    if num_contrast > LARGEST_CONTRAST:
        return f"the kernels take up to {LARGEST_CONTRAST} contrast tokens, not {num_contrast}"
    return None


def use_triton(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, num_contrast: int) -> bool:
    """Whether the kernels are taken. `auto` takes them on a GPU alone, and warns once where it cannot.

    Raises:
        ValueError: if the backend is `triton` and the kernels cannot serve the call.
    """
    if backend is Backend.eager or (backend is Backend.auto and device.type != "cuda"):
        return False
    reason = why_not(device, dtype, head_dim, num_contrast)
    if reason is not None and backend is Backend.triton:
        raise ValueError(f"attention.backend=triton: {reason}; attention.backend=auto takes them where it can")
    if reason is not None and not torch.compiler.is_compiling():
        warn_once(f"attention.backend=auto runs VCA in plain PyTorch: {reason}")
    return reason is None


@functools.cache
def warn_once(message: str) -> None:
    """Warn of something, the first time that it is said."""
    warnings.warn(message, stacklevel=2)
