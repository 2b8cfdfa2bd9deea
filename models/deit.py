"""DeiT: a plain Vision Transformer (arXiv 2012.12877) in which every block uses the configured attention.

`attention=softmax` is timm's `deit_*_patch16_224`, parameter for parameter. `attention=vca` is the DeiT of Table 1 of
the VCA paper: the class token attends as a prefix token and is not pooled into the contrast grid.

Shape letters: B batch, N = P + H W tokens (P = 1 class token first, or P = 0), C channels.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from models.config import BackboneConfig, check_positive
from models.features import LayerOutput
from models.layers import Backbone, Block, drop_path_rates, load_official, replaced, square_side, trunc_normal_
from vca.attention import build_attention
from vca.attention.base import choose
from vca.attention.geometry import is_pair
from vca.attention.pooling import check_layers

NORM_EPS = 1e-6


class Norm(Enum):
    """Norm of the blocks and of the final tokens: LayerNorm or RMSNorm."""

    layer = "layer"
    rms = "rms"


NORMS = {Norm.layer: nn.LayerNorm, Norm.rms: nn.RMSNorm}


@dataclass
class DeiTConfig(BackboneConfig):
    """Config of a DeiT, with timm's names.

    Attributes:
        patch_size: side of a patch, in pixels.
        embed_dim: width C.
        depth, num_heads: number of blocks (`depth`) and of heads per block (`num_heads`).
        mlp_ratio: hidden width of the MLPs, as a multiple of `embed_dim`.
        qkv_bias: whether the projections to q, k and v have a bias.
        class_token: whether a class token is pooled by the head; otherwise the mean of all tokens is.
        pos_embed: whether learned position embeddings are added to the tokens.
        conditional_position: add a 3 x 3 depthwise convolution of the grid before the first norm of each block.
        norm: norms of the blocks and of the final tokens, LayerNorm (`layer`) or RMSNorm (`rms`), with epsilon 1e-6.
        contrast_grid: `[h, w]` of the contrast tokens; `attention.contrast_grid` overrides it.
    """

    family: str = "deit"
    name: str = "deit_tiny"
    patch_size: int = 16
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    class_token: bool = True
    pos_embed: bool = True
    conditional_position: bool = False
    norm: Norm = Norm.layer
    contrast_grid: list[int] = field(default_factory=lambda: [7, 7])

    def __post_init__(self) -> None:
        check_positive(self, "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
        super().__post_init__()
        self.norm = choose(Norm, self.norm, "model.norm")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"model.num_heads must divide model.embed_dim {self.embed_dim}, got {self.num_heads}")
        if not is_pair(self.contrast_grid):
            raise ValueError(f"model.contrast_grid must be two integers >= 1, got {self.contrast_grid}")

    @property
    def size_multiple(self) -> int:
        return self.patch_size


class DeiT(Backbone):
    """Vision Transformer; its learned position embeddings are interpolated at other image sizes."""

    config: DeiTConfig

    def __init__(self, config: DeiTConfig, attention: Any) -> None:
        from timm.layers import PatchEmbed

        dim, depth = config.embed_dim, config.depth
        check_layers(attention, depth)
        super().__init__(config, num_features=dim, num_prefix_tokens=int(config.class_token))
        self.patch_embed = PatchEmbed(config.size, config.patch_size, config.in_chans, dim, strict_img_size=False)
        self.grid: tuple[int, int] = self.patch_embed.grid_size
        tokens = self.num_prefix_tokens + self.grid[0] * self.grid[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim)) if config.pos_embed else None
        self.pos_drop = nn.Dropout(config.drop_rate)

        norm = NORMS[config.norm]
        self.blocks = nn.ModuleList()
        for index, drop_path in enumerate(drop_path_rates(config.drop_path_rate, depth)):
            attn = build_attention(
                attention,
                dim,
                config.num_heads,
                self.grid,
                contrast_grid=(config.contrast_grid[0], config.contrast_grid[1]),
                num_prefix_tokens=self.num_prefix_tokens,
                layer_index=index,
                qkv_bias=config.qkv_bias,
                proj_drop=config.drop_rate,
            )
            self.blocks.append(
                Block(
                    dim,
                    attn,
                    config.mlp_ratio,
                    config.drop_rate,
                    drop_path,
                    norm_eps=NORM_EPS,
                    norm=norm,
                    conditional_position=config.conditional_position,
                )
            )
        self.norm = norm(dim, eps=NORM_EPS)
        self.set_feature_info()
        self.add_head()

    def init_weights(self) -> None:
        """Initialise as timm: truncated normal with std 0.02, biases zero, class token normal with std 1e-6."""
        super().init_weights()
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)

    def no_weight_decay(self) -> set[str]:
        return {name for name in ("pos_embed", "cls_token") if getattr(self, name) is not None}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group as timm's ViT: one layer per block; the final norm joins the last block (timm marks it by 99999)."""
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def adapt(self, name: str, tensor: Tensor) -> Tensor | None:
        """Interpolate a `pos_embed` of another (square) image size; drop the class token's if the model has none."""
        if name != "pos_embed" or self.pos_embed is None or tensor.shape[2] != self.pos_embed.shape[2]:
            return None
        prefix = 0 if self.cls_token is None and square_side(tensor.shape[1]) else 1
        side = square_side(tensor.shape[1] - prefix)
        if side is None:
            return None
        return resample_positions(tensor, (side, side), self.grid)[:, -self.pos_embed.shape[1] :]

    def set_input_size(self, img_size: Any = None, patch_size: int | None = None) -> None:
        """As in `Backbone`; a new `patch_size`, in pixels, resamples the patch embedding."""
        self.change_config(img_size=img_size, patch_size=patch_size)

    def resize(self, old: DeiTConfig) -> None:
        """Resample patch and position embeddings, and set the grid of each attention."""
        before, self.size_multiple = self.grid, self.config.size_multiple
        block: Any
        for block in self.blocks:  # first, because an attention may refuse the grid
            block.attn.set_grid((self.config.size[0] // self.size_multiple, self.config.size[1] // self.size_multiple))
        self.patch_embed.set_input_size(self.config.size, self.config.patch_size)
        self.grid = self.patch_embed.grid_size
        if self.pos_embed is not None:
            self.pos_embed = replaced(self.pos_embed, resample_positions(self.pos_embed, before, self.grid))
        self.set_feature_info()

    def set_feature_info(self) -> None:
        config = self.config
        self.feature_info = [
            {"num_chs": config.embed_dim, "reduction": config.patch_size, "module": f"blocks.{index}"}
            for index in range(config.depth)
        ]

    @property
    def layers(self) -> nn.ModuleList:
        return self.blocks

    def run_layers(
        self, x: Tensor, take: Collection[int] = (), last: int | None = None
    ) -> tuple[Tensor, list[LayerOutput]]:
        """Images `(B, in_chans, height, width)` to tokens `(B, N, C)`; see `LayeredNetwork`."""
        self.check_images(x)
        grid = (x.shape[-2] // self.config.patch_size, x.shape[-1] // self.config.patch_size)
        x = self.patch_embed(x)  # (B, H W, C)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)  # (B, N, C)
        if self.pos_embed is not None:
            x = x + resample_positions(self.pos_embed, self.grid, grid)  # (B, N, C)
        else:  # under autocast the residual stream is float32, as with positions
            x = x.to(self.patch_embed.proj.weight.dtype)
        x = self.pos_drop(x)
        taken = []
        for index, block in enumerate(self.blocks):
            x = self.run_block(block, x, grid)  # (B, N, C)
            if index in take:
                taken.append(LayerOutput(x, grid))
            if index == last:
                break
        return x, taken  # (B, N, C)


def resample_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate a position embedding `(1, P + h w, C)` from the grid `old = (h, w)` to the grid `new`."""
    from timm.layers import resample_abs_pos_embed

    if new == old:
        return positions
    prefix = positions.shape[1] - old[0] * old[1]
    return resample_abs_pos_embed(positions, list(new), list(old), num_prefix_tokens=prefix)


def from_official(config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> DeiT:
    """Build the softmax baseline with weights of timm's or the DeiT repository's `deit_*`, see `load_official`."""
    return load_official(DeiT, DeiTConfig, config, state_dict)
