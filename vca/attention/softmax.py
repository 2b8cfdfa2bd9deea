"""Multi-head self-attention (MHSA), the baseline of every variant.

    o = softmax(q k^T / sqrt D + bias) v,    y = o Wo

Backbones with windows, stripes or spatial reduction call `softmax_attention` with their own tokens.

Shape letters: B batch, N tokens, C channels, M heads, D = C / M head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from vca.attention.base import AttentionConfig, ProjectedAttention, Tokens


def needs_plain_ops() -> bool:
    """Return whether `torch.func` or forward-mode differentiation is active.

    Fused SDPA and custom backward functions support neither forward-mode or second derivatives nor batching rules.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute softmax attention of queries `(B, M, N, D)` over keys and values `(B, M, N', D)`: `(B, M, N, D)`.

    `bias` is added to the scores and must broadcast to `(B, M, N, N')`.
    """
    if bias is not None:
        bias = bias.to(q.dtype)
    if needs_plain_ops():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@dataclass
class SoftmaxConfig(AttentionConfig):
    """Options of MHSA. Backbones with windows, stripes or spatial reduction use their original attention.

    These backbones reject other options than the defaults. The local branch measures its effect without VCA.
    """

    name: str = "softmax"


class SoftmaxAttention(ProjectedAttention):
    """MHSA over all tokens; takes the arguments of `ProjectedAttention`."""

    Config = SoftmaxConfig

    def attend(self, tokens: Tokens) -> Tensor:
        return softmax_attention(tokens.q, tokens.k, tokens.v)
