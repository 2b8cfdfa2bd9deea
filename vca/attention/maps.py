"""Attention maps on the token grid, for visualization.

Shape letters: B batch, M heads, N = P + H W tokens (P prefix tokens, then the grid), D head dim, n = h w contrast
tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vca.attention.base import ProjectedAttention, Tokens
from vca.attention.contrast import EPS, Stage2Softmax, VisualContrastAttention, streams_of
from vca.attention.lambdas import LambdaForm
from vca.attention.softmax import SoftmaxAttention


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[list[tuple[ProjectedAttention, Tokens]]]:
    """Record the arguments of every attention call of the model within the context, in the order of the layers."""
    calls: list[tuple[ProjectedAttention, Tokens]] = []
    modules = [module for module in model.modules() if isinstance(module, ProjectedAttention)]

    def record(module: ProjectedAttention, attend: Any, tokens: Tokens) -> Tensor:
        q, k, v, x, grid = tokens
        calls.append((module, Tokens(q.detach(), k.detach(), v.detach(), x.detach(), grid)))
        return attend(tokens)

    for module in modules:
        module.attend = partial(record, module, module.attend)  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        for module in modules:
            del module.attend


def maps_of(module: ProjectedAttention, tokens: Tokens, patch: tuple[int, int]) -> dict[str, Tensor]:
    """Compute the maps of one layer for the patch at (row, column), averaged over heads: title -> `(B, height, width)`.

    VCA has the maps `I+` and `I-` (attention of the patch's contrast token in both streams), `II+` and `II-` (attention
    of the patch to the contrast tokens), the weighted differences `I` and `II`, and `VCA`, the product of both stages,
    `A diag(r) (I+ - l1 I-)` over all contrast tokens. `r` is the factor of Stage I's norm, so `VCA` applied to v is the
    input of Stage II's norm, up to the learned norm weights, which act on channels and are ignored. A plain stage has
    its positive stream only. Without norms `r` is 1. MHSA has one map, `MHSA`. Every other attention, and a subclass of
    VCA with its own stages, has the map `do/dv`, see `derivative_of_output`.

    Raises:
        ValueError: if the patch is not on the grid.
    """
    q, k, v, x, grid = tokens
    if not (0 <= patch[0] < grid[0] and 0 <= patch[1] < grid[1]):
        raise ValueError(f"patch must be on the grid {grid[0]} x {grid[1]}, got {patch}")
    prefix, scale = module.num_prefix_tokens, q.shape[-1] ** -0.5
    query = prefix + patch[0] * grid[1] + patch[1]

    def on(size: tuple[int, int], weights: Tensor) -> Tensor:  # (B, M, .. h w) -> (B, h, w)
        return weights[..., -size[0] * size[1] :].mean(1).unflatten(-1, size)

    if isinstance(module, SoftmaxAttention) and type(module).attend is SoftmaxAttention.attend:
        weights = (q[:, :, query : query + 1] @ k.transpose(2, 3) * scale).softmax(-1)  # (B, M, 1, N)
        return {"MHSA": on(grid, weights.squeeze(2))}
    if not isinstance(module, VisualContrastAttention) or module.overridden("attend", "stage1", "stage2"):
        return {"do/dv": on(grid, derivative_of_output(module, tokens, query))}

    contrast_grid, options = module.contrast_grid, module.config
    cell = patch[0] * contrast_grid[0] // grid[0] * contrast_grid[1] + patch[1] * contrast_grid[1] // grid[1]
    parameters = module.contrast_parameters(x, grid)
    sources = streams_of(parameters, options, q, module.num_contrast)
    t = module.contrast_tokens(q, grid) if any(source.pooled for source in sources) else None
    contrast_tokens = [source.tokens(t, q.shape[0]) for source in sources]  # 2 or 1 x (B, M, n, D)
    streams = dict(zip("+-", contrast_tokens, strict=False))
    stage1 = {sign: (t @ k.transpose(2, 3) * scale).softmax(-1) for sign, t in streams.items()}  # (B, M, n, N)
    scores = {sign: q[:, :, query : query + 1] @ t.transpose(2, 3) * scale for sign, t in streams.items()}
    if options.stage2_softmax is Stage2Softmax.joint and parameters.lambda2 is not None:
        joint = torch.cat([scores["+"], scores["-"]], -1).softmax(-1).chunk(2, dim=-1)
        stage2 = dict(zip("+-", joint, strict=True))  # (B, M, 1, n)
    else:
        stage2 = {sign: score.softmax(-1) for sign, score in scores.items()}  # (B, M, 1, n)

    first, second = stage1["+"], stage2["+"]
    maps = {"I+": on(grid, first[:, :, cell])}
    if parameters.lambda1 is not None:
        first = first - parameters.lambda1 * stage1["-"]  # (B, M, n, N)
        maps |= {"I-": on(grid, stage1["-"][:, :, cell]), "I": on(grid, first[:, :, cell])}
    maps["II+"] = on(contrast_grid, second.squeeze(2))
    lambda2: Any = parameters.lambda2
    if lambda2 is not None:
        if options.lambda_form is LambdaForm.token:
            lambda2 = lambda2[:, :, query : query + 1]  # (B, M, 1, 1)
        second = second - lambda2 * stage2["-"]  # (B, M, 1, n)
        maps |= {"II-": on(contrast_grid, stage2["-"].squeeze(2)), "II": on(contrast_grid, second.squeeze(2))}
    if options.norm:
        r = (1 - module.lambda_init) * ((first @ v).square().mean(-1, keepdim=True) + EPS).rsqrt()  # (B, M, n, 1)
        first = r * first
    return maps | {"VCA": on(grid, (second @ first).squeeze(2))}


def derivative_of_output(module: ProjectedAttention, tokens: Tokens, query: int) -> Tensor:
    """Compute the derivative of a token's output by v, averaged over the channels of a head: `(B, M, N)`.

    These are the attention weights, averaged over heads that share v, if the output is a sum of values with the same
    weights in every channel.
    """
    v = tokens.v.detach().requires_grad_()
    with torch.enable_grad():
        out = module.attend(tokens._replace(v=v))  # (B, M, N, D)
        (weights,) = torch.autograd.grad(out[:, :, query].sum(), v)  # (B, M, N, D)
    return weights.mean(-1) * (v.shape[1] / out.shape[1])  # v of several heads: their mean
