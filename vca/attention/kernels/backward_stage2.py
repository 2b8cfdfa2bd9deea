"""Backward kernels of Stage II of VCA, the last of which includes the backward of the average pooling.

The gradients of the contrast tokens are complete only after the backward of Stage I, so q is read twice:

    stage2_bwd_kernel_preprocess   several blocks of contrast tokens only: gradient before the norm, lse, delta
    stage2_bwd_kernel_dtokens      gradients of v^ and the contrast tokens, before the backward of Stage I
    stage2_bwd_kernel_dq           after it: dq, to which the gradient through the pooled queries is added

Each recomputes what it needs of its tokens. With the probabilities A+-, G = dW and the scores `S = q t^T / sqrt D`:

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
    store_rows,
    store_weight,
)


@triton.jit
def stream_weights(
    tokens, stream, block, x, x_rest, lse, n, scale,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the probabilities A of rows and a block of one stream's tokens, `(R, BLOCK_C)`."""
    scores = stream_scores(tokens, stream, block, x, x_rest, n, scale, D, D_MAIN, D_REST, BLOCK_C, PRECISION)
    return tl.exp2(scores - lse[:, None])


@triton.jit
def stage2_norm_bwd(
    x, x_rest, do, do_rest, tokens, v_diff, lambda2, norm1, norm2, n, scale, gain, eps,
    CONTRAST: tl.constexpr, JOINT: tl.constexpr, NUM_BLOCKS_C: tl.constexpr,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward of Stage II from its output to `A v^`, for rows x of q and rows of the gradient of the output.

    Returns the gradient of `A v^` in the dtype of x, that of the norm weight before the sum over rows, and of each row
    the lse of each stream, delta (with the sign and weight of the stream) and `sum(A- G)`, the delta without them.
    """
    lse_pos, lse_neg = stage2_lse(
        tokens, x, x_rest, n, scale, CONTRAST, JOINT, NUM_BLOCKS_C, D, D_MAIN, D_REST, BLOCK_C, BLOCK_N, PRECISION
    )
    acc = tl.zeros((BLOCK_N, D_MAIN), tl.float32)
    acc_rest = acc
    if D_REST:
        acc_rest = tl.zeros((BLOCK_N, D_REST), tl.float32)
    for block in range(NUM_BLOCKS_C):
        weights = stream_weights(tokens, 0, block, x, x_rest, lse_pos, n, scale, D, D_MAIN, D_REST, BLOCK_C, PRECISION)
        if CONTRAST:
            weights -= tl.load(lambda2) * stream_weights(
                tokens, 1, block, x, x_rest, lse_neg, n, scale, D, D_MAIN, D_REST, BLOCK_C, PRECISION
            )
        v_hat, v_hat_rest = load_v_hat(v_diff, norm1, block, n, gain, eps, D, D_MAIN, D_REST, BLOCK_C)
        acc, acc_rest = dot_acc(weights, v_hat, v_hat_rest, acc, acc_rest, D_REST, PRECISION)

    weight, weight_rest = load_weight(norm2, gain, D, D_MAIN, D_REST)
    g, g_rest, dweight, dweight_rest = rms_norm_bwd(
        acc, acc_rest, do.to(tl.float32), do_rest.to(tl.float32), weight, weight_rest, eps, D, D_REST
    )
    g, g_rest = g.to(x.dtype), g_rest.to(x.dtype)
    delta_pos = tl.zeros((BLOCK_N,), tl.float32)
    delta_of_neg, delta_neg = delta_pos, delta_pos
    for block in range(NUM_BLOCKS_C):
        v_hat, v_hat_rest = load_v_hat(v_diff, norm1, block, n, gain, eps, D, D_MAIN, D_REST, BLOCK_C)
        dweights = dot_nt(g, g_rest, v_hat, v_hat_rest, D_REST, PRECISION)
        weights = stream_weights(tokens, 0, block, x, x_rest, lse_pos, n, scale, D, D_MAIN, D_REST, BLOCK_C, PRECISION)
        delta_pos += tl.sum(weights * dweights, axis=1)
        if CONTRAST:
            weights = stream_weights(
                tokens, 1, block, x, x_rest, lse_neg, n, scale, D, D_MAIN, D_REST, BLOCK_C, PRECISION
            )
            delta_of_neg += tl.sum(weights * dweights, axis=1)
    if CONTRAST:
        delta_neg = -tl.load(lambda2) * delta_of_neg
        if JOINT:
            delta_pos += delta_neg
            delta_neg = delta_pos
    return g, g_rest, dweight, dweight_rest, lse_pos, lse_neg, delta_pos, delta_neg, delta_of_neg


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
    """Gradient before the norm, lse and delta of each token, if several blocks of contrast tokens need them."""
    i_bh = tl.program_id(0)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_tokens
    tokens += (i_bh * STREAMS).to(tl.int64) * n * D
    v_diff += i_bh.to(tl.int64) * n * D
    x, x_rest = load_rows(q + i_b * stride_b + i_h * stride_m, offs_n, stride_n, mask_n, D, D_MAIN, D_REST)
    g, g_rest = load_rows(
        do + i_b * do_stride_b + i_h * do_stride_m, offs_n, do_stride_n, mask_n, D, D_MAIN, D_REST
    )  # fmt: skip
    g, g_rest, _, _, lse_pos, lse_neg, delta_pos, delta_neg, _ = stage2_norm_bwd(
        x, x_rest, g, g_rest, tokens, v_diff, lambda2, norm1, norm2, n, scale, gain, eps,
        CONTRAST, JOINT, NUM_BLOCKS_C, D, D_MAIN, D_REST, BLOCK_C, BLOCK_N, PRECISION,
    )  # fmt: skip
    store_rows(
        do_raw + i_b * raw_stride_b + i_h * raw_stride_m, offs_n, raw_stride_n, mask_n, g, g_rest, D, D_MAIN, D_REST
    )
    lse += i_bh * 2 * num_tokens + offs_n
    delta += i_bh * 2 * num_tokens + offs_n
    tl.store(lse, lse_pos, mask=mask_n)
    tl.store(delta, delta_pos, mask=mask_n)
    if CONTRAST:
        tl.store(lse + num_tokens, lse_neg, mask=mask_n)
        tl.store(delta + num_tokens, delta_neg, mask=mask_n)


@triton.jit
def stage2_stream_bwd(
    tokens, stream, block, x, x_rest, g, lse, delta, weight, n, scale,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward of one stream's softmax: returns `weight A` and dS in the dtype of x, both `(R, BLOCK_C)`."""
    a = stream_weights(tokens, stream, block, x, x_rest, lse, n, scale, D, D_MAIN, D_REST, BLOCK_C, PRECISION)
    return weight * a, (a * (weight * g - delta[:, None])).to(x.dtype)


@triton.jit
def stage2_bwd_kernel_dtokens(
    q,  # (B, M, N, D)
    tokens,  # (B, M, S, n, D)
    v_diff,  # (B, M, n, D)
    lambda2,
    norm1,
    norm2,
    do,  # (B, M, N, D), gradient of the output; do_raw of the preprocessing if n has several blocks
    lse,  # (B, M, 2, N) float32, read if n has several blocks
    delta,
    dv_hat,  # (splits, B, M, n, D)
    dtokens,  # (splits, B, M, S, n, D)
    stride_b,
    stride_m,
    stride_n,
    do_stride_b,
    do_stride_m,
    do_stride_n,
    heads,
    num_tokens,
    n,
    split_size,
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
    """Backward of Stage II to v^ and the contrast tokens, for a block of these and a split of the tokens."""
    i_bh, i_block, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if NUM_BLOCKS_C == 1:
        i_block = 0  # a constant, so that the compiler merges the scores with those of `stage2_norm_bwd`
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    q += i_b * stride_b + i_h * stride_m
    do += i_b * do_stride_b + i_h * do_stride_m
    lse += i_bh * 2 * num_tokens
    delta += i_bh * 2 * num_tokens
    tokens += (i_bh * STREAMS).to(tl.int64) * n * D
    v_diff += i_bh.to(tl.int64) * n * D
    minus_lam = 0.0
    if CONTRAST:
        minus_lam = -tl.load(lambda2)

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
        g, g_rest = load_rows(do, offs_n, do_stride_n, mask_n, D, D_MAIN, D_REST)
        if NUM_BLOCKS_C == 1:
            g, g_rest, _, _, lse_pos, lse_neg, delta_pos, delta_neg, _ = stage2_norm_bwd(
                x, x_rest, g, g_rest, tokens, v_diff, lambda2, norm1, norm2, n, scale, gain, eps,
                CONTRAST, JOINT, NUM_BLOCKS_C, D, D_MAIN, D_REST, BLOCK_C, BLOCK_N, PRECISION,
            )  # fmt: skip
        else:
            lse_pos = tl.load(lse + offs_n, mask=mask_n, other=0.0)
            delta_pos = tl.load(delta + offs_n, mask=mask_n, other=0.0)
            lse_neg, delta_neg = lse_pos, delta_pos
            if CONTRAST:
                lse_neg = tl.load(lse + num_tokens + offs_n, mask=mask_n, other=0.0)
                delta_neg = tl.load(delta + num_tokens + offs_n, mask=mask_n, other=0.0)
        v_hat, v_hat_rest = load_v_hat(v_diff, norm1, i_block, n, gain, eps, D, D_MAIN, D_REST, BLOCK_C)
        dweights = dot_nt(g, g_rest, v_hat, v_hat_rest, D_REST, PRECISION)  # (BLOCK_N, BLOCK_C)
        weights, dscores = stage2_stream_bwd(
            tokens, 0, i_block, x, x_rest, dweights, lse_pos, delta_pos, 1.0, n, scale,
            D, D_MAIN, D_REST, BLOCK_C, PRECISION,
        )  # fmt: skip
        dt_pos, dt_pos_rest = dot_acc(tl.trans(dscores), x, x_rest, dt_pos, dt_pos_rest, D_REST, PRECISION)
        if CONTRAST:
            neg_weights, dscores = stage2_stream_bwd(
                tokens, 1, i_block, x, x_rest, dweights, lse_neg, delta_neg, minus_lam, n, scale,
                D, D_MAIN, D_REST, BLOCK_C, PRECISION,
            )  # fmt: skip
            dt_neg, dt_neg_rest = dot_acc(tl.trans(dscores), x, x_rest, dt_neg, dt_neg_rest, D_REST, PRECISION)
            weights += neg_weights
        dv, dv_rest = dot_acc(tl.trans(weights.to(x.dtype)), g, g_rest, dv, dv_rest, D_REST, PRECISION)

    offs_c = i_block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n
    LN2: tl.constexpr = 0.6931471805599453
    grad_scale = scale * LN2
    partial = (i_split * tl.num_programs(0) + i_bh).to(tl.int64) * n * D
    dtokens += partial * STREAMS
    store_rows(
        dtokens, offs_c, D, mask_c, dt_pos * grad_scale, dt_pos_rest * grad_scale, D, D_MAIN, D_REST
    )  # fmt: skip
    if STREAMS == 2:
        store_rows(dtokens + n * D, offs_c, D, mask_c, dt_neg * grad_scale, dt_neg_rest * grad_scale, D, D_MAIN, D_REST)
    store_rows(dv_hat + partial, offs_c, D, mask_c, dv, dv_rest, D, D_MAIN, D_REST)


@triton.jit
def avg_pool_bwd(
    dtokens, position, valid, acc, acc_rest, n, height, width, contrast_h, contrast_w,
    MAX_ROWS: tl.constexpr, MAX_COLUMNS: tl.constexpr, POOL_POS: tl.constexpr, POOL_NEG: tl.constexpr,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr,
):  # fmt: skip
    """Backward of the average pooling: add the gradients of the cells that contain a `valid` position of the grid."""
    y, x = position // width, position % width
    for i_row in tl.static_range(MAX_ROWS):
        cell_row = y * contrast_h // height + i_row
        top, bottom = cell_row * height // contrast_h, ((cell_row + 1) * height + contrast_h - 1) // contrast_h
        for i_column in tl.static_range(MAX_COLUMNS):
            cell_column = x * contrast_w // width + i_column
            left, right = cell_column * width // contrast_w, ((cell_column + 1) * width + contrast_w - 1) // contrast_w
            inside = valid & (cell_row < contrast_h) & (top <= y) & (cell_column < contrast_w) & (left <= x)
            weight = (inside.to(tl.float32) / ((bottom - top) * (right - left)))[:, None]
            cell = tl.minimum(cell_row, contrast_h - 1) * contrast_w + tl.minimum(cell_column, contrast_w - 1)
            if POOL_POS:
                part, part_rest = load_rows(dtokens, cell, D, valid, D, D_MAIN, D_REST)
                acc += weight * part
                if D_REST:
                    acc_rest += weight * part_rest
            if POOL_NEG:
                part, part_rest = load_rows(dtokens + n * D, cell, D, valid, D, D_MAIN, D_REST)
                acc += weight * part
                if D_REST:
                    acc_rest += weight * part_rest
    return acc, acc_rest


@triton.jit
def stage2_bwd_kernel_dq(
    q,  # (B, M, N, D)
    tokens,  # (B, M, S, n, D)
    v_diff,  # (B, M, n, D)
    lambda2,
    norm1,
    norm2,
    do,  # (B, M, N, D), gradient of the output
    dtokens,  # (B, M, S, n, D), of both stages
    dq,  # (B, M, N, D), result
    dnorm2,  # (blocks of N, B, M, D) float32, partial sums
    dlambda2,  # (blocks of N, B, M) float32, partial sums
    stride_b,
    stride_m,
    stride_n,
    do_stride_b,
    do_stride_m,
    do_stride_n,
    dq_stride_b,
    dq_stride_m,
    dq_stride_n,
    heads,
    num_tokens,
    n,
    scale,
    gain,
    eps,
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
    """Backward of Stage II to q, lambda2 and the norm weight, and of the pooling to q, for a block of tokens."""
    i_bh = tl.program_id(0)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_tokens
    tokens += (i_bh * STREAMS).to(tl.int64) * n * D
    v_diff += i_bh.to(tl.int64) * n * D
    x, x_rest = load_rows(q + i_b * stride_b + i_h * stride_m, offs_n, stride_n, mask_n, D, D_MAIN, D_REST)
    g, g_rest = load_rows(
        do + i_b * do_stride_b + i_h * do_stride_m, offs_n, do_stride_n, mask_n, D, D_MAIN, D_REST
    )  # fmt: skip
    g, g_rest, dweight, dweight_rest, lse_pos, lse_neg, delta_pos, delta_neg, delta_of_neg = stage2_norm_bwd(
        x, x_rest, g, g_rest, tokens, v_diff, lambda2, norm1, norm2, n, scale, gain, eps,
        CONTRAST, JOINT, NUM_BLOCKS_C, D, D_MAIN, D_REST, BLOCK_C, BLOCK_N, PRECISION,
    )  # fmt: skip
    dweight, dweight_rest = gain * tl.sum(dweight, axis=0), gain * tl.sum(dweight_rest, axis=0)
    minus_lam, dlam = 0.0, 0.0
    if CONTRAST:
        minus_lam, dlam = -tl.load(lambda2), -tl.sum(delta_of_neg, axis=0)

    acc = tl.zeros((BLOCK_N, D_MAIN), tl.float32)
    acc_rest = acc
    if D_REST:
        acc_rest = tl.zeros((BLOCK_N, D_REST), tl.float32)
    for block in range(NUM_BLOCKS_C):
        offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        v_hat, v_hat_rest = load_v_hat(v_diff, norm1, block, n, gain, eps, D, D_MAIN, D_REST, BLOCK_C)
        dweights = dot_nt(g, g_rest, v_hat, v_hat_rest, D_REST, PRECISION)  # (BLOCK_N, BLOCK_C)
        _, dscores = stage2_stream_bwd(
            tokens, 0, block, x, x_rest, dweights, lse_pos, delta_pos, 1.0, n, scale,
            D, D_MAIN, D_REST, BLOCK_C, PRECISION,
        )  # fmt: skip
        t, t_rest = load_rows(tokens, offs_c, D, offs_c < n, D, D_MAIN, D_REST)
        acc, acc_rest = dot_acc(dscores, t, t_rest, acc, acc_rest, D_REST, PRECISION)
        if CONTRAST:
            _, dscores = stage2_stream_bwd(
                tokens, 1, block, x, x_rest, dweights, lse_neg, delta_neg, minus_lam, n, scale,
                D, D_MAIN, D_REST, BLOCK_C, PRECISION,
            )  # fmt: skip
            t, t_rest = load_rows(tokens + n * D, offs_c, D, offs_c < n, D, D_MAIN, D_REST)
            acc, acc_rest = dot_acc(dscores, t, t_rest, acc, acc_rest, D_REST, PRECISION)

    LN2: tl.constexpr = 0.6931471805599453
    acc, acc_rest = acc * (scale * LN2), acc_rest * (scale * LN2)
    position = tl.maximum(offs_n - prefix, 0)
    acc, acc_rest = avg_pool_bwd(
        dtokens + (i_bh * STREAMS).to(tl.int64) * n * D, position, mask_n & (offs_n >= prefix), acc, acc_rest,
        n, height, width, contrast_h, contrast_w,
        MAX_ROWS, MAX_COLUMNS, POOL_POS, POOL_NEG, D, D_MAIN, D_REST,
    )  # fmt: skip
    store_rows(
        dq + i_b * dq_stride_b + i_h * dq_stride_m, offs_n, dq_stride_n, mask_n, acc, acc_rest, D, D_MAIN, D_REST
    )
    # Stores are last: the compiler does not merge loads before and after a store, or the scores made from them.
    partial = tl.program_id(1) * tl.num_programs(0) + i_bh
    store_weight(dnorm2 + partial * D, dweight, dweight_rest, D, D_MAIN, D_REST)
    if CONTRAST:
        tl.store(dlambda2 + partial, dlam)
