"""Forward kernels of VCA: contrast tokens, Stage I (whole, or in splits over N and then combined), Stage II.

Shape letters: B batch, M heads, N = P + H W tokens, D head dim, n = h w contrast tokens, S streams of the tokens (2, or
1 where both stages are plain). One program works for one head of one image.
"""

import triton
import triton.language as tl

from vca.attention.kernels.tiles import (
    inverse_rms,
    load_rows,
    load_weight,
    log2_of_sum,
    over_head_dim,
    over_rows,
    store_rows,
)


@triton.jit
def contrast_tokens_kernel(
    source,  # (B, M, P + H W, D), what is averaged
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
    rows,  # h
    columns,  # w
    largest,  # tokens in the largest cell
    POOL_POS: tl.constexpr,
    POOL_NEG: tl.constexpr,
    EMBED_POS: tl.constexpr,
    EMBED_NEG: tl.constexpr,
    STREAMS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    CELL: tl.constexpr,
):
    """Tokens of both streams: the mean of a cell of the grid, its embedding, or their sum."""
    program = tl.program_id(0)
    batch, head = (program // heads).to(tl.int64), program % heads
    source += batch * stride_b + head * stride_m
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, WIDTH)
    valid = (token < n)[:, None] & (column < D)[None, :]

    mean = tl.zeros((TOKENS, WIDTH), tl.float32)
    if POOL_POS or POOL_NEG:
        row = token // columns
        top, bottom = row * height // rows, ((row + 1) * height + rows - 1) // rows
        place = token % columns
        left, right = place * width // columns, ((place + 1) * width + columns - 1) // columns
        size = (bottom - top) * (right - left)
        for start in range(0, largest, CELL):
            cell = start + tl.arange(0, CELL)[None, :]
            across = (right - left)[:, None]
            y, x = top[:, None] + cell // across, left[:, None] + cell % across
            inside = (cell < size[:, None]) & (token < n)[:, None]
            pointers = source + (prefix + y * width + x)[:, :, None] * stride_n + column[None, None, :]
            values = tl.load(pointers, mask=inside[:, :, None] & (column < D)[None, None, :], other=0.0)
            mean += tl.sum(values.to(tl.float32), axis=1)
        mean = mean / size[:, None]

    place_of = token[:, None] * D + column[None, :]
    tokens += (program * STREAMS).to(tl.int64) * n * D
    positive = tl.zeros((TOKENS, WIDTH), tl.float32)
    if POOL_POS:
        positive = mean
    if EMBED_POS:
        positive += tl.load(e_pos + head * n * D + place_of, mask=valid, other=0.0)
    tl.store(tokens + place_of, positive.to(tokens.dtype.element_ty), mask=valid)
    if STREAMS == 2:
        negative = tl.zeros((TOKENS, WIDTH), tl.float32)
        if POOL_NEG:
            negative = mean
        if EMBED_NEG:
            negative += tl.load(e_neg + head * n * D + place_of, mask=valid, other=0.0)
        tl.store(tokens + n * D + place_of, negative.to(tokens.dtype.element_ty), mask=valid)


