"""Differential Attention of the Differential Transformer (arXiv 2410.05258), over all tokens: quadratic.

Each head splits its queries and keys into two halves; common-mode attention cancels in their difference:

    q = [q1; q2],   k = [k1; k2]
    o = (1 - l_init) RMSNorm((softmax(q1 k1^T / sqrt(D/2)) - l softmax(q2 k2^T / sqrt(D/2))) v)

With M heads of dim D this is the paper's layer of M heads, with two queries of dim D / 2 and values of dim D. The paper
uses half as many heads as MHSA, with values twice as wide; here the number of heads is unchanged.

Shape letters: B batch, M heads, N tokens, D head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca.attention.base import AttentionConfig, ProjectedAttention, Tokens
from vca.attention.contrast import Lambda, lambda_init_of_layer
from vca.attention.softmax import softmax_attention
from vca.attention.stages import difference


@dataclass
class DifferentialConfig(AttentionConfig):
    """Options of Differential Attention; the paper has no local branch."""

    name: str = "differential"


def check_halves(head_dim: int) -> None:
    """Raise `ValueError` unless the head dim is even."""
    if head_dim % 2:
        raise ValueError(f"head dim must be even (its halves are used separately), got {head_dim}; change num_heads")


class DifferentialAttention(ProjectedAttention):
    """Differential Attention as a replacement for MHSA; takes the arguments of `ProjectedAttention`.

    Raises:
        ValueError: if the head dim is odd.
    """

    Config = DifferentialConfig

    def add_parameters(self) -> None:
        check_halves(self.head_dim)
        self.lambda_init = lambda_init_of_layer(self.layer_index)
        self.lambda1 = Lambda(self.head_dim // 2, self.lambda_init)
        self.norm1_weight = nn.Parameter(torch.ones(self.head_dim))

    def attend(self, tokens: Tokens) -> Tensor:
        q, k, v = tokens[:3]
        acc_dtype = torch.promote_types(q.dtype, torch.float32)
        (q1, q2), (k1, k2) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)  # (B, M, N, D / 2)
        positive = softmax_attention(q1, k1, v).to(acc_dtype)  # (B, M, N, D)
        negative = softmax_attention(q2, k2, v).to(acc_dtype)  # (B, M, N, D)
        out = difference(positive, negative, self.lambda1())  # (B, M, N, D)
        weight = (1 - self.lambda_init) * self.norm1_weight.to(acc_dtype)
        return F.rms_norm(out, (self.head_dim,), weight, 1e-5).to(q.dtype)
