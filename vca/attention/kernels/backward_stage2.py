"""Backward kernels of Stage II of VCA, the last of which is the backward of the average pooling.

    stage2_bwd_kernel_preprocess   gradient before the norm, lse and delta of each token, dlambda2, dnorm2
    stage2_bwd_kernel              gradients of q, v^ and the contrast tokens
    avg_pool_bwd_kernel            after the backward of Stage I: adds the gradient through the pooled queries to dq

The first two recompute what they need of their tokens. With the probabilities A+-, G = dW and `S = q t^T / sqrt D`:

    dS+ = A+ (G - delta+),   dS- = -l A- (G - delta-),   delta+- = sum(A+- G) over the axis of the softmax

There are no atomics: partial sums of the programs are stored and added in a fixed order, so results are deterministic.

Shape letters: B batch, M heads, N = P + H W tokens, D head dim, n = h w contrast tokens, S streams of the tokens.
"""

import triton
import triton.language as tl

from vca.attention.kernels.forward import load_v_hat, scores_of, stage2_values, stream_scores
from vca.attention.kernels.tiles import (
    dot_acc,
    dot_nt,
    load_rows,
    load_tile,
    load_weight,
    rms_norm_bwd,
    store_rows,
    store_tile,
    store_weight,
)


@triton.jit
def stage2_bwd_kernel_preprocess(
    q,  # (B, M, N, D)
    tokens,  # (B, M, S, n, D)
    v_diff,  # (B, M, n, D)
    lambda2,
    norm1,
    norm2,
    do,  # (B, M, N, D), gradient of the output
    do_raw,  # (B, M, N, D), result: gradient of A v^, before the norm
    lse,  # (B, M, 2, N) float32
    delta,  # (B, M, 2, N) float32
    dnorm2,  # (blocks of N, B, M, D) float32, partial sums
    dlambda2,  # (blocks of N, B, M) float32, partial sums
    stride_b,
    stride_m,
    stride_n,
    do_stride_b,
    do_stride_m,
    do_stride_n,
    raw_stride_b,
    raw_stride_m,
    raw_stride_n,
    heads,
    num_tokens,
    n,
    scale,
    gain,
    eps,
    STREAMS: tl.constexpr,
    CONTRAST: tl.constexpr,
    JOINT: tl.constexpr,
    NUM_BLOCKS_C: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient before the norm, lse and delta of each token; partial sums of dlambda2 and dnorm2.

    With a single block of contrast tokens the compiler merges the three computations of the scores.
    """
    i_bh = tl.program_id(0)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_tokens
    tokens += (i_bh * STREAMS).to(tl.int64) * n * D
    v_diff += i_bh.to(tl.int64) * n * D
    minus_lam = 0.0
    if CONTRAST:
        minus_lam = -tl.load(lambda2)
    x, x_rest = load_rows(q + i_b * stride_b + i_h * stride_m, offs_n, stride_n, mask_n, D, D_MAIN, D_REST)
    g, g_rest = load_rows(
        do + i_b * do_stride_b + i_h * do_stride_m, offs_n, do_stride_n, mask_n, D, D_MAIN, D_REST
    )  # fmt: skip
    acc, acc_rest, lse_pos, lse_neg = stage2_values(
        tokens, v_diff, norm1, minus_lam, x, x_rest, n, scale, gain, eps, False,
        CONTRAST, JOINT, NUM_BLOCKS_C, D, D_MAIN, D_REST, BLOCK_C, BLOCK_N, PRECISION,
    )  # fmt: skip
    weight, weight_rest = load_weight(norm2, gain, D, D_MAIN, D_REST)
    g, g_rest, dweight, dweight_rest = rms_norm_bwd(
        acc, acc_rest, g.to(tl.float32), g_rest.to(tl.float32), weight, weight_rest, eps, D, D_REST
    )
    g, g_rest = g.to(x.dtype), g_rest.to(x.dtype)
    delta_pos = tl.zeros((BLOCK_N,), tl.float32)
    sum_neg, delta_neg = delta_pos, delta_pos
    for block in range(NUM_BLOCKS_C):
        v_hat, v_hat_rest = load_v_hat(v_diff, norm1, block, n, gain, eps, D, D_MAIN, D_REST, BLOCK_C)
        dweights = dot_nt(g, g_rest, v_hat, v_hat_rest, D_REST, PRECISION)
        scores = stream_scores(tokens, 0, block, x, x_rest, n, scale, D, D_MAIN, D_REST, BLOCK_C, PRECISION)
        delta_pos += tl.sum(tl.exp2(scores - lse_pos[:, None]) * dweights, axis=1)
        if CONTRAST:
            scores = stream_scores(tokens, 1, block, x, x_rest, n, scale, D, D_MAIN, D_REST, BLOCK_C, PRECISION)
            sum_neg += tl.sum(tl.exp2(scores - lse_neg[:, None]) * dweights, axis=1)
    if CONTRAST:
        delta_neg = minus_lam * sum_neg
        if JOINT:
            delta_pos += delta_neg
            delta_neg = delta_pos

    store_rows(
        do_raw + i_b * raw_stride_b + i_h * raw_stride_m, offs_n, raw_stride_n, mask_n, g, g_rest, D, D_MAIN, D_REST
    )
    lse += i_bh * 2 * num_tokens + offs_n
    delta += i_bh * 2 * num_tokens + offs_n
    tl.store(lse, lse_pos, mask=mask_n)
    tl.store(delta, delta_pos, mask=mask_n)
    partial = tl.program_id(1) * tl.num_programs(0) + i_bh
    store_weight(
        dnorm2 + partial * D, gain * tl.sum(dweight, axis=0), gain * tl.sum(dweight_rest, axis=0), D, D_MAIN, D_REST
    )
    if CONTRAST:
        tl.store(lse + num_tokens, lse_neg, mask=mask_n)
        tl.store(delta + num_tokens, delta_neg, mask=mask_n)
        tl.store(dlambda2 + partial, -tl.sum(sum_neg, axis=0))


@triton.jit
def stage2_bwd_kernel(
    q,  # (B, M, N, D)
    tokens,  # (B, M, S, n, D)
    v_diff,  # (B, M, n, D)
    lambda2,
    norm1,
    do_raw,  # (B, M, N, D), gradient of A v^, before the norm
    lse,  # (B, M, 2, N) float32
    delta,
    dq,  # (blocks of n, B, M, N, D)
    dv_hat,  # (splits, B, M, n, D)
    dtokens,  # (splits, B, M, S, n, D)
    stride_b,
    stride_m,
    stride_n,
    raw_stride_b,
    raw_stride_m,
    raw_stride_n,
    dq_stride_block,
    dq_stride_b,
    dq_stride_m,
    dq_stride_n,
    heads,
    num_tokens,
    n,
    split_size,
    scale,
    gain,
    eps,
    STREAMS: tl.constexpr,
    CONTRAST: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Backward of Stage II for a block of contrast tokens and a split of the tokens."""
    i_bh, i_block, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    q += i_b * stride_b + i_h * stride_m
    do_raw += i_b * raw_stride_b + i_h * raw_stride_m
    dq += i_block.to(tl.int64) * dq_stride_block + i_b * dq_stride_b + i_h * dq_stride_m
    lse += i_bh * 2 * num_tokens
    delta += i_bh * 2 * num_tokens
    tokens += (i_bh * STREAMS).to(tl.int64) * n * D
    v_diff += i_bh.to(tl.int64) * n * D
    offs_c = i_block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n
    LN2: tl.constexpr = 0.6931471805599453
    grad_scale = scale * LN2

    t_pos, t_pos_rest = load_rows(tokens, offs_c, D, mask_c, D, D_MAIN, D_REST)
    t_neg, t_neg_rest = t_pos, t_pos_rest
    minus_lam = 0.0
    if CONTRAST:
        t_neg, t_neg_rest = load_rows(tokens + n * D, offs_c, D, mask_c, D, D_MAIN, D_REST)
        minus_lam = -tl.load(lambda2)
    v_hat, v_hat_rest = load_v_hat(v_diff, norm1, i_block, n, gain, eps, D, D_MAIN, D_REST, BLOCK_C)

    dt_pos = tl.zeros((BLOCK_C, D_MAIN), tl.float32)
    dt_pos_rest = dt_pos
    if D_REST:
        dt_pos_rest = tl.zeros((BLOCK_C, D_REST), tl.float32)
    dt_neg, dt_neg_rest = dt_pos, dt_pos_rest
    dv, dv_rest = dt_pos, dt_pos_rest
    start = i_split * split_size
    for start_n in range(start, tl.minimum(start + split_size, num_tokens), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < num_tokens
        x, x_rest = load_rows(q, offs_n, stride_n, mask_n, D, D_MAIN, D_REST)
        g, g_rest = load_rows(do_raw, offs_n, raw_stride_n, mask_n, D, D_MAIN, D_REST)
        dweights = dot_nt(g, g_rest, v_hat, v_hat_rest, D_REST, PRECISION)  # (BLOCK_N, BLOCK_C)
        scores = scores_of(x, x_rest, t_pos, t_pos_rest, offs_c, n, scale, D_REST, PRECISION)
        weights = tl.exp2(scores - tl.load(lse + offs_n, mask=mask_n, other=0.0)[:, None])
        delta_pos = tl.load(delta + offs_n, mask=mask_n, other=0.0)[:, None]
        dscores = (weights * (dweights - delta_pos)).to(x.dtype)
        dx = tl.zeros((BLOCK_N, D_MAIN), tl.float32)
        dx_rest = dx
        if D_REST:
            dx_rest = tl.zeros((BLOCK_N, D_REST), tl.float32)
        dx, dx_rest = dot_acc(dscores, t_pos, t_pos_rest, dx, dx_rest, D_REST, PRECISION)
        dt_pos, dt_pos_rest = dot_acc(tl.trans(dscores), x, x_rest, dt_pos, dt_pos_rest, D_REST, PRECISION)
        if CONTRAST:
            scores = scores_of(x, x_rest, t_neg, t_neg_rest, offs_c, n, scale, D_REST, PRECISION)
            a_neg = tl.exp2(scores - tl.load(lse + num_tokens + offs_n, mask=mask_n, other=0.0)[:, None])
            delta_neg = tl.load(delta + num_tokens + offs_n, mask=mask_n, other=0.0)[:, None]
            dscores = (a_neg * (minus_lam * dweights - delta_neg)).to(x.dtype)
            weights += minus_lam * a_neg
            dx, dx_rest = dot_acc(dscores, t_neg, t_neg_rest, dx, dx_rest, D_REST, PRECISION)
            dt_neg, dt_neg_rest = dot_acc(tl.trans(dscores), x, x_rest, dt_neg, dt_neg_rest, D_REST, PRECISION)
        dv, dv_rest = dot_acc(tl.trans(weights.to(x.dtype)), g, g_rest, dv, dv_rest, D_REST, PRECISION)
        store_rows(
            dq, offs_n, dq_stride_n, mask_n, dx * grad_scale, dx_rest * grad_scale, D, D_MAIN, D_REST
        )  # fmt: skip

    partial = i_split * tl.num_programs(0) + i_bh
    dtokens += partial.to(tl.int64) * STREAMS * n * D
    store_rows(dtokens, offs_c, D, mask_c, dt_pos * grad_scale, dt_pos_rest * grad_scale, D, D_MAIN, D_REST)
    if STREAMS == 2:
        store_rows(dtokens + n * D, offs_c, D, mask_c, dt_neg * grad_scale, dt_neg_rest * grad_scale, D, D_MAIN, D_REST)
    store_rows(dv_hat + partial.to(tl.int64) * n * D, offs_c, D, mask_c, dv, dv_rest, D, D_MAIN, D_REST)


@triton.jit
def avg_pool_bwd_kernel(
    dtokens,  # (B, M, S, n, D), of both stages
    dq,  # (B, M, N, D), changed in place
    stride_b,
    stride_m,
    stride_n,
    heads,
    num_tokens,
    n,
    prefix,
    height,
    width,
    contrast_h,
    contrast_w,
    MAX_ROWS: tl.constexpr,  # maximum number of cells that contain a row of the grid
    MAX_COLUMNS: tl.constexpr,
    POOL_POS: tl.constexpr,
    POOL_NEG: tl.constexpr,
    STREAMS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Backward of the average pooling: add the gradients of the cells that contain a position of the grid to dq."""
    i_bh = tl.program_id(0)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    offs_n = prefix + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = offs_n < num_tokens
    dq += i_b * stride_b + i_h * stride_m
    dtokens += (i_bh * STREAMS).to(tl.int64) * n * D
    acc = load_tile(dq, offs_n, stride_n, valid, 0, BLOCK_D, D).to(tl.float32)
    y, x = (offs_n - prefix) // width, (offs_n - prefix) % width
    for i_row in tl.static_range(MAX_ROWS):
        cell_row = y * contrast_h // height + i_row
        top, bottom = cell_row * height // contrast_h, ((cell_row + 1) * height + contrast_h - 1) // contrast_h
        for i_column in tl.static_range(MAX_COLUMNS):
            cell_column = x * contrast_w // width + i_column
            left, right = cell_column * width // contrast_w, ((cell_column + 1) * width + contrast_w - 1) // contrast_w
            inside = valid & (cell_row < contrast_h) & (top <= y) & (cell_column < contrast_w) & (left <= x)
            share = (inside.to(tl.float32) / ((bottom - top) * (right - left)))[:, None]
            cell = cell_row * contrast_w + cell_column
            if POOL_POS:
                acc += share * load_tile(dtokens, cell, D, inside, 0, BLOCK_D, D)
            if POOL_NEG:
                acc += share * load_tile(dtokens + n * D, cell, D, inside, 0, BLOCK_D, D)
    store_tile(dq, offs_n, stride_n, valid, acc, 0, BLOCK_D, D)
