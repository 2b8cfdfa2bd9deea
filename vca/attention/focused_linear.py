"""Focused linear attention of FLatten Transformer (arXiv 2308.00442): a kernel instead of the softmax.

    f(x) = |relu(x)| u^3 / |u^3|,   u = relu(x) / |relu(x)|       the power sharpens the direction, the length stays
    o    = f(q) (f(k)^T v) / (f(q) sum f(k)^T)

The original adds a depthwise convolution of v against the low rank of such a map; here it is the 3 x 3 local branch
that all variants share, where the original has 5 x 5 (and one kernel for all heads). Its learned scale before the
power, one number a channel, is left out: being positive, it is a rescaling of the projections. Left out as well is the
learned position that the original adds to every key. The original focuses all C channels of a token at once, before it
splits them into heads; here each head has a norm and a power of its own.

Shape letters: B batch, M heads, N tokens, D head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vca.attention.base import AttentionConfig, ProjectedAttention


@dataclass
class FocusedLinearConfig(AttentionConfig):
    """Options of focused linear attention.

    Attributes:
        power: p, of the focusing function, from 1 to 16; 3 in the original. The squares of a flat direction, D^-p
            each, stay in the range of float32 up to 16 for heads of 256.
    """

    name: str = "focused_linear"
    local_branch: bool = True
    power: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.power <= 16:
            raise ValueError(f"attention.power must be from 1 to 16, got {self.power}")


def focus(x: Tensor, power: int, eps: float = 1e-6) -> Tensor:
    """`f(x)` over the last dimension, in the dtype of `x`; never all zero, so that its sums can be divided by."""
    positive = F.relu(x) + eps
    length = positive.norm(dim=-1, keepdim=True)
    sharp = (positive / length) ** power  # the direction first: a power of the length would leave the range
    return length * sharp / sharp.norm(dim=-1, keepdim=True)


class FocusedLinearAttention(ProjectedAttention):
    """Focused linear attention in the place of MHSA; the arguments are those of `ProjectedAttention`."""

    Config = FocusedLinearConfig

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """The kernel map, keys and values first: three `(B, M, N, D)` to one.

        The focusing function and the division are taken in float32. The result does not depend on the length of the
        queries, nor on a common factor of the keys, so both are brought to the order of one.
        """
        full = torch.promote_types(q.dtype, torch.float32)
        q_focused = F.normalize(focus(q.to(full), self.config.power), dim=-1)  # (B, M, N, D)
        k_focused = focus(k.to(full), self.config.power)  # (B, M, N, D)
        k_focused = k_focused / k_focused.mean(dim=(2, 3), keepdim=True)  # (B, M, N, D)
        k_mean = k_focused.mean(dim=2, keepdim=True)  # (B, M, 1, D)
        seen = k_focused.to(q.dtype).transpose(2, 3) @ (v / v.shape[2])  # (B, M, D, D)
        out = (q_focused.to(q.dtype) @ seen).to(full)  # (B, M, N, D)
        return (out / (q_focused * k_mean).sum(-1, keepdim=True)).to(q.dtype)
