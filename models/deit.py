"""DeiT: the plain Vision Transformer (arXiv 2012.12877), every block with the attention that the config names.

With `attention=softmax` it is timm's `deit_*_patch16_224`, parameter for parameter; with `attention=vca` it is the
DeiT of Table 1 of the VCA paper (the class token stays, as a prefix token of the contrast grid).

Shape letters: B batch, N = 1 + H W tokens (the class token first), C channels, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import DropPath, Mlp, PatchEmbed, resample_abs_pos_embed, to_2tuple, trunc_normal_
from torch import Tensor, nn

from models.layers import init_linear, select_options
from vca.attention import SoftmaxConfig, build_attention
from vca.attention.geometry import is_pair


@dataclass
class DeiTConfig:
    """Size of a DeiT; names as in timm.

    Attributes:
        family: the key in `models.MODELS`.
        name: what runs and tables call this size.
        img_size: pixels, one integer or `[height, width]`; other sizes work too, by interpolating `pos_embed`.
        contrast_grid: `[h, w]` of the contrast tokens, unless `attention.pool` names another.
    """

    family: str = "deit"
    name: str = "deit_tiny"
    img_size: Any = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    contrast_grid: list[int] = field(default_factory=lambda: [7, 7])

    def __post_init__(self) -> None:
        for key in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key} must be >= 1, got {getattr(self, key)}")
        if not self.mlp_ratio > 0:
            raise ValueError(f"model.mlp_ratio must be > 0, got {self.mlp_ratio}")
        size = to_2tuple(self.img_size) if not isinstance(self.img_size, str) else None
        if size is None or not is_pair(size):
            raise ValueError(f"model.img_size must be an integer or two, >= 1, got {self.img_size!r}")
        height, width = size
        if height % self.patch_size or width % self.patch_size:
            sizes = f"{height} x {width}" if height != width else height
            raise ValueError(f"model.img_size must be a multiple of model.patch_size {self.patch_size}, got {sizes}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"model.num_heads must divide model.embed_dim {self.embed_dim}, got {self.num_heads}")
        if self.num_classes < 0:
            raise ValueError(f"model.num_classes must be >= 0, got {self.num_classes}")
        if not is_pair(self.contrast_grid):
            raise ValueError(f"model.contrast_grid must be two integers >= 1, got {self.contrast_grid}")
        for key in ("drop_rate", "drop_path_rate"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"model.{key} must be in [0, 1), got {getattr(self, key)}")


class Block(nn.Module):
    """Pre-norm transformer block: `x + Attention(LN(x))`, then `x + MLP(LN(x))`, each under stochastic depth."""

    def __init__(self, config: DeiTConfig, attention: nn.Module, drop_path: float) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), drop=config.drop_rate)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """`(B, N, C)` to `(B, N, C)`."""
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DeiT(nn.Module):
    """Vision Transformer with a class token and learned absolute positions.

    Args:
        config: the size.
        attention: config of an attention variant, one of `vca.attention.ATTENTIONS`.
    """

    def __init__(self, config: DeiTConfig, attention: Any) -> None:
        super().__init__()
        self.config = config
        dim, depth = config.embed_dim, config.depth
        self.patch_embed = PatchEmbed(
            to_2tuple(config.img_size), config.patch_size, config.in_chans, dim, strict_img_size=False
        )
        self.grid: tuple[int, int] = self.patch_embed.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], dim))
        self.pos_drop = nn.Dropout(config.drop_rate)
        pool = (config.contrast_grid[0], config.contrast_grid[1])
        self.blocks = nn.ModuleList(
            Block(
                config,
                build_attention(
                    attention,
                    dim,
                    config.num_heads,
                    self.grid,
                    pool,
                    num_prefix_tokens=1,
                    layer_index=index,
                    qkv_bias=config.qkv_bias,
                    proj_drop=config.drop_rate,
                ),
                drop_path=config.drop_path_rate * index / max(depth - 1, 1),
            )
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, config.num_classes) if config.num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """As timm: linear layers and positions truncated normal 0.02, biases zero, the class token almost zero."""
        self.apply(init_linear)
        trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more dimensions that the recipe does not decay."""
        return {"pos_embed", "cls_token"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `(B, in_chans, height, width)` to normalised tokens `(B, N, C)`."""
        patch = self.config.patch_size
        if x.shape[-2] % patch or x.shape[-1] % patch:
            raise ValueError(f"image height and width must be multiples of {patch}, got {tuple(x.shape[-2:])}")
        grid = (x.shape[-2] // patch, x.shape[-1] // patch)
        x = self.patch_embed(x)  # (B, H W, C)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)  # (B, N, C)
        x = self.pos_drop(x + self.positions(grid))  # (B, N, C)
        for block in self.blocks:
            x = block(x, grid)  # (B, N, C)
        return self.norm(x)  # (B, N, C)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """`pos_embed` `(1, N, C)`, interpolated where the grid is not the one it was made for."""
        if grid == self.grid:
            return self.pos_embed
        return resample_abs_pos_embed(self.pos_embed, list(grid), list(self.grid), num_prefix_tokens=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens `(B, N, C)` to logits `(B, K)`, or to the class token `(B, C)` before them."""
        return x[:, 0] if pre_logits else self.head(x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, in_chans, height, width)` to logits `(B, K)`."""
        return self.forward_head(self.forward_features(x))


def from_official(config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> DeiT:
    """The softmax baseline with the weights of timm's `deit_*_patch16_224` or of the DeiT repository.

    Args:
        config: timm's own keys (`embed_dim`, `depth`, `num_heads`, `img_size`, ...); what is not named is DeiT-Tiny's.
        state_dict: parameters by name, or a checkpoint that holds them under `model`.

    Raises:
        ValueError: on a key that DeiT does not have.
        RuntimeError: on a missing, unexpected or misshapen parameter.
    """
    model = DeiT(select_options(DeiTConfig, config), SoftmaxConfig())
    model.load_state_dict(state_dict.get("model", state_dict))
    return model
