"""Backward kernels of Stage I of VCA: preprocessing per contrast token, then the gradients of k, v and the tokens.

Scores and weights are recomputed from k, v and lse. With the probabilities A+-, G = dW and the scores
`S = t k^T / sqrt D` of each stream:

    dS+ = A+ (G - delta+),   dS- = -l A- (G - delta-),   delta+- = sum(A+- G) over the axis of the softmax

There are no atomics: partial sums of the programs are stored and added in a fixed order, so results are deterministic.

Shape letters: B batch, M heads, N = P + H W tokens, D head dim, n = h w contrast tokens, S streams of the tokens.
"""

import triton
import triton.language as tl

from vca.attention.kernels.tiles import (
    dot_acc,
    dot_nt,
    load_rows,
    load_weight,
    rms_norm_bwd,
    row_dot,
    store_rows,
    store_weight,
)


@triton.jit
def stage1_bwd_kernel_preprocess(
    v_diff,  # (B, M, n, D), v+ - l1 v-
    v_neg,  # (B, M, n, D)
    lambda1,
    norm1,
    dv_hat,  # (splits, B, M, n, D)
    dv_diff,  # (B, M, n, D), result
    delta,  # (B, M, streams, n) float32
    dnorm1,  # (blocks of n, B, M, D) float32, partial sums
    dlambda1,  # (blocks of n, B, M) float32, partial sums
    n,
    num_splits,
    gain,
    eps,
    CONTRAST: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Backward preprocessing of Stage I: gradient before the norm and delta of each contrast token."""
    i_bh = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n
    offset = i_bh.to(tl.int64) * n * D
    g = tl.zeros((BLOCK_C, D_MAIN), tl.float32)
    g_rest = g
    if D_REST:
        g_rest = tl.zeros((BLOCK_C, D_REST), tl.float32)
    for split in range(0, num_splits):
        dv_hat_split = dv_hat + (split * tl.num_programs(0) + i_bh).to(tl.int64) * n * D
        part, part_rest = load_rows(dv_hat_split, offs_c, D, mask_c, D, D_MAIN, D_REST)
        g += part
        if D_REST:
            g_rest += part_rest

    x, x_rest = load_rows(v_diff + offset, offs_c, D, mask_c, D, D_MAIN, D_REST)
    x, x_rest = x.to(tl.float32), x_rest.to(tl.float32)
    weight, weight_rest = load_weight(norm1, gain, D, D_MAIN, D_REST)
    g, g_rest, dweight, dweight_rest = rms_norm_bwd(x, x_rest, g, g_rest, weight, weight_rest, eps, D, D_REST)
    store_rows(dv_diff + offset, offs_c, D, mask_c, g, g_rest, D, D_MAIN, D_REST)
    partial = tl.program_id(1) * tl.num_programs(0) + i_bh
    store_weight(
        dnorm1 + partial * D, gain * tl.sum(dweight, axis=0), gain * tl.sum(dweight_rest, axis=0), D, D_MAIN, D_REST
    )

    delta += i_bh * (1 + CONTRAST) * n + offs_c
    delta_pos = row_dot(g, g_rest, x, x_rest, D_REST)
    if CONTRAST:  # v+ is x + l1 v-
        neg, neg_rest = load_rows(v_neg + offset, offs_c, D, mask_c, D, D_MAIN, D_REST)
        delta_of_neg = row_dot(g, g_rest, neg.to(tl.float32), neg_rest.to(tl.float32), D_REST)
        lam = tl.load(lambda1)
        delta_pos += lam * delta_of_neg
        tl.store(delta + n, -lam * delta_of_neg, mask=mask_c)
        tl.store(dlambda1 + partial, -tl.sum(delta_of_neg, axis=0))
    tl.store(delta, delta_pos, mask=mask_c)


@triton.jit
def stream_bwd(
    t, t_rest, x, x_rest, g, mask, lse, delta, weight, scale,
    dx, dx_rest, dt, dt_rest, D_REST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward of one stream: returns `weight A` and the accumulated dx and dt."""
    scores = dot_nt(t, t_rest, x, x_rest, D_REST, PRECISION) * scale  # (BLOCK_C, BLOCK_N), base 2
    a = tl.where(mask, tl.exp2(scores - lse), 0.0)
    dscores = (a * (weight * g - delta)).to(x.dtype)
    dx, dx_rest = dot_acc(tl.trans(dscores), t, t_rest, dx, dx_rest, D_REST, PRECISION)
    dt, dt_rest = dot_acc(dscores, x, x_rest, dt, dt_rest, D_REST, PRECISION)
    return weight * a, dx, dx_rest, dt, dt_rest


@triton.jit
def stage1_bwd_kernel(
    tokens,  # (B, M, S, n, D)
    k,  # (B, M, N, D), with the strides of v
    v,
    dv_diff,  # (B, M, n, D)
    lambda1,
    lse,  # (B, M, streams, n)
    delta,  # shape of lse
    dtokens_stage2,  # (B, M, S, n, D), added to dtokens
    dk,  # (blocks of n, B, M, N, D)
    dv,  # shape and strides of dk
    dtokens,  # (splits, B, M, S, n, D)
    stride_b,
    stride_m,
    stride_n,
    dk_stride_block,
    dk_stride_b,
    dk_stride_m,
    dk_stride_n,
    heads,
    num_tokens,
    n,
    split_size,
    scale,
    STREAMS: tl.constexpr,
    CONTRAST: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Backward of Stage I for a block of contrast tokens and a split of the tokens."""
    i_bh, i_block, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    k += i_b * stride_b + i_h * stride_m
    v += i_b * stride_b + i_h * stride_m
    dk_offset = i_block.to(tl.int64) * dk_stride_block + i_b * dk_stride_b + i_h * dk_stride_m
    offs_c = i_block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n
    offset = i_bh.to(tl.int64) * n * D
    neg_offset = n * D  # offset from the positive to the negative stream
    tokens += offset * STREAMS
    LN2: tl.constexpr = 0.6931471805599453

    t_pos, t_pos_rest = load_rows(tokens, offs_c, D, mask_c, D, D_MAIN, D_REST)
    t_neg, t_neg_rest = t_pos, t_pos_rest
    minus_lam = 0.0
    if CONTRAST:
        t_neg, t_neg_rest = load_rows(tokens + neg_offset, offs_c, D, mask_c, D, D_MAIN, D_REST)
        minus_lam = -tl.load(lambda1)
    g_values, g_values_rest = load_rows(dv_diff + offset, offs_c, D, mask_c, D, D_MAIN, D_REST)
    lse += i_bh * (1 + CONTRAST) * n + offs_c
    delta += i_bh * (1 + CONTRAST) * n + offs_c
    lse_pos, delta_pos = (
        tl.load(lse, mask=mask_c, other=0.0)[:, None],
        tl.load(delta, mask=mask_c, other=0.0)[:, None],
    )
    lse_neg, delta_neg = lse_pos, delta_pos
    if CONTRAST:
        lse_neg = tl.load(lse + n, mask=mask_c, other=0.0)[:, None]
        delta_neg = tl.load(delta + n, mask=mask_c, other=0.0)[:, None]

    dt_pos = tl.zeros((BLOCK_C, D_MAIN), tl.float32)
    dt_pos_rest = dt_pos
    if D_REST:
        dt_pos_rest = tl.zeros((BLOCK_C, D_REST), tl.float32)
    dt_neg, dt_neg_rest = dt_pos, dt_pos_rest

    start = i_split * split_size
    for start_n in range(start, tl.minimum(start + split_size, num_tokens), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < num_tokens
        k_tile, k_rest = load_rows(k, offs_n, stride_n, mask_n, D, D_MAIN, D_REST)
        v_tile, v_rest = load_rows(v, offs_n, stride_n, mask_n, D, D_MAIN, D_REST)
        mask = mask_c[:, None] & mask_n[None, :]
        g = dot_nt(g_values, g_values_rest, v_tile, v_rest, D_REST, PRECISION)  # dW, (BLOCK_C, BLOCK_N)

        dk_tile = tl.zeros((BLOCK_N, D_MAIN), tl.float32)
        dk_rest = dk_tile
        if D_REST:
            dk_rest = tl.zeros((BLOCK_N, D_REST), tl.float32)
        weights, dk_tile, dk_rest, dt_pos, dt_pos_rest = stream_bwd(
            t_pos, t_pos_rest, k_tile, k_rest, g, mask, lse_pos, delta_pos, 1.0, scale,
            dk_tile, dk_rest, dt_pos, dt_pos_rest, D_REST, PRECISION,
        )  # fmt: skip
        if CONTRAST:
            neg_weights, dk_tile, dk_rest, dt_neg, dt_neg_rest = stream_bwd(
                t_neg, t_neg_rest, k_tile, k_rest, g, mask, lse_neg, delta_neg, minus_lam, scale,
                dk_tile, dk_rest, dt_neg, dt_neg_rest, D_REST, PRECISION,
            )  # fmt: skip
            weights += neg_weights
        grad_scale = scale * LN2
        store_rows(
            dk + dk_offset, offs_n, dk_stride_n, mask_n,
            dk_tile * grad_scale, dk_rest * grad_scale, D, D_MAIN, D_REST,
        )  # fmt: skip
        dv_tile = tl.zeros((BLOCK_N, D_MAIN), tl.float32)
        dv_rest = dv_tile
        if D_REST:
            dv_rest = tl.zeros((BLOCK_N, D_REST), tl.float32)
        dv_tile, dv_rest = dot_acc(tl.trans(weights), g_values, g_values_rest, dv_tile, dv_rest, D_REST, PRECISION)
        store_rows(dv + dk_offset, offs_n, dk_stride_n, mask_n, dv_tile, dv_rest, D, D_MAIN, D_REST)

    partial = (i_split * tl.num_programs(0) + i_bh).to(tl.int64) * n * D
    grad_scale = scale * LN2
    dt_pos, dt_neg = dt_pos * grad_scale, dt_neg * grad_scale
    dt_pos_rest, dt_neg_rest = dt_pos_rest * grad_scale, dt_neg_rest * grad_scale
    if i_split == 0:
        dtokens_stage2 += offset * STREAMS
        part, part_rest = load_rows(dtokens_stage2, offs_c, D, mask_c, D, D_MAIN, D_REST)
        dt_pos, dt_pos_rest = dt_pos + part, dt_pos_rest + part_rest
        if STREAMS == 2:
            part, part_rest = load_rows(dtokens_stage2 + neg_offset, offs_c, D, mask_c, D, D_MAIN, D_REST)
            dt_neg, dt_neg_rest = dt_neg + part, dt_neg_rest + part_rest
    dtokens += partial * STREAMS
    store_rows(dtokens, offs_c, D, mask_c, dt_pos, dt_pos_rest, D, D_MAIN, D_REST)
    if STREAMS == 2:
        store_rows(dtokens + neg_offset, offs_c, D, mask_c, dt_neg, dt_neg_rest, D, D_MAIN, D_REST)
