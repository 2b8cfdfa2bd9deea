"""Multi-head self-attention (MHSA), the baseline that every variant is compared with.

    o = softmax(q k^T / sqrt D + bias) v,    y = o Wo

The windows and stripes of the backbones call the function with the tokens they have chosen.

Shape letters: B batch, N tokens, C channels, M heads, D = C / M head dim.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from vca.attention.base import AttentionConfig, ProjectedAttention


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of `(B, M, N, D)` queries over `(B, M, N', D)` keys and values: `(B, M, N, D)`.

    `bias` is added to the scores; `(M, N, N')` or anything that broadcasts to `(B, M, N, N')`.
    """
    if bias is not None:
        bias = bias.to(q.dtype)
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
