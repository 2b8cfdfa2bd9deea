"""Contrast tokens: the queries of the grid, pooled to `h x w` cells.

The paper averages. As its outlook suggests, the pooling is a choice: `average`, `maximum`, or `depthwise`, a strided
depthwise convolution whose weights are learned. Its kernel has `H // h x W // w` tokens, and begins as the average of a
cell where `h x w` divides the grid. Elsewhere what it makes is averaged further: from 14 x 14 to 8 x 8 the kernel is
1 x 1, a factor for each channel; from 11 x 11 to 4 x 4 it is 2 x 2, and leaves out the last row and column.

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
    """How the queries of a cell become its contrast token."""

    average = "average"
    maximum = "maximum"
    depthwise = "depthwise"


@dataclass
class PooledConfig(AttentionConfig):
    """Options of the variants that pool.

    Attributes:
        contrast_grid: contrast grid `[h, w]`, or one such pair for each layer of the model; None takes the backbone's.
        pooling: `average` (the paper), `maximum` or `depthwise`.
    """

    contrast_grid: Any = None
    pooling: Pooling = Pooling.average

    def __post_init__(self) -> None:
        self.pooling = choose(Pooling, self.pooling, "attention.pooling")
        per_layer = (
            isinstance(self.contrast_grid, (list, tuple))
            and len(self.contrast_grid) > 0
            and all(map(is_pair, self.contrast_grid))
        )
        if not (self.contrast_grid is None or is_pair(self.contrast_grid) or per_layer):
            raise ValueError(
                f"attention.contrast_grid must be two integers >= 1, or such a pair a layer, got {self.contrast_grid}"
            )

    def contrast_grid_of_layer(self, layer_index: int, default: tuple[int, int]) -> tuple[int, int]:
        """Contrast grid `(h, w)` of one layer; `default` is the backbone's."""
        if self.contrast_grid is None:
            return default
        if is_pair(self.contrast_grid):
            return (self.contrast_grid[0], self.contrast_grid[1])
        if layer_index >= len(self.contrast_grid):
            raise ValueError(
                f"attention.contrast_grid names {len(self.contrast_grid)} layers, but the model has a layer {layer_index}"
            )
        return tuple(self.contrast_grid[layer_index])

    def pool_weight(self, dim: int, grid: tuple[int, int], contrast_grid: tuple[int, int]) -> nn.Parameter | None:
        """Weights `(C, 1, H // h, W // w)` of `depthwise`, equal and of sum one; None for the others."""
        if self.pooling is not Pooling.depthwise:
            return None
        stride = (max(grid[0] // contrast_grid[0], 1), max(grid[1] // contrast_grid[1], 1))
        return nn.Parameter(torch.full((dim, 1, *stride), 1 / (stride[0] * stride[1])))


def pool_queries(
    q: Tensor,
    grid: tuple[int, int],
    contrast_grid: tuple[int, int],
    num_prefix_tokens: int,
    pooling: Pooling | str = Pooling.average,
    weight: Tensor | None = None,
) -> Tensor:
    """Pool the queries on the grid: `(B, M, N, D)` to `(B, M, n, D)`; prefix tokens are left out.

    Heads lie next to each other in a token, so the grid of all heads is one channels_last image and needs no copy.
    Average and maximum are adaptive: bins overlap where they do not divide the grid. The convolution goes over the grid
    in steps of its own size, and what it makes is averaged to the contrast grid where it is finer than that.

    Raises:
        ValueError: if the pooling is unknown, or its weights are missing or larger than the grid.
    """
    pooling = choose(Pooling, pooling, "pooling")
    if (pooling is Pooling.depthwise) != (weight is not None):
        raise ValueError(f"pool_weight goes with the pooling 'depthwise' and no other, got '{pooling.value}'")
    image = to_image(q.transpose(1, 2).flatten(2), grid, num_prefix_tokens)  # (B, C, H, W)
    if pooling is Pooling.maximum:
        pooled = F.adaptive_max_pool2d(image, contrast_grid)  # (B, C, h, w)
    elif weight is not None:
        stride = (weight.shape[2], weight.shape[3])
        if grid[0] < stride[0] or grid[1] < stride[1]:
            raise ValueError(f"a learned pooling of {stride[0]} x {stride[1]} tokens needs such a grid, got {grid}")
        pooled = F.conv2d(image, weight.to(q.dtype), stride=stride, groups=image.shape[1])  # (B, C, H // sh, W // sw)
        if pooled.shape[2:] != contrast_grid:
            pooled = F.adaptive_avg_pool2d(pooled, contrast_grid)  # (B, C, h, w)
    elif grid[0] % contrast_grid[0] or grid[1] % contrast_grid[1]:
        pooled = F.adaptive_avg_pool2d(image, contrast_grid)  # (B, C, h, w)
    else:  # the same, and several times faster
        pooled = F.avg_pool2d(image, (grid[0] // contrast_grid[0], grid[1] // contrast_grid[1]))  # (B, C, h, w)
    return pooled.flatten(2).unflatten(1, (q.shape[1], -1)).transpose(2, 3)  # (B, M, n, D)


def check_layers(config: Any, depth: int) -> None:
    """Raise `ValueError` if an attention's options name the contrast grids of more layers than a model's `depth`."""
    contrast_grid = getattr(config, "contrast_grid", None)
    if contrast_grid is not None and not is_pair(contrast_grid) and len(contrast_grid) > depth:
        raise ValueError(f"attention.contrast_grid names {len(contrast_grid)} layers, but the model has {depth}")


class PooledAttention(ProjectedAttention):
    """A variant with contrast tokens."""

    Config: type[AttentionConfig] = PooledConfig

    def add_parameters(self) -> None:
        """The contrast grid of this layer, and the weights of a learned pooling."""
        self.contrast_grid = self.config.contrast_grid_of_layer(self.layer_index, default=self.contrast_grid)
        self.pool_weight = self.config.pool_weight(self.dim, self.grid, self.contrast_grid)

    def contrast_tokens(self, q: Tensor, grid: tuple[int, int]) -> Tensor:
        """`pool_queries` of this layer, `(B, M, N, D)` to `(B, M, n, D)`."""
        return pool_queries(q, grid, self.contrast_grid, self.num_prefix_tokens, self.config.pooling, self.pool_weight)
