"""What the kernels are made of: rows of a head as tiles, products over the head dim, softmaxes in base 2, the norm.

Tiles have sides that are powers of two. A head dim that is none, such as the 72 of DiT-XL, is two tiles, 64 and 16,
instead of one of 128: every tile of rows comes with its `tail`, which is not looked at where TAIL is 0.

Shape letters: R rows, D head dim, HEAD and TAIL the widths of its two tiles.
"""

import triton
import triton.language as tl


@triton.jit
def load_columns(pointer, rows, stride, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Rows `(R, WIDTH)` from column FIRST on; 0 in rows that are not `valid` and in columns from D on."""
    columns = FIRST + tl.arange(0, WIDTH)
    return tl.load(
        pointer + rows[:, None] * stride + columns[None, :], mask=valid[:, None] & (columns < D)[None, :], other=0.0
    )


@triton.jit
def load_rows(pointer, rows, stride, valid, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Rows of a head, `(R, HEAD)` and `(R, TAIL)`."""
    main = load_columns(pointer, rows, stride, valid, 0, HEAD, D)
    tail = main
    if TAIL:
        tail = load_columns(pointer, rows, stride, valid, HEAD, TAIL, D)
    return main, tail


@triton.jit
def store_columns(pointer, rows, stride, valid, values, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """What `load_columns` loads, stored in the type of the pointer."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = valid[:, None] & (columns < D)[None, :]
    tl.store(pointer + rows[:, None] * stride + columns[None, :], values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(pointer, rows, stride, valid, main, tail, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Rows of a head, `(R, HEAD)` and `(R, TAIL)`."""
    store_columns(pointer, rows, stride, valid, main, 0, HEAD, D)
    if TAIL:
        store_columns(pointer, rows, stride, valid, tail, HEAD, TAIL, D)


@triton.jit
def load_weight(pointer, gain, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Weight of a norm times `gain`, `(1, HEAD)` and `(1, TAIL)` in float32."""
    columns = tl.arange(0, HEAD)
    main = tl.load(pointer + columns, mask=columns < D, other=0.0)[None, :] * gain
    tail = main
    if TAIL:
        columns = HEAD + tl.arange(0, TAIL)
        tail = tl.load(pointer + columns, mask=columns < D, other=0.0)[None, :] * gain
    return main, tail


@triton.jit
def store_weight(pointer, main, tail, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """One row of D numbers, from `(HEAD,)` and `(TAIL,)`."""
    columns = tl.arange(0, HEAD)
    tl.store(pointer + columns, main, mask=columns < D)
    if TAIL:
        columns = HEAD + tl.arange(0, TAIL)
        tl.store(pointer + columns, tail, mask=columns < D)


@triton.jit
def over_head_dim(a, a_tail, b, b_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """`a b^T` in float32: two tiles of R and R' rows to `(R, R')`."""
    product = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if TAIL:
        product = tl.dot(a_tail, tl.trans(b_tail), product, input_precision=PRECISION)
    return product


@triton.jit
def over_rows(weights, b, b_tail, main, tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """`main + weights b`, in two tiles: weights `(R, R')`, b of R' rows; the weights are rounded to the type of b."""
    weights = weights.to(b.dtype)
    main = tl.dot(weights, b, main, input_precision=PRECISION)
    if TAIL:
        tail = tl.dot(weights, b_tail, tail, input_precision=PRECISION)
    return main, tail


@triton.jit
def row_sum(a, a_tail, b, b_tail, TAIL: tl.constexpr):
    """`sum(a b)` over the head dim: `(R,)`."""
    total = tl.sum(a * b, axis=1)
    if TAIL:
        total += tl.sum(a_tail * b_tail, axis=1)
    return total


@triton.jit
def inverse_rms(x, x_tail, eps, D: tl.constexpr, TAIL: tl.constexpr):
    """`1 / sqrt(mean(x^2) + eps)` of each row, `(R, 1)`."""
    return tl.rsqrt(row_sum(x, x_tail, x, x_tail, TAIL) / D + eps)[:, None]


@triton.jit
def norm_gradient(x, x_tail, grad, grad_tail, weight, weight_tail, eps, D: tl.constexpr, TAIL: tl.constexpr):
    """Backward of `weight RMSNorm(x)`: gradient of x in two tiles, and `grad x / rms(x)`, of which the weight's is the
    sum over rows."""
    inverse = inverse_rms(x, x_tail, eps, D, TAIL)
    unit, unit_tail = x * inverse, x_tail * inverse
    by_row, by_row_tail = grad * unit, grad_tail * unit_tail
    grad, grad_tail = grad * weight, grad_tail * weight_tail
    mean = (row_sum(grad, grad_tail, unit, unit_tail, TAIL) / D)[:, None]
    return (grad - unit * mean) * inverse, (grad_tail - unit_tail * mean) * inverse, by_row, by_row_tail


@triton.jit
def log2_of_sum(score, maximum, total):
    """One step of `log2(sum(2^score))` over columns, kept as a maximum and a total, both `(R,)`."""
    new = tl.maximum(maximum, tl.max(score, axis=1))
    total = total * tl.exp2(maximum - new) + tl.sum(tl.exp2(score - new[:, None]), axis=1)
    return new, total
