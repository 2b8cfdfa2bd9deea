"""Choice between the fused kernels and plain PyTorch for a call of VCA."""

import torch

from vca.attention.kernels import Backend, use_triton
from vca.attention.softmax import needs_plain_ops


def use_kernels(
    backend: Backend, device: torch.device, dtype: torch.dtype, dim: int, num_contrast: int, per_token: bool, norm: bool
) -> bool:
    """Return whether to use the kernels, which support neither token lambdas nor stages without norm.

    Raises:
        ValueError: if the backend is `triton` and the kernels do not support the call.
    """
    if norm and not per_token:
        return use_triton(backend, device, dtype, dim, num_contrast)
    if backend is Backend.triton:
        reason = "lambda_form must be scalar, got token" if per_token else "norm must be true, got false"
        raise ValueError(f"attention.backend=triton: attention.{reason}; use attention.backend=auto")
    return False


def needs_eager(backend: Backend) -> bool:
    """Return whether this call must use plain PyTorch on a GPU too: `torch.func`, forward mode, tracing or ONNX export.

    Raises:
        ValueError: under a transform, if the backend is `triton`.
    """
    transformed = needs_plain_ops()
    if transformed and backend is Backend.triton:
        raise ValueError(
            "attention.backend must be auto or eager under torch.func and forward-mode differentiation, got triton"
        )
    to_onnx = torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    return transformed or to_onnx or torch.jit.is_tracing()
