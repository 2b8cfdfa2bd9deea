"""Forward kernels of VCA: contrast tokens, Stage I (optionally split over N and combined), Stage II.

Shape letters: B batch, M heads, N = P + H W tokens, D head dim, n = h w contrast tokens, S streams of the tokens (2, or
1 if both stages are plain). Program axis 0 is the index of one head of one image, `i_bh`.
"""

import triton
import triton.language as tl

from vca.attention.kernels.tiles import (
    dot_acc,
    dot_nt,
    load_rows,
    load_weight,
    online_lse,
    rstd_of_rows,
    store_rows,
)


@triton.jit
def contrast_tokens_fwd_kernel(
    x,  # (B, M, P + H W, D), queries to average
    e_pos,  # (M, n, D) float32
    e_neg,
    tokens,  # (B, M, S, n, D)
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
    max_cell,  # tokens in the largest cell
    POOL_POS: tl.constexpr,
    POOL_NEG: tl.constexpr,
    EMBED_POS: tl.constexpr,
    EMBED_NEG: tl.constexpr,
    STREAMS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_CELL: tl.constexpr,
):
    """Compute the contrast tokens of all streams: the mean of a grid cell, an embedding, or their sum."""
    i_bh = tl.program_id(0)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    x += i_b * stride_b + i_h * stride_m
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_c < n)[:, None] & (offs_d < D)[None, :]

    mean = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    if POOL_POS or POOL_NEG:
        cell_row = offs_c // contrast_w
        top, bottom = cell_row * height // contrast_h, ((cell_row + 1) * height + contrast_h - 1) // contrast_h
        cell_column = offs_c % contrast_w
        left, right = cell_column * width // contrast_w, ((cell_column + 1) * width + contrast_w - 1) // contrast_w
        cell_size = (bottom - top) * (right - left)
        for start in range(0, max_cell, BLOCK_CELL):
            offs_cell = start + tl.arange(0, BLOCK_CELL)[None, :]
            cell_width = (right - left)[:, None]
            pixel_y, pixel_x = top[:, None] + offs_cell // cell_width, left[:, None] + offs_cell % cell_width
            mask_cell = (offs_cell < cell_size[:, None]) & (offs_c < n)[:, None]
            pointers = x + (prefix + pixel_y * width + pixel_x)[:, :, None] * stride_n + offs_d[None, None, :]
            values = tl.load(pointers, mask=mask_cell[:, :, None] & (offs_d < D)[None, None, :], other=0.0)
            mean += tl.sum(values.to(tl.float32), axis=1)
        mean = mean / cell_size[:, None]

    offs_cd = offs_c[:, None] * D + offs_d[None, :]
    tokens += (i_bh * STREAMS).to(tl.int64) * n * D
    t_pos = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    if POOL_POS:
        t_pos = mean
    if EMBED_POS:
        t_pos += tl.load(e_pos + i_h * n * D + offs_cd, mask=mask, other=0.0)
    tl.store(tokens + offs_cd, t_pos.to(tokens.dtype.element_ty), mask=mask)
    if STREAMS == 2:
        t_neg = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
        if POOL_NEG:
            t_neg = mean
        if EMBED_NEG:
            t_neg += tl.load(e_neg + i_h * n * D + offs_cd, mask=mask, other=0.0)
        tl.store(tokens + n * D + offs_cd, t_neg.to(tokens.dtype.element_ty), mask=mask)


