"""Swin Transformer (arXiv 2103.14030).

Its own attention is softmax attention within windows, shifted by half a window in every second block, with a learned
relative position bias. `attention=softmax` is timm's `swin_*_patch4_window7_224`. `attention=vca` is the Swin of
Table 1 of the VCA paper: stages 1 to 3 attend globally, stage 4 keeps its single window.

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

from models.config import PyramidConfig, check_positive, check_size, height_and_width
from models.layers import ConvEmbed, join_windows, load_official, replaced, split_windows, square_side, trunc_normal_
from models.pyramid import OwnAttention, Pyramid
from vca.attention import softmax_attention

MASKED = -100.0  # added to the score of tokens from different regions of a shifted window; the original's value


@dataclass
class SwinConfig(PyramidConfig):
    """Config of a Swin, with timm's names.

    Attributes:
        embed_dim: width of the first stage; it doubles with each stage.
        window_size: side of a window, in tokens; a smaller grid is one window.
        mlp_ratio: hidden width of the MLPs, as a multiple of the stage's width.
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
        check_positive(self, "embed_dim", "window_size", "mlp_ratio")
        super().__post_init__()

    def dim(self, stage: int) -> int:
        return self.embed_dim * 2**stage


class PatchMerging(nn.Module):
    """Merge 2 x 2 tokens into one of twice the width."""

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


