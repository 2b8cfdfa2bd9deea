"""Agent Attention (arXiv 2312.08874): linear attention with one stream, no difference and no norm.

    a  = AvgPool(q on the grid)                          n agent tokens
    v^ = softmax(a k^T / sqrt D + b1) v                  agents attend to all tokens
    o  = softmax(q a^T / sqrt D + b2) v^                 tokens attend to the agents

The biases b1 and b2 depend on the position only: each agent has a 7 x 7 map, interpolated to the grid, and one value
for each row, column and prefix token.

Shape letters: B batch, M heads, N = P + H W tokens, D head dim, n = h w agents.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca.attention.base import Tokens
from vca.attention.pooling import PooledAttention, PooledConfig
from vca.attention.softmax import softmax_attention

CELLS = 7  # side of the bias map, as in the original


@dataclass
class AgentConfig(PooledConfig):
    """Options of Agent Attention.

    Attributes:
        contrast_grid: the grid of agents; the original uses the contrast grids of the VCA backbones.
        position_bias: add the biases b1 and b2.
    """

    name: str = "agent"
    local_branch: bool = True
    position_bias: bool = True


class PositionBias(nn.Module):
    """Position bias of each agent and token, `(M, n, N)`, initialized from a truncated normal with std 0.02."""

    def __init__(self, num_heads: int, num_agents: int, grid: tuple[int, int], num_prefix_tokens: int) -> None:
        super().__init__()

        def parameter(*size: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, num_agents, *size), std=0.02))

        self.cells = parameter(CELLS, CELLS)
        self.rows = parameter(grid[0], 1)
        self.columns = parameter(1, grid[1])
        self.prefix = parameter(num_prefix_tokens) if num_prefix_tokens else None

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Return the bias interpolated to a grid `(H, W)`: `(M, n, P + H W)`."""
        height, width = grid
        cells = F.interpolate(self.cells, (height, width), mode="bilinear")  # (M, n, H, W)
        rows = F.interpolate(self.rows, (height, 1), mode="bilinear")  # (M, n, H, 1)
        columns = F.interpolate(self.columns, (1, width), mode="bilinear")  # (M, n, 1, W)
        bias = (cells + rows + columns).flatten(2)  # (M, n, H W)
        return bias if self.prefix is None else torch.cat((self.prefix, bias), dim=2)  # (M, n, N)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Interpolate the biases of rows and columns to a grid `(H, W)`."""
        for name, size in (("rows", (grid[0], 1)), ("columns", (1, grid[1]))):
            old = getattr(self, name)
            resized = F.interpolate(old.detach(), size, mode="bilinear")
            setattr(self, name, nn.Parameter(resized, requires_grad=old.requires_grad))


class AgentAttention(PooledAttention):
    """Agent Attention as a replacement for MHSA; takes the arguments of `ProjectedAttention`."""

    Config = AgentConfig

    def add_parameters(self) -> None:
        super().add_parameters()

        def bias() -> PositionBias | None:
            if not self.config.position_bias:
                return None
            return PositionBias(
                self.num_heads, self.contrast_grid[0] * self.contrast_grid[1], self.grid, self.num_prefix_tokens
            )

        self.bias1, self.bias2 = bias(), bias()

    def set_grid(self, grid: tuple[int, int]) -> None:
        super().set_grid(grid)
        for bias in (self.bias1, self.bias2):
            if bias is not None:
                bias.set_grid(grid)

    def attend(self, tokens: Tokens) -> Tensor:
        q, k, v, _, grid = tokens
        agents = self.contrast_tokens(q, grid)  # (B, M, n, D)
        bias1 = self.bias1(grid).to(q.dtype) if self.bias1 is not None else None  # (M, n, N)
        bias2 = self.bias2(grid).transpose(1, 2).to(q.dtype) if self.bias2 is not None else None  # (M, N, n)
        agent_v = softmax_attention(agents, k, v, bias1)  # (B, M, n, D)
        return softmax_attention(q, agents, agent_v, bias2)  # (B, M, N, D)
