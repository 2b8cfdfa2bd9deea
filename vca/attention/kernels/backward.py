"""Backward kernels of VCA. `stage_bwd_kernel` is shared by both stages.

Scores and weights are recomputed from q, k, v and lse. With the probabilities A+-, G = dW and the scores
`S = x t^T / sqrt D` of each stream:

    dS+ = A+ (G - delta+),   dS- = -l A- (G - delta-),   delta+- = sum(A+- G) over the axis of the softmax

There are no atomics: partial sums of the programs are stored and added in a fixed order, so results are deterministic.

Shape letters: B batch, M heads, N = P + H W tokens, D head dim, n = h w contrast tokens, S streams of the tokens.
"""

import triton
import triton.language as tl

from vca.attention.kernels.forward import load_v_hat, stage2_lse, stream_scores
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
    delta,  # (B, M, 2, N) float32, sum of A+- dA+- over tokens, with the sign and weight of the stream
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
    """Backward preprocessing of Stage II: gradient before the norm, lse and delta of each token."""
    i_bh = tl.program_id(0)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_tokens
    tokens += (i_bh * STREAMS).to(tl.int64) * n * D
    v_diff += i_bh.to(tl.int64) * n * D
    x, x_rest = load_rows(q + i_b * stride_b + i_h * stride_m, offs_n, stride_n, mask_n, D, D_MAIN, D_REST)
    lse_pos, lse_neg = stage2_lse(
        tokens, x, x_rest, n, scale, CONTRAST, JOINT, NUM_BLOCKS_C, D, D_MAIN, D_REST, BLOCK_C, BLOCK_N, PRECISION
    )

    acc_pos = tl.zeros((BLOCK_N, D_MAIN), tl.float32)  # A+ v^
    acc_pos_rest = acc_pos
    if D_REST:
        acc_pos_rest = tl.zeros((BLOCK_N, D_REST), tl.float32)
    acc_neg, acc_neg_rest = acc_pos, acc_pos_rest
    for block in range(NUM_BLOCKS_C):
        v_hat, v_hat_rest = load_v_hat(v_diff, norm1, block, n, gain, eps, D, D_MAIN, D_REST, BLOCK_C)
        scores = stream_scores(tokens, 0, block, x, x_rest, n, scale, D, D_MAIN, D_REST, BLOCK_C, PRECISION)
        weights = tl.exp2(scores - lse_pos[:, None])
        acc_pos, acc_pos_rest = dot_acc(weights, v_hat, v_hat_rest, acc_pos, acc_pos_rest, D_REST, PRECISION)
        if CONTRAST:
            scores = stream_scores(tokens, 1, block, x, x_rest, n, scale, D, D_MAIN, D_REST, BLOCK_C, PRECISION)
            weights = tl.exp2(scores - lse_neg[:, None])
            acc_neg, acc_neg_rest = dot_acc(weights, v_hat, v_hat_rest, acc_neg, acc_neg_rest, D_REST, PRECISION)
    acc, acc_rest = acc_pos, acc_pos_rest
    if CONTRAST:
        lam = tl.load(lambda2)
        acc, acc_rest = acc_pos - lam * acc_neg, acc_pos_rest - lam * acc_neg_rest

    g, g_rest = load_rows(
        do + i_b * do_stride_b + i_h * do_stride_m, offs_n, do_stride_n, mask_n, D, D_MAIN, D_REST
    )  # fmt: skip
    weight, weight_rest = load_weight(norm2, gain, D, D_MAIN, D_REST)
    g, g_rest, dweight, dweight_rest = rms_norm_bwd(
        acc, acc_rest, g.to(tl.float32), g_rest.to(tl.float32), weight, weight_rest, eps, D, D_REST
    )
    store_rows(
        do_raw + i_b * raw_stride_b + i_h * raw_stride_m, offs_n, raw_stride_n, mask_n, g, g_rest, D, D_MAIN, D_REST
    )
    partial = tl.program_id(1) * tl.num_programs(0) + i_bh
    store_weight(
        dnorm2 + partial * D, gain * tl.sum(dweight, axis=0), gain * tl.sum(dweight_rest, axis=0), D, D_MAIN, D_REST
    )

    delta_pos = row_dot(g, g_rest, acc_pos, acc_pos_rest, D_REST)
    lse += i_bh * 2 * num_tokens + offs_n
    delta += i_bh * 2 * num_tokens + offs_n
    tl.store(lse, lse_pos, mask=mask_n)
    if CONTRAST:
        delta_of_neg = row_dot(g, g_rest, acc_neg, acc_neg_rest, D_REST)
        tl.store(dlambda2 + partial, -tl.sum(tl.where(mask_n, delta_of_neg, 0.0), axis=0))
        delta_neg = -lam * delta_of_neg
        if JOINT:
            delta_pos += delta_neg
            delta_neg = delta_pos
        tl.store(lse + num_tokens, lse_neg, mask=mask_n)
        tl.store(delta + num_tokens, delta_neg, mask=mask_n)
    tl.store(delta, delta_pos, mask=mask_n)


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
def stage_bwd_kernel(
    tokens,  # (B, M, S, n, D)
    x,  # (B, M, N, D): k in Stage I, q in Stage II
    y,  # (B, M, N, D): v in Stage I, do_raw in Stage II
    values,  # (B, M, n, D): dv_diff in Stage I, v_diff in Stage II
    norm1,
    lambda_of_stage,
    lse,  # (B, M, streams, n), or (B, M, 2, N)
    delta,  # shape of lse
    dtokens_stage2,  # (B, M, S, n, D): in Stage I, the gradient of the tokens from Stage II, added to dtokens
    dx,  # (blocks of n, B, M, N, D)
    dy,  # (blocks of n, B, M, N, D): dv in Stage I
    dvalues,  # (splits, B, M, n, D): dv_hat in Stage II
    dtokens,  # (splits, B, M, S, n, D)
    x_stride_b,
    x_stride_m,
    x_stride_n,
    y_stride_b,
    y_stride_m,
    y_stride_n,
    dx_stride_block,
    dx_stride_b,
    dx_stride_m,
    dx_stride_n,
    heads,
    num_tokens,
    n,
    split_size,
    scale,
    gain,
    eps,
    STAGE: tl.constexpr,
    HAS_DTOKENS2: tl.constexpr,
    STREAMS: tl.constexpr,
    CONTRAST: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Backward of Stage I or II for a block of contrast tokens and a split of the tokens."""
    i_bh, i_block, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    x += i_b * x_stride_b + i_h * x_stride_m
    y += i_b * y_stride_b + i_h * y_stride_m
    dx_offset = i_block.to(tl.int64) * dx_stride_block + i_b * dx_stride_b + i_h * dx_stride_m
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
        minus_lam = -tl.load(lambda_of_stage)
    if STAGE == 1:
        c, c_rest = load_rows(values + offset, offs_c, D, mask_c, D, D_MAIN, D_REST)
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
    else:
        c, c_rest = load_v_hat(values + offset, norm1, i_block, n, gain, eps, D, D_MAIN, D_REST, BLOCK_C)
        lse += i_bh * 2 * num_tokens
        delta += i_bh * 2 * num_tokens

    dt_pos = tl.zeros((BLOCK_C, D_MAIN), tl.float32)
    dt_pos_rest = dt_pos
    if D_REST:
        dt_pos_rest = tl.zeros((BLOCK_C, D_REST), tl.float32)
    dt_neg, dt_neg_rest = dt_pos, dt_pos_rest
    dc, dc_rest = dt_pos, dt_pos_rest

    start = i_split * split_size
    for start_n in range(start, tl.minimum(start + split_size, num_tokens), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < num_tokens
        x_tile, x_rest = load_rows(x, offs_n, x_stride_n, mask_n, D, D_MAIN, D_REST)
        y_tile, y_rest = load_rows(y, offs_n, y_stride_n, mask_n, D, D_MAIN, D_REST)
        if STAGE == 2:
            lse_pos = tl.load(lse + offs_n, mask=mask_n, other=0.0)[None, :]
            delta_pos = tl.load(delta + offs_n, mask=mask_n, other=0.0)[None, :]
            lse_neg, delta_neg = lse_pos, delta_pos
            if CONTRAST:
                lse_neg = tl.load(lse + num_tokens + offs_n, mask=mask_n, other=0.0)[None, :]
                delta_neg = tl.load(delta + num_tokens + offs_n, mask=mask_n, other=0.0)[None, :]
        mask = mask_c[:, None] & mask_n[None, :]
        g = dot_nt(c, c_rest, y_tile, y_rest, D_REST, PRECISION)  # dW, (BLOCK_C, BLOCK_N)

        dx_tile = tl.zeros((BLOCK_N, D_MAIN), tl.float32)
        dx_rest = dx_tile
        if D_REST:
            dx_rest = tl.zeros((BLOCK_N, D_REST), tl.float32)
        weights, dx_tile, dx_rest, dt_pos, dt_pos_rest = stream_bwd(
            t_pos, t_pos_rest, x_tile, x_rest, g, mask, lse_pos, delta_pos, 1.0, scale,
            dx_tile, dx_rest, dt_pos, dt_pos_rest, D_REST, PRECISION,
        )  # fmt: skip
        if CONTRAST:
            neg_weights, dx_tile, dx_rest, dt_neg, dt_neg_rest = stream_bwd(
                t_neg, t_neg_rest, x_tile, x_rest, g, mask, lse_neg, delta_neg, minus_lam, scale,
                dx_tile, dx_rest, dt_neg, dt_neg_rest, D_REST, PRECISION,
            )  # fmt: skip
            weights += neg_weights
        grad_scale = scale * LN2
        store_rows(
            dx + dx_offset, offs_n, dx_stride_n, mask_n,
            dx_tile * grad_scale, dx_rest * grad_scale, D, D_MAIN, D_REST,
        )  # fmt: skip
        if STAGE == 1:
            dy_tile = tl.zeros((BLOCK_N, D_MAIN), tl.float32)
            dy_rest = dy_tile
            if D_REST:
                dy_rest = tl.zeros((BLOCK_N, D_REST), tl.float32)
            dy_tile, dy_rest = dot_acc(tl.trans(weights), c, c_rest, dy_tile, dy_rest, D_REST, PRECISION)
            store_rows(
                dy + dx_offset, offs_n, dx_stride_n, mask_n, dy_tile, dy_rest, D, D_MAIN, D_REST
            )  # fmt: skip
        else:
            dc, dc_rest = dot_acc(weights, y_tile, y_rest, dc, dc_rest, D_REST, PRECISION)

    partial = (i_split * tl.num_programs(0) + i_bh).to(tl.int64) * n * D
    grad_scale = scale * LN2
    dt_pos, dt_neg = dt_pos * grad_scale, dt_neg * grad_scale
    dt_pos_rest, dt_neg_rest = dt_pos_rest * grad_scale, dt_neg_rest * grad_scale
    if HAS_DTOKENS2 and i_split == 0:
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
    if STAGE == 2:
        store_rows(dvalues + partial, offs_c, D, mask_c, dc, dc_rest, D, D_MAIN, D_REST)


@triton.jit
def avg_pool_bwd_kernel(
    dtokens,  # (B, M, S, n, D)
    dq,  # (B, M, N, D), accumulated in place
    stride_b,
    stride_m,
    stride_n,
    heads,
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
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Backward of the average pooling: add the gradients of the cells that contain a token to its dq."""
    i_bh = tl.program_id(0)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < height * width
    y, x = offs_n // width, offs_n % width
    dtokens += (i_bh * STREAMS).to(tl.int64) * n * D
    dq += i_b * stride_b + i_h * stride_m
    g, g_rest = load_rows(dq, prefix + offs_n, stride_n, mask_n, D, D_MAIN, D_REST)
    acc, acc_rest = g.to(tl.float32), g_rest.to(tl.float32)
    for i_row in tl.static_range(MAX_ROWS):
        cell_row = y * contrast_h // height + i_row
        top, bottom = cell_row * height // contrast_h, ((cell_row + 1) * height + contrast_h - 1) // contrast_h
        for i_column in tl.static_range(MAX_COLUMNS):
            cell_column = x * contrast_w // width + i_column
            left, right = cell_column * width // contrast_w, ((cell_column + 1) * width + contrast_w - 1) // contrast_w
            weight = (mask_n & (cell_row < contrast_h) & (top <= y) & (cell_column < contrast_w) & (left <= x)).to(
                tl.float32
            )
            weight = (weight / ((bottom - top) * (right - left)))[:, None]
            cell = tl.minimum(cell_row, contrast_h - 1) * contrast_w + tl.minimum(cell_column, contrast_w - 1)
            if POOL_POS:
                part, part_rest = load_rows(dtokens, cell, D, mask_n, D, D_MAIN, D_REST)
                acc += weight * part
                if D_REST:
                    acc_rest += weight * part_rest
            if POOL_NEG:
                part, part_rest = load_rows(dtokens + n * D, cell, D, mask_n, D, D_MAIN, D_REST)
                acc += weight * part
                if D_REST:
                    acc_rest += weight * part_rest
    store_rows(dq, prefix + offs_n, stride_n, mask_n, acc, acc_rest, D, D_MAIN, D_REST)
