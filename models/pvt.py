"""PVT v1: the Pyramid Vision Transformer (arXiv 2102.12122).

Its own attention is spatial-reduction attention: keys and values come from a strided convolution of the grid.
`attention=softmax` is the original with its class token. `attention=vca`, in all four stages, is the PVT of Table 1 of
the VCA paper: no spatial reduction, and the mean over the final tokens instead of a class token.

Shape letters: B batch, N tokens of a grid H x W (in stage 4 after the class token), C channels, M heads, D = C / M head
dim, S tokens after the spatial reduction.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import PyramidConfig, check_positive
from models.layers import ConvEmbed, load_official, replaced, square_side, trunc_normal_
from models.pyramid import OwnAttention, Pyramid, keeps_own
from vca.attention import softmax_attention
from vca.attention.geometry import to_image


@dataclass
class PVTConfig(PyramidConfig):
    """Config of a PVT, with the names of its repository.

    Attributes:
        embed_dims, mlp_ratios: width (`embed_dims`) and MLP ratio (`mlp_ratios`) per stage.
        sr_ratios: reduction of height and width of the keys and values per stage; 1 is none.
        norm_eps: epsilon of every LayerNorm in and after the blocks.
    """

    family: str = "pvt"
    name: str = "pvt_tiny"
    embed_dims: list[int] = field(default_factory=lambda: [64, 128, 320, 512])
    num_heads: list[int] = field(default_factory=lambda: [1, 2, 5, 8])
    mlp_ratios: list[float] = field(default_factory=lambda: [8, 8, 4, 4])
    sr_ratios: list[int] = field(default_factory=lambda: [8, 4, 2, 1])
    norm_eps: float = 1e-6

    per_stage: ClassVar[tuple[str, ...]] = (*PyramidConfig.per_stage, "embed_dims", "mlp_ratios", "sr_ratios")

    def __post_init__(self) -> None:
        check_positive(self, "embed_dims", "mlp_ratios", "sr_ratios", "norm_eps")
        super().__post_init__()
        if self.sr_ratios[-1] != 1:
            raise ValueError(f"model.sr_ratios must end with 1 (the stage with the class token), got {self.sr_ratios}")
        for stage, ratio in enumerate(self.sr_ratios):
            if min(self.grid(stage)) < ratio:
                raise ValueError(f"model.sr_ratios must fit the grid of its stage, {self.grid(stage)}, got {ratio}")

    def dim(self, stage: int) -> int:
        return self.embed_dims[stage]


class SpatialReductionAttention(OwnAttention):
    """Softmax attention with keys and values from a grid that is `sr_ratio` times smaller per side.

    `qkv` is one layer, as in every attention of this project, but q and k, v project different tokens.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, qkv_bias: bool, proj_drop: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim) if sr_ratio > 1 else None

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens `(B, N, C)` of a grid `(H, W)` to `(B, N, C)`."""
        dim = x.shape[-1]
        source = x  # (B, S, C)
        if self.sr is not None and self.norm is not None:
            source = self.norm(self.sr(to_image(x, grid, 0)).flatten(2).transpose(1, 2))  # (B, S, C)
        (q_weight, kv_weight), (q_bias, kv_bias) = self.qkv.weight.split((dim, 2 * dim)), (None, None)
        if self.qkv.bias is not None:
            q_bias, kv_bias = self.qkv.bias.split((dim, 2 * dim))
        q = F.linear(x, q_weight, q_bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, M, N, D)
        kv = F.linear(source, kv_weight, kv_bias).unflatten(-1, (2, self.num_heads, -1))  # (B, S, 2, M, D)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # 2 x (B, M, S, D)
        out = softmax_attention(q, k, v)  # (B, M, N, D)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))  # (B, N, C)


def resize_positions(embed: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Tensor:
    """Interpolate positions `(1, prefix + h w, C)` from the grid `old = (h, w)` to the grid `new`."""
    if new == old:
        return embed
    image = to_image(embed, old, prefix)  # (1, C, H, W)
    resized = F.interpolate(image, size=new, mode="bilinear").flatten(2).transpose(1, 2)  # (1, H W, C)
    return torch.cat((embed[:, :prefix], resized), dim=1)  # (1, N, C)


class PVT(Pyramid):
    """Four stages with learned positions; a class token in the last stage if it keeps its own attention."""

    config: PVTConfig

    def __init__(self, config: PVTConfig, attention: Any) -> None:
        last = len(config.depths) - 1
        class_tokens = 1 if keeps_own(config, attention, last) else 0
        widths, strides = [config.in_chans, *config.embed_dims], [config.patch_size] + [2] * last

        def own_attention(stage: int, block: int) -> OwnAttention:
            return SpatialReductionAttention(
                config.dim(stage), config.num_heads[stage], config.sr_ratios[stage], config.qkv_bias, config.drop_rate
            )

        super().__init__(
            config,
            attention,
            [ConvEmbed(widths[i], widths[i + 1], stride, stride) for i, stride in enumerate(strides)],
            own_attention,
            config.mlp_ratios,
            config.norm_eps,
            num_prefix_tokens=class_tokens,
        )
        counts = [config.grid(stage)[0] * config.grid(stage)[1] for stage in range(last + 1)]
        counts[last] += class_tokens
        self.pos_embeds = nn.ParameterList(
            nn.Parameter(torch.zeros(1, count, config.dim(stage))) for stage, count in enumerate(counts)
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim(last))) if class_tokens else None
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.add_head()

    def init_weights(self) -> None:
        """Initialise as the original: truncated normal with std 0.02, biases zero."""
        super().init_weights()
        for tokens in [*self.pos_embeds, *([self.cls_token] if self.cls_token is not None else [])]:
            trunc_normal_(tokens, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """The class token; positions are decayed, as in the original."""
        return {"cls_token"} if self.cls_token is not None else set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group as timm's PVT v2: one layer per stage, with its positions and class token, `coarse` or not."""
        return {
            "stem": r"^(?:stages\.0\.embed|pos_embeds\.0)",
            "blocks": [(r"^(?:stages|pos_embeds)\.(\d+)", None), (r"^(?:cls_token|norm)", (99999,))],
        }

    def resize(self, old: PVTConfig) -> None:
        """Resample the positions, and set the grid of each attention."""
        super().resize(old)
        for stage, positions in enumerate(self.pos_embeds):
            prefix = positions.shape[1] - old.grid(stage)[0] * old.grid(stage)[1]
            resized = resize_positions(positions, old.grid(stage), self.config.grid(stage), prefix)
            self.pos_embeds[stage] = replaced(positions, resized)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As in `LayeredNetwork`; removes positions and class token with their stages."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.pos_embeds = self.pos_embeds[: len(self.stages)]
        if len(self.stages) < len(self.config.depths):
            self.cls_token, self.num_prefix_tokens = None, 0
        return take

    def enter(self, stage: int, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Prepend the class token in the last stage, and add the positions: `(B, H W, C)` to `(B, N, C)`."""
        prefix = 0
        if self.cls_token is not None and stage == len(self.stages) - 1:
            prefix = 1
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)  # (B, N, C)
        positions = resize_positions(self.pos_embeds[stage], self.config.grid(stage), grid, prefix)  # (1, N, C)
        return self.pos_drop(x + positions)  # (B, N, C)

    def adapt(self, name: str, tensor: Tensor) -> Tensor | None:
        """Interpolate positions of another (square) image size; drop the class token's if the model has none.

        Positions without a class token do not fit a model with one: None.
        """
        if not (match := re.fullmatch(r"pos_embeds\.(\d)", name)):
            return None
        stage = int(match[1])
        prefix = 0 if square_side(tensor.shape[1]) else 1
        side = square_side(tensor.shape[1] - prefix)
        if side is None or tensor.shape[2] != self.config.dim(stage):
            return None
        resized = resize_positions(tensor, (side, side), self.config.grid(stage), prefix)
        wanted = self.pos_embeds[stage].shape[1]
        return resized[:, -wanted:] if resized.shape[1] >= wanted else None

    def convert_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert names of the PVT repository; its `q` and `kv` become one `qkv`."""
        renamed = {}
        for name, tensor in state.items():
            if ".attn.kv." in name:
                continue
            if ".attn.q." in name and (kv := state.get(name.replace(".q.", ".kv."))) is not None:
                name, tensor = name.replace(".q.", ".qkv."), torch.cat((tensor, kv))
            name = re.sub(r"^pos_embed(\d)", lambda m: f"pos_embeds.{int(m[1]) - 1}", name)
            name = re.sub(r"^patch_embed(\d)", lambda m: f"stages.{int(m[1]) - 1}.embed", name)
            name = re.sub(r"^block(\d)", lambda m: f"stages.{int(m[1]) - 1}.blocks", name)
            renamed[name] = tensor
        return renamed


def from_official(config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> PVT:
    """Build the softmax baseline with weights of the PVT repository, see `load_official`."""
    return load_official(PVT, PVTConfig, config, state_dict)