@triton.jit
def store_stage1(
    lambda1, contrast, v_neg, lse, program, stream, token, n, seen, seen_tail, lse_of_row,
    CONTRAST: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Store what both streams have seen: `v+ - l1 v-`, `v-`, and the log-sum-exps; rows lie stream by stream."""
    first = program.to(tl.int64) * n * D
    tl.store(lse + program * (1 + CONTRAST) * n + stream * n + token, lse_of_row, mask=token < n)
    if CONTRAST:
        store_rows(v_neg + first, token, D, (token < n) & (stream == 1), seen, seen_tail, D, HEAD, TAIL)
        share = tl.where(stream == 0, 1.0, -tl.load(lambda1))[:, None]
        seen = tl.sum(tl.reshape(seen * share, (2, TOKENS, HEAD)), axis=0)
        if TAIL:
            seen_tail = tl.sum(tl.reshape(seen_tail * share, (2, TOKENS, TAIL)), axis=0)
        token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    store_rows(contrast + first, token, D, token < n, seen, seen_tail, D, HEAD, TAIL)


@triton.jit
def stage1_kernel(
    tokens,  # (B, M, S, n, D)
    k,  # (B, M, N, D), in memory like v
    v,
    lambda1,
    contrast,  # (B, M, n, D), v+ - l1 v-
    v_neg,  # (B, M, n, D)
    lse,  # (B, M, streams, n) float32, base 2
    part,  # (splits, B, M, streams, n, D) float32, where N is split
    part_lse,  # (splits, B, M, streams, n) float32
    stride_b,
    stride_m,
    stride_n,
    heads,
    num_tokens,
    n,
    split,  # tokens in a split
    scale,
    SPLITS: tl.constexpr,  # 0: N is whole
    STREAMS: tl.constexpr,
    CONTRAST: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stage I, softmax attention of the contrast tokens over all tokens: one tile of rows serves both streams."""
    program = tl.program_id(0)
    batch, head = (program // heads).to(tl.int64), program % heads
    k += batch * stride_b + head * stride_m
    v += batch * stride_b + head * stride_m
    row = tl.arange(0, (1 + CONTRAST) * TOKENS)
    stream, token = row // TOKENS, tl.program_id(1) * TOKENS + row % TOKENS
    valid = token < n
    first = (program * STREAMS).to(tl.int64) * n * D
    t, t_tail = load_rows(tokens + first, stream * n + token, D, valid, D, HEAD, TAIL)

    maximum = tl.full(((1 + CONTRAST) * TOKENS,), float("-inf"), tl.float32)
    total = tl.zeros(((1 + CONTRAST) * TOKENS,), tl.float32)
    seen = tl.zeros(((1 + CONTRAST) * TOKENS, HEAD), tl.float32)
    seen_tail = seen
    if TAIL:
        seen_tail = tl.zeros(((1 + CONTRAST) * TOKENS, TAIL), tl.float32)
    start = tl.program_id(2) * split
    end = tl.minimum(start + split, num_tokens)
    for block in range(start, end, ROWS):
        place = block + tl.arange(0, ROWS)
        inside = place < end
        keys, keys_tail = load_rows(k, place, stride_n, inside, D, HEAD, TAIL)
        values, values_tail = load_rows(v, place, stride_n, inside, D, HEAD, TAIL)
        scores = over_head_dim(t, t_tail, keys, keys_tail, TAIL, PRECISION) * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new, total = log2_of_sum(scores, maximum, total)
        shrink = tl.exp2(maximum - new)[:, None]
        maximum = new
        seen *= shrink
        if TAIL:
            seen_tail *= shrink
        weights = tl.exp2(scores - new[:, None])
        seen, seen_tail = over_rows(weights, values, values_tail, seen, seen_tail, TAIL, PRECISION)

    seen /= total[:, None]
    if TAIL:
        seen_tail /= total[:, None]
    lse_of_row = maximum + tl.log2(total)
    if SPLITS == 0:
        store_stage1(
            lambda1, contrast, v_neg, lse, program, stream, token, n, seen, seen_tail, lse_of_row,
            CONTRAST, D, HEAD, TAIL, TOKENS,
        )  # fmt: skip
    else:
        place = tl.program_id(2) * tl.num_programs(0) + program
        rows = place * (1 + CONTRAST) * n
        tl.store(part_lse + rows + stream * n + token, lse_of_row, mask=valid)
        store_rows(part + rows.to(tl.int64) * D, stream * n + token, D, valid, seen, seen_tail, D, HEAD, TAIL)


@triton.jit
def combine_kernel(
    part,
    part_lse,
    lambda1,
    contrast,
    v_neg,
    lse,
    n,
    splits,
    CONTRAST: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Stage I of the splits to that of all tokens; arguments as `stage1_kernel` has them."""
    program = tl.program_id(0)
    row = tl.arange(0, (1 + CONTRAST) * TOKENS)
    stream, token = row // TOKENS, tl.program_id(1) * TOKENS + row % TOKENS
    valid = token < n
    maximum = tl.full(((1 + CONTRAST) * TOKENS,), float("-inf"), tl.float32)
    total = tl.zeros(((1 + CONTRAST) * TOKENS,), tl.float32)
    seen = tl.zeros(((1 + CONTRAST) * TOKENS, HEAD), tl.float32)
    seen_tail = seen
    if TAIL:
        seen_tail = tl.zeros(((1 + CONTRAST) * TOKENS, TAIL), tl.float32)
    for split in range(0, splits):
        rows = (split * tl.num_programs(0) + program) * (1 + CONTRAST) * n
        of_split = tl.load(part_lse + rows + stream * n + token, mask=valid, other=0.0)
        values, values_tail = load_rows(
            part + rows.to(tl.int64) * D, stream * n + token, D, valid, D, HEAD, TAIL
        )  # fmt: skip
        new = tl.maximum(maximum, of_split)
        shrink, share = tl.exp2(maximum - new), tl.exp2(of_split - new)
        maximum, total = new, total * shrink + share
        seen = seen * shrink[:, None] + values * share[:, None]
        if TAIL:
            seen_tail = seen_tail * shrink[:, None] + values_tail * share[:, None]
    seen /= total[:, None]
    if TAIL:
        seen_tail /= total[:, None]
    store_stage1(
        lambda1, contrast, v_neg, lse, program, stream, token, n, seen, seen_tail, maximum + tl.log2(total),
        CONTRAST, D, HEAD, TAIL, TOKENS,
    )  # fmt: skip


@triton.jit
def stream_scores(
    tokens, stream, block, x, x_tail, n, scale,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of rows against a block of one stream's tokens, `(R, TOKENS)` in base 2, -inf where there is no token."""
    token = block * TOKENS + tl.arange(0, TOKENS)
    t, t_tail = load_rows(tokens + stream * n * D, token, D, token < n, D, HEAD, TAIL)
    scores = over_head_dim(x, x_tail, t, t_tail, TAIL, PRECISION) * scale
    return tl.where((token < n)[None, :], scores, float("-inf"))


@triton.jit
def stage2_logsumexp(
    tokens, x, x_tail, n, scale,
    CONTRAST: tl.constexpr, JOINT: tl.constexpr, BLOCKS: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of rows over the tokens of either stream, or over both jointly: two of `(ROWS,)`."""
    max_pos, sum_pos = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    max_neg, sum_neg = max_pos, sum_pos
    for block in range(BLOCKS):
        scores = stream_scores(tokens, 0, block, x, x_tail, n, scale, D, HEAD, TAIL, TOKENS, PRECISION)
        max_pos, sum_pos = log2_of_sum(scores, max_pos, sum_pos)
        if CONTRAST:
            scores = stream_scores(tokens, 1, block, x, x_tail, n, scale, D, HEAD, TAIL, TOKENS, PRECISION)
            max_neg, sum_neg = log2_of_sum(scores, max_neg, sum_neg)
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
    contrast, norm1, block, n, gain, eps,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """v^ of a block of contrast tokens, in the type of `contrast`: the norm of Stage I."""
    token = block * TOKENS + tl.arange(0, TOKENS)
    raw, raw_tail = load_rows(contrast, token, D, token < n, D, HEAD, TAIL)
    x, x_tail = raw.to(tl.float32), raw_tail.to(tl.float32)
    weight, weight_tail = load_weight(norm1, gain, D, HEAD, TAIL)
    inverse = inverse_rms(x, x_tail, eps, D, TAIL)
    return (x * inverse * weight).to(raw.dtype), (x_tail * inverse * weight_tail).to(raw.dtype)


@triton.jit
def stage2_kernel(
    q,  # (B, M, N, D)
    tokens,  # (B, M, S, n, D)
    contrast,  # (B, M, n, D)
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
    BLOCKS: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stage II: a block of tokens reads v^ by the difference of two softmaxes; the norm.

    The scores of a single block of contrast tokens are made once: the compiler sees that the second time is the first.
    """
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

    read = tl.zeros((ROWS, HEAD), tl.float32)
    read_tail = read
    if TAIL:
        read_tail = tl.zeros((ROWS, TAIL), tl.float32)
    for block in range(BLOCKS):
        scores = stream_scores(tokens, 0, block, x, x_tail, n, scale, D, HEAD, TAIL, TOKENS, PRECISION)
        weights = tl.exp2(scores - lse_pos[:, None])
        if CONTRAST:
            scores = stream_scores(tokens, 1, block, x, x_tail, n, scale, D, HEAD, TAIL, TOKENS, PRECISION)
            weights -= tl.load(lambda2) * tl.exp2(scores - lse_neg[:, None])
        v_hat, v_hat_tail = load_v_hat(contrast, norm1, block, n, gain, eps, D, HEAD, TAIL, TOKENS)
        read, read_tail = over_rows(weights, v_hat, v_hat_tail, read, read_tail, TAIL, PRECISION)

    weight, weight_tail = load_weight(norm2, gain, D, HEAD, TAIL)
    inverse = inverse_rms(read, read_tail, eps, D, TAIL)
    store_rows(
        out + batch * out_stride_b + head * out_stride_m, row, out_stride_n, inside,
        read * inverse * weight, read_tail * inverse * weight_tail, D, HEAD, TAIL,
    )  # fmt: skip
