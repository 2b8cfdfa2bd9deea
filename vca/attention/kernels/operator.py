"""The fused core as an operator of PyTorch, `torch.ops.vca.contrast_attention`, with its backward.

It is known to autograd, `torch.compile`, `torch.export`, DDP and checkpointing as any other. For its backward it keeps
q, k, v, and of each contrast token `v+ - l1 v-`, `v-` and two log-sum-exps; the rest is made again.

Shape letters: B batch, M heads, N = P + H W tokens, D head dim, n = h w contrast tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vca.attention.kernels.launch import Call

TENSORS = 10  # the first arguments, which have gradients


@torch.library.custom_op("vca::contrast_attention", mutates_args=())
def contrast_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t: Tensor | None,
    e_pos: Tensor | None,
    e_neg: Tensor | None,
    lambda1: Tensor | None,
    lambda2: Tensor | None,
    norm1: Tensor,
    norm2: Tensor,
    lambda_init: float,
    grid: Sequence[int],
    contrast_grid: Sequence[int],
    num_prefix_tokens: int,
    eps: float,
    pooled: Sequence[bool],
    joint: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The attention of VCA before the local branch, in fused kernels.

    Args:
        q, k, v: `(B, M, N, D)`, of one type: float32, float16 or bfloat16.
        t: `(B, M, n, D)`, pooled queries; None where they are the average, which is then taken here.
        e_pos, e_neg: `(M, n, D)` float32, or None where a stream has no embedding.
        lambda1, lambda2: float32 scalars; None makes the stage plain.
        norm1, norm2: `(D,)` float32, weights of the norms.
        lambda_init, grid, contrast_grid, num_prefix_tokens, eps: as `visual_contrast_attention` has them.
        pooled: whether the pooled queries are part of the positive and of the negative stream.
        joint: one softmax over both streams in Stage II.

    Returns:
        The output `(B, M, N, D)` and, for the backward, `v+ - l1 v-` and `v-` `(B, M, n, D)`, the latter empty where
        Stage I is plain, and Stage I's log-sum-exps `(B, M, streams, n)` in base 2.
    """
    call = Call(q, lambda1, lambda2, lambda_init, grid, contrast_grid, num_prefix_tokens, eps, pooled, joint)
    q, k, v, t = readable(q, k, v, t)
    e_pos, e_neg = (e if e is None else e.contiguous() for e in (e_pos, e_neg))
    norm1, norm2 = norm1.contiguous(), norm2.contiguous()
    out, contrast, v_neg, lse = call.empty_results(q)
    with torch.cuda.device_of(q):
        tokens = call.contrast_tokens(q, t, e_pos, e_neg)
        call.stage1(tokens, k, v, contrast, v_neg, lse)
        call.stage2(q, tokens, contrast, norm1, norm2, out)
    return out, contrast, v_neg, lse


