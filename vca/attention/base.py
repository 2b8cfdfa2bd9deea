"""What every variant shares: the projections around its attention over heads, and the local branch beside it.

    y = (attend(q, k, v) + DWConv3x3(v)) Wo

A variant is a subclass that names its `Config` and defines `attend`; parameters of its own are made in
`add_parameters`. Parameters are named as in timm's `Attention` (`qkv`, `proj`), so that its checkpoints load into every
variant as far as they go.

Shape letters: B batch, M heads, N = P + H W tokens (P prefix tokens, then the grid), C = M D channels, D head dim.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca.attention.geometry import check_heads, check_tokens, is_pair, to_image

Choice = TypeVar("Choice", bound=Enum)


def choose(choices: type[Choice], value: Choice | str, key: str) -> Choice:
    """`value`, or the choice of that name; `ValueError` names the key and the choices."""
    if isinstance(value, choices):
        return value
    try:
        return choices(value)
    except ValueError:
        raise ValueError(f"{key} must be one of {[choice.value for choice in choices]}, got {value!r}") from None


@dataclass
class AttentionConfig:
    """Options that every variant has.

    Attributes:
        name: key of the variant in `vca.attention.ATTENTIONS`.
        local_branch: add a 3 x 3 depthwise convolution of v on the grid, before the output projection.
    """

    name: str = ""
    local_branch: bool = False


class ProjectedAttention(nn.Module):
    """`(B, N, C)` to `(B, N, C)`: projections, an attention over heads that the subclass defines, local branch.

    The constructor of every variant. What means nothing to one, such as the contrast grid to MHSA, it leaves alone.

    Args:
        dim: C.
        num_heads: M.
        grid: `(H, W)` of the patch tokens; another one can be given to `forward`.
        contrast_grid: `(h, w)`, the backbone's contrast grid, unless the variant's options name one.
        num_prefix_tokens: P, tokens before the grid (class token, registers).
        layer_index: depth of the layer, from 0.
        qkv_bias: bias of the qkv projection.
        proj_drop: dropout after the output projection.
        config: the variant's options; None takes their defaults.

    Raises:
        ValueError: if `dim` is not divisible by `num_heads`, the options are another variant's, or another argument is
            out of its range.
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
        check_heads(dim, num_heads)
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
        if self.config.local_branch:  # its images are channels_last, and so will be the gradient of its weight
            local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
            self.local = local.to(memory_format=torch.channels_last)
        self.add_parameters()

    def add_parameters(self) -> None:
        """Make what the variant has besides; called at the end of the constructor."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """The variant itself: three `(B, M, N, D)` to one, in the dtype of `q`."""
        raise NotImplementedError

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Attend: `(B, N, C)` to `(B, N, C)`; `grid` where this input's is not the one the module was built for.

        Raises:
            ValueError: if the tokens do not fill the grid.
        """
        grid = grid or self.grid
        check_tokens(x.shape[1], grid, self.num_prefix_tokens)
        qkv = self.qkv(x)  # (B, N, 3C)
        heads = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # 3 x (B, N, M, D); their gradients: one copy
        q, k, v = (x.transpose(1, 2) for x in heads)  # 3 x (B, M, N, D)
        out = self.attend(q, k, v, grid).transpose(1, 2).flatten(2)  # (B, N, C)
        if self.local is not None:
            local = self.local_branch(v.transpose(1, 2).flatten(2), grid)  # (B, H W, C)
            out = out + F.pad(local, (0, 0, self.num_prefix_tokens, 0))  # not in place: SDPA keeps what it returned
        return self.proj_drop(self.proj(out))  # (B, N, C)

    def local_branch(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Depthwise 3 x 3 convolution of v on the grid: `(B, N, C)` to `(B, H W, C)`, nothing for prefix tokens."""
        assert self.local is not None
        image = self.local(to_image(v, grid, self.num_prefix_tokens))  # (B, C, H, W)
        return image.flatten(2).transpose(1, 2)  # (B, H W, C)
