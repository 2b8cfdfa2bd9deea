"""Multi-head self-attention (MHSA), the baseline that every variant is compared with.

    o = softmax(q k^T / sqrt D + bias) v,    y = o Wo

The windows and stripes of the backbones call the function with the tokens they have chosen.

Shape letters: B batch, N tokens, C channels, M heads, D = C / M head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from vca.attention.base import AttentionConfig, ProjectedAttention


def needs_plain_ops() -> bool:
    """Whether `torch.func` or forward-mode differentiation is active, which take plain operations alone.

    Fused attention has no forward-mode derivative, no second one and no batching rule; nor has a backward of our own.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of `(B, M, N, D)` queries over `(B, M, N', D)` keys and values: `(B, M, N, D)`.

    `bias` is added to the scores; `(M, N, N')` or anything that broadcasts to `(B, M, N, N')`.
    """
    if bias is not None:
        bias = bias.to(q.dtype)
    if needs_plain_ops():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@dataclass
class SoftmaxConfig(AttentionConfig):
    """MHSA. A backbone with windows, stripes or spatial reduction keeps those, its baseline.

    Attributes:
        local_branch: as for every variant; what this convolution alone adds to the baseline. A backbone that keeps an
            attention of its own refuses it.
    """

    name: str = "softmax"


class SoftmaxAttention(ProjectedAttention):
    """MHSA over all tokens; the arguments are those of `ProjectedAttention`."""

    Config = SoftmaxConfig

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """`softmax_attention` over all tokens."""
        return softmax_attention(q, k, v)
