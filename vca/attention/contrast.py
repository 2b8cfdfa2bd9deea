"""Visual-Contrast Attention (VCA): differential attention in linear time, a drop-in replacement of MHSA.

"Linear Differential Vision Transformer: Learning Visual Contrasts via Pairwise Differentials", NeurIPS 2025,
arXiv 2511.00833. A few contrast tokens, pooled from the queries, attend to the image in a positive and a negative
stream; every token then attends to the contrast tokens with the difference of the two streams:

    contrast tokens   t  = AvgPool(q on the grid),   t+ = t + e+,   t- = t + e-
    Stage I           v^ = (1 - l_init) RMSNorm(softmax(t+ k^T / sqrt D) v - l1 softmax(t- k^T / sqrt D) v)
    Stage II          A  = softmax(q t+^T / sqrt D) - l2 softmax(q t-^T / sqrt D)
                      o  = (1 - l_init) RMSNorm(A v^)
    output            y  = (o + DWConv3x3(v)) Wo

    paper      name here            shape
    q, k, v    q, k, v              (B, M, N, D)
    t+, t-     t_pos, t_neg         (B, M, n, D)
    e+, e-     e_pos, e_neg         (M, n, D)
    l1, l2     lambda1, lambda2     scalar; with lambda_form=token (B, M, n, 1) and (B, M, N, 1)
    l_init     lambda_init          float
    v^         v_hat                (B, M, n, D)
    A          weights              (B, M, N, n)

Shape letters: B batch, M heads, N = P + H W tokens (P prefix tokens, then the grid), C = M D channels, D head dim,
n = h w contrast tokens. `reference.py` is a literal implementation of these equations.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vca.attention.backend import needs_eager, use_kernels
from vca.attention.base import Tokens, choose
from vca.attention.geometry import check_tokens
from vca.attention.kernels import Backend
from vca.attention.lambdas import Lambda, LambdaForm, check_lambda, lambda_init_of_layer, token_lambdas
from vca.attention.parameters import ContrastParameters
from vca.attention.pooling import PooledAttention, PooledConfig, Pooling, pool_queries
from vca.attention.stages import global_contrast, per_patch_differential


class Stage(Enum):
    """Form of a stage: the difference of two streams, or the positive stream only (lambda = 0)."""

    contrast = "contrast"
    plain = "plain"


# Contrast tokens of a stream: pooled queries (t), a learned embedding (e), or their sum (t + e, the paper).
Stream = Enum("Stream", {"pool": "pool", "embedding": "embedding", "pool+embedding": "pool+embedding"})


class Stage2Softmax(Enum):
    """Softmax of Stage II: one per stream over n tokens (the paper), or one over the 2n joined scores."""

    separate = "separate"
    joint = "joint"


@dataclass
class VCAConfig(PooledConfig):
    """Options of VCA; the defaults are the paper's. Enum options also accept strings.

    Attributes:
        stage1, stage2: two streams (`contrast`) or one softmax attention (`plain`) in this stage (Table 3).
        positive_stream, negative_stream: contrast tokens of this stream: pooled queries (`pool`), a learned embedding
            (`embedding`) or their sum (`pool+embedding`) (Table 4).
        embedding_init_std: standard deviation of the initial e+ and e-.
        stage2_softmax: one softmax per stream (`separate`, the paper) or one over the scores of both (`joint`).
        lambda_form: one learned lambda per stage (`scalar`, the paper), or the sigmoid of a linear function of x for
            each token and head (`token`, as in Differential Transformer V2), which Stage I pools on the grid.
        norm: RMSNorm and factor `1 - lambda_init` after each stage (the paper); false: neither.
        backend: `eager` (PyTorch), `triton` (fused kernels), or `auto`: the kernels where they are checked on a GPU.
            Results agree up to rounding.
    """

    name: str = "vca"
    local_branch: bool = True
    stage1: Stage = Stage.contrast
    stage2: Stage = Stage.contrast
    positive_stream: Stream = Stream["pool+embedding"]
    negative_stream: Stream = Stream["pool+embedding"]
    embedding_init_std: float = 1.0
    stage2_softmax: Stage2Softmax = Stage2Softmax.separate
    lambda_form: LambdaForm = LambdaForm.scalar
    norm: bool = True
    backend: Backend = Backend.auto

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stage1 = choose(Stage, self.stage1, "attention.stage1")
        self.stage2 = choose(Stage, self.stage2, "attention.stage2")
        self.positive_stream = choose(Stream, self.positive_stream, "attention.positive_stream")
        self.negative_stream = choose(Stream, self.negative_stream, "attention.negative_stream")
        self.stage2_softmax = choose(Stage2Softmax, self.stage2_softmax, "attention.stage2_softmax")
        self.lambda_form = choose(LambdaForm, self.lambda_form, "attention.lambda_form")
        if self.lambda_form is LambdaForm.token and self.stage1 is self.stage2 is Stage.plain:
            raise ValueError("attention.lambda_form must be scalar if both stages are plain, got token")
        self.backend = choose(Backend, self.backend, "attention.backend")
        if not 0 <= self.embedding_init_std < math.inf:
            raise ValueError(f"attention.embedding_init_std must be >= 0 and finite, got {self.embedding_init_std}")


EPS = 1e-5  # epsilon of both norms


def visual_contrast_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parameters: ContrastParameters,
    grid: tuple[int, int],
    contrast_grid: tuple[int, int],
    num_prefix_tokens: int = 0,
    config: VCAConfig | None = None,
    eps: float = EPS,
) -> Tensor:
    """Compute VCA before the local branch.

    Softmaxes, differences, lambdas and norms are computed in float32 (float64 for float64 inputs), also under autocast;
    matrix products use the dtype of `q`. In half precision v+ and v- are rounded before the difference of Stage I; the
    Triton kernels do not round them.

    Args:
        q, k, v: `(B, M, N, D)` with N = `num_prefix_tokens + H * W`, prefix tokens first.
        parameters: learned parameters. A stage is plain (positive stream only) if its lambda is None, and has no norm
            if its norm weight is None.
        grid: `(H, W)` of the patch tokens.
        contrast_grid: `(h, w)`; pooling bins overlap if it does not divide the grid.
        num_prefix_tokens: P; prefix tokens take part in the attention but are not pooled.
        config: its streams, `stage2_softmax`, `pooling` and `backend` apply; None uses the defaults.
        eps: epsilon of both norms.

    Returns:
        `(B, M, N, D)`, in the dtype of `q`.

    Raises:
        ValueError: if N does not match the grid, an embedding is missing, it or a lambda has the wrong shape, or
            `backend=triton` does not support the call.
    """
    config = config or VCAConfig()
    check_tokens(q.shape[2], grid, num_prefix_tokens)
    acc_dtype, num_contrast = torch.promote_types(q.dtype, torch.float32), contrast_grid[0] * contrast_grid[1]
    joint = config.stage2_softmax is Stage2Softmax.joint
    streams = streams_of(parameters, config, q, num_contrast)
    lambda1 = check_lambda(parameters.lambda1, (*q.shape[:2], num_contrast, 1), q)
    lambda2 = check_lambda(parameters.lambda2, (*q.shape[:3], 1), q)
    norms: list[Any] = [x if x is None else x.to(acc_dtype) for x in (parameters.norm1_weight, parameters.norm2_weight)]

    # Pooled queries, unless no stream uses them or the kernels compute the average themselves.
    per_token = any(x is not None and x.ndim > 0 for x in (lambda1, lambda2))
    options = per_token, all(x is not None for x in norms)
    fused = use_kernels(config.backend, q.device, q.dtype, q.shape[3], num_contrast, *options)
    fused = fused and not needs_eager(config.backend)
    kernel_pools = fused and config.pooling is Pooling.average and parameters.pool_weight is None
    t = None
    if any(stream.pooled for stream in streams) and not kernel_pools:
        t = pool_queries(q, grid, contrast_grid, num_prefix_tokens, config.pooling, parameters.pool_weight)
    if fused:
        from vca.attention.kernels.operator import KernelInputs, KernelOptions, fused_attention  # triton is optional

        pos, neg = [*streams, StreamTokens(False, None)][:2]
        inputs = KernelInputs(q, k, v, t, pos.embedding, neg.embedding, lambda1, lambda2, *norms)
        layout = grid, contrast_grid, num_prefix_tokens
        settings = KernelOptions(parameters.lambda_init, *layout, eps, [pos.pooled, neg.pooled], joint)
        return fused_attention(inputs, settings)

    tokens1, tokens2 = contrast_tokens_of(streams, t, q, parameters)
    gain1, gain2 = (None if norm is None else (1 - parameters.lambda_init) * norm for norm in norms)
    v_hat = global_contrast(tokens1, k, v, lambda1, gain1, eps)  # (B, M, n, D)
    return per_patch_differential(q, tokens2, v_hat, lambda2, gain2, joint, eps)  # (B, M, N, D)


class StreamTokens(NamedTuple):
    """Definition of the contrast tokens of one stream: pooled queries, an embedding, or their sum."""

    pooled: bool
    embedding: Tensor | None  # (M, n, D), at least float32

    @classmethod
    def of(cls, stream: Stream, embedding: Tensor | None, q: Tensor, num_contrast: int) -> "StreamTokens":
        """Build from a stream's name; `ValueError` if its embedding is missing or has the wrong shape."""
        size = (q.shape[1], num_contrast, q.shape[3])
        if stream is Stream["pool"]:
            return cls(True, None)
        if embedding is None or embedding.shape != size:
            got = None if embedding is None else tuple(embedding.shape)
            raise ValueError(f"embedding of a '{stream.value}' stream must have shape {size}, got {got}")
        return cls(stream is not Stream.embedding, embedding.to(torch.promote_types(q.dtype, torch.float32)))

    def tokens(self, t: Tensor | None, batch: int) -> Tensor:
        """Return `t`, `e` or `t + e`: `(B, M, n, D)`, at least float32 if the stream has an embedding."""
        if self.embedding is None:
            assert t is not None
            return t
        return self.embedding.expand(batch, -1, -1, -1) if t is None or not self.pooled else t + self.embedding


