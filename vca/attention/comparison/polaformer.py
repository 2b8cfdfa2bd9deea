"""Polarity-aware linear attention of PolaFormer (arXiv 2501.15061): the negative parts of q and k are kept.

    q <- q / t,   k <- (k + E) / t,   t = softplus(scale)            a factor per channel, a position E per token
    r = 1 + alpha sigmoid(power)                                     a power per channel
    u+ = relu(u)^r,   u- = relu(-u)^r
    same_ij     = q+_i . k+_j + q-_i . k-_j
    opposite_ij = q+_i . k-_j + q-_i . k+_j
    o_i = [mean_j same_ij v1_j / (mean_j same_ij + eps), mean_j opposite_ij v2_j / (mean_j opposite_ij + eps)]
    y   = ((o + DWConv(v)) * (x Wg + bg)) Wo                         5 x 5, the same kernels in every head

v1 and v2 are the halves of v. eps is added to a mean: the output shrinks where the products of the powers are small.

Differences from the original: one qkv projection and one of the gate (the original: q with gate, k with v);
the powers are computed relative to their maximum, so that they do not overflow. For another grid the positions are
interpolated. Prefix tokens are queries and keys like others; each has its own position, which is not interpolated, and
gets nothing from the convolution.

Shape letters: B batch, M heads, N = P + H W tokens (P prefix tokens, then the grid), C = M D channels, D head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca.attention.base import AttentionConfig, Gate, ProjectedAttention, Tokens, no_autocast
from vca.attention.comparison.differential import check_halves
from vca.attention.geometry import to_image

EPS = 1e-6  # added to the mean over all tokens
TINY = 1e-30  # lower bound of the absolute values, before their logarithm
MAX_EXPONENT = 60.0  # bound of eps / exp(maximum), so that it is neither zero nor infinite in float32


@dataclass
class PolaFormerConfig(AttentionConfig):
    """Options of PolaFormer's attention.

    Attributes:
        alpha: the powers are between 1 and 1 + alpha.
        positional: add a learned position to every key.
    """

    name: str = "polaformer"
    local_branch: bool = True
    local_kernel: int = 5
    local_shared: bool = True
    gate: Gate = Gate.linear
    alpha: float = 4.0
    positional: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 16:
            raise ValueError(f"attention.alpha must be from 0 to 16, got {self.alpha}")


class PolaFormerAttention(ProjectedAttention):
    """PolaFormer's attention as a replacement for MHSA; takes the arguments of `ProjectedAttention`.

    Raises:
        ValueError: if the head dim is odd.
    """

    Config = PolaFormerConfig

    def add_parameters(self) -> None:
        check_halves(self.head_dim)
        self.scale = nn.Parameter(torch.zeros(1, 1, self.dim))
        self.power = nn.Parameter(torch.zeros(1, self.num_heads, 1, self.head_dim))
        count = self.num_prefix_tokens + self.grid[0] * self.grid[1]
        self.position = nn.Parameter(torch.zeros(1, count, self.dim)) if self.config.positional else None

    def set_grid(self, grid: tuple[int, int]) -> None:
        if self.position is not None and grid != self.grid:
            resized = self.positions(grid).detach()
            self.position = nn.Parameter(resized, requires_grad=self.position.requires_grad)
        super().set_grid(grid)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the positions of the keys at a grid `(H, W)`: `(1, P + H W, C)`."""
        assert self.position is not None
        if grid == self.grid:
            return self.position
        image = to_image(self.position, self.grid, self.num_prefix_tokens)  # (1, C, h, w)
        resized = F.interpolate(image, grid, mode="bilinear").flatten(2).transpose(1, 2)  # (1, H W, C)
        return torch.cat((self.position[:, : self.num_prefix_tokens], resized), dim=1)

    def attend(self, tokens: Tokens) -> Tensor:
        """Compute both polarities; powers and divisions run at least in float32, for float16 the products too.

        A mean of products may be so small that the gradient of the division overflows float16.
        """
        dtype = tokens.q.dtype
        acc_dtype = torch.promote_types(dtype, torch.float32)
        q, k = tokens.q.to(acc_dtype), tokens.k.to(acc_dtype)
        v = tokens.v.to(acc_dtype) if dtype is torch.float16 else tokens.v
        if self.position is not None:
            k = k + self.to_heads(self.positions(tokens.grid)).to(acc_dtype)  # (B, M, N, D)
        factor = 1 / F.softplus(self.to_heads(self.scale).to(acc_dtype))  # (1, M, 1, D)
        power = 1 + self.config.alpha * self.power.to(acc_dtype).sigmoid()  # (1, M, 1, D)
        with no_autocast(q):
            return polarized_attention(q * factor, k * factor, v, power).to(dtype)

    def to_heads(self, x: Tensor) -> Tensor:
        """View `(1, N, C)` as `(1, M, N, D)`."""
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)


def polarized_attention(q: Tensor, k: Tensor, v: Tensor, power: Tensor) -> Tensor:
    """Compute the attention of q and k, at least in float32, and v, all `(B, M, N, D)`, in the dtype of v.

    A channel of k is divided by its maximum over the tokens, which multiplies the query's channel; then each query is
    divided by its maximum over the channels, which divides eps. All features are at most 1, and the result is the same.
    """
    half = v.shape[3] // 2
    log_q, log_k = (power * x.abs().clamp(min=TINY).log() for x in (q, k))  # (B, M, N, D)
    k_max = log_k.detach().amax(dim=2, keepdim=True)  # (B, M, 1, D)
    log_q = log_q + k_max
    q_max = log_q.detach().amax(dim=3, keepdim=True)  # (B, M, N, 1)
    q_features, k_features = signed_parts((log_q - q_max).exp(), q), signed_parts((log_k - k_max).exp(), k)
    eps = EPS * (-q_max).clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()  # (B, M, N, 1)

    kv = k_features.to(v.dtype).transpose(2, 3) @ (v / v.shape[2])  # (B, M, 2D, D)
    weights = torch.cat((kv[..., :half], swap_signs(kv[..., half:], 2)), dim=3)  # (B, M, 2D, D)
    out = (q_features.to(v.dtype) @ weights).to(q.dtype)  # (B, M, N, D)
    k_mean = k_features.mean(dim=2, keepdim=True)  # (B, M, 1, 2D)
    same, opposite = ((q_features * mean).sum(3, keepdim=True) + eps for mean in (k_mean, swap_signs(k_mean, 3)))
    return torch.cat((out[..., :half] / same, out[..., half:] / opposite), dim=3).to(v.dtype)  # (B, M, N, D)


def signed_parts(x: Tensor, sign: Tensor) -> Tensor:
    """Split x by the sign of another tensor, both `(..., D)`: the positive part, then the negative, `(..., 2D)`."""
    return torch.cat((torch.where(sign > 0, x, 0), torch.where(sign < 0, x, 0)), dim=-1)


def swap_signs(x: Tensor, dim: int) -> Tensor:
    """Exchange the positive and the negative half of a dimension."""
    return x.roll(x.shape[dim] // 2, dim)
