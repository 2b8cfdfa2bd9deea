"""The two stages of VCA in PyTorch. Neither saves attention scores: Stage I is SDPA, Stage II recomputes them.

Under plain autograd, Stage II would save several tensors of `N x 2n` per head, up to 3.6 times the saved activations of
an MHSA layer.

Shape letters: B batch, M heads, N tokens, D head dim, n contrast tokens, S streams (2, or 1 in a plain stage).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vca.attention.softmax import needs_plain_ops, softmax_attention


def difference(positive: Tensor, negative: Tensor, weight: Tensor | float) -> Tensor:
    """Compute `positive - weight * negative` in one pass over memory."""
    return torch.addcmul(positive, negative, torch.as_tensor(-weight, dtype=positive.dtype, device=positive.device))


def norm_of_stage(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """Compute the RMSNorm over the last dimension; without a gain, return x."""
    return x if gain is None else F.rms_norm(x, x.shape[-1:], gain, eps)


def global_contrast(
    tokens: Tensor, k: Tensor, v: Tensor, lambda1: Tensor | None, gain: Tensor | None, eps: float
) -> Tensor:
    """Compute Stage I: the contrast tokens attend to all tokens.

    Args:
        tokens: `(B, M, S n, D)`, the positive stream first; S is 1 where `lambda1` is None.
        k, v: `(B, M, N, D)`.
        lambda1: scalar, or `(B, M, n, 1)`; at least float32.
        gain: factors of the norm `(D,)`, at least float32; None: no norm.

    Returns:
        v^ `(B, M, n, D)`, at least in float32.
    """
    # One SDPA call for both streams. All SDPA backends compute the softmax in float32 and round the result.
    out = softmax_attention(tokens, k, v).to(torch.promote_types(v.dtype, torch.float32))  # (B, M, S n, D)
    if lambda1 is not None:
        v_pos, v_neg = out.chunk(2, dim=2)
        out = difference(v_pos, v_neg, lambda1)  # (B, M, n, D)
    return norm_of_stage(out, gain, eps)  # (B, M, n, D)


def per_patch_differential(
    q: Tensor, tokens: Tensor, v_hat: Tensor, lambda2: Tensor | None, gain: Tensor | None, joint: bool, eps: float
) -> Tensor:
    """Compute Stage II: each token attends to the contrast tokens with the difference of two softmaxes.

    Exports, traces and `torch.func` transforms use plain operations without chunking. So does `torch.compile`, as a
    checkpointed region: the compiler fuses its operations and recomputes the scores, which it would otherwise save.

    Args:
        q: `(B, M, N, D)`.
        tokens: `(B, M, S n, D)`, the positive stream first; S is 1 where `lambda2` is None.
        v_hat: `(B, M, n, D)`.
        lambda2: scalar, or `(B, M, N, 1)`; at least float32.
        gain: factors of the norm `(D,)`, at least float32; None: no norm.
        joint: one softmax over both streams instead of one per stream.

    Returns:
        `(B, M, N, D)`, in the dtype of `q`.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or needs_plain_ops():
        return plain_per_patch_differential(q, tokens, v_hat, lambda2, gain, joint, eps)
    if torch.compiler.is_compiling():
        arguments = q, tokens, v_hat, lambda2, gain, joint, eps
        return checkpoint(plain_per_patch_differential, *arguments, use_reentrant=False, preserve_rng_state=False)
    return PerPatchDifferential.apply(q, tokens, v_hat, lambda2, gain, joint, eps)


def plain_per_patch_differential(
    q: Tensor, tokens: Tensor, v_hat: Tensor, lambda2: Tensor | None, gain: Tensor | None, joint: bool, eps: float
) -> Tensor:
    """Compute `per_patch_differential` with plain operations; autograd saves the scores."""
    scaled, values = tokens * q.shape[-1] ** -0.5, v_hat.to(q.dtype)
    return stage2_attention(q, scaled, values, lambda2, gain, joint, eps).to(q.dtype)


def stage2_attention(
    q: Tensor, scaled: Tensor, values: Tensor, lambda2: Tensor | None, gain: Tensor | None, joint: bool, eps: float
) -> Tensor:
    """Compute Stage II for these queries, at least in float32; `scaled` is the tokens times `D ** -0.5`."""
    acc_dtype = torch.promote_types(q.dtype, torch.float32)
    a = probabilities(q, scaled, 1 if lambda2 is None else 2, joint, acc_dtype)  # (B, M, N, S, n)
    out = (weights_of(a, lambda2).to(q.dtype) @ values).to(acc_dtype)  # (B, M, N, D)
    return norm_of_stage(out, gain, eps)


def probabilities(q: Tensor, tokens: Tensor, streams: int, joint: bool, dtype: torch.dtype) -> Tensor:
    """Compute the softmaxes over the (scaled) contrast tokens, `(B, M, N, S, n)`; one product for both streams."""
    scores = (q @ tokens.transpose(2, 3)).to(dtype)  # (B, M, N, S n)
    if joint:
        return scores.softmax(-1).unflatten(-1, (streams, -1))
    return scores.unflatten(-1, (streams, -1)).softmax(-1)


def weights_of(a: Tensor, lambda2: Tensor | None) -> Tensor:
    """Compute `a+ - l2 a-`, or `a+` in a plain stage: `(B, M, N, S, n)` to `(B, M, N, n)`."""
    return a.squeeze(-2) if lambda2 is None else difference(a[..., 0, :], a[..., 1, :], lambda2)


# Scores per chunk: 1 MB in float32 fits a core's cache; on a GPU 0.5 GB only bounds memory.
CPU_CHUNK, GPU_CHUNK = 2**18, 2**27


