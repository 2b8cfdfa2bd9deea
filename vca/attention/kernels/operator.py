"""The fused kernels as a PyTorch operator with backward, `torch.ops.vca.contrast_attention`.

It works with autograd, `torch.compile`, `torch.export`, DDP and activation checkpointing. It saves q, k, v and, per
contrast token, `v+ - l1 v-`, `v-` and two log-sum-exps; backward recomputes the rest.

Shape letters: B batch, M heads, N = P + H W tokens, D head dim, n = h w contrast tokens.
"""

from collections.abc import Iterable
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from vca.attention.kernels.launch import KernelInputs, KernelLaunch, KernelOptions

TENSORS = len(KernelInputs._fields)
# The fields of KernelInputs and KernelOptions. An operator takes them one by one.
ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? t, Tensor? e_pos, Tensor? e_neg, Tensor? lambda1, Tensor? lambda2, "
    "Tensor norm1, Tensor norm2, float lambda_init, SymInt[] grid, SymInt[] contrast_grid, SymInt num_prefix_tokens, "
    "float eps, bool[] pooled, bool joint"
)
SCHEMA = f"({ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
SAVED = "Tensor v_diff, Tensor v_neg, Tensor lse"
BACKWARD_SCHEMA = f"(Tensor do, {SAVED}, {ARGUMENTS}) -> ({', '.join(['Tensor'] * TENSORS)})"


def unpack(arguments: tuple[Any, ...]) -> tuple[KernelInputs, KernelOptions]:
    """Return the arguments of the operator as `KernelInputs` and `KernelOptions`."""
    return KernelInputs(*arguments[:TENSORS]), KernelOptions(*arguments[TENSORS:])


def run_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute VCA before the local branch; arguments are the fields of `KernelInputs` and `KernelOptions`.

    Returns:
        The output `(B, M, N, D)` and, for backward, `v+ - l1 v-` and `v-` `(B, M, n, D)` (`v-` is empty if Stage I is
        plain), and the base-2 log-sum-exps of Stage I `(B, M, streams, n)`.
    """
    inputs, options = unpack(arguments)
    launch, x = KernelLaunch(inputs, options), with_kernel_strides(inputs)
    out, v_diff, v_neg, lse = launch.empty_results(x.q)
    with torch.cuda.device_of(x.q):
        tokens = launch.contrast_tokens_fwd(x.q, x.t, x.e_pos, x.e_neg)
        launch.stage1_fwd(tokens, x.k, x.v, v_diff, v_neg, lse)
        launch.stage2_fwd(x.q, tokens, v_diff, x.norm1, x.norm2, out)
    return out, v_diff, v_neg, lse


def run_backward(do: Tensor, v_diff: Tensor, v_neg: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Compute the gradients of the fields of `KernelInputs`, in order; a gradient of None is an empty tensor."""
    inputs, options = unpack(arguments)
    launch, x = KernelLaunch(inputs, options), with_kernel_strides(inputs)
    do = do if do.stride(-1) == 1 else do.contiguous()
    empty = x.q.new_empty(0)
    with torch.cuda.device_of(x.q):
        tokens = launch.contrast_tokens_fwd(x.q, x.t, x.e_pos, x.e_neg)
        do_raw, *rows, dlambda2, dnorm2 = launch.stage2_bwd_preprocess(x.q, tokens, v_diff, x.norm1, x.norm2, do)
        dq, dv_hat, dtokens2 = launch.stage2_bwd(x.q, tokens, v_diff, x.norm1, do_raw, *rows)
        del do_raw, rows  # frees as much memory as dq needs
        dv_diff, delta, dlambda1, dnorm1 = launch.stage1_bwd_preprocess(v_diff, v_neg, x.norm1, dv_hat)
        dk, dv, dtokens = launch.stage1_bwd(tokens, x.k, x.v, dv_diff, lse, delta, dtokens2)
        launch.avg_pool_bwd(dq, dtokens)

    streams = dtokens.unbind(2)  # S x (B, M, n, D)
    dt = empty
    if x.t is not None:
        dt = torch.stack([d for d, pooled in zip(streams, options.pooled, strict=False) if pooled]).sum(0).to(x.t.dtype)
    return (
        dq,
        dk,
        dv,
        dt,
        empty.clone() if x.e_pos is None else streams[0].sum(0, dtype=torch.float32),
        empty.clone() if x.e_neg is None else streams[-1].sum(0, dtype=torch.float32),
        empty.clone() if x.lambda1 is None else dlambda1,
        empty.clone() if x.lambda2 is None else dlambda2,
        dnorm1,
        dnorm2,
    )


