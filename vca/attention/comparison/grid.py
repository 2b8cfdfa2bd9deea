"""Base class of attentions that are defined for the tokens of a grid only.

Prefix tokens attend to all tokens by softmax attention, as the class token of CaiT (arXiv 2103.17239), at a cost linear
in N. Patch tokens do not attend to prefix tokens. The originals have no prefix tokens.

Shape letters: B batch, M heads, N = P + H W tokens, D head dim.
"""

import torch
from torch import Tensor

from vca.attention.base import ProjectedAttention, Tokens
from vca.attention.softmax import softmax_attention


class GridAttention(ProjectedAttention):
    """Attention of patch tokens; the subclass defines `attend_grid`. Takes the arguments of `ProjectedAttention`."""

    def attend_grid(self, tokens: Tokens) -> Tensor:
        """Compute the attention of patch tokens `(B, M, H W, D)`: the same shape, in the dtype of `q`."""
        raise NotImplementedError

    def attend(self, tokens: Tokens) -> Tensor:
        q, k, v, x, grid = tokens
        prefix = self.num_prefix_tokens
        if not prefix:
            return self.attend_grid(tokens)
        patches = Tokens(q[:, :, prefix:], k[:, :, prefix:], v[:, :, prefix:], x[:, prefix:], grid)
        return torch.cat((softmax_attention(q[:, :, :prefix], k, v), self.attend_grid(patches)), dim=2)
