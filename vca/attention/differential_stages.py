"""Differential Attention in both stages of VCA: a row of Table 3.

The contrast tokens are pooled as in VCA, but the two streams come from the two halves of the head dim, as in the
Differential Transformer (arXiv 2410.05258), instead of from the embeddings e+ and e-:

    t = AvgPool(q on the grid),   t = [t1; t2],   q = [q1; q2],   k = [k1; k2]
    Stage I    v^ = (1 - l_init) RMSNorm(softmax(t1 k1^T / sqrt(D/2)) v - l1 softmax(t2 k2^T / sqrt(D/2)) v)
    Stage II   A  = softmax(q1 t1^T / sqrt(D/2)) - l2 softmax(q2 t2^T / sqrt(D/2))
               o  = (1 - l_init) RMSNorm(A v^)

Shape letters: B batch, M heads, N tokens, D head dim, n contrast tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca.attention.base import ProjectedAttention
from vca.attention.contrast import Lambda, difference, lambda_init_of_layer
from vca.attention.differential import check_halves
from vca.attention.geometry import check_tokens
from vca.attention.pooling import PooledConfig, pool_queries


@dataclass
class DifferentialStagesConfig(PooledConfig):
    """Options of Differential Attention in both stages: pooling and local branch, as VCA has them."""

    name: str = "differential_stages"
    local_branch: bool = True


class DifferentialStagesAttention(ProjectedAttention):
    """VCA's two stages with the streams of Differential Attention.

    Takes the arguments that every variant takes (see `vca.attention.build_attention`).

    Raises:
        ValueError: if `dim` is not divisible by `num_heads`, or the head dim is odd.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        pool: tuple[int, int] = (7, 7),
        num_prefix_tokens: int = 0,
        layer_index: int = 0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        config: DifferentialStagesConfig | None = None,
    ) -> None:
        config = config or DifferentialStagesConfig()
        super().__init__(dim, num_heads, grid, num_prefix_tokens, qkv_bias, proj_drop, config.local_branch)
        check_halves(self.head_dim)
        self.config = config
        self.pool = config.pool_of_layer(layer_index, default=pool)
        self.lambda_init = lambda_init_of_layer(layer_index)
        self.lambda1 = Lambda(self.head_dim // 2, self.lambda_init)
        self.lambda2 = Lambda(self.head_dim // 2, self.lambda_init)
        self.norm1_weight = nn.Parameter(torch.ones(self.head_dim))
        self.norm2_weight = nn.Parameter(torch.ones(self.head_dim))
        self.pool_weight = config.pool_weight(dim, grid, self.pool)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Both stages: three `(B, M, N, D)` to one. What is float32 in VCA is float32 here."""
        check_tokens(q.shape[2], grid, self.num_prefix_tokens)
        full = torch.promote_types(q.dtype, torch.float32)
        t = pool_queries(q, grid, self.pool, self.num_prefix_tokens, self.config.pooling, self.pool_weight)
        (t1, t2), (q1, q2), (k1, k2) = (x.chunk(2, dim=-1) for x in (t, q, k))  # (B, M, n or N, D / 2)

        positive = F.scaled_dot_product_attention(t1, k1, v).to(full)  # (B, M, n, D)
        negative = F.scaled_dot_product_attention(t2, k2, v).to(full)  # (B, M, n, D)
        v_hat = self.norm(difference(positive, negative, self.lambda1()), self.norm1_weight)  # (B, M, n, D)

        scale = (self.head_dim // 2) ** -0.5
        a_pos = (q1 @ (t1 * scale).transpose(2, 3)).to(full).softmax(-1)  # (B, M, N, n)
        a_neg = (q2 @ (t2 * scale).transpose(2, 3)).to(full).softmax(-1)  # (B, M, N, n)
        weights = difference(a_pos, a_neg, self.lambda2())  # (B, M, N, n)
        out = (weights.to(q.dtype) @ v_hat.to(q.dtype)).to(full)  # (B, M, N, D)
        return self.norm(out, self.norm2_weight).to(q.dtype)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """`(1 - l_init) RMSNorm(x)` over the head dim."""
        return F.rms_norm(x, (self.head_dim,), (1 - self.lambda_init) * weight.to(x.dtype), 1e-5)
