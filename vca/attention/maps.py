"""What an attention looks at, as maps on the token grid: for pictures, not for training.

Shape letters: B batch, M heads, N = P + H W tokens (P prefix tokens, then the grid), D head dim, n = h w contrast
tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vca.attention.base import ProjectedAttention
from vca.attention.contrast import EPS, Content, Stage2Softmax, VisualContrastAttention
from vca.attention.softmax import SoftmaxAttention


class Heads(NamedTuple):
    """What an attention was called with: three `(B, M, N, D)` and the grid."""

    q: Tensor
    k: Tensor
    v: Tensor
    grid: tuple[int, int]


@contextmanager
def listening(model: nn.Module) -> Iterator[list[tuple[ProjectedAttention, Heads]]]:
    """Within the context every attention of the model notes what it is called with, in the order of the layers."""
    heard: list[tuple[ProjectedAttention, Heads]] = []
    modules = [module for module in model.modules() if isinstance(module, ProjectedAttention)]

    def wrap(module: ProjectedAttention) -> Any:
        attend = module.attend

        def noting(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
            heard.append((module, Heads(q.detach(), k.detach(), v.detach(), grid)))
            return attend(q, k, v, grid)

        return noting

    for module in modules:
        module.attend = wrap(module)  # type: ignore[method-assign]
    try:
        yield heard
    finally:
        for module in modules:
            del module.attend


def maps_of(module: ProjectedAttention, heads: Heads, patch: tuple[int, int]) -> dict[str, Tensor]:
    """Maps of one layer for the patch in row and column `patch`, averaged over heads: title -> `(B, height, width)`.

    Of VCA: `I+` and `I-`, where the two streams of this patch's contrast token look in the image; `II+` and `II-`, how
    the patch reads the contrast tokens of the two streams; `I` and `II`, the weighted differences; `VCA`, what comes of
    both stages, `A diag(r) (I+ - l1 I-)` over all contrast tokens. There `r` is what the norm of Stage I multiplies a
    contrast token by, so that this map, applied to v, is what the norm of Stage II gets. The learned weights of the
    norms are left out: they scale channels, which a map of patches does not have. A plain stage has its positive
    stream alone. Of MHSA: `MHSA`, where the patch looks.

    Raises:
        ValueError: if the layer is of another variant, or the patch is not on the grid.
    """
    q, k, v, grid = heads
    if not (0 <= patch[0] < grid[0] and 0 <= patch[1] < grid[1]):
        raise ValueError(f"there is no patch {patch} on a grid of {grid[0]} x {grid[1]}")
    prefix, scale = module.num_prefix_tokens, q.shape[-1] ** -0.5
    query = prefix + patch[0] * grid[1] + patch[1]

    def on(size: tuple[int, int], weights: Tensor) -> Tensor:  # (B, M, .. h w) -> (B, h, w)
        return weights[..., -size[0] * size[1] :].mean(1).unflatten(-1, size)

    if isinstance(module, SoftmaxAttention):
        weights = (q[:, :, query : query + 1] @ k.transpose(2, 3) * scale).softmax(-1)  # (B, M, 1, N)
        return {"MHSA": on(grid, weights.squeeze(2))}
    if not isinstance(module, VisualContrastAttention):
        raise ValueError(f"there are maps of VCA and of MHSA, not of {type(module).__name__}")

    contrast_grid, options = module.contrast_grid, module.config
    cell = patch[0] * contrast_grid[0] // grid[0] * contrast_grid[1] + patch[1] * contrast_grid[1] // grid[1]
    used = [(options.positive_stream, module.e_pos)]
    if module.lambda1 is not None or module.lambda2 is not None:
        used.append((options.negative_stream, module.e_neg))
    contents = [Content.of(stream, embedding, q, contrast_grid[0] * contrast_grid[1]) for stream, embedding in used]
    t = module.contrast_tokens(q, grid) if any(content.pooled for content in contents) else None
    tokens = [content.tokens(t, q.shape[0]) for content in contents]  # 2 or 1 x (B, M, n, D)
    streams = dict(zip("+-", tokens, strict=False))
    stage1 = {sign: (t @ k.transpose(2, 3) * scale).softmax(-1) for sign, t in streams.items()}  # (B, M, n, N)
    scores = {sign: q[:, :, query : query + 1] @ t.transpose(2, 3) * scale for sign, t in streams.items()}
    if options.stage2_softmax is Stage2Softmax.joint and module.lambda2 is not None:
        joint = torch.cat([scores["+"], scores["-"]], -1).softmax(-1).chunk(2, dim=-1)
        stage2 = dict(zip("+-", joint, strict=True))  # (B, M, 1, n)
    else:
        stage2 = {sign: score.softmax(-1) for sign, score in scores.items()}  # (B, M, 1, n)

    first, second = stage1["+"], stage2["+"]
    found = {"I+": on(grid, first[:, :, cell])}
    if module.lambda1 is not None:
        first = first - module.lambda1() * stage1["-"]  # (B, M, n, N)
        found |= {"I-": on(grid, stage1["-"][:, :, cell]), "I": on(grid, first[:, :, cell])}
    found["II+"] = on(contrast_grid, second.squeeze(2))
    if module.lambda2 is not None:
        second = second - module.lambda2() * stage2["-"]  # (B, M, 1, n)
        found |= {"II-": on(contrast_grid, stage2["-"].squeeze(2)), "II": on(contrast_grid, second.squeeze(2))}
    r = (1 - module.lambda_init) * ((first @ v).square().mean(-1, keepdim=True) + EPS).rsqrt()  # (B, M, n, 1)
    return found | {"VCA": on(grid, (second @ (r * first)).squeeze(2))}