def with_kernel_strides(inputs: KernelInputs) -> KernelInputs:
    """Return the inputs with the strides that the kernels expect: contiguous channels, and v with the strides of k."""

    def contiguous_channels(x: Tensor | None) -> Any:
        return x if x is None or x.stride(-1) == 1 else x.contiguous()

    k, v = inputs.k, inputs.v
    if k.stride(-1) != 1 or k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    e_pos, e_neg = (e if e is None else e.contiguous() for e in (inputs.e_pos, inputs.e_neg))
    q, t = contiguous_channels(inputs.q), contiguous_channels(inputs.t)
    norm1, norm2 = inputs.norm1.contiguous(), inputs.norm2.contiguous()
    return KernelInputs(q, k, v, t, e_pos, e_neg, inputs.lambda1, inputs.lambda2, norm1, norm2)


contrast_attention = torch.library.custom_op("vca::contrast_attention", run_forward, mutates_args=(), schema=SCHEMA)
contrast_attention_backward = torch.library.custom_op(
    "vca::contrast_attention_backward", run_backward, mutates_args=(), schema=BACKWARD_SCHEMA
)


@contrast_attention.register_fake
def fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Return empty results with the shapes and strides of the real ones."""
    inputs, options = unpack(arguments)
    return KernelLaunch(inputs, options).empty_results(inputs.q)


@contrast_attention_backward.register_fake
def fake_backward(do: Tensor, v_diff: Tensor, v_neg: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return empty gradients with the shapes and strides of the real ones."""
    inputs, options = unpack(arguments)
    launch = KernelLaunch(inputs, options)
    dqkv = tuple(launch.empty_tokens(x) for x in inputs[:3])
    return dqkv + tuple(inputs.q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs[3:])


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:TENSORS])
    ctx.options = inputs[TENSORS:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, do: Tensor | None, *rest: None) -> tuple[Tensor | None, ...]:
    no_gradients = [None] * len(ctx.options)
    if do is None:
        return (*[None] * TENSORS, *no_gradients)
    tensors = ctx.saved_tensors
    by_operator = torch.is_grad_enabled() or needs_operator((do, *tensors))  # grad is enabled for second derivatives
    compute = contrast_attention_backward if by_operator else run_backward
    grads = compute(do, *tensors, *ctx.options)
    return (*(None if x is None else g for g, x in zip(grads, tensors[3:], strict=True)), *no_gradients)


def double_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        "attention.backend=triton does not support second derivatives; use attention.backend=eager and "
        "sdpa_kernel(SDPBackend.MATH)"
    )


def needs_operator(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether something must see the operator: a compiler, a dispatch mode or a tensor subclass."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    return any(type(x) not in (Tensor, Parameter, NoneType) for x in tensors)


class ContrastAttention(torch.autograd.Function):
    """The operator without the dispatcher, whose handling of the arguments takes longer than the launches."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:  # with `ctx`, because torch is faster then
        results = run_forward(*arguments)
        setup_context(ctx, arguments, results)
        return results

    backward = staticmethod(backward)  # type: ignore[assignment]


contrast_attention.register_autograd(backward, setup_context=setup_context)
contrast_attention_backward.register_autograd(double_backward)


def fused_attention(inputs: KernelInputs, options: KernelOptions) -> Tensor:
    """Compute the output of `contrast_attention`, in the dtype of q.

    Under autocast q, k, v and t are cast as for a matrix product; the other inputs stay in float32.
    """
    dtype, device = inputs.q.dtype, inputs.q.device.type
    if torch.is_autocast_enabled(device):
        names = ("q", "k", "v", "t") if inputs.t is not None else ("q", "k", "v")
        compute_dtype = torch.get_autocast_dtype(device)
        inputs = inputs._replace(**{name: getattr(inputs, name).to(compute_dtype) for name in names})
    compute = contrast_attention if needs_operator(inputs) else ContrastAttention.apply
    return compute(*inputs, *options)[0].to(dtype)
