"""Swin Transformer (arXiv 2103.14030).

Its own attention is softmax attention in windows, every second block's shifted by half a window, with a learned bias
for each relative position. Under `attention=softmax` it is timm's `swin_*_patch4_window7_224`. With VCA it is the Swin
of Table 1 of the VCA paper: stages 1 to 3 see their whole grid, without windows; stage 4 keeps its one window.

Shape letters: B batch, N tokens of a grid H x W, C channels, M heads, D = C / M head dim, L tokens of a window, R
windows of an image.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import PyramidConfig
from models.layers import (
    ConvEmbed,
    join_windows,
    load_official,
    select_options,
    split_windows,
    square_side,
    trunc_normal_,
)
from models.pyramid import Pyramid
from vca.attention import SoftmaxConfig, softmax_attention

MASKED = -100.0  # added to the score of two tokens that the shift brought into one window; the original's value


@dataclass
class SwinConfig(PyramidConfig):
    """Size of a Swin; names as in timm.

    Attributes:
        embed_dim: width of the first stage; each later one has twice the width.
        window_size: side of a window, in tokens; a smaller grid is one window.
    """

    family: str = "swin"
    name: str = "swin_tiny"
    embed_dim: int = 96
    depths: list[int] = field(default_factory=lambda: [2, 2, 6, 2])
    num_heads: list[int] = field(default_factory=lambda: [3, 6, 12, 24])
    window_size: int = 7
    mlp_ratio: float = 4.0
    attention_stages: list[int] = field(default_factory=lambda: [1, 2, 3])

    def __post_init__(self) -> None:
        self.check_positive("embed_dim", "window_size", "mlp_ratio")
        super().__post_init__()

    def dim(self, stage: int) -> int:
        """Width of a stage, counted from 0."""
        return self.embed_dim * 2**stage


class PatchMerging(nn.Module):
    """The next stage's tokens: each made of 2 x 2 of this one's."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens as an image `(B, C, H, W)` to tokens `(B, H W / 4, 2C)` and their grid."""
        x = image.permute(0, 2, 3, 1)  # (B, H, W, C)
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, 2, W/2, 2, C)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # (B, H/2, W/2, 4C): down the columns first, as the original
        return self.reduction(self.norm(x)).flatten(1, 2), (x.shape[1], x.shape[2])


class WindowAttention(nn.Module):
    """Softmax attention within windows, which may be shifted.

    Args:
        dim, num_heads: C, M.
        grid: the stage's; where it is no larger than a window, the window is the grid and nothing is shifted.
        window_size: side of a window.
        shifted: whether to move the windows by half their side.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        window_size: int,
        shifted: bool,
        qkv_bias: bool,
        proj_drop: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = height, width = min(grid[0], window_size), min(grid[1], window_size)
        self.shift = (window_size // 2, window_size // 2) if shifted else (0, 0)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * height - 1) * (2 * width - 1), num_heads))
        self.register_buffer("relative_position_index", relative_positions(height, width), persistent=False)
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """`(B, N, C)` to `(B, N, C)`; a grid that the windows do not divide is padded with zeros at its far sides."""
        window = self.window
        shift = [s if side > w else 0 for s, side, w in zip(self.shift, grid, window, strict=True)]
        padded = (-(-grid[0] // window[0]) * window[0], -(-grid[1] // window[1]) * window[1])

        x = x.unflatten(1, grid)  # (B, H, W, C)
        x = x.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else x
        x = F.pad(x, (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0])) if padded != grid else x
        qkv = self.qkv(split_windows(x, window)).unflatten(-1, (3, self.num_heads, -1))  # (B, R, L, 3, M, D)
        # Windows stand beside heads, so that one mask serves the whole batch.
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3).unbind(0)  # 3 x (B, R M, L, D)
        out = softmax_attention(q, k, v, self.bias(padded, shift))  # (B, R M, L, D)
        out = out.unflatten(1, (-1, self.num_heads)).transpose(2, 3).flatten(3)  # (B, R, L, C)
        out = join_windows(self.proj(out), window, padded)[:, : grid[0], : grid[1]]  # (B, H, W, C)
        out = out.roll((shift[0], shift[1]), (1, 2)) if any(shift) else out
        return self.proj_drop(out.flatten(1, 2))  # (B, N, C)

    def bias(self, grid: tuple[int, int], shift: list[int]) -> Tensor:
        """What is added to the scores of all windows: `(R M, L, L)`."""
        windows = (grid[0] // self.window[0]) * (grid[1] // self.window[1])
        bias = self.relative_position_bias_table[self.relative_position_index]  # (L, L, M)
        bias = bias.permute(2, 0, 1).expand(windows, -1, -1, -1)  # (R, M, L, L)
        if any(shift):
            bias = bias + shift_mask(grid, self.window, shift, bias.device)[:, None]
        return bias.flatten(0, 1)


def relative_positions(height: int, width: int) -> Tensor:
    """Row of the bias table for each pair of tokens in a window: `(L, L)`."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    down = rows[:, None] - rows[None, :] + height - 1  # (L, L), from 0
    right = columns[:, None] - columns[None, :] + width - 1
    return down * (2 * width - 1) + right


