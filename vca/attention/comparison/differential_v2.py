"""Differential Transformer V2 (Microsoft, January 2026, code in microsoft/unilm): two query heads per value, quadratic.

    q = x Wq: 2M heads,   k, v: Mkv heads,   l = sigmoid(x Wl): M numbers per token
    h_m = softmax(q_m k_g^T / sqrt D) v_g,   g = floor(m Mkv / 2M),   m = 0 .. 2M - 1
    o_m = h_2m - l_m h_2m+1,   m = 0 .. M - 1

The two heads of a difference share k and v. Unlike V1 (`differential`) there is no norm, no `lambda_init`, and the
width of the heads is that of MHSA. The original is causal and rotates q and k; images need neither.

Shape letters: B batch, M heads, Mkv heads of k and v, N tokens, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vca.attention.base import AttentionConfig, HeadCounts, ProjectedAttention, Tokens
from vca.attention.softmax import softmax_attention


@dataclass
class DifferentialV2Config(AttentionConfig):
    """Options of Differential Attention V2.

    Attributes:
        kv_heads: number of heads of k and v, a divisor of the number of heads; null is the number of heads.
    """

    name: str = "differential_v2"
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv_heads is not None and self.kv_heads < 1:
            raise ValueError(f"attention.kv_heads must be >= 1 or null, got {self.kv_heads}")


class DifferentialV2Attention(ProjectedAttention):
    """Differential Attention V2 as a replacement for MHSA; takes the arguments of `ProjectedAttention`.

    Raises:
        ValueError: if `kv_heads` does not divide the number of heads.
    """

    Config = DifferentialV2Config

    def head_counts(self) -> HeadCounts:
        kv_heads = self.config.kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise ValueError(f"attention.kv_heads must divide the number of heads {self.num_heads}, got {kv_heads}")
        return HeadCounts(2 * self.num_heads, kv_heads, self.num_heads)

    def add_parameters(self) -> None:
        self.lambda_proj = nn.Linear(self.dim, self.num_heads, bias=False)

    def attend(self, tokens: Tokens) -> Tensor:
        q, k, v = tokens[:3]  # (B, 2M, N, D), 2 x (B, Mkv, N, D)
        acc_dtype = torch.promote_types(q.dtype, torch.float32)
        # The heads that share k and v attend as one head with more queries, so that k and v need no copies.
        queries = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, Mkv, 2M / Mkv N, D)
        heads = softmax_attention(queries, k, v).to(acc_dtype).reshape(q.shape).unflatten(1, (-1, 2))  # (B, M, 2, N, D)
        weight = self.lambda_proj(tokens.x).to(acc_dtype).sigmoid().transpose(1, 2)  # (B, M, N)
        return torch.addcmul(heads[:, :, 0], weight.unsqueeze(-1), heads[:, :, 1], value=-1).to(q.dtype)
