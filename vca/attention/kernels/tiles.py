"""Building blocks of the kernels: loads and stores of rows, matrix products, base-2 softmaxes, RMSNorm.

Tile sides are powers of two. A head dim that is not, such as 72 in DiT-XL, is split into two tiles (64 and 16) instead
of padding to 128. Each row tile `x` therefore has a second tile `x_rest`, which is unused if D_REST is 0.

Shape letters: R rows, D head dim, D_MAIN and D_REST the widths of its two tiles.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(pointer, rows, stride, valid, FIRST: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr):
    """Load rows `(R, BLOCK_D)` from column FIRST; rows that are not `valid` and columns >= D are 0."""
    columns = FIRST + tl.arange(0, BLOCK_D)
    return tl.load(
        pointer + rows[:, None] * stride + columns[None, :], mask=valid[:, None] & (columns < D)[None, :], other=0.0
    )


@triton.jit
def load_rows(pointer, rows, stride, valid, D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr):
    """Load rows of a head, `(R, D_MAIN)` and `(R, D_REST)`."""
    main = load_tile(pointer, rows, stride, valid, 0, D_MAIN, D)
    rest = main
    if D_REST:
        rest = load_tile(pointer, rows, stride, valid, D_MAIN, D_REST, D)
    return main, rest


@triton.jit
def store_tile(pointer, rows, stride, valid, values, FIRST: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr):
    """Store the rows of `load_tile` in the dtype of the pointer."""
    columns = FIRST + tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (columns < D)[None, :]
    tl.store(pointer + rows[:, None] * stride + columns[None, :], values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(pointer, rows, stride, valid, main, rest, D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr):
    """Store rows of a head, `(R, D_MAIN)` and `(R, D_REST)`."""
    store_tile(pointer, rows, stride, valid, main, 0, D_MAIN, D)
    if D_REST:
        store_tile(pointer, rows, stride, valid, rest, D_MAIN, D_REST, D)


@triton.jit
def load_weight(pointer, gain, D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr):
    """Load a norm weight times `gain`, `(1, D_MAIN)` and `(1, D_REST)` in float32."""
    columns = tl.arange(0, D_MAIN)
    main = tl.load(pointer + columns, mask=columns < D, other=0.0)[None, :] * gain
    rest = main
    if D_REST:
        columns = D_MAIN + tl.arange(0, D_REST)
        rest = tl.load(pointer + columns, mask=columns < D, other=0.0)[None, :] * gain
    return main, rest


@triton.jit
def store_weight(pointer, main, rest, D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr):
    """Store one row of D numbers from `(D_MAIN,)` and `(D_REST,)`."""
    columns = tl.arange(0, D_MAIN)
    tl.store(pointer + columns, main, mask=columns < D)
    if D_REST:
        columns = D_MAIN + tl.arange(0, D_REST)
        tl.store(pointer + columns, rest, mask=columns < D)


@triton.jit
def dot_nt(a, a_rest, b, b_rest, D_REST: tl.constexpr, PRECISION: tl.constexpr):
    """Compute `a b^T` in float32 for R and R' rows: `(R, R')`."""
    product = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if D_REST:
        product = tl.dot(a_rest, tl.trans(b_rest), product, input_precision=PRECISION)
    return product


@triton.jit
def dot_acc(weights, b, b_rest, main, rest, D_REST: tl.constexpr, PRECISION: tl.constexpr):
    """Compute `main + weights b` for weights `(R, R')`, which are rounded to the dtype of b."""
    weights = weights.to(b.dtype)
    main = tl.dot(weights, b, main, input_precision=PRECISION)
    if D_REST:
        rest = tl.dot(weights, b_rest, rest, input_precision=PRECISION)
    return main, rest


@triton.jit
def row_dot(a, a_rest, b, b_rest, D_REST: tl.constexpr):
    """Compute `sum(a b)` over the head dim: `(R,)`."""
    total = tl.sum(a * b, axis=1)
    if D_REST:
        total += tl.sum(a_rest * b_rest, axis=1)
    return total


@triton.jit
def rstd_of_rows(x, x_rest, eps, D: tl.constexpr, D_REST: tl.constexpr):
    """Compute `1 / sqrt(mean(x^2) + eps)` of each row: `(R, 1)`."""
    return tl.rsqrt(row_dot(x, x_rest, x, x_rest, D_REST) / D + eps)[:, None]


@triton.jit
def rms_norm_bwd(x, x_rest, dy, dy_rest, weight, weight_rest, eps, D: tl.constexpr, D_REST: tl.constexpr):
    """Backward of `weight RMSNorm(x)`: dx, and dweight before the sum over rows."""
    rstd = rstd_of_rows(x, x_rest, eps, D, D_REST)
    unit, unit_rest = x * rstd, x_rest * rstd
    dweight, dweight_rest = dy * unit, dy_rest * unit_rest
    dy, dy_rest = dy * weight, dy_rest * weight_rest
    mean = (row_dot(dy, dy_rest, unit, unit_rest, D_REST) / D)[:, None]
    return (dy - unit * mean) * rstd, (dy_rest - unit_rest * mean) * rstd, dweight, dweight_rest


@triton.jit
def online_lse(scores, m_i, l_i):
    """Update the running maximum and sum, both `(R,)`, of `log2(sum(2^scores))` over columns."""
    m_new = tl.maximum(m_i, tl.max(scores, axis=1))
    l_i = l_i * tl.exp2(m_i - m_new) + tl.sum(tl.exp2(scores - m_new[:, None]), axis=1)
    return m_new, l_i
