"""Differential Attention in both stages of VCA: a row of Table 3.

Contrast tokens are pooled as in VCA. The two streams are the two halves of the head dim, as in the Differential
Transformer (arXiv 2410.05258), instead of the embeddings e+ and e-:

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

from vca.attention.base import Tokens
from vca.attention.comparison.differential import check_halves
from vca.attention.contrast import Lambda, lambda_init_of_layer
from vca.attention.pooling import PooledAttention, PooledConfig
from vca.attention.softmax import softmax_attention
from vca.attention.stages import difference


@dataclass
class DifferentialStagesConfig(PooledConfig):
    """Options of Differential Attention in both stages: contrast grid, pooling and local branch, as in VCA."""

    name: str = "differential_stages"
    local_branch: bool = True


class DifferentialStagesAttention(PooledAttention):
    """VCA with the streams of Differential Attention; takes the arguments of `ProjectedAttention`.

    Raises:
        ValueError: if the head dim is odd.
    """

    Config = DifferentialStagesConfig

    def add_parameters(self) -> None:
        super().add_parameters()
        check_halves(self.head_dim)
        self.lambda_init = lambda_init_of_layer(self.layer_index)
        self.lambda1 = Lambda(self.head_dim // 2, self.lambda_init)
        self.lambda2 = Lambda(self.head_dim // 2, self.lambda_init)
        self.norm1_weight = nn.Parameter(torch.ones(self.head_dim))
        self.norm2_weight = nn.Parameter(torch.ones(self.head_dim))

    def attend(self, tokens: Tokens) -> Tensor:
        """Compute both stages; the precision is that of VCA: SDPA rounds v+ and v-, their difference is float32."""
        q, k, v, _, grid = tokens
        acc_dtype = torch.promote_types(q.dtype, torch.float32)
        t = self.contrast_tokens(q, grid)  # (B, M, n, D)
        (t1, t2), (q1, q2), (k1, k2) = (x.chunk(2, dim=-1) for x in (t, q, k))  # (B, M, n or N, D / 2)

        positive = softmax_attention(t1, k1, v).to(acc_dtype)  # (B, M, n, D)
        negative = softmax_attention(t2, k2, v).to(acc_dtype)  # (B, M, n, D)
        v_hat = self.norm(difference(positive, negative, self.lambda1()), self.norm1_weight)  # (B, M, n, D)

        scale = (self.head_dim // 2) ** -0.5
        a_pos = (q1 @ (t1 * scale).transpose(2, 3)).to(acc_dtype).softmax(-1)  # (B, M, N, n)
        a_neg = (q2 @ (t2 * scale).transpose(2, 3)).to(acc_dtype).softmax(-1)  # (B, M, N, n)
        weights = difference(a_pos, a_neg, self.lambda2())  # (B, M, N, n)
        out = (weights.to(q.dtype) @ v_hat.to(q.dtype)).to(acc_dtype)  # (B, M, N, D)
        return self.norm(out, self.norm2_weight).to(q.dtype)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        # (1 - l_init) RMSNorm(x) over the head dim
        return F.rms_norm(x, (self.head_dim,), (1 - self.lambda_init) * weight.to(x.dtype), 1e-5)