class WindowAttention(OwnAttention):
    """Softmax attention within windows, optionally shifted.

    Args:
        grid: `(H, W)` of the stage; a grid no larger than a window is one window, without shift.
        shifted: shift the windows by half their side.
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
        self.num_heads, self.window_size, self.shifted = num_heads, window_size, shifted
        self.window = height, width = min(grid[0], window_size), min(grid[1], window_size)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * height - 1) * (2 * width - 1), num_heads))
        self.index_positions()
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    @property
    def shift(self) -> tuple[int, int]:
        """Tokens by which the windows are shifted down and right."""
        return (self.window_size // 2, self.window_size // 2) if self.shifted else (0, 0)

    def index_positions(self) -> None:
        """Compute the index into the table for each pair of tokens of a window: `(L, L)`."""
        from timm.layers import gen_relative_position_index

        index = gen_relative_position_index(self.window).to(self.relative_position_bias_table.device)
        self.register_buffer("relative_position_index", index, persistent=False)

    @torch.no_grad()
    def set_grid(self, grid: tuple[int, int]) -> None:
        """Choose the window for a grid, and interpolate the table to it."""
        from timm.layers import resize_rel_pos_bias_table

        old, self.window = self.window, (min(grid[0], self.window_size), min(grid[1], self.window_size))
        if self.window == old:
            return
        table = self.relative_position_bias_table
        shape = ((2 * self.window[0] - 1) * (2 * self.window[1] - 1), self.num_heads)
        resized = resize_rel_pos_bias_table(table, self.window, shape, old_window_size=old)
        self.relative_position_bias_table = replaced(table, resized)
        self.index_positions()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens `(B, N, C)` of a grid `(H, W)` to `(B, N, C)`; zero-pads bottom and right to whole windows."""
        window = self.window
        shift = [s if side > w else 0 for s, side, w in zip(self.shift, grid, window, strict=True)]
        padded = (-(-grid[0] // window[0]) * window[0], -(-grid[1] // window[1]) * window[1])

        x = x.unflatten(1, grid)  # (B, H, W, C)
        x = x.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else x
        x = F.pad(x, (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0])) if padded != grid else x
        qkv = self.qkv(split_windows(x, window)).unflatten(-1, (3, self.num_heads, -1))  # (B, R, L, 3, M, D)
        # Windows and heads share a dimension, so that one mask serves the whole batch.
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3).unbind(0)  # 3 x (B, R M, L, D)
        out = softmax_attention(q, k, v, self.bias(padded, shift))  # (B, R M, L, D)
        out = out.unflatten(1, (-1, self.num_heads)).transpose(2, 3).flatten(3)  # (B, R, L, C)
        out = join_windows(self.proj(out), window, padded)[:, : grid[0], : grid[1]]  # (B, H, W, C)
        out = out.roll((shift[0], shift[1]), (1, 2)) if any(shift) else out
        return self.proj_drop(out.flatten(1, 2))  # (B, N, C)

    def bias(self, grid: tuple[int, int], shift: list[int]) -> Tensor:
        """Relative position bias plus shift mask of all windows: `(R M, L, L)`."""
        windows = (grid[0] // self.window[0]) * (grid[1] // self.window[1])
        bias = self.relative_position_bias_table[self.relative_position_index]  # (L, L, M)
        bias = bias.permute(2, 0, 1).expand(windows, -1, -1, -1)  # (R, M, L, L)
        if any(shift):
            bias = bias + shift_mask(grid, self.window, shift, bias.device)[:, None]
        return bias.flatten(0, 1)


def shift_mask(grid: tuple[int, int], window: tuple[int, int], shift: list[int], device: torch.device) -> Tensor:
    """Attention mask `(R, L, L)`: `MASKED` between tokens that were not neighbours before the roll, else 0."""

    def parts(side: int, window_side: int, by: int) -> Tensor:
        place = torch.arange(side, device=device)
        return (place >= side - window_side).int() + (place >= side - by).int() * (by > 0)  # whole, cut, rolled

    down, right = parts(grid[0], window[0], shift[0]), parts(grid[1], window[1], shift[1])
    region = split_windows((3 * down[:, None] + right)[None, :, :, None], window)[0, :, :, 0]  # (R, L)
    return (region[:, :, None] != region[:, None, :]) * MASKED


class Swin(Pyramid):
    """Four stages of window attention, then the mean over the final tokens."""

    config: SwinConfig

    def __init__(self, config: SwinConfig, attention: Any) -> None:
        def own_attention(stage: int, block: int) -> OwnAttention:
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
        self.window_reference = config.window_size, config.grid(0)
        self.add_head()

    def set_input_size(self, img_size: Any = None, window_size: int | None = None) -> None:
        """As in `Backbone`; scales the windows with the image, as timm's Swin, unless `window_size` is given.

        A scaled window keeps its share of the grid that it was chosen for: 7 at 224 px is 12 at 384 px.

        Raises:
            ValueError: also if `window_size` is not given and height and width are scaled by different factors.
        """
        size = self.config.size if img_size is None else height_and_width(img_size, "model.img_size")
        check_size(size, self.size_multiple, "model.img_size")
        chosen, reference = self.window_reference
        grid = [side // self.config.patch_size for side in size]
        scaled = {max(1, chosen * side // old) for side, old in zip(grid, reference, strict=True)}
        if window_size is None and len(scaled) > 1:
            raise ValueError(f"window_size must be given for another aspect ratio, got img_size {size} without it")
        window = scaled.pop() if window_size is None else window_size
        self.change_config(img_size=img_size, window_size=window)
        if window_size is not None:
            self.window_reference = window_size, self.config.grid(0)

    def resize(self, old: SwinConfig) -> None:
        """Resize the windows, and set the grid of each attention."""
        for module in self.modules():
            if isinstance(module, WindowAttention):
                module.window_size = self.config.window_size
        super().resize(old)

    def no_weight_decay(self) -> set[str]:
        """The relative position bias tables."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def adapt(self, name: str, tensor: Tensor) -> Tensor | None:
        """Interpolate a relative position bias table of another window size."""
        from timm.layers import resize_rel_pos_bias_table

        if not name.endswith("relative_position_bias_table"):
            return None
        attention: Any = self.get_submodule(name.rpartition(".")[0])
        table = attention.relative_position_bias_table
        if tensor.shape[1:] != table.shape[1:] or square_side(tensor.shape[0]) is None:
            return None
        return resize_rel_pos_bias_table(tensor, new_window_size=attention.window, new_bias_shape=table.shape)

    def convert_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert names of timm or of the Swin repository.

        The repository assigns a merging to the preceding stage, and stores two buffers that the config determines.
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
    """Build the softmax baseline with weights of timm's or the Swin repository's `swin_*`, see `load_official`."""
    return load_official(Swin, SwinConfig, config, state_dict)
