"""Base class of every attention variant: qkv and output projections and the local branch.

    y = (attend(q, k, v) + DWConv3x3(v)) Wo

A variant is a subclass that sets `Config` and defines `attend`; it creates its own parameters in `add_parameters`.
Projections are named as in timm's `Attention` (`qkv`, `proj`), so timm checkpoints load into every variant.

Shape letters: B batch, M heads, N = P + H W tokens (P prefix tokens, then the grid), C = M D channels, D head dim.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca.attention.geometry import check_tokens, is_pair, to_image

Choice = TypeVar("Choice", bound=Enum)


def choose(choices: type[Choice], value: Choice | str, key: str) -> Choice:
    """Convert a string to a member of the enum `choices`; `ValueError` names the key and the valid values."""
    if isinstance(value, choices):
        return value
    try:
        return choices(value)
    except ValueError:
        raise ValueError(f"{key} must be one of {[choice.value for choice in choices]}, got {value!r}") from None


@dataclass
class AttentionConfig:
    """Options shared by all variants.

    Attributes:
        name: registry key in `vca.attention.ATTENTIONS`.
        local_branch: add a 3 x 3 depthwise convolution of v on the grid, before the output projection.
    """

    name: str = ""
    local_branch: bool = False


class ProjectedAttention(nn.Module):
    """Multi-head attention on tokens `(B, N, C)`; the subclass defines the attention over heads, `attend`.

    All variants have this constructor and ignore arguments that do not apply to them, such as `contrast_grid` for MHSA.

    Args:
        dim: width C.
        num_heads: number of heads M; must divide `dim`.
        grid: `(H, W)` of the patch tokens; `forward` accepts other grids.
        contrast_grid: the backbone's contrast grid `(h, w)`; `config.contrast_grid` overrides it.
        num_prefix_tokens: P, the number of tokens before the grid (class token, registers).
        layer_index: depth of the layer in the network, from 0. It sets `lambda_init` of VCA and Differential Attention
            and selects the layer's entry of a per-layer `config.contrast_grid`.
        qkv_bias: whether the qkv projection has a bias.
        proj_drop: dropout rate after the output projection.
        config: options of the variant; None uses the defaults.

    Weight decay: `vca.training.optim` decays parameters with two or more dimensions. New parameters of shape `(D,)`
    (norm weights, lambda vectors, biases) are therefore not decayed; stream embeddings and projections are. To exclude
    a parameter, add its name to the backbone's `no_weight_decay()`.

    Raises:
        ValueError: if `num_heads` does not divide `dim`, `config` is not the variant's dataclass, or a value is out of
            range.
    """

    Config: type[AttentionConfig] = AttentionConfig

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        contrast_grid: tuple[int, int] = (7, 7),
        num_prefix_tokens: int = 0,
        layer_index: int = 0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        config: Any = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must be >= 1 and divide dim={dim}, got {num_heads}")
        for key, pair in (("grid", grid), ("contrast_grid", contrast_grid)):
            if not is_pair(pair):
                raise ValueError(f"{key} must be two integers >= 1, got {pair}")
        for key, number in (("num_prefix_tokens", num_prefix_tokens), ("layer_index", layer_index)):
            if number < 0:
                raise ValueError(f"{key} must be >= 0, got {number}")
        if not isinstance(config, (self.Config, type(None))):
            raise ValueError(f"config must be a {self.Config.__name__}, got {type(config).__name__}")
        self.config: Any = config or self.Config()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.grid, self.contrast_grid = (grid[0], grid[1]), (contrast_grid[0], contrast_grid[1])
        self.num_prefix_tokens, self.layer_index = num_prefix_tokens, layer_index
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.local = None
        if self.config.local_branch:  # channels_last, the memory format of its input and of its weight gradient
            local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
            self.local = local.to(memory_format=torch.channels_last)
        self.add_parameters()

    def add_parameters(self) -> None:
        """Create the variant's own parameters; called at the end of the constructor."""

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Make `(H, W)` the grid of inputs without `grid`, as if the module had been built for it.

        A variant whose parameters depend on the grid also interpolates those.
        """
        self.grid = (grid[0], grid[1])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Compute the attention over heads from q, k, v `(B, M, N, D)`: `(B, M, N, D)`, in the dtype of `q`."""
        raise NotImplementedError

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Map `(B, N, C)` to `(B, N, C)`; pass `grid` if it differs from the one the module was built for.

        Raises:
            ValueError: if N is not `num_prefix_tokens + H * W`.
        """
        grid = grid or self.grid
        check_tokens(x.shape[1], grid, self.num_prefix_tokens)
        qkv = self.qkv(x)  # (B, N, 3C)
        heads = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # 3 x (B, N, M, D); one copy in backward
        q, k, v = (x.transpose(1, 2) for x in heads)  # 3 x (B, M, N, D)
        out = self.attend(q, k, v, grid).transpose(1, 2).flatten(2)  # (B, N, C)
        if self.local is not None:
            local = self.local_branch(v.transpose(1, 2).flatten(2), grid)  # (B, H W, C)
            out = out + F.pad(local, (0, 0, self.num_prefix_tokens, 0))  # not in place: SDPA saves its output
        return self.proj_drop(self.proj(out))  # (B, N, C)

    def local_branch(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Convolve v on the grid (3 x 3, depthwise): `(B, N, C)` to `(B, H W, C)`, without prefix tokens."""
        assert self.local is not None
        image = self.local(to_image(v, grid, self.num_prefix_tokens))  # (B, C, H, W)
        return image.flatten(2).transpose(1, 2)  # (B, H W, C)
