"""MHLA (arXiv 2601.07832): linear attention with one summary per piece of the grid, mixed by a learned matrix A.

    y    = LayerNorm(x);   q, k, v from y;   q, k = RMSNorm(q), RMSNorm(k)    over C channels, with qk_norm
    q, k = relu(q) + eps, relu(k) + eps
    S_b  = sum_{j in piece b} k_j^T v_j,   z_b = sum_{j in piece b} k_j
    o    = q_at sum_b A_ab S_b / (den_at + eps)        of the token at place t of piece a
    den  = sum_b A_ab (q_bt . z_b)                     `released`: q of the same place t in piece b
         = q_at . sum_b A_ab z_b                       `normalized`: the weights of a token sum to one

With the first, that of the released code, the weights do not sum to one. A is trained, one for all heads, and decayed
like a weight. The initial A depends on the distance d of two pieces and the largest one, d_max; except for `gaussian`,
its columns are then divided by their sums:

    linear 1 - d / d_max    cos cos(pi d / 4 d_max)    exp exp(-d / sigma)    local d <= 1.5
    gaussian exp(-d^2 / (2 (d_max / 3)^2))

The original has square pieces on a square grid, padded to 256 px for DeiT. Here any grid that the pieces divide works;
another image size keeps A and has larger pieces. Prefix tokens attend by softmax (`GridAttention`).

Shape letters: B batch, M heads, N = H W tokens, C = M D channels, D head dim, n = ph pw pieces of t = N / n tokens.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca.attention.base import AttentionConfig, Tokens, choose, no_autocast
from vca.attention.comparison.grid import GridAttention
from vca.attention.geometry import is_pair

EPS = 1e-6


class Mixing(Enum):
    """Initial mixing of the summaries, a function of the distance of two pieces."""

    linear = "linear"
    cos = "cos"
    exp = "exp"
    local = "local"
    gaussian = "gaussian"


class Denominator(Enum):
    """Divisor of the mixed summaries."""

    released = "released"
    normalized = "normalized"


@dataclass
class MHLAConfig(AttentionConfig):
    """Options of MHLA; the defaults are those of its classifiers, except for the pieces.

    Attributes:
        pieces: grid of pieces `[ph, pw]`, which must divide the token grid; None uses the backbone's contrast grid.
        mixing: initial mixing matrix: `linear`, `cos`, `exp`, `local` or `gaussian`.
        sigma: decay length of `exp`, in pieces.
        denominator: `released` (as the published code) or `normalized` (weights sum to one).
        local_identity: initialize the local branch as the identity, as in the original's DiT.
    """

    name: str = "mhla"
    local_branch: bool = True
    local_kernel: int = 5
    qk_norm: bool = True
    pieces: Any = None
    mixing: Mixing = Mixing.linear
    sigma: float = 3.0
    denominator: Denominator = Denominator.released
    local_identity: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mixing = choose(Mixing, self.mixing, "attention.mixing")
        self.denominator = choose(Denominator, self.denominator, "attention.denominator")
        if self.pieces is not None and not is_pair(self.pieces):
            raise ValueError(f"attention.pieces must be two integers >= 1 or null, got {self.pieces}")
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"attention.sigma must be > 0 and finite, got {self.sigma}")


def initial_mixing(mixing: Mixing, pieces: tuple[int, int], sigma: float) -> Tensor:
    """Return the initial matrix A `(n, n)` of a grid of pieces."""
    rows, columns = torch.meshgrid(*(torch.arange(float(side)) for side in pieces), indexing="ij")
    places = torch.stack((rows.flatten(), columns.flatten()), dim=1)  # (n, 2)
    distance = (places[:, None] - places).square().sum(-1).sqrt()  # (n, n)
    relative = distance / (math.hypot(pieces[0] - 1, pieces[1] - 1) or 1.0)
    if mixing is Mixing.gaussian:
        return torch.exp(-(relative.square()) * 4.5)
    weights = {
        Mixing.linear: 1 - relative,
        Mixing.cos: torch.cos(math.pi / 4 * relative),
        Mixing.exp: torch.exp(-distance / sigma),
        Mixing.local: (distance <= 1.5).float(),
    }[mixing]
    return weights / weights.sum(dim=0)


class MHLAAttention(GridAttention):
    """MHLA as a replacement for MHSA; takes the arguments of `ProjectedAttention`.

    Raises:
        ValueError: if the pieces do not divide the token grid, also in `forward` and `set_grid`.
    """

    Config = MHLAConfig

    def add_parameters(self) -> None:
        ph, pw = self.config.pieces or self.contrast_grid
        self.pieces: tuple[int, int] = (ph, pw)
        self.piece_size(self.grid)
        self.norm = nn.LayerNorm(self.dim)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.eps = None  # machine epsilon, as in the original
        self.mixing = nn.Parameter(initial_mixing(self.config.mixing, self.pieces, self.config.sigma))
        if self.local is not None and self.config.local_identity:
            nn.init.dirac_(self.local.weight, groups=self.local.groups)
            nn.init.zeros_(self.local.bias)  # type: ignore[arg-type]

    def piece_size(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width of a piece, in tokens."""
        (height, width), (ph, pw) = grid, self.pieces
        if height % ph or width % pw:
            raise ValueError(
                f"attention=mhla: {ph} x {pw} pieces must divide the token grid, got {height} x {width}; "
                "set attention.pieces=[ph,pw]"
            )
        return (height // ph, width // pw)

    def set_grid(self, grid: tuple[int, int]) -> None:
        self.piece_size(grid)
        super().set_grid(grid)

    def project(self, x: Tensor, grid: tuple[int, int]) -> Tokens:
        return super().project(self.norm(x), grid)

    def to_pieces(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Arrange `(B, M, N, D)` by pieces, row by row inside and outside: `(B, M, n, t, D)`."""
        (ph, pw), (height, width) = self.pieces, size
        return x.unflatten(2, (ph, height, pw, width)).transpose(3, 4).flatten(4, 5).flatten(2, 3)

    def attend_grid(self, tokens: Tokens) -> Tensor:
        size, dtype = self.piece_size(tokens.grid), tokens.v.dtype
        acc_dtype = torch.promote_types(dtype, torch.float32)
        q, k, v = (self.to_pieces(x, size) for x in tokens[:3])  # 3 x (B, M, n, t, D)
        q, k = F.relu(q.to(acc_dtype)) + EPS, F.relu(k.to(acc_dtype)) + EPS
        # A common factor of the queries or keys of a head changes eps only. With a mean of one, products fit float16.
        q_mean, k_mean = (x.detach().mean(dim=(2, 3, 4), keepdim=True) for x in (q, k))  # (B, M, 1, 1, 1)
        q, k = q / q_mean, k / k_mean
        eps = EPS / (q_mean * k_mean * k.shape[3]).squeeze(-1)  # (B, M, 1, 1); the sums of a piece are means
        summary = k.to(dtype).transpose(3, 4) @ (v / k.shape[3])  # S, (B, M, n, D, D)
        mixed = (self.mixing.to(dtype) @ summary.flatten(3)).unflatten(3, summary.shape[3:])  # (B, M, n, D, D)
        out = (q.to(dtype) @ mixed).to(acc_dtype) / (self.denominator(q, k) + eps).unsqueeze(-1)
        (ph, pw), (height, width) = self.pieces, size
        out = out.to(dtype).unflatten(3, (height, width)).unflatten(2, (ph, pw))  # (B, M, ph, pw, height, width, D)
        return out.transpose(3, 4).flatten(2, 5)  # (B, M, N, D)

    def denominator(self, q: Tensor, k: Tensor) -> Tensor:
        """Compute the divisor of each token, `(B, M, n, t)`, in the dtype of q."""
        z, mixing = k.mean(dim=3), self.mixing.to(q.dtype)  # (B, M, n, D), (n, n)
        with no_autocast(q):  # in float32
            if self.config.denominator is Denominator.normalized:
                return (q * (mixing @ z).unsqueeze(3)).sum(-1)
            return mixing @ (q * z.unsqueeze(3)).sum(-1)
