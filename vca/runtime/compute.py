"""Device, precision, and torch's process-wide switches."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import torch


class Device(Enum):
    """Device to run on; `auto` uses a GPU if one is visible."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(Enum):
    """Precision of matrix products; parameters, optimizer state and EMA are always float32."""

    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Autocast's dtype; None for fp32 and tf32, which do not use autocast."""
        return {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}.get(self)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the inputs of matrix products."""
        return self.autocast_dtype or torch.float32


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the autocast context of a precision; autocast is off for fp32 and tf32."""
    dtype = precision.autocast_dtype
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def set_tf32(enabled: bool) -> None:
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.allow_tf32 = enabled


def set_precision(precision: Precision, deterministic: bool) -> None:
    """Set torch's process-wide switches: TF32 for `tf32` only, and deterministic kernels if requested."""
    set_tf32(precision is Precision.tf32)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


@contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute in a precision, overriding the surrounding TF32 and autocast settings."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    set_tf32(precision is Precision.tf32)
    try:
        with autocast(precision, device):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def without_automatic_gc() -> Iterator[None]:
    """Turn automatic garbage collection off, and exempt all existing objects from collections."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
