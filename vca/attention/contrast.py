"""Visual-Contrast Attention (VCA): differential attention in linear time, a drop-in replacement of MHSA.

"Linear Differential Vision Transformer: Learning Visual Contrasts via Pairwise Differentials", NeurIPS 2025,
arXiv 2511.00833. A few contrast tokens, pooled from the queries, look at the whole image twice, through a positive and
a negative stream; every patch then reads out the difference of the two:

    contrast tokens   t  = AvgPool(q on the grid),   t+ = t + e+,   t- = t + e-
    Stage I           v^ = (1 - l_init) RMSNorm(softmax(t+ k^T / sqrt D) v - l1 softmax(t- k^T / sqrt D) v)
    Stage II          A  = softmax(q t+^T / sqrt D) - l2 softmax(q t-^T / sqrt D)
                      o  = (1 - l_init) RMSNorm(A v^)
    output            y  = (o + DWConv3x3(v)) Wo

    paper      name here            shape
    q, k, v    q, k, v              (B, M, N, D)
    t+, t-     t_pos, t_neg         (B, M, n, D)
    e+, e-     e_pos, e_neg         (M, n, D)
    l1, l2     lambda1, lambda2     scalar
    l_init     lambda_init          float
    v^         v_hat                (B, M, n, D)
    A          weights              (B, M, N, n)

Shape letters: B batch, M heads, N = P + H W tokens (P prefix tokens, then the grid), C = M D channels, D head dim,
n = h w contrast tokens. `reference.py` is the same mathematics, slow and obvious.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vca.attention.base import choose
from vca.attention.geometry import check_tokens
from vca.attention.kernels import Backend, use_triton
from vca.attention.pooling import PooledAttention, PooledConfig, Pooling, pool_queries
from vca.attention.softmax import needs_plain_ops
from vca.attention.stages import global_contrast, per_patch_differential


class Stage(Enum):
    """What a stage computes: the difference of two streams, or the positive stream alone (lambda = 0)."""

    contrast = "contrast"
    plain = "plain"


# What a stream's tokens are made of: pooled queries (t), learned embeddings (e), or their sum (t + e, the paper).
Stream = Enum("Stream", {"pool": "pool", "embedding": "embedding", "pool+embedding": "pool+embedding"})


class Stage2Softmax(Enum):
    """Stage II: one softmax a stream over n tokens (the equations), or one over the 2n joined scores, then split."""

    separate = "separate"
    joint = "joint"


@dataclass
class VCAConfig(PooledConfig):
    """Options of VCA; the defaults are the paper's. Strings are accepted for the enums.

    Attributes:
        name, local_branch: as for every variant, see `AttentionConfig`.
        contrast_grid, pooling: as for every variant that pools, see `PooledConfig`.
        stage1, stage2: `contrast` or `plain` (Table 3).
        positive_stream, negative_stream: content of the two streams: `pool`, `embedding` or
            `pool+embedding` (Table 4).
        embedding_init_std: standard deviation of e+ and e- at the start.
        stage2_softmax: `separate` or `joint`.
        backend: `auto`, `eager` or `triton`, see `vca.attention.kernels`; the mathematics is the same.
    """

    name: str = "vca"
    local_branch: bool = True
    stage1: Stage = Stage.contrast
    stage2: Stage = Stage.contrast
    positive_stream: Stream = Stream["pool+embedding"]
    negative_stream: Stream = Stream["pool+embedding"]
    embedding_init_std: float = 1.0
    stage2_softmax: Stage2Softmax = Stage2Softmax.separate
    backend: Backend = Backend.auto

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stage1 = choose(Stage, self.stage1, "attention.stage1")
        self.stage2 = choose(Stage, self.stage2, "attention.stage2")
        self.positive_stream = choose(Stream, self.positive_stream, "attention.positive_stream")
        self.negative_stream = choose(Stream, self.negative_stream, "attention.negative_stream")
        self.stage2_softmax = choose(Stage2Softmax, self.stage2_softmax, "attention.stage2_softmax")
        self.backend = choose(Backend, self.backend, "attention.backend")
        if not 0 <= self.embedding_init_std < math.inf:
            raise ValueError(f"attention.embedding_init_std must be >= 0 and finite, got {self.embedding_init_std}")


EPS = 1e-5  # of both norms


def lambda_init_of_layer(layer_index: int) -> float:
    """`l_init = 0.8 - 0.6 exp(-0.3 layer)`, layers from 0 (Differential Transformer, arXiv 2410.05258)."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer_index)


