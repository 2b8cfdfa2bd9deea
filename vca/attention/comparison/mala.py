"""MALA (arXiv 2507.00698): linear attention with a scale and an offset that keep the length of the query.

    q, k  = elu(x Wq) + 1, elu(x Wk) + 1
    z_i   = q_i . mean(k) / sqrt D                                            without rotation
    o_i   = (1 + 1 / (z_i + eps)) sum_j (R_i q_i . R_j k_j) v_j / (sqrt D N) - z_i mean(v)
    y     = ((o + DWConv5x5(v)) * (x Wg)) Wo

R rotates pairs of channels by the position on the grid: the first D / 2 channels by the row, the others by the column,
with frequencies 10000^(-i / (D / 4 - 1)), i = 0 .. D / 4 - 1. Without R the weights of a token would sum to
z / (z + eps). The mean of v is subtracted before the sum over j and its share added in float32: an equal form in which
the large terms do not cancel in half precision.

The original uses it in the first two stages of a pyramid, in blocks with a convolution before each attention, and has
no prefix tokens. Prefix tokens are not rotated here: they interact with every position alike.

Shape letters: B batch, M heads, N = P + H W tokens (P prefix tokens, then the grid), D head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca.attention.base import AttentionConfig, Gate, ProjectedAttention, Tokens
from vca.attention.comparison.linear import elu_plus_one

EPS = 1e-6
BASE = 10_000  # ratio of the largest frequency to the smallest


@dataclass
class MALAConfig(AttentionConfig):
    """Options of MALA."""

    name: str = "mala"
    local_branch: bool = True
    local_kernel: int = 5
    gate: Gate = Gate.linear


def angles_of(grid: tuple[int, int], head_dim: int, like: Tensor) -> Tensor:
    """Return the angle of each pair of channels on the grid, `(H W, D / 2)`, with the device and dtype of `like`."""
    # The frequencies are rounded to float32, as in the original.
    exponents = torch.linspace(0, 1, head_dim // 4, dtype=torch.float32, device=like.device)
    frequencies = (1.0 / BASE**exponents).to(like.dtype)  # (D / 4)
    rows, columns = (torch.arange(side, dtype=like.dtype, device=like.device) for side in grid)
    by_row = (rows[:, None] * frequencies)[:, None].expand(-1, grid[1], -1)  # (H, W, D / 4)
    by_column = (columns[:, None] * frequencies).expand(grid[0], -1, -1)
    return torch.cat((by_row, by_column), dim=-1).flatten(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of channels (2i, 2i + 1) of `(B, M, N, D)` by angles with cosine and sine `(N, D / 2)`."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # 2 x (B, M, N, D / 2)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


class MALAAttention(ProjectedAttention):
    """MALA as a replacement for MHSA; takes the arguments of `ProjectedAttention`.

    Raises:
        ValueError: if the head dim is not divisible by 4.
    """

    Config = MALAConfig

    def add_parameters(self) -> None:
        if self.head_dim % 4:
            raise ValueError(
                f"attention=mala: the head dim must be divisible by 4, got {self.head_dim} (width {self.dim}, "
                f"{self.num_heads} heads)"
            )
        if self.local is not None:
            nn.init.trunc_normal_(self.local.weight, std=0.02)
            nn.init.zeros_(self.local.bias)  # type: ignore[arg-type]

    def attend(self, tokens: Tokens) -> Tensor:
        q, k, v, _, grid = tokens
        dtype, acc_dtype = v.dtype, torch.promote_types(v.dtype, torch.float32)
        q, k = elu_plus_one(q.to(acc_dtype)), elu_plus_one(k.to(acc_dtype))
        scale, root = self.head_dim**-0.5, k.shape[2] ** -0.5  # 1 / N on one factor is subnormal in float16
        v_mean = v.to(acc_dtype).mean(dim=2, keepdim=True)  # (B, M, 1, D)
        length = (q * k.mean(dim=2, keepdim=True)).sum(-1, keepdim=True) * scale  # z, (B, M, N, 1)

        angles = F.pad(angles_of(grid, self.head_dim, q), (0, 0, self.num_prefix_tokens, 0))  # (N, D / 2)
        cos, sin = angles.cos(), angles.sin()
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        total = (q * k.mean(dim=2, keepdim=True)).sum(-1, keepdim=True) * scale  # sum of the scores, (B, M, N, 1)
        kv = (k * root).to(dtype).transpose(2, 3) @ ((v - v_mean) * root).to(dtype)  # (B, M, D, D)
        out = (q.to(dtype) @ kv).to(acc_dtype) * scale  # (B, M, N, D)
        factor = 1 + 1 / (length + EPS)
        return (factor * out + (factor * total - length) * v_mean).to(dtype)