def shift_mask(grid: tuple[int, int], window: tuple[int, int], shift: list[int], device: torch.device) -> Tensor:
    """`(R, L, L)`: 0, or `MASKED` between tokens that were not neighbours before the grid was rolled."""

    def parts(side: int, window_side: int, by: int) -> Tensor:
        place = torch.arange(side, device=device)
        return (place >= side - window_side).int() + (place >= side - by).int() * (by > 0)  # whole, cut, rolled

    down, right = parts(grid[0], window[0], shift[0]), parts(grid[1], window[1], shift[1])
    region = split_windows((3 * down[:, None] + right)[None, :, :, None], window)[0, :, :, 0]  # (R, L)
    return (region[:, :, None] != region[:, None, :]) * MASKED


class Swin(Pyramid):
    """Four stages of windowed blocks, the mean over the last tokens.

    Args:
        config: the size.
        attention: config of an attention variant, one of `vca.attention.ATTENTIONS`.
    """

    config: SwinConfig

    def __init__(self, config: SwinConfig, attention: Any) -> None:
        def own_attention(stage: int, block: int) -> nn.Module:
            return WindowAttention(
                config.dim(stage),
                config.num_heads[stage],
                config.grid(stage),
                config.window_size,
                shifted=block % 2 == 1,
                qkv_bias=config.qkv_bias,
                proj_drop=config.drop_rate,
            )

        stages = len(config.depths)
        first = ConvEmbed(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)
        embeds = [first, *(PatchMerging(config.dim(stage)) for stage in range(stages - 1))]
        super().__init__(config, attention, embeds, own_attention, [config.mlp_ratio] * stages)
        self.add_head()

    def no_weight_decay(self) -> set[str]:
        """The tables of the relative position bias."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def adapt(self, name: str, tensor: Tensor) -> Tensor | None:
        """A table of the relative position bias for windows of another size, interpolated."""
        from timm.layers import resize_rel_pos_bias_table

        if not name.endswith("relative_position_bias_table"):
            return None
        attention: Any = self.get_submodule(name.rpartition(".")[0])
        table = attention.relative_position_bias_table
        if tensor.shape[1:] != table.shape[1:] or square_side(tensor.shape[0]) is None:
            return None
        return resize_rel_pos_bias_table(tensor, new_window_size=attention.window, new_bias_shape=table.shape)

    def convert_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Names of timm, or of the Swin repository, to ours.

        The repository counts a merging to the stage before it, and stores two buffers that follow from the config.
        """
        merges_after = any(name.startswith("layers.0.downsample.") for name in state)
        renamed = {}
        for name, tensor in state.items():
            if name.endswith(("relative_position_index", "attn_mask")):
                continue
            name = name.replace("head.fc.", "head.").replace("patch_embed.", "stages.0.embed.")
            if match := re.fullmatch(r"layers\.(\d)\.downsample\.(.*)", name):
                name = f"stages.{int(match[1]) + merges_after}.embed.{match[2]}"
            renamed[re.sub(r"^layers\.", "stages.", name)] = tensor
        return renamed


def from_official(config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> Swin:
    """The softmax baseline with the weights of timm's `swin_*` or of the Swin repository.

    Args:
        config: timm's own keys (`embed_dim`, `depths`, `num_heads`, `window_size`, ...); what is not named is
            Swin-Tiny's.
        state_dict: parameters by name, or a checkpoint that holds them.

    Raises:
        ValueError: on a key that Swin does not have.
        RuntimeError: on a missing, unexpected or misshapen parameter.
    """
    return load_official(Swin(select_options(SwinConfig, config), SoftmaxConfig()), state_dict)
