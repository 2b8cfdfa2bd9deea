"""Multi-head self-attention (MHSA), the baseline that every variant is compared with.

    o = softmax(q k^T / sqrt D + bias) v,    y = o Wo

Parameters are named as in timm's `Attention` (`qkv`, `proj`), so that its checkpoints load as they are. The windows
and stripes of the backbones call the function with the tokens they have chosen.

Shape letters: B batch, N tokens, C channels, M heads, D = C / M head dim.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from vca.attention.geometry import check_heads


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of `(B, M, N, D)` queries over `(B, M, N', D)` keys and values: `(B, M, N, D)`.

    `bias` is added to the scores; `(M, N, N')` or anything that broadcasts to `(B, M, N, N')`.
    """
    if bias is not None:
        bias = bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@dataclass
class SoftmaxConfig:
    """MHSA has no options of its own. A backbone with windows, stripes or spatial reduction keeps them under it."""

    name: str = "softmax"


class SoftmaxAttention(nn.Module):
    """MHSA over all tokens.

    Takes the arguments that every variant takes (see `vca.attention.build_attention`); the token grid and the
    contrast pool mean nothing to it.

    Raises:
        ValueError: if `dim` is not divisible by `num_heads`.
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
        config: SoftmaxConfig | None = None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Attend over all tokens: `(B, N, C)` to `(B, N, C)`. `grid` is accepted and not needed."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, M, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, M, N, D)
        out = softmax_attention(q, k, v)  # (B, M, N, D)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))  # (B, N, C)