@torch.library.custom_op("vca::contrast_attention_backward", mutates_args=())
def contrast_attention_backward(
    grad: Tensor,
    contrast: Tensor,
    v_neg: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t: Tensor | None,
    e_pos: Tensor | None,
    e_neg: Tensor | None,
    lambda1: Tensor | None,
    lambda2: Tensor | None,
    norm1: Tensor,
    norm2: Tensor,
    lambda_init: float,
    grid: Sequence[int],
    contrast_grid: Sequence[int],
    num_prefix_tokens: int,
    eps: float,
    pooled: Sequence[bool],
    joint: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the ten tensors of `contrast_attention`, in their order; those of what was None are empty."""
    call = Call(q, lambda1, lambda2, lambda_init, grid, contrast_grid, num_prefix_tokens, eps, pooled, joint)
    q, k, v, t = readable(q, k, v, t)
    e_pos, e_neg = (e if e is None else e.contiguous() for e in (e_pos, e_neg))
    norm1, norm2 = norm1.contiguous(), norm2.contiguous()
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    none = q.new_empty(0)
    with torch.cuda.device_of(q):
        tokens = call.contrast_tokens(q, t, e_pos, e_neg)
        grad_read, lse2, delta2, grad_lambda2, grad_norm2 = call.stage2_rows(q, tokens, contrast, norm1, norm2, grad)
        grad_q, grad_v_hat, found = call.stage_backward(2, tokens, q, grad_read, contrast, norm1, lse2, delta2)
        grad_seen, delta1, grad_lambda1, grad_norm1 = call.stage1_rows(contrast, v_neg, norm1, grad_v_hat)
        grad_k, grad_v, grad_tokens = call.stage_backward(1, tokens, k, v, grad_seen, norm1, lse, delta1, found)
        if t is None and any(pooled):
            call.unpool(grad_tokens, grad_q)

    streams = grad_tokens.unbind(2)  # of (B, M, n, D)
    grad_t = none
    if t is not None:
        grad_t = torch.stack([grad for grad, used in zip(streams, pooled, strict=False) if used]).sum(0).to(t.dtype)
    return (
        grad_q,
        grad_k,
        grad_v,
        grad_t,
        none.clone() if e_pos is None else streams[0].sum(0, dtype=torch.float32),
        none.clone() if e_neg is None else streams[-1].sum(0, dtype=torch.float32),
        none.clone() if lambda1 is None else grad_lambda1,
        none.clone() if lambda2 is None else grad_lambda2,
        grad_norm1,
        grad_norm2,
    )


def readable(q: Tensor, k: Tensor, v: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As the kernels read them: the channels of a head next to each other, v in memory as k is."""
    q = q if q.stride(-1) == 1 else q.contiguous()
    t = t if t is None or t.stride(-1) == 1 else t.contiguous()
    if k.stride(-1) == 1 and k.stride() == v.stride():
        return q, k, v, t
    return q, k.contiguous(), v.contiguous(), t


@contrast_attention.register_fake
def fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Shapes and strides of the results."""
    q, lambda1, lambda2 = arguments[0], arguments[6], arguments[7]
    return Call(q, lambda1, lambda2, *arguments[TENSORS:]).empty_results(q)


@contrast_attention_backward.register_fake
def fake_backward(grad: Tensor, contrast: Tensor, v_neg: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Shapes and strides of the gradients."""
    (q, k, v), lambda1, lambda2 = arguments[:3], arguments[6], arguments[7]
    call = Call(q, lambda1, lambda2, *arguments[TENSORS:])
    of_tokens = tuple(call.empty_tokens(x) for x in (q, k, v))
    return of_tokens + tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in arguments[3:TENSORS])


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the tensors of the call, and what Stage I has found."""
    ctx.save_for_backward(*output[1:], *inputs[:TENSORS])
    ctx.options = inputs[TENSORS:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def differentiate(ctx: Any, grad: Tensor | None, *rest: None) -> tuple[Tensor | None, ...]:
    """Gradients in the order of the arguments."""
    no_gradients = [None] * len(ctx.options)
    if grad is None:
        return (*[None] * TENSORS, *no_gradients)
    tensors = ctx.saved_tensors
    grads = contrast_attention_backward(grad, *tensors, *ctx.options)
    return (*(None if x is None else g for g, x in zip(grads, tensors[3:], strict=True)), *no_gradients)


def differentiate_twice(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Refuse: there is no kernel for it."""
    raise RuntimeError(
        "the kernels of VCA have no second derivative; use attention.backend=eager under sdpa_kernel(SDPBackend.MATH)"
    )


contrast_attention.register_autograd(differentiate, setup_context=setup_context)
contrast_attention_backward.register_autograd(differentiate_twice)


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t: Tensor | None,
    streams: Sequence[tuple[bool, Tensor | None]],
    lambda1: Tensor | None,
    lambda2: Tensor | None,
    norm1: Tensor,
    norm2: Tensor,
    lambda_init: float,
    grid: Sequence[int],
    contrast_grid: Sequence[int],
    num_prefix_tokens: int,
    eps: float,
    joint: bool,
) -> Tensor:
    """The output of `contrast_attention`; `streams` says of each whether it is pooled, and its embedding.

    Under autocast q, k and v are cast as for a product, and the rest stays in float32; the result is as q was.
    """
    dtype = q.dtype
    if torch.is_autocast_enabled(q.device.type):
        half = torch.get_autocast_dtype(q.device.type)
        q, k, v, t = q.to(half), k.to(half), v.to(half), None if t is None else t.to(half)
    pooled, embeddings = [pooled for pooled, _ in streams], [embedding for _, embedding in streams]
    if len(streams) == 1:
        pooled, embeddings = [*pooled, False], [*embeddings, None]
    return contrast_attention(
        q, k, v, t, *embeddings, lambda1, lambda2, norm1, norm2, lambda_init, grid, contrast_grid, num_prefix_tokens, eps,
        pooled, joint,
    )[0].to(dtype)  # fmt: skip