@triton.jit
def store_stage1(
    lambda1, v_diff, v_neg, lse, i_bh, stream, offs_c, n, acc, acc_rest, row_lse,
    CONTRAST: tl.constexpr, D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store `v+ - l1 v-`, `v-` and lse; the rows of `acc` are the positive stream, then the negative one."""
    offset = i_bh.to(tl.int64) * n * D
    tl.store(lse + i_bh * (1 + CONTRAST) * n + stream * n + offs_c, row_lse, mask=offs_c < n)
    if CONTRAST:
        store_rows(v_neg + offset, offs_c, D, (offs_c < n) & (stream == 1), acc, acc_rest, D, D_MAIN, D_REST)
        weight = tl.where(stream == 0, 1.0, -tl.load(lambda1))[:, None]
        acc = tl.sum(tl.reshape(acc * weight, (2, BLOCK_C, D_MAIN)), axis=0)
        if D_REST:
            acc_rest = tl.sum(tl.reshape(acc_rest * weight, (2, BLOCK_C, D_REST)), axis=0)
        offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    store_rows(v_diff + offset, offs_c, D, offs_c < n, acc, acc_rest, D, D_MAIN, D_REST)


@triton.jit
def stage1_fwd_kernel(
    tokens,  # (B, M, S, n, D)
    k,  # (B, M, N, D), with the strides of v
    v,
    lambda1,
    v_diff,  # (B, M, n, D), v+ - l1 v-
    v_neg,  # (B, M, n, D)
    lse,  # (B, M, streams, n) float32, base 2
    partial,  # (splits, B, M, streams, n, D) float32, if N is split
    partial_lse,  # (splits, B, M, streams, n) float32
    stride_b,
    stride_m,
    stride_n,
    heads,
    num_tokens,
    n,
    split_size,  # tokens in a split
    scale,
    NUM_SPLITS: tl.constexpr,  # 0: N is not split
    STREAMS: tl.constexpr,
    CONTRAST: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stage I: softmax attention of the contrast tokens over all tokens; both streams share the k and v tiles."""
    i_bh = tl.program_id(0)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    k += i_b * stride_b + i_h * stride_m
    v += i_b * stride_b + i_h * stride_m
    offs = tl.arange(0, (1 + CONTRAST) * BLOCK_C)
    stream, offs_c = offs // BLOCK_C, tl.program_id(1) * BLOCK_C + offs % BLOCK_C
    mask_c = offs_c < n
    offset = (i_bh * STREAMS).to(tl.int64) * n * D
    t, t_rest = load_rows(tokens + offset, stream * n + offs_c, D, mask_c, D, D_MAIN, D_REST)

    m_i = tl.full(((1 + CONTRAST) * BLOCK_C,), float("-inf"), tl.float32)
    l_i = tl.zeros(((1 + CONTRAST) * BLOCK_C,), tl.float32)
    acc = tl.zeros(((1 + CONTRAST) * BLOCK_C, D_MAIN), tl.float32)
    acc_rest = acc
    if D_REST:
        acc_rest = tl.zeros(((1 + CONTRAST) * BLOCK_C, D_REST), tl.float32)
    start = tl.program_id(2) * split_size
    end = tl.minimum(start + split_size, num_tokens)
    for start_n in range(start, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        k_tile, k_rest = load_rows(k, offs_n, stride_n, mask_n, D, D_MAIN, D_REST)
        v_tile, v_rest = load_rows(v, offs_n, stride_n, mask_n, D, D_MAIN, D_REST)
        scores = dot_nt(t, t_rest, k_tile, k_rest, D_REST, PRECISION) * scale
        scores = tl.where(mask_n[None, :], scores, float("-inf"))
        m_new, l_i = online_lse(scores, m_i, l_i)
        alpha = tl.exp2(m_i - m_new)[:, None]
        m_i = m_new
        acc *= alpha
        if D_REST:
            acc_rest *= alpha
        weights = tl.exp2(scores - m_new[:, None])
        acc, acc_rest = dot_acc(weights, v_tile, v_rest, acc, acc_rest, D_REST, PRECISION)

    acc /= l_i[:, None]
    if D_REST:
        acc_rest /= l_i[:, None]
    row_lse = m_i + tl.log2(l_i)
    if NUM_SPLITS == 0:
        store_stage1(
            lambda1, v_diff, v_neg, lse, i_bh, stream, offs_c, n, acc, acc_rest, row_lse,
            CONTRAST, D, D_MAIN, D_REST, BLOCK_C,
        )  # fmt: skip
    else:
        partial_row = (tl.program_id(2) * tl.num_programs(0) + i_bh) * (1 + CONTRAST) * n
        tl.store(partial_lse + partial_row + stream * n + offs_c, row_lse, mask=mask_c)
        store_rows(
            partial + partial_row.to(tl.int64) * D, stream * n + offs_c, D, mask_c, acc, acc_rest, D, D_MAIN, D_REST
        )


@triton.jit
def stage1_fwd_kernel_combine(
    partial,
    partial_lse,
    lambda1,
    v_diff,
    v_neg,
    lse,
    n,
    num_splits,
    CONTRAST: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Combine the partial results of `stage1_fwd_kernel` over the splits."""
    i_bh = tl.program_id(0)
    offs = tl.arange(0, (1 + CONTRAST) * BLOCK_C)
    stream, offs_c = offs // BLOCK_C, tl.program_id(1) * BLOCK_C + offs % BLOCK_C
    mask_c = offs_c < n
    m_i = tl.full(((1 + CONTRAST) * BLOCK_C,), float("-inf"), tl.float32)
    l_i = tl.zeros(((1 + CONTRAST) * BLOCK_C,), tl.float32)
    acc = tl.zeros(((1 + CONTRAST) * BLOCK_C, D_MAIN), tl.float32)
    acc_rest = acc
    if D_REST:
        acc_rest = tl.zeros(((1 + CONTRAST) * BLOCK_C, D_REST), tl.float32)
    for split in range(0, num_splits):
        partial_row = (split * tl.num_programs(0) + i_bh) * (1 + CONTRAST) * n
        split_lse = tl.load(partial_lse + partial_row + stream * n + offs_c, mask=mask_c, other=0.0)
        values, values_rest = load_rows(
            partial + partial_row.to(tl.int64) * D, stream * n + offs_c, D, mask_c, D, D_MAIN, D_REST
        )  # fmt: skip
        m_new = tl.maximum(m_i, split_lse)
        alpha, beta = tl.exp2(m_i - m_new), tl.exp2(split_lse - m_new)
        m_i, l_i = m_new, l_i * alpha + beta
        acc = acc * alpha[:, None] + values * beta[:, None]
        if D_REST:
            acc_rest = acc_rest * alpha[:, None] + values_rest * beta[:, None]
    acc /= l_i[:, None]
    if D_REST:
        acc_rest /= l_i[:, None]
    store_stage1(
        lambda1, v_diff, v_neg, lse, i_bh, stream, offs_c, n, acc, acc_rest, m_i + tl.log2(l_i),
        CONTRAST, D, D_MAIN, D_REST, BLOCK_C,
    )  # fmt: skip


@triton.jit
def scores_of(x, x_rest, t, t_rest, offs_c, n, scale, D_REST: tl.constexpr, PRECISION: tl.constexpr):
    """Compute base-2 scores of rows and contrast tokens, `(R, BLOCK_C)`; -inf for tokens >= n."""
    scores = dot_nt(x, x_rest, t, t_rest, D_REST, PRECISION) * scale
    return tl.where((offs_c < n)[None, :], scores, float("-inf"))


@triton.jit
def stream_scores(
    tokens, stream, block, x, x_rest, n, scale,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the scores of rows and a block of one stream's tokens, `(R, BLOCK_C)`."""
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    t, t_rest = load_rows(tokens + stream * n * D, offs_c, D, offs_c < n, D, D_MAIN, D_REST)
    return scores_of(x, x_rest, t, t_rest, offs_c, n, scale, D_REST, PRECISION)


@triton.jit
def softmax_pair(pos, neg, CONTRAST: tl.constexpr, JOINT: tl.constexpr):
    """Compute the probabilities A+ and A- of rows from all their scores, or those of one softmax over both streams."""
    max_pos = tl.max(pos, axis=1)
    max_neg = max_pos
    if CONTRAST:
        max_neg = tl.max(neg, axis=1)
        if JOINT:
            max_pos = tl.maximum(max_pos, max_neg)
            max_neg = max_pos
    pos = tl.exp2(pos - max_pos[:, None])
    sum_pos = tl.sum(pos, axis=1)
    if CONTRAST:
        neg = tl.exp2(neg - max_neg[:, None])
        sum_neg = tl.sum(neg, axis=1)
        if JOINT:
            sum_pos += sum_neg
            sum_neg = sum_pos
        neg *= (1.0 / sum_neg)[:, None]
    return pos * (1.0 / sum_pos)[:, None], neg


@triton.jit
def stage2_lse(
    tokens, x, x_rest, n, scale,
    CONTRAST: tl.constexpr, JOINT: tl.constexpr, NUM_BLOCKS_C: tl.constexpr,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the lse of each row over the tokens of each stream, or jointly over both: two `(BLOCK_N,)`."""
    max_pos, sum_pos = tl.full((BLOCK_N,), float("-inf"), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    max_neg, sum_neg = max_pos, sum_pos
    for block in range(NUM_BLOCKS_C):
        scores = stream_scores(tokens, 0, block, x, x_rest, n, scale, D, D_MAIN, D_REST, BLOCK_C, PRECISION)
        max_pos, sum_pos = online_lse(scores, max_pos, sum_pos)
        if CONTRAST:
            scores = stream_scores(tokens, 1, block, x, x_rest, n, scale, D, D_MAIN, D_REST, BLOCK_C, PRECISION)
            max_neg, sum_neg = online_lse(scores, max_neg, sum_neg)
    pos = max_pos + tl.log2(sum_pos)
    neg = pos
    if CONTRAST:
        neg = max_neg + tl.log2(sum_neg)
        if JOINT:
            larger = tl.maximum(pos, neg)
            pos = larger + tl.log2(tl.exp2(pos - larger) + tl.exp2(neg - larger))
            neg = pos
    return pos, neg


@triton.jit
def load_v_hat(
    v_diff, norm1, block, n, gain, eps,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Load `v+ - l1 v-` of a block of contrast tokens and apply the norm of Stage I: v^, in the dtype of `v_diff`."""
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    raw, raw_rest = load_rows(v_diff, offs_c, D, offs_c < n, D, D_MAIN, D_REST)
    x, x_rest = raw.to(tl.float32), raw_rest.to(tl.float32)
    weight, weight_rest = load_weight(norm1, gain, D, D_MAIN, D_REST)
    rstd = rstd_of_rows(x, x_rest, eps, D, D_REST)
    return (x * rstd * weight).to(raw.dtype), (x_rest * rstd * weight_rest).to(raw.dtype)


@triton.jit
def stage2_values(
    tokens, v_diff, norm1, minus_lam, x, x_rest, n, scale, gain, eps, ONE_PASS: tl.constexpr,
    CONTRAST: tl.constexpr, JOINT: tl.constexpr, NUM_BLOCKS_C: tl.constexpr,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `A v^` of rows, before the norm, and the lse of each stream; ONE_PASS is without lse, for one block."""
    lse_pos = tl.zeros((BLOCK_N,), tl.float32)
    lse_neg = lse_pos
    if not ONE_PASS:
        lse_pos, lse_neg = stage2_lse(
            tokens, x, x_rest, n, scale, CONTRAST, JOINT, NUM_BLOCKS_C, D, D_MAIN, D_REST, BLOCK_C, BLOCK_N, PRECISION
        )
    acc = tl.zeros((BLOCK_N, D_MAIN), tl.float32)
    acc_rest = acc
    if D_REST:
        acc_rest = tl.zeros((BLOCK_N, D_REST), tl.float32)
    for block in range(NUM_BLOCKS_C):
        a_pos = stream_scores(tokens, 0, block, x, x_rest, n, scale, D, D_MAIN, D_REST, BLOCK_C, PRECISION)
        a_neg = a_pos
        if CONTRAST:
            a_neg = stream_scores(tokens, 1, block, x, x_rest, n, scale, D, D_MAIN, D_REST, BLOCK_C, PRECISION)
        if ONE_PASS:
            a_pos, a_neg = softmax_pair(a_pos, a_neg, CONTRAST, JOINT)
        else:
            a_pos, a_neg = tl.exp2(a_pos - lse_pos[:, None]), tl.exp2(a_neg - lse_neg[:, None])
        weights = a_pos
        if CONTRAST:
            weights += minus_lam * a_neg
        v_hat, v_hat_rest = load_v_hat(v_diff, norm1, block, n, gain, eps, D, D_MAIN, D_REST, BLOCK_C)
        acc, acc_rest = dot_acc(weights, v_hat, v_hat_rest, acc, acc_rest, D_REST, PRECISION)
    return acc, acc_rest, lse_pos, lse_neg


@triton.jit
def stage2_fwd_kernel(
    q,  # (B, M, N, D)
    tokens,  # (B, M, S, n, D)
    v_diff,  # (B, M, n, D)
    lambda2,
    norm1,  # (D,) float32
    norm2,
    out,  # (B, M, N, D)
    stride_b,
    stride_m,
    stride_n,
    out_stride_b,
    out_stride_m,
    out_stride_n,
    heads,
    num_tokens,
    n,
    scale,
    gain,  # 1 - l_init
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
    """Stage II: attention to the contrast tokens with the difference of two softmaxes, then the norm."""
    i_bh = tl.program_id(0)
    i_b, i_h = (i_bh // heads).to(tl.int64), i_bh % heads
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_tokens
    tokens += (i_bh * STREAMS).to(tl.int64) * n * D
    v_diff += i_bh.to(tl.int64) * n * D
    x, x_rest = load_rows(q + i_b * stride_b + i_h * stride_m, offs_n, stride_n, mask_n, D, D_MAIN, D_REST)
    minus_lam = 0.0
    if CONTRAST:
        minus_lam = -tl.load(lambda2)
    acc, acc_rest, _, _ = stage2_values(
        tokens, v_diff, norm1, minus_lam, x, x_rest, n, scale, gain, eps, NUM_BLOCKS_C == 1,
        CONTRAST, JOINT, NUM_BLOCKS_C, D, D_MAIN, D_REST, BLOCK_C, BLOCK_N, PRECISION,
    )  # fmt: skip
    weight, weight_rest = load_weight(norm2, gain, D, D_MAIN, D_REST)
    rstd = rstd_of_rows(acc, acc_rest, eps, D, D_REST)
    store_rows(
        out + i_b * out_stride_b + i_h * out_stride_m, offs_n, out_stride_n, mask_n,
        acc * rstd * weight, acc_rest * rstd * weight_rest, D, D_MAIN, D_REST,
    )  # fmt: skip