def streams_of(parameters: ContrastParameters, config: VCAConfig, q: Tensor, num_contrast: int) -> list[StreamTokens]:
    """Return the streams that are used: both, or the positive one if both stages are plain."""
    streams = [(config.positive_stream, parameters.e_pos), (config.negative_stream, parameters.e_neg)]
    plain = parameters.lambda1 is None and parameters.lambda2 is None
    return [StreamTokens.of(name, e, q, num_contrast) for name, e in (streams[:1] if plain else streams)]


def contrast_tokens_of(
    streams: list[StreamTokens], t: Tensor | None, q: Tensor, parameters: ContrastParameters
) -> tuple[Tensor, Tensor]:
    """Return the contrast tokens of each stage, positive stream first: `(B, M, 2n, D)`, or `(B, M, n, D)` if plain."""
    parts = [stream.tokens(t, q.shape[0]) for stream in streams]
    tokens, n = torch.cat(parts, dim=2).to(q.dtype), parts[0].shape[2]
    plain1, plain2 = parameters.lambda1 is None, parameters.lambda2 is None
    return tokens[:, :, :n] if plain1 else tokens, tokens[:, :, :n] if plain2 else tokens


class VisualContrastAttention(PooledAttention):
    """VCA with projections and local branch, a drop-in replacement for MHSA: `(B, N, C)` to `(B, N, C)`.

    Takes the arguments of `ProjectedAttention`; inputs with another grid are called as `attn(x, grid=(H, W))`.
    `layer_index` sets `lambda_init = 0.8 - 0.6 exp(-0.3 layer_index)`, which is also the initial offset of both
    lambdas. With 0 in every layer, all layers use `lambda_init = 0.2`. Parameters do not depend on the grid, except the
    kernel of `pooling=depthwise`.

    New parameters and weight decay: lambda vectors and norm weights are 1-D and not decayed by `vca.training.optim`;
    the stream embeddings `e_pos`, `e_neg` `(M, n, D)` and the projections of token lambdas `(M, C)` are decayed.

    To change one part, subclass and override `contrast_tokens` (pooling), `stage1` or `stage2`; the rest is unchanged.
    A subclass with an override runs in plain PyTorch.

    Raises:
        ValueError: if a value is out of range, or `backend=triton` is set for a subclass with an override.

    Example:
        >>> attn = VisualContrastAttention(384, 6, grid=(14, 14), num_prefix_tokens=1, layer_index=0)
        >>> attn(torch.randn(2, 197, 384)).shape
        torch.Size([2, 197, 384])

        >>> class MeanStage1(VisualContrastAttention):
        ...     def stage1(self, tokens, k, v):
        ...         return v.mean(2, keepdim=True).expand(-1, -1, self.num_contrast, -1)
    """

    Config = VCAConfig

    def add_parameters(self) -> None:
        super().add_parameters()
        config, dim = self.config, self.head_dim
        if config.backend is Backend.triton and self.overridden("contrast_tokens", "stage1", "stage2"):
            name = type(self).__name__
            raise ValueError(f"attention.backend must be auto or eager for {name}, which overrides a stage, got triton")
        contrast1, contrast2 = config.stage1 is Stage.contrast, config.stage2 is Stage.contrast
        self.num_contrast = self.contrast_grid[0] * self.contrast_grid[1]
        self.lambda_init = lambda_init_of_layer(self.layer_index)
        # Only parameters that the stages and streams use are created, so that each gets a gradient.
        self.lambda1 = self.new_lambda() if contrast1 else None
        self.lambda2 = self.new_lambda() if contrast2 else None
        self.norm1_weight, self.norm2_weight = (
            nn.Parameter(torch.ones(dim)) if config.norm else None for _ in range(2)
        )

        def embedding(stream: Stream) -> nn.Parameter | None:
            if stream is Stream["pool"]:
                return None
            return nn.Parameter(config.embedding_init_std * torch.randn(self.num_heads, self.num_contrast, dim))

        streams = [config.positive_stream, config.negative_stream][: 2 if contrast1 or contrast2 else 1]
        self.e_pos = embedding(config.positive_stream)
        self.e_neg = embedding(config.negative_stream) if len(streams) == 2 else None
        if all(stream is Stream.embedding for stream in streams):
            self.pool_weight = None  # nothing is pooled

    def new_lambda(self) -> nn.Module:
        """Create the lambda of a stage: a scalar, or a projection of x to one logit per head."""
        if self.config.lambda_form is LambdaForm.token:
            return nn.Linear(self.dim, self.num_heads, bias=False)
        return Lambda(self.head_dim, self.lambda_init)

    def overridden(self, *names: str) -> bool:
        """Return whether the class overrides one of these methods of `VisualContrastAttention`."""
        return any(getattr(type(self), name) is not getattr(VisualContrastAttention, name) for name in names)

    def fused(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Return whether the Triton kernels compute this layer; `ValueError` if `backend=triton` cannot."""
        if self.overridden("attend", "contrast_tokens", "stage1", "stage2"):
            return False
        options = self.config.lambda_form is LambdaForm.token, self.config.norm
        return use_kernels(self.config.backend, device, dtype, self.head_dim, self.num_contrast, *options)

    def contrast_parameters(self, x: Tensor | None = None, grid: tuple[int, int] | None = None) -> ContrastParameters:
        """Return the parameters as `visual_contrast_attention` takes them; token lambdas need x `(B, N, C)`."""
        if self.config.lambda_form is LambdaForm.scalar:
            lambda1, lambda2 = (None if module is None else module() for module in (self.lambda1, self.lambda2))
        else:
            if x is None:
                raise ValueError("contrast_parameters needs x with attention.lambda_form=token")
            layout = grid or self.grid, self.contrast_grid, self.num_prefix_tokens
            lambda1, lambda2 = token_lambdas(self.lambda1, self.lambda2, x, *layout)
        norms = self.norm1_weight, self.norm2_weight
        return ContrastParameters(self.e_pos, self.e_neg, lambda1, lambda2, self.lambda_init, *norms, self.pool_weight)

    def attend(self, tokens: Tokens) -> Tensor:
        q, k, v, x, grid = tokens
        parameters = self.contrast_parameters(x, grid)
        if not self.overridden("contrast_tokens", "stage1", "stage2"):
            layout = grid, self.contrast_grid, self.num_prefix_tokens
            return visual_contrast_attention(q, k, v, parameters, *layout, self.config)
        streams = streams_of(parameters, self.config, q, self.num_contrast)
        t = self.contrast_tokens(q, grid) if any(stream.pooled for stream in streams) else None
        tokens1, tokens2 = contrast_tokens_of(streams, t, q, parameters)
        per_token = self.config.lambda_form is LambdaForm.token
        lambdas: Any = [(parameters.lambda1,), (parameters.lambda2,)] if per_token else [(), ()]
        return self.stage2(q, tokens2, self.stage1(tokens1, k, v, *lambdas[0]), *lambdas[1])

    def stage1(self, tokens: Tensor, k: Tensor, v: Tensor, lambda1: Tensor | None = None) -> Tensor:
        """Compute v^ `(B, M, n, D)` from contrast tokens `(B, M, 2n, D)` (`n` if plain) and k, v `(B, M, N, D)`.

        Token lambdas are an argument; a scalar lambda is that of the layer.
        """
        lambda1, weight = self.lambda_and_weight(lambda1, self.lambda1, self.norm1_weight, k.dtype)
        return global_contrast(tokens, k, v, lambda1, weight, EPS)

    def stage2(self, q: Tensor, tokens: Tensor, v_hat: Tensor, lambda2: Tensor | None = None) -> Tensor:
        """Compute the output `(B, M, N, D)` from q, contrast tokens `(B, M, 2n, D)` (`n` if plain) and v^."""
        lambda2, weight = self.lambda_and_weight(lambda2, self.lambda2, self.norm2_weight, q.dtype)
        joint = self.config.stage2_softmax is Stage2Softmax.joint
        return per_patch_differential(q, tokens, v_hat, lambda2, weight, joint, EPS)

    def lambda_and_weight(
        self, given: Tensor | None, module: nn.Module | None, weight: Tensor | None, dtype: torch.dtype
    ) -> tuple[Any, Tensor | None]:
        """Return lambda (None if plain) and the scaled norm weight of a stage, at least in float32."""
        acc_dtype = torch.promote_types(dtype, torch.float32)
        value = module() if given is None and module is not None else given
        gain = None if weight is None else (1 - self.lambda_init) * weight.to(acc_dtype)
        return None if value is None else value.to(acc_dtype), gain


def backend_of(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Describe the VCA backend of a model for a log line, such as " in fused kernels"; empty without VCA."""
    fused = [layer.fused(device, dtype) for layer in model.modules() if isinstance(layer, VisualContrastAttention)]
    if not fused:
        return ""
    if not any(fused):
        return " in plain PyTorch"
    return " in fused kernels" if all(fused) else f" in fused kernels in {sum(fused)} of {len(fused)} layers"
