"""Backward kernels of VCA. Both stages have one backward, `stage_backward_kernel`; what differs is who is a row.

Scores, weights and the difference are made again from q, k, v and a few log-sum-exps. With A+-, G = dW and the two
streams' `s = x t^T / sqrt D`:

    dS+ = A+ (G - d+),   dS- = -l A- (G - d-),   d+- = sum(A+- G) over what the softmax ran over

No atomics: sums over programs are kept apart and added afterwards, in a fixed order.

Shape letters: B batch, M heads, N = P + H W tokens, D head dim, n = h w contrast tokens, S streams of the tokens.
"""

import triton
import triton.language as tl

from vca.attention.kernels.forward import load_v_hat, stage2_logsumexp, stream_scores
from vca.attention.kernels.tiles import (
    load_rows,
    load_weight,
    norm_gradient,
    over_head_dim,
    over_rows,
    row_sum,
    store_rows,
    store_weight,
)


@triton.jit
def stage2_rows_kernel(
    q,  # (B, M, N, D)
    tokens,  # (B, M, S, n, D)
    contrast,  # (B, M, n, D)
    lambda2,
    norm1,
    norm2,
    grad,  # (B, M, N, D), of the output
    grad_read,  # (B, M, N, D), in memory like q's gradient
    lse,  # (B, M, 2, N) float32
    delta,  # (B, M, 2, N) float32, A+- dA+- summed over tokens, with the sign and weight of the stream
    grad_norm2,  # (blocks of N, B, M, D) float32, to be summed
    grad_lambda2,  # (blocks of N, B, M) float32, to be summed
    stride_b,
    stride_m,
    stride_n,
    grad_stride_b,
    grad_stride_m,
    grad_stride_n,
    read_stride_b,
    read_stride_m,
    read_stride_n,
    heads,
    num_tokens,
    n,
    scale,
    gain,
    eps,
    STREAMS: tl.constexpr,
    CONTRAST: tl.constexpr,
    JOINT: tl.constexpr,
    BLOCKS: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What Stage II's backward needs of each token: gradient before the norm, log-sum-exps and deltas."""
    program = tl.program_id(0)
    batch, head = (program // heads).to(tl.int64), program % heads
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < num_tokens
    tokens += (program * STREAMS).to(tl.int64) * n * D
    contrast += program.to(tl.int64) * n * D
    x, x_tail = load_rows(q + batch * stride_b + head * stride_m, row, stride_n, inside, D, HEAD, TAIL)
    lse_pos, lse_neg = stage2_logsumexp(
        tokens, x, x_tail, n, scale, CONTRAST, JOINT, BLOCKS, D, HEAD, TAIL, TOKENS, ROWS, PRECISION
    )

    pos = tl.zeros((ROWS, HEAD), tl.float32)  # what either stream reads
    pos_tail = pos
    if TAIL:
        pos_tail = tl.zeros((ROWS, TAIL), tl.float32)
    neg, neg_tail = pos, pos_tail
    for block in range(BLOCKS):
        v_hat, v_hat_tail = load_v_hat(contrast, norm1, block, n, gain, eps, D, HEAD, TAIL, TOKENS)
        scores = stream_scores(tokens, 0, block, x, x_tail, n, scale, D, HEAD, TAIL, TOKENS, PRECISION)
        weights = tl.exp2(scores - lse_pos[:, None])
        pos, pos_tail = over_rows(weights, v_hat, v_hat_tail, pos, pos_tail, TAIL, PRECISION)
        if CONTRAST:
            scores = stream_scores(tokens, 1, block, x, x_tail, n, scale, D, HEAD, TAIL, TOKENS, PRECISION)
            weights = tl.exp2(scores - lse_neg[:, None])
            neg, neg_tail = over_rows(weights, v_hat, v_hat_tail, neg, neg_tail, TAIL, PRECISION)
    read, read_tail = pos, pos_tail
    if CONTRAST:
        share = tl.load(lambda2)
        read, read_tail = pos - share * neg, pos_tail - share * neg_tail

    g, g_tail = load_rows(
        grad + batch * grad_stride_b + head * grad_stride_m, row, grad_stride_n, inside, D, HEAD, TAIL
    )  # fmt: skip
    weight, weight_tail = load_weight(norm2, gain, D, HEAD, TAIL)
    g, g_tail, by_row, by_row_tail = norm_gradient(
        read, read_tail, g.to(tl.float32), g_tail.to(tl.float32), weight, weight_tail, eps, D, TAIL
    )
    store_rows(
        grad_read + batch * read_stride_b + head * read_stride_m, row, read_stride_n, inside, g, g_tail, D, HEAD, TAIL
    )
    place = tl.program_id(1) * tl.num_programs(0) + program
    store_weight(
        grad_norm2 + place * D, gain * tl.sum(by_row, axis=0), gain * tl.sum(by_row_tail, axis=0), D, HEAD, TAIL
    )

    delta_pos = row_sum(g, g_tail, pos, pos_tail, TAIL)
    lse += program * 2 * num_tokens + row
    delta += program * 2 * num_tokens + row
    tl.store(lse, lse_pos, mask=inside)
    if CONTRAST:
        by_neg = row_sum(g, g_tail, neg, neg_tail, TAIL)
        tl.store(grad_lambda2 + place, -tl.sum(tl.where(inside, by_neg, 0.0), axis=0))
        delta_neg = -share * by_neg
        if JOINT:
            delta_pos += delta_neg
            delta_neg = delta_pos
        tl.store(lse + num_tokens, lse_neg, mask=inside)
        tl.store(delta + num_tokens, delta_neg, mask=inside)
    tl.store(delta, delta_pos, mask=inside)


@triton.jit
def stage1_rows_kernel(
    contrast,  # (B, M, n, D), v+ - l1 v-
    v_neg,  # (B, M, n, D)
    lambda1,
    norm1,
    grad_v_hat,  # (splits, B, M, n, D)
    grad_seen,  # (B, M, n, D), of v+ - l1 v-
    delta,  # (B, M, streams, n) float32
    grad_norm1,  # (blocks of n, B, M, D) float32, to be summed
    grad_lambda1,  # (blocks of n, B, M) float32, to be summed
    n,
    splits,
    gain,
    eps,
    CONTRAST: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """What Stage I's backward needs of each contrast token: gradient before the norm, and deltas."""
    program = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    valid = token < n
    first = program.to(tl.int64) * n * D
    g = tl.zeros((TOKENS, HEAD), tl.float32)
    g_tail = g
    if TAIL:
        g_tail = tl.zeros((TOKENS, TAIL), tl.float32)
    for split in range(0, splits):
        rows = grad_v_hat + (split * tl.num_programs(0) + program).to(tl.int64) * n * D
        more, more_tail = load_rows(rows, token, D, valid, D, HEAD, TAIL)
        g += more
        if TAIL:
            g_tail += more_tail

    x, x_tail = load_rows(contrast + first, token, D, valid, D, HEAD, TAIL)
    x, x_tail = x.to(tl.float32), x_tail.to(tl.float32)
    weight, weight_tail = load_weight(norm1, gain, D, HEAD, TAIL)
    g, g_tail, by_row, by_row_tail = norm_gradient(x, x_tail, g, g_tail, weight, weight_tail, eps, D, TAIL)
    store_rows(grad_seen + first, token, D, valid, g, g_tail, D, HEAD, TAIL)
    place = tl.program_id(1) * tl.num_programs(0) + program
    store_weight(
        grad_norm1 + place * D, gain * tl.sum(by_row, axis=0), gain * tl.sum(by_row_tail, axis=0), D, HEAD, TAIL
    )

    delta += program * (1 + CONTRAST) * n + token
    delta_pos = row_sum(g, g_tail, x, x_tail, TAIL)
    if CONTRAST:  # v+ is x + l1 v-
        neg, neg_tail = load_rows(v_neg + first, token, D, valid, D, HEAD, TAIL)
        by_neg = row_sum(g, g_tail, neg.to(tl.float32), neg_tail.to(tl.float32), TAIL)
        share = tl.load(lambda1)
        delta_pos += share * by_neg
        tl.store(delta + n, -share * by_neg, mask=valid)
        tl.store(grad_lambda1 + place, -tl.sum(by_neg, axis=0))
    tl.store(delta, delta_pos, mask=valid)


@triton.jit
def stream_gradients(
    t, t_tail, x, x_tail, g, valid, lse, delta, share, scale,
    grad_x, grad_x_tail, grad_t, grad_t_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One stream's part of the weights, `share A`, and what it adds to the gradients of x and of its tokens."""
    scores = over_head_dim(t, t_tail, x, x_tail, TAIL, PRECISION) * scale  # (TOKENS, ROWS), base 2
    a = tl.where(valid, tl.exp2(scores - lse), 0.0)
    grad_scores = (a * (share * g - delta)).to(x.dtype)
    grad_x, grad_x_tail = over_rows(tl.trans(grad_scores), t, t_tail, grad_x, grad_x_tail, TAIL, PRECISION)
    grad_t, grad_t_tail = over_rows(grad_scores, x, x_tail, grad_t, grad_t_tail, TAIL, PRECISION)
    return share * a, grad_x, grad_x_tail, grad_t, grad_t_tail


@triton.jit
def stage_backward_kernel(
    tokens,  # (B, M, S, n, D)
    x,  # (B, M, N, D): Stage I k, Stage II q
    y,  # (B, M, N, D): Stage I v, Stage II the gradient before the norm
    values,  # (B, M, n, D): Stage I the gradient before the norm, Stage II v+ - l1 v-, of which v^ is the norm
    norm1,
    weight,  # lambda of the stage
    lse,  # (B, M, streams, n), or (B, M, 2, N)
    delta,  # likewise
    found,  # (B, M, S, n, D), where Stage I begins: what Stage II has found of the tokens' gradient
    grad_x,  # (blocks of n, B, M, N, D)
    grad_y,  # Stage I: (blocks of n, B, M, N, D), of v
    grad_values,  # Stage II: (splits, B, M, n, D), of v^
    grad_tokens,  # (splits, B, M, S, n, D)
    x_stride_b,
    x_stride_m,
    x_stride_n,
    y_stride_b,
    y_stride_m,
    y_stride_n,
    grad_stride_block,
    grad_stride_b,
    grad_stride_m,
    grad_stride_n,
    heads,
    num_tokens,
    n,
    split,
    scale,
    gain,
    eps,
    STAGE: tl.constexpr,
    FOUND: tl.constexpr,
    STREAMS: tl.constexpr,
    CONTRAST: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Backward of either stage for a block of contrast tokens, over a split of the tokens."""
    program, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = (program // heads).to(tl.int64), program % heads
    x += batch * x_stride_b + head * x_stride_m
    y += batch * y_stride_b + head * y_stride_m
    grad_place = block.to(tl.int64) * grad_stride_block + batch * grad_stride_b + head * grad_stride_m
    token = block * TOKENS + tl.arange(0, TOKENS)
    known = token < n
    first = program.to(tl.int64) * n * D
    neg_rows = n * D  # from the tokens of the positive stream to those of the negative one
    tokens += first * STREAMS
    log2e_inverse: tl.constexpr = 0.6931471805599453

    pos, pos_tail = load_rows(tokens, token, D, known, D, HEAD, TAIL)
    neg, neg_tail = pos, pos_tail
    share = 0.0
    if CONTRAST:
        neg, neg_tail = load_rows(tokens + neg_rows, token, D, known, D, HEAD, TAIL)
        share = -tl.load(weight)
    if STAGE == 1:
        seen, seen_tail = load_rows(values + first, token, D, known, D, HEAD, TAIL)
        lse += program * (1 + CONTRAST) * n + token
        delta += program * (1 + CONTRAST) * n + token
        lse_pos, delta_pos = (
            tl.load(lse, mask=known, other=0.0)[:, None],
            tl.load(delta, mask=known, other=0.0)[:, None],
        )
        lse_neg, delta_neg = lse_pos, delta_pos
        if CONTRAST:
            lse_neg = tl.load(lse + n, mask=known, other=0.0)[:, None]
            delta_neg = tl.load(delta + n, mask=known, other=0.0)[:, None]
    else:
        seen, seen_tail = load_v_hat(values + first, norm1, block, n, gain, eps, D, HEAD, TAIL, TOKENS)
        lse += program * 2 * num_tokens
        delta += program * 2 * num_tokens

    grad_pos = tl.zeros((TOKENS, HEAD), tl.float32)
    grad_pos_tail = grad_pos
    if TAIL:
        grad_pos_tail = tl.zeros((TOKENS, TAIL), tl.float32)
    grad_neg, grad_neg_tail = grad_pos, grad_pos_tail
    grad_seen, grad_seen_tail = grad_pos, grad_pos_tail

    start = part * split
    for place in range(start, tl.minimum(start + split, num_tokens), ROWS):
        row = place + tl.arange(0, ROWS)
        inside = row < num_tokens
        rows, rows_tail = load_rows(x, row, x_stride_n, inside, D, HEAD, TAIL)
        others, others_tail = load_rows(y, row, y_stride_n, inside, D, HEAD, TAIL)
        if STAGE == 2:
            lse_pos = tl.load(lse + row, mask=inside, other=0.0)[None, :]
            delta_pos = tl.load(delta + row, mask=inside, other=0.0)[None, :]
            lse_neg, delta_neg = lse_pos, delta_pos
            if CONTRAST:
                lse_neg = tl.load(lse + num_tokens + row, mask=inside, other=0.0)[None, :]
                delta_neg = tl.load(delta + num_tokens + row, mask=inside, other=0.0)[None, :]
        valid = known[:, None] & inside[None, :]
        g = over_head_dim(seen, seen_tail, others, others_tail, TAIL, PRECISION)  # of the weights, (TOKENS, ROWS)

        grad_rows = tl.zeros((ROWS, HEAD), tl.float32)
        grad_rows_tail = grad_rows
        if TAIL:
            grad_rows_tail = tl.zeros((ROWS, TAIL), tl.float32)
        weights, grad_rows, grad_rows_tail, grad_pos, grad_pos_tail = stream_gradients(
            pos, pos_tail, rows, rows_tail, g, valid, lse_pos, delta_pos, 1.0, scale,
            grad_rows, grad_rows_tail, grad_pos, grad_pos_tail, TAIL, PRECISION,
        )  # fmt: skip
        if CONTRAST:
            more, grad_rows, grad_rows_tail, grad_neg, grad_neg_tail = stream_gradients(
                neg, neg_tail, rows, rows_tail, g, valid, lse_neg, delta_neg, share, scale,
                grad_rows, grad_rows_tail, grad_neg, grad_neg_tail, TAIL, PRECISION,
            )  # fmt: skip
            weights += more
        natural = scale * log2e_inverse
        store_rows(
            grad_x + grad_place, row, grad_stride_n, inside,
            grad_rows * natural, grad_rows_tail * natural, D, HEAD, TAIL,
        )  # fmt: skip
        if STAGE == 1:
            grad_others = tl.zeros((ROWS, HEAD), tl.float32)
            grad_others_tail = grad_others
            if TAIL:
                grad_others_tail = tl.zeros((ROWS, TAIL), tl.float32)
            grad_others, grad_others_tail = over_rows(
                tl.trans(weights), seen, seen_tail, grad_others, grad_others_tail, TAIL, PRECISION
            )
            store_rows(
                grad_y + grad_place, row, grad_stride_n, inside, grad_others, grad_others_tail, D, HEAD, TAIL
            )  # fmt: skip
        else:
            grad_seen, grad_seen_tail = over_rows(
                weights, others, others_tail, grad_seen, grad_seen_tail, TAIL, PRECISION
            )

    place = (part * tl.num_programs(0) + program).to(tl.int64) * n * D
    natural = scale * log2e_inverse
    grad_pos, grad_neg = grad_pos * natural, grad_neg * natural
    grad_pos_tail, grad_neg_tail = grad_pos_tail * natural, grad_neg_tail * natural
    if FOUND and part == 0:
        found += first * STREAMS
        more, more_tail = load_rows(found, token, D, known, D, HEAD, TAIL)
        grad_pos, grad_pos_tail = grad_pos + more, grad_pos_tail + more_tail
        if STREAMS == 2:
            more, more_tail = load_rows(found + neg_rows, token, D, known, D, HEAD, TAIL)
            grad_neg, grad_neg_tail = grad_neg + more, grad_neg_tail + more_tail
    grad_tokens += place * STREAMS
    store_rows(grad_tokens, token, D, known, grad_pos, grad_pos_tail, D, HEAD, TAIL)
    if STREAMS == 2:
        store_rows(grad_tokens + neg_rows, token, D, known, grad_neg, grad_neg_tail, D, HEAD, TAIL)
    if STAGE == 2:
        store_rows(grad_values + place, token, D, known, grad_seen, grad_seen_tail, D, HEAD, TAIL)


@triton.jit
def unpool_kernel(
    grad_tokens,  # (B, M, S, n, D)
    grad_q,  # (B, M, N, D), added to
    stride_b,
    stride_m,
    stride_n,
    heads,
    n,
    prefix,
    height,
    width,
    rows,  # h
    columns,  # w
    DOWN: tl.constexpr,  # cells that a row of the grid lies in, at most
    ACROSS: tl.constexpr,
    POOL_POS: tl.constexpr,
    POOL_NEG: tl.constexpr,
    STREAMS: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Backward of the average: each token of the grid gets its share of the cells that it lies in."""
    program = tl.program_id(0)
    batch, head = (program // heads).to(tl.int64), program % heads
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = token < height * width
    y, x = token // width, token % width
    grad_tokens += (program * STREAMS).to(tl.int64) * n * D
    grad_q += batch * stride_b + head * stride_m
    g, g_tail = load_rows(grad_q, prefix + token, stride_n, inside, D, HEAD, TAIL)
    total, total_tail = g.to(tl.float32), g_tail.to(tl.float32)
    for down in tl.static_range(DOWN):
        row = y * rows // height + down
        top, bottom = row * height // rows, ((row + 1) * height + rows - 1) // rows
        for across in tl.static_range(ACROSS):
            column = x * columns // width + across
            left, right = column * width // columns, ((column + 1) * width + columns - 1) // columns
            share = (inside & (row < rows) & (top <= y) & (column < columns) & (left <= x)).to(tl.float32)
            share = (share / ((bottom - top) * (right - left)))[:, None]
            cell = tl.minimum(row, rows - 1) * columns + tl.minimum(column, columns - 1)
            if POOL_POS:
                more, more_tail = load_rows(grad_tokens, cell, D, inside, D, HEAD, TAIL)
                total += share * more
                if TAIL:
                    total_tail += share * more_tail
            if POOL_NEG:
                more, more_tail = load_rows(grad_tokens + n * D, cell, D, inside, D, HEAD, TAIL)
                total += share * more
                if TAIL:
                    total_tail += share * more_tail
    store_rows(grad_q, prefix + token, stride_n, inside, total, total_tail, D, HEAD, TAIL)
