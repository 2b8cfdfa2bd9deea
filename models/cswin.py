"""CSWin Transformer (arXiv 2107.00652).

Its own attention is softmax attention within stripes, vertical for half of the heads and horizontal for the others,
plus a depthwise convolution of v within each stripe (LePE). `attention=softmax` is the original. `attention=vca` is the
CSWin of Table 1 of the VCA paper: stages 1 and 2 attend globally, stages 3 and 4 keep their stripes.

Shape letters: B batch, N tokens of a grid H x W, C channels, M heads, D = C / M head dim, L tokens of a stripe, R
stripes of an image.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import PyramidConfig, check_positive, check_size, height_and_width
from models.layers import ConvEmbed, join_windows, load_official, split_windows
from models.pyramid import OwnAttention, Pyramid, keeps_own
from vca.attention import softmax_attention


@dataclass
class CSWinConfig(PyramidConfig):
    """Config of a CSWin.

    Attributes:
        embed_dim: width of the first stage; it doubles with each stage.
        split_size: stripe width per stage, in tokens; the last stage always attends globally.
        mlp_ratio: hidden width of the MLPs, as a multiple of the stage's width.
    """

    family: str = "cswin"
    name: str = "cswin_tiny"
    embed_dim: int = 64
    depths: list[int] = field(default_factory=lambda: [2, 4, 18, 1])
    num_heads: list[int] = field(default_factory=lambda: [2, 4, 8, 16])
    split_size: list[int] = field(default_factory=lambda: [1, 2, 7, 7])
    mlp_ratio: float = 4.0
    attention_stages: list[int] = field(default_factory=lambda: [1, 2])

    per_stage: ClassVar[tuple[str, ...]] = (*PyramidConfig.per_stage, "split_size")

    def __post_init__(self) -> None:
        check_positive(self, "embed_dim", "split_size", "mlp_ratio")
        super().__post_init__()
        if any(heads % 2 for heads in self.num_heads[:-1]):
            raise ValueError(f"model.num_heads must be even before the last stage, got {list(self.num_heads)}")

    def dim(self, stage: int) -> int:
        return self.embed_dim * 2**stage


class CrossShapedAttention(OwnAttention):
    """Softmax attention within vertical stripes for half of the heads, horizontal stripes for the others.

    The depthwise convolution of v (LePE) is one layer over all channels, `local` as in VCA, applied per stripe.
    `split` is the stripe width; None attends globally with all heads.
    """

    def __init__(self, dim: int, num_heads: int, split: int | None, qkv_bias: bool, proj_drop: float) -> None:
        super().__init__()
        self.num_heads, self.split = num_heads, split
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens `(B, N, C)` of a grid `(H, W)` to `(B, N, C)`."""
        stripes = [grid] if self.split is None else [(grid[0], self.split), (self.split, grid[1])]
        qkv = (
            self.qkv(x).unflatten(1, grid).unflatten(-1, (3, len(stripes), -1))
        )  # (B, H, W, 3, branches, C / branches)
        assert self.local.bias is not None
        kernels = zip(self.local.weight.chunk(len(stripes)), self.local.bias.chunk(len(stripes)), strict=True)
        branches = [
            self.attend(qkv[..., branch, :], stripe, *kernel)
            for branch, (stripe, kernel) in enumerate(zip(stripes, kernels, strict=True))
        ]
        return self.proj_drop(self.proj(torch.cat(branches, dim=-1)))  # (B, N, C)

    def attend(self, qkv: Tensor, stripe: tuple[int, int], weight: Tensor, bias: Tensor) -> Tensor:
        """Attend within the stripes of one branch of C channels: `(B, H, W, 3, C)` to `(B, N, C)`."""
        grid, dim = (qkv.shape[1], qkv.shape[2]), qkv.shape[-1]
        tokens = split_windows(qkv.flatten(3), stripe).flatten(0, 1)  # (B R, L, 3C)
        heads = tokens.unflatten(-1, (3, -1, self.qkv.in_features // self.num_heads))  # (B R, L, 3, M, D)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B R, M, L, D)
        out = softmax_attention(q, k, v).transpose(1, 2).flatten(2)  # (B R, L, C)
        image = tokens.chunk(3, dim=-1)[2].transpose(1, 2).unflatten(2, stripe)  # (B R, C, h, w)
        out = out + F.conv2d(image, weight, bias, padding=1, groups=dim).flatten(2).transpose(1, 2)
        return join_windows(out.unflatten(0, (qkv.shape[0], -1)), stripe, grid).flatten(1, 2)


class CSWin(Pyramid):
    """Four stages of cross-shaped windows, then the mean over the final tokens.

    Raises:
        ValueError: if the stripes do not divide `img_size`; the message has the nearest valid sizes.
    """

    config: CSWinConfig

    def __init__(self, config: CSWinConfig, attention: Any) -> None:
        last = len(config.depths) - 1

        def own_attention(stage: int, block: int) -> OwnAttention:
            return CrossShapedAttention(
                config.dim(stage),
                config.num_heads[stage],
                config.split_size[stage] if stage != last else None,
                config.qkv_bias,
                config.drop_rate,
            )

        first = ConvEmbed(config.in_chans, config.embed_dim, 7, config.patch_size, 2)
        embeds = [first, *(ConvEmbed(config.dim(stage), config.dim(stage + 1), 3, 2, 1) for stage in range(last))]
        super().__init__(config, attention, embeds, own_attention, [config.mlp_ratio] * (last + 1))
        striped = [stage for stage in range(last) if keeps_own(config, attention, stage)]
        strides = [config.patch_size * 2**stage * config.split_size[stage] for stage in striped]
        self.size_multiple = math.lcm(config.size_multiple, *strides)
        self.check_stripes(config.size)
        self.add_head()

    def check_stripes(self, size: tuple[int, int]) -> None:
        """Raise `ValueError` unless the stripes divide an image of `(height, width)` pixels."""
        check_size(size, self.size_multiple, f"with model.split_size {list(self.config.split_size)}, model.img_size")

    def set_input_size(self, img_size: Any = None) -> None:
        if img_size is not None:
            self.check_stripes(height_and_width(img_size, "model.img_size"))
        super().set_input_size(img_size)

    def convert_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert names of the CSWin repository; the LePE convolutions of both branches are concatenated in `local`."""
        renamed = {}
        for name, tensor in state.items():
            if ".attns.1." in name:
                continue
            if ".attns.0." in name and (second := state.get(name.replace(".attns.0.", ".attns.1."))) is not None:
                tensor = torch.cat((tensor, second))
            name = name.replace("stage1_conv_embed.0.", "stages.0.embed.proj.")
            name = name.replace("stage1_conv_embed.2.", "stages.0.embed.norm.")
            name = re.sub(r"^merge(\d)\.", r"stages.\1.embed.", name).replace(".embed.conv.", ".embed.proj.")
            if match := re.fullmatch(r"stage(\d)\.(\d+)\.(.*)", name):
                rest = re.sub(r"^(qkv|proj)\.", r"attn.\1.", match[3]).replace("attns.0.get_v.", "attn.local.")
                name = f"stages.{int(match[1]) - 1}.blocks.{match[2]}.{rest}"
            renamed[name] = tensor
        return renamed


def from_official(config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> CSWin:
    """Build the softmax baseline with weights of the CSWin repository, see `load_official`.

    The keys of `config` are the repository's (`depth`); the default is its CSWin-Tiny, `CSWin_64_12211_tiny_224`.
    """
    options = {"depths" if key == "depth" else key: value for key, value in config.items()}
    return load_official(CSWin, CSWinConfig, {"depths": [1, 2, 21, 1], **options}, state_dict)