def visual_contrast_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e_pos: Tensor | None,
    e_neg: Tensor | None,
    lambda1: Tensor | float | None,
    lambda2: Tensor | float | None,
    lambda_init: float,
    norm1_weight: Tensor,
    norm2_weight: Tensor,
    grid: tuple[int, int],
    contrast_grid: tuple[int, int],
    num_prefix_tokens: int = 0,
    eps: float = EPS,
    *,
    streams: tuple[Stream | str, Stream | str] = (Stream["pool+embedding"], Stream["pool+embedding"]),
    stage2_softmax: Stage2Softmax | str = Stage2Softmax.separate,
    pooling: Pooling | str = Pooling.average,
    pool_weight: Tensor | None = None,
    backend: Backend | str = Backend.auto,
) -> Tensor:
    """The attention of VCA, before the local branch.

    Softmaxes, the two differences, lambda and the two norms are taken in float32 (float64 for float64 inputs), also
    under autocast; only the products run in the dtype of `q`. In half precision the difference of Stage I is thus one
    of v+ and v- as the product rounds them; the kernels do not round them.

    Args:
        q, k, v: `(B, M, N, D)`, where N is `num_prefix_tokens + H * W`, prefix tokens first.
        e_pos, e_neg: `(M, n, D)` stream embeddings; None where `streams` does not use them.
        lambda1, lambda2: scalar of each stage; None makes the stage plain (the positive stream alone).
        lambda_init: the constant of the layer; both norms are scaled by `1 - lambda_init`.
        norm1_weight, norm2_weight: `(D,)`.
        grid: `(H, W)`.
        contrast_grid: `(h, w)`; bins overlap where they do not divide the grid.
        num_prefix_tokens: P; these tokens attend and are attended to, but are not pooled.
        eps: of the two norms.
        streams: content of the positive and the negative stream.
        stage2_softmax: one softmax a stream, or one over both.
        pooling, pool_weight: as `vca.attention.pooling.pool_queries` has them.
        backend: `auto` (the fused kernels on a GPU that they serve), `eager` or `triton`.

    Returns:
        `(B, M, N, D)`, in the dtype of `q`.

    Raises:
        ValueError: if the tokens do not fill the grid, an embedding is missing or misshapen, an option is unknown, or
            the kernels are asked for and cannot serve the call.
    """
    check_tokens(q.shape[2], grid, num_prefix_tokens)
    joint = choose(Stage2Softmax, stage2_softmax, "stage2_softmax") is Stage2Softmax.joint
    full, num_contrast = torch.promote_types(q.dtype, torch.float32), contrast_grid[0] * contrast_grid[1]
    named = list(zip(streams, (e_pos, e_neg), strict=True))
    if lambda1 is None and lambda2 is None:  # a plain stage reads the positive stream alone
        named = named[:1]
    used = [Content.of(stream, e, q, num_contrast) for stream, e in named]
    lambda1, lambda2 = (x if x is None else torch.as_tensor(x, dtype=full, device=q.device) for x in (lambda1, lambda2))
    norm1_weight, norm2_weight = norm1_weight.to(full), norm2_weight.to(full)

    # Contrast tokens. Nothing is pooled for embeddings alone, and the kernels take the average by themselves.
    backend = choose(Backend, backend, "backend")
    fused = use_triton(backend, q.device, q.dtype, q.shape[3], num_contrast) and not without_kernels(backend)
    averaged_there = fused and choose(Pooling, pooling, "pooling") is Pooling.average and pool_weight is None
    t = None
    if any(content.pooled for content in used) and not averaged_there:
        t = pool_queries(q, grid, contrast_grid, num_prefix_tokens, pooling, pool_weight)  # (B, M, n, D)
    if fused:
        from vca.attention.kernels.operator import fused_attention  # triton need not be there

        return fused_attention(
            q, k, v, t, used, lambda1, lambda2, norm1_weight, norm2_weight,
            lambda_init, grid, contrast_grid, num_prefix_tokens, eps, joint,
        )  # fmt: skip

    tokens = torch.cat([content.tokens(t, q.shape[0]) for content in used], dim=2).to(q.dtype)  # (B, M, 2n or n, D)
    tokens1 = tokens if lambda1 is not None else tokens[:, :, :num_contrast]
    tokens2 = tokens if lambda2 is not None else tokens[:, :, :num_contrast]

    # Stage I, global contrast; Stage II, per-patch differential.
    norm1_weight, norm2_weight = (1 - lambda_init) * norm1_weight, (1 - lambda_init) * norm2_weight
    v_hat = global_contrast(tokens1, k, v, lambda1, norm1_weight, eps)  # (B, M, n, D)
    return per_patch_differential(q, tokens2, v_hat, lambda2, norm2_weight, joint, eps)  # (B, M, N, D)


def without_kernels(backend: Backend) -> bool:
    """Whether this call takes plain PyTorch on a GPU too: under a transform, or for a file that loads without Triton.

    Raises:
        ValueError: if it is under a transform, and the backend is `triton`.
    """
    transformed = needs_plain_ops()
    if transformed and backend is Backend.triton:
        raise ValueError(
            "attention.backend=triton does not serve torch.func and forward-mode differentiation; "
            "use attention.backend=auto"
        )
    to_onnx = torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    return transformed or to_onnx or torch.jit.is_tracing()


