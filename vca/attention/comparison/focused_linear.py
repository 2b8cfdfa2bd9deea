"""Focused linear attention of FLatten Transformer (arXiv 2308.00442): a feature map replaces the softmax.

    f(x) = |relu(x)| u^3 / |u^3|,   u = relu(x) / |relu(x)|       sharpens the direction, keeps the length
    o    = f(q) (f(k)^T v) / (f(q) sum f(k)^T)

Differences from the original: the depthwise convolution of v is the shared 3 x 3 local branch (the original: 5 x 5, one
kernel for all heads); there is no learned scale per channel before the power (it is positive, so the projections can
absorb it) and no learned position added to the keys; f is applied per head, not to all C channels of a token.

Shape letters: B batch, M heads, N tokens, D head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vca.attention.base import AttentionConfig, ProjectedAttention, Tokens


@dataclass
class FocusedLinearConfig(AttentionConfig):
    """Options of focused linear attention.

    Attributes:
        power: exponent of f, from 1 to 16; 3 in the original. Up to 16, the squares of a uniform direction (D^-p) stay
            within float32 for a head dim of 256.
    """

    name: str = "focused_linear"
    local_branch: bool = True
    power: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.power <= 16:
            raise ValueError(f"attention.power must be from 1 to 16, got {self.power}")


def focus(x: Tensor, power: int, eps: float = 1e-6) -> Tensor:
    """Compute `f(x)` over the last dimension, in the dtype of `x`. The result is never all zero."""
    positive = F.relu(x) + eps
    length = positive.norm(dim=-1, keepdim=True)
    sharp = (positive / length) ** power  # normalized first: a power of the length would overflow
    return length * sharp / sharp.norm(dim=-1, keepdim=True)


class FocusedLinearAttention(ProjectedAttention):
    """Focused linear attention as a replacement for MHSA; takes the arguments of `ProjectedAttention`."""

    Config = FocusedLinearConfig

    def attend(self, tokens: Tokens) -> Tensor:
        q, k, v = tokens[:3]
        # f and the division run in float32. The result does not depend on the length of the queries or on a common
        # factor of the keys, so both are normalized to the order of one.
        acc_dtype = torch.promote_types(q.dtype, torch.float32)
        q_focused = F.normalize(focus(q.to(acc_dtype), self.config.power), dim=-1)  # (B, M, N, D)
        k_focused = focus(k.to(acc_dtype), self.config.power)  # (B, M, N, D)
        k_focused = k_focused / k_focused.mean(dim=(2, 3), keepdim=True)  # (B, M, N, D)
        k_mean = k_focused.mean(dim=2, keepdim=True)  # (B, M, 1, D)
        kv = k_focused.to(q.dtype).transpose(2, 3) @ (v / v.shape[2])  # (B, M, D, D)
        out = (q_focused.to(q.dtype) @ kv).to(acc_dtype)  # (B, M, N, D)
        return (out / (q_focused * k_mean).sum(-1, keepdim=True)).to(q.dtype)
