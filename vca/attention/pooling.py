"""Contrast tokens: the queries on the token grid, pooled to the contrast grid `h x w`.

`average` is the paper's pooling; `maximum` and `depthwise` follow its outlook. `depthwise` is a strided depthwise
convolution with a learned kernel of `H // h x W // w` tokens, initialized as the average. If `h x w` does not divide
the grid, the output of the convolution is average-pooled to the contrast grid: for 14 x 14 to 8 x 8 the kernel is 1 x 1
(one factor per channel); for 11 x 11 to 4 x 4 it is 2 x 2 and ignores the last row and column.

Shape letters: B batch, M heads, N = P + H W tokens, C = M D channels, D head dim, n = h w contrast tokens.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca.attention.base import AttentionConfig, ProjectedAttention, choose
from vca.attention.geometry import is_pair, to_image


class Pooling(Enum):
    """How the queries of a cell are reduced to one contrast token."""

    average = "average"
    maximum = "maximum"
    depthwise = "depthwise"


@dataclass
class PooledConfig(AttentionConfig):
    """Options of the variants with contrast tokens.

    Attributes:
        contrast_grid: contrast grid `[h, w]`, or a list with one pair per layer; None uses the backbone's.
        pooling: `average` (the paper), `maximum` or `depthwise`.
    """

    contrast_grid: Any = None
    pooling: Pooling = Pooling.average

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pooling = choose(Pooling, self.pooling, "attention.pooling")
        per_layer = (
            isinstance(self.contrast_grid, (list, tuple))
            and len(self.contrast_grid) > 0
            and all(map(is_pair, self.contrast_grid))
        )
        if not (self.contrast_grid is None or is_pair(self.contrast_grid) or per_layer):
            raise ValueError(
                "attention.contrast_grid must be two integers >= 1, or one such pair per layer, "
                f"got {self.contrast_grid}"
            )

    def contrast_grid_of_layer(self, layer_index: int, default: tuple[int, int]) -> tuple[int, int]:
        """Return the contrast grid `(h, w)` of a layer; `default` is the backbone's."""
        if self.contrast_grid is None:
            return default
        if is_pair(self.contrast_grid):
            return (self.contrast_grid[0], self.contrast_grid[1])
        if layer_index >= len(self.contrast_grid):
            raise ValueError(
                f"attention.contrast_grid must have a pair for each layer, got {len(self.contrast_grid)} "
                f"and a layer {layer_index}"
            )
        return tuple(self.contrast_grid[layer_index])

    def pool_weight(self, dim: int, grid: tuple[int, int], contrast_grid: tuple[int, int]) -> nn.Parameter | None:
        """Create the kernel `(C, 1, H // h, W // w)` of `depthwise`, initialized as an average; else None."""
        if self.pooling is not Pooling.depthwise:
            return None
        stride = pool_stride(grid, contrast_grid)
        return nn.Parameter(torch.full((dim, 1, *stride), 1 / (stride[0] * stride[1])))


def pool_stride(grid: tuple[int, int], contrast_grid: tuple[int, int]) -> tuple[int, int]:
    """Return the stride and kernel size of `depthwise`: the whole tokens per contrast token, at least 1."""
    return (max(grid[0] // contrast_grid[0], 1), max(grid[1] // contrast_grid[1], 1))


def pool_queries(
    q: Tensor,
    grid: tuple[int, int],
    contrast_grid: tuple[int, int],
    num_prefix_tokens: int,
    pooling: Pooling | str = Pooling.average,
    weight: Tensor | None = None,
) -> Tensor:
    """Pool the queries on the grid, without prefix tokens: `(B, M, N, D)` to `(B, M, n, D)`.

    The heads of a token are contiguous in memory, so the grid of all heads is a channels_last image without a copy.
    Average and maximum use adaptive bins, which overlap where the contrast grid does not divide the grid.

    Raises:
        ValueError: if the pooling is unknown, or its kernel is missing or larger than the grid.
    """
    pooling = choose(Pooling, pooling, "pooling")
    if (pooling is Pooling.depthwise) != (weight is not None):
        raise ValueError(f"pool_weight must be given for pooling 'depthwise' only, got pooling '{pooling.value}'")
    image = to_image(q.transpose(1, 2).flatten(2), grid, num_prefix_tokens)  # (B, C, H, W)
    if pooling is Pooling.maximum:
        pooled = F.adaptive_max_pool2d(image, contrast_grid)  # (B, C, h, w)
    elif weight is not None:
        stride = (weight.shape[2], weight.shape[3])
        if grid[0] < stride[0] or grid[1] < stride[1]:
            raise ValueError(
                f"grid must be at least {stride[0]} x {stride[1]}, the kernel of the learned pooling, got {grid}"
            )
        pooled = F.conv2d(image, weight.to(q.dtype), stride=stride, groups=image.shape[1])  # (B, C, H // sh, W // sw)
        if pooled.shape[2:] != contrast_grid:
            pooled = F.adaptive_avg_pool2d(pooled, contrast_grid)  # (B, C, h, w)
    elif grid[0] % contrast_grid[0] or grid[1] % contrast_grid[1]:
        pooled = F.adaptive_avg_pool2d(image, contrast_grid)  # (B, C, h, w)
    else:  # equal to adaptive pooling, several times faster
        pooled = F.avg_pool2d(image, (grid[0] // contrast_grid[0], grid[1] // contrast_grid[1]))  # (B, C, h, w)
    return pooled.flatten(2).unflatten(1, (q.shape[1], -1)).transpose(2, 3)  # (B, M, n, D)


def check_layers(config: Any, depth: int) -> None:
    """Raise `ValueError` if `config.contrast_grid` has more entries than the model has layers."""
    contrast_grid = getattr(config, "contrast_grid", None)
    if contrast_grid is not None and not is_pair(contrast_grid) and len(contrast_grid) > depth:
        raise ValueError(f"attention.contrast_grid must have one pair per layer ({depth}), got {len(contrast_grid)}")


class PooledAttention(ProjectedAttention):
    """Base class of the variants with contrast tokens."""

    Config: type[AttentionConfig] = PooledConfig

    def add_parameters(self) -> None:
        self.contrast_grid = self.config.contrast_grid_of_layer(self.layer_index, default=self.contrast_grid)
        self.pool_weight = self.config.pool_weight(self.dim, self.grid, self.contrast_grid)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Set the grid; the kernel of `depthwise` is interpolated and keeps its sum, so an average stays one."""
        super().set_grid(grid)
        weight, stride = self.pool_weight, pool_stride(self.grid, self.contrast_grid)
        if weight is None or weight.shape[2:] == stride:
            return
        scale = weight.shape[2] * weight.shape[3] / (stride[0] * stride[1])
        resized = scale * F.interpolate(weight.detach(), stride, mode="bilinear")  # (C, 1, H // h, W // w)
        self.pool_weight = nn.Parameter(resized, requires_grad=weight.requires_grad)

    def contrast_tokens(self, q: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pool the queries of this layer: `(B, M, N, D)` to `(B, M, n, D)`."""
        return pool_queries(q, grid, self.contrast_grid, self.num_prefix_tokens, self.config.pooling, self.pool_weight)