class Content(NamedTuple):
    """What the tokens of one stream are made of."""

    pooled: bool
    embedding: Tensor | None  # (M, n, D), float32 at least

    @classmethod
    def of(cls, stream: Stream | str, embedding: Tensor | None, q: Tensor, num_contrast: int) -> "Content":
        """The content that a stream's name stands for; `ValueError` if it needs an embedding of another shape."""
        stream, size = choose(Stream, stream, "streams"), (q.shape[1], num_contrast, q.shape[3])
        if stream is Stream["pool"]:
            return cls(True, None)
        if embedding is None or embedding.shape != size:
            got = None if embedding is None else tuple(embedding.shape)
            raise ValueError(f"a stream of content '{stream.value}' needs an embedding of shape {size}, got {got}")
        return cls(stream is not Stream.embedding, embedding.to(torch.promote_types(q.dtype, torch.float32)))

    def tokens(self, t: Tensor | None, batch: int) -> Tensor:
        """Tokens of the stream, `t`, `e` or `t + e`: `(B, M, n, D)`, float32 at least if there is an embedding."""
        if self.embedding is None:
            assert t is not None
            return t
        return self.embedding.expand(batch, -1, -1, -1) if t is None or not self.pooled else t + self.embedding


class Lambda(nn.Module):
    """`l = exp(q1 . k1) - exp(q2 . k2) + l_init`, four learned vectors `(D,)` shared by the heads; float32 scalar."""

    def __init__(self, head_dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.q1, self.k1, self.q2, self.k2 = (nn.Parameter(0.1 * torch.randn(head_dim)) for _ in range(4))

    def forward(self) -> Tensor:
        """The scalar lambda."""
        # A product and a sum, not torch.dot: autocast would take that in half precision.
        first, second = (self.q1 * self.k1).sum(), (self.q2 * self.k2).sum()
        return first.exp() - second.exp() + self.init


class VisualContrastAttention(PooledAttention):
    """VCA with its projections and local branch: `(B, N, C)` to `(B, N, C)`, in the place of MHSA.

    The arguments are those of `ProjectedAttention`, the options those of `VCAConfig`. Parameters do not depend on the
    grid, except the kernel of a learned pooling; the depth of the layer sets `lambda_init`.
    """

    Config = VCAConfig

    def add_parameters(self) -> None:
        """Lambdas, norms and stream embeddings: only what the chosen stages and streams use, so all get a gradient."""
        super().add_parameters()
        config, dim = self.config, self.head_dim
        contrast1, contrast2 = config.stage1 is Stage.contrast, config.stage2 is Stage.contrast
        self.lambda_init = lambda_init_of_layer(self.layer_index)
        self.lambda1 = Lambda(dim, self.lambda_init) if contrast1 else None
        self.lambda2 = Lambda(dim, self.lambda_init) if contrast2 else None
        self.norm1_weight, self.norm2_weight = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

        def embedding(content: Stream) -> nn.Parameter | None:
            if content is Stream["pool"]:
                return None
            size = (self.num_heads, self.contrast_grid[0] * self.contrast_grid[1], dim)
            return nn.Parameter(config.embedding_init_std * torch.randn(size))

        streams = (
            [config.positive_stream, config.negative_stream] if contrast1 or contrast2 else [config.positive_stream]
        )
        self.e_pos = embedding(config.positive_stream)
        self.e_neg = embedding(config.negative_stream) if contrast1 or contrast2 else None
        if all(content is Stream.embedding for content in streams):
            self.pool_weight = None  # nothing is pooled

    def fused(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the fused kernels compute this layer there; `ValueError` if they are asked for and cannot."""
        return use_triton(
            self.config.backend, device, dtype, self.head_dim, self.contrast_grid[0] * self.contrast_grid[1]
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """`visual_contrast_attention` with the parameters of this layer."""
        return visual_contrast_attention(
            q,
            k,
            v,
            self.e_pos,
            self.e_neg,
            self.lambda1() if self.lambda1 is not None else None,
            self.lambda2() if self.lambda2 is not None else None,
            self.lambda_init,
            self.norm1_weight,
            self.norm2_weight,
            grid,
            self.contrast_grid,
            self.num_prefix_tokens,
            streams=(self.config.positive_stream, self.config.negative_stream),
            stage2_softmax=self.config.stage2_softmax,
            backend=self.config.backend,
            pooling=self.config.pooling,
            pool_weight=self.pool_weight,
        )


def backend_of(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """In words, what computes VCA in a model there: empty for a model without VCA."""
    fused = [layer.fused(device, dtype) for layer in model.modules() if isinstance(layer, VisualContrastAttention)]
    if not fused:
        return ""
    if not any(fused):
        return " in plain PyTorch"
    return " in fused kernels" if all(fused) else f" in fused kernels in {sum(fused)} of {len(fused)} layers"
