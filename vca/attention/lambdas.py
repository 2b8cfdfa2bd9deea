"""The lambdas of VCA: one scalar per stage (the paper), or a number per token and head (Differential Transformer V2).

    scalar   l = exp(q1 . k1) - exp(q2 . k2) + l_init
    token    l1 = sigmoid(AvgPool(x Wl1 on the grid)),   l2 = sigmoid(x Wl2)

Shape letters: B batch, M heads, N = P + H W tokens (P prefix tokens, then the grid), C channels, n = h w contrast
tokens.
"""

import math
from enum import Enum

import torch
from torch import Tensor, nn

from vca.attention.pooling import pool_queries


class LambdaForm(Enum):
    """Lambda of a stage: one learned scalar, or a function of each token."""

    scalar = "scalar"
    token = "token"


def lambda_init_of_layer(layer_index: int) -> float:
    """Return `0.8 - 0.6 exp(-0.3 layer_index)`, with layers from 0 (Differential Transformer, arXiv 2410.05258)."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer_index)


class Lambda(nn.Module):
    """Scalar `exp(q1 . k1) - exp(q2 . k2) + l_init` of four learned vectors `(D,)`, shared by all heads; float32."""

    def __init__(self, head_dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.q1, self.k1, self.q2, self.k2 = (nn.Parameter(0.1 * torch.randn(head_dim)) for _ in range(4))

    def forward(self) -> Tensor:
        # A product and a sum, because autocast runs torch.dot in half precision.
        first, second = (self.q1 * self.k1).sum(), (self.q2 * self.k2).sum()
        return first.exp() - second.exp() + self.init


def token_lambdas(
    first: nn.Module | None,
    second: nn.Module | None,
    x: Tensor,
    grid: tuple[int, int],
    contrast_grid: tuple[int, int],
    num_prefix_tokens: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the token lambdas of x `(B, N, C)`, at least in float32; None for a stage without a projection.

    Args:
        first, second: projections of Stage I and Stage II from C to M channels.

    Returns:
        lambda1 `(B, M, n, 1)` and lambda2 `(B, M, N, 1)`.
    """

    def logits(projection: nn.Module) -> Tensor:
        y = projection(x)  # (B, N, M)
        return y.to(torch.promote_types(y.dtype, torch.float32)).transpose(1, 2).unsqueeze(-1)  # (B, M, N, 1)

    layout = grid, contrast_grid, num_prefix_tokens
    lambda1 = None if first is None else pool_queries(logits(first), *layout).sigmoid()
    return lambda1, None if second is None else logits(second).sigmoid()


def check_lambda(value: Tensor | float | None, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """Return a lambda as a tensor without dimensions or of this shape, at least in float32, on the device of `like`.

    Raises:
        ValueError: unless it is a scalar, has this shape, or is None.
    """
    if value is None:
        return None
    tensor = torch.as_tensor(value, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    if tensor.ndim == 0 or tensor.shape == shape:
        return tensor
    if tensor.numel() != 1:
        raise ValueError(f"lambda must be a scalar or have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    return tensor.reshape(())