def chunks(q: Tensor, scores: int) -> Iterator[tuple[slice, slice]]:
    """Yield chunks `q[images, :, rows]`, given the number of `scores` per token and head."""
    batch, heads, tokens, _ = q.shape
    size = CPU_CHUNK if q.device.type == "cpu" else GPU_CHUNK
    images = max(1, min(batch, size // (heads * tokens * scores)))
    rows = max(1, min(tokens, size // (heads * scores))) if images == 1 else tokens
    for image in range(0, batch, images):
        for row in range(0, tokens, rows):
            yield slice(image, image + images), slice(row, row + rows)


def lambda_of(lambda2: Tensor | None, images: slice, rows: slice) -> Tensor | None:
    """Return the lambdas of a chunk, or the scalar of all chunks."""
    return lambda2 if lambda2 is None or lambda2.ndim == 0 else lambda2[images, :, rows]


def norm_backward(x: Tensor, gain: Tensor, grad: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x `(B, M, N, D)` and of the gain `(D,)` of an RMSNorm."""
    # y = gain x / r, with r = sqrt(mean(x^2) + eps).
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()  # 1 / r, (B, M, N, 1)
    unit = x * rstd
    grad_gain = (grad * unit).sum((0, 1, 2))
    grad = grad * gain
    return (grad - unit * (grad * unit).mean(-1, keepdim=True)) * rstd, grad_gain


class PerPatchDifferential(torch.autograd.Function):
    """Stage II with an explicit backward; it saves its inputs only."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        tokens: Tensor,
        v_hat: Tensor,
        lambda2: Tensor | None,
        gain: Tensor | None,
        joint: bool,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(q, tokens, v_hat, lambda2, gain)
        ctx.joint, ctx.eps = joint, eps
        scaled, values, out = tokens * q.shape[-1] ** -0.5, v_hat.to(q.dtype), like_tokens(q)
        for images, rows in chunks(q, tokens.shape[2]):
            chunk = q[images, :, rows], scaled[images], values[images]
            out[images, :, rows] = stage2_attention(*chunk, lambda_of(lambda2, images, rows), gain, joint, eps)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():  # create_graph=True
            return differentiable_gradients(ctx, grad_out)
        q, tokens, v_hat, lambda2, gain = ctx.saved_tensors
        streams, scale = 1 if lambda2 is None else 2, q.shape[-1] ** -0.5
        dtype, acc_dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
        scaled, values = tokens * scale, v_hat.to(dtype)
        grad_q, grad_v_hat = like_tokens(q), torch.zeros_like(v_hat)
        grad_tokens = torch.zeros_like(tokens, dtype=acc_dtype)
        grad_gain: Any = None if gain is None else torch.zeros_like(gain)
        grad_lambda2: Any = None if lambda2 is None else torch.zeros_like(lambda2)

        for images, rows in chunks(q, tokens.shape[2]):
            # Recompute the forward: softmaxes, weights and, if there is a norm, its input.
            weight: Any = lambda_of(lambda2, images, rows)
            a = probabilities(q[images, :, rows], scaled[images], streams, ctx.joint, acc_dtype)  # (B, M, N, S, n)
            weights = weights_of(a, weight).to(dtype)  # (B, M, N, n)
            grad = grad_out[images, :, rows]  # (B, M, N, D)
            if gain is not None:
                out = (weights @ values[images]).to(acc_dtype)  # (B, M, N, D)
                grad, part = norm_backward(out, gain, grad.to(acc_dtype), ctx.eps)
                grad_gain += part
            grad = grad.to(dtype)

            # The product with v^, and the difference.
            grad_v_hat[images] += weights.transpose(2, 3) @ grad
            grad_weights = (grad @ values[images].transpose(2, 3)).to(acc_dtype)  # (B, M, N, n)
            grad_a = grad_weights.unsqueeze(-2) * a  # (B, M, N, S, n), times a
            if lambda2 is not None:
                if weight.ndim == 0:
                    grad_lambda2 -= grad_a[..., 1, :].sum()
                else:
                    grad_lambda2[images, :, rows] = -grad_a[..., 1, :].sum(-1, keepdim=True)
                grad_a[..., 1, :] *= -weight

            # The softmaxes, and the product of queries and tokens.
            over = (-2, -1) if ctx.joint else (-1,)
            grad_scores = torch.addcmul(grad_a, a, grad_a.sum(over, keepdim=True), value=-1).flatten(-2).to(dtype)
            grad_q[images, :, rows] = grad_scores @ scaled[images]
            grad_tokens[images] += (grad_scores.transpose(2, 3) @ q[images, :, rows]) * scale
        return grad_q, grad_tokens.to(dtype), grad_v_hat, grad_lambda2, grad_gain, None, None


def differentiable_gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the result of `PerPatchDifferential.backward` with autograd, for second derivatives."""
    # Views, because the tokens depend on q: the gradient of q itself would include that of the tokens.
    tensors: list[Any] = [None if x is None else x.view_as(x) for x in ctx.saved_tensors]
    q, tokens, v_hat, lambda2, gain = tensors
    needed = ctx.needs_input_grad[: len(tensors)]
    out = plain_per_patch_differential(q, tokens, v_hat, lambda2, gain, ctx.joint, ctx.eps)
    inputs = [x for x, wanted in zip(tensors, needed, strict=True) if wanted]
    grads = iter(torch.autograd.grad(out, inputs, grad_out, create_graph=True))
    return (*(next(grads) if wanted else None for wanted in needed), None, None)


def like_tokens(q: Tensor) -> Tensor:
    """Return an empty `(B, M, N, D)` with the heads of a token contiguous, the layout of the projections."""
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
