"""Circulant Attention (arXiv 2512.21542): a softmax over cyclic displacements, by 2D FFT in O(N log N).

    a[d] = sum_p q[p] k[p + d] / sqrt N      for each displacement d of the grid, cyclic in both directions
    s    = softmax_d(a)
    o[p] = sum_d s[d] v[p + d]
    y    = (o * SiLU(x Wg + bg)) Wo

Every channel is its own head, so the number of heads affects prefix tokens only. A correlation over the grid is a
product of spectra: F(a) = conj(F q) F k / sqrt N and F(o) = conj(F s) F v. Opposite borders of the grid are neighbours.

Differences from the original: x is projected before the transform and not after it, which is equal, because both are
linear; any grid, not only squares. Prefix tokens have no displacement, so they attend by softmax (`GridAttention`).

Shape letters: B batch, M heads, N = H W patch tokens, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fft import irfft2, rfft2

from vca.attention.base import AttentionConfig, Gate, Tokens
from vca.attention.comparison.grid import GridAttention


@dataclass
class CirculantConfig(AttentionConfig):
    """Options of Circulant Attention: those of every variant, with a gate."""

    name: str = "circulant"
    gate: Gate = Gate.silu


def correlate(x: Tensor, y: Tensor) -> Tensor:
    """Compute `sum_p x[p] y[p + d]` for each cyclic displacement d; all are `(..., H, W)`, in float32 or float64."""
    return irfft2(rfft2(x).conj() * rfft2(y), s=x.shape[-2:])


class CirculantAttention(GridAttention):
    """Circulant Attention as a replacement for MHSA; takes the arguments of `ProjectedAttention`."""

    Config = CirculantConfig

    def attend_grid(self, tokens: Tokens) -> Tensor:
        """Compute the attention of each channel; FFTs and softmax run in float32, or in float64 for float64."""
        acc_dtype = torch.promote_types(tokens.q.dtype, torch.float32)
        q, k, v = (x.to(acc_dtype).transpose(2, 3).unflatten(3, tokens.grid) for x in tokens[:3])  # (B, M, D, H, W)
        scores = correlate(q * tokens.q.shape[2] ** -0.5, k)  # (B, M, D, H, W)
        weights = scores.flatten(3).softmax(-1).unflatten(3, tokens.grid)  # (B, M, D, H, W)
        return correlate(weights, v).flatten(3).transpose(2, 3).to(tokens.q.dtype)  # (B, M, N, D)
