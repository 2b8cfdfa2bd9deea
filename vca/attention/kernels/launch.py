"""Kernel launches: splits, scratch memory and constants. A `KernelLaunch` is one call of the operator.

Shape letters: B batch, M heads, N = P + H W tokens, D head dim, n = h w contrast tokens, S streams of the tokens (2, or
1 if both stages are plain).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vca.attention.kernels import backward_stage1, backward_stage2, forward
from vca.attention.kernels.block_sizes import BlockSizes, KernelBlocks, block_sizes, cdiv, next_power_of_2

LOG2E = math.log2(math.e)


def num_splits(num_programs: int, num_tokens: int, block_n: int, device: torch.device) -> int:
    """Return the number of splits of N that gives two programs per processor, with at least four blocks per split."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(2 * processors // num_programs, num_tokens // (4 * block_n)))


@functools.cache
def bins(size: int, count: int) -> tuple[tuple[int, int], ...]:
    """Return the half-open ranges of adaptive pooling."""
    return tuple((i * size // count, cdiv((i + 1) * size, count)) for i in range(count))


@functools.cache
def largest_bin(size: int, count: int) -> int:
    """Return the length of the longest range of adaptive pooling."""
    return max(stop - start for start, stop in bins(size, count))


@functools.cache
def overlaps(size: int, count: int) -> int:
    """Return the maximum number of bins of adaptive pooling that contain one position."""
    return max(sum(start <= i < stop for start, stop in bins(size, count)) for i in range(size))


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over axis 0 in `dtype`."""
    return partials[0] if len(partials) == 1 else partials.sum(0).to(dtype)


class KernelInputs(NamedTuple):
    """Tensors of the operator, which all have gradients."""

    q: Tensor  # (B, M, N, D) float32, float16 or bfloat16, as k and v
    k: Tensor
    v: Tensor
    t: Tensor | None  # (B, M, n, D), pooled queries; None: the kernels compute the average
    e_pos: Tensor | None  # (M, n, D) float32; None if the stream has no embedding
    e_neg: Tensor | None
    lambda1: Tensor | None  # float32 scalar; None: plain stage
    lambda2: Tensor | None
    norm1: Tensor  # (D,) float32
    norm2: Tensor


class KernelOptions(NamedTuple):
    """Options of the operator."""

    lambda_init: float
    grid: Sequence[int]
    contrast_grid: Sequence[int]
    num_prefix_tokens: int
    eps: float
    pooled: Sequence[bool]  # whether the positive and the negative stream contain the pooled queries
    joint: bool  # one softmax over both streams in Stage II


class KernelLaunch:
    """Shapes and constants of one call of the operator; its methods launch the kernels."""

    def __init__(self, inputs: KernelInputs, options: KernelOptions) -> None:
        self.batch, self.heads, self.num_tokens, self.dim = inputs.q.shape
        self.grid, self.contrast_grid, self.prefix = options.grid, options.contrast_grid, options.num_prefix_tokens
        self.n, self.num_bh = self.contrast_grid[0] * self.contrast_grid[1], self.batch * self.heads
        self.lambda1, self.lambda2 = inputs.lambda1, inputs.lambda2
        self.pooled, self.joint = options.pooled, options.joint
        self.streams = 1 if self.lambda1 is None and self.lambda2 is None else 2
        self.scale, self.gain, self.eps = self.dim**-0.5 * LOG2E, 1 - options.lambda_init, options.eps
        self.device = inputs.q.device
        self.averages, self.dtype = inputs.t is None, inputs.q.dtype
        d_main = max(16, 1 << (self.dim.bit_length() - 1))  # the head dim is D_MAIN + D_REST
        d_rest = max(16, next_power_of_2(self.dim - d_main)) if self.dim > d_main else 0
        self.width = {"D": self.dim, "D_MAIN": d_main, "D_REST": d_rest}
        exact = torch.get_float32_matmul_precision() == "highest"
        self.precision = {"PRECISION": "ieee" if exact else "tf32"}

    @functools.cached_property
    def tiles(self) -> KernelBlocks:
        """Block sizes of the kernels. They are not looked up for fake tensors, whose sizes may be symbols."""
        return block_sizes(self.num_tokens, self.n, self.dim, self.dtype, self.device)

    @property
    def pool_warps(self) -> int:
        """Warps of the pooling kernels. With few, a thread has all rows of a small cell, and needs no other thread."""
        return max(1, next_power_of_2(self.dim) // 64)

    def empty_tokens(self, like: Tensor, *leading: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return an empty `(*leading, B, M, N, D)` with the heads of a token contiguous; not a view."""
        batch, heads, tokens, dim = self.batch, self.heads, self.num_tokens, self.dim
        image, shape = tokens * heads * dim, (*leading, batch, heads, tokens, dim)
        strides = (batch * image, image, dim, heads * dim, 1)[-len(shape) :]
        return like.new_empty_strided(shape, strides, dtype=dtype)

    def empty_results(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Allocate the results of the operator: output, `v+ - l1 v-`, `v-`, lse of Stage I."""
        streams = 1 if self.lambda1 is None else 2
        v_diff = q.new_empty(self.batch, self.heads, self.n, self.dim)
        v_neg = torch.empty_like(v_diff) if streams == 2 else q.new_empty(0)
        lse = q.new_empty(self.batch, self.heads, streams, self.n, dtype=torch.float32)
        return self.empty_tokens(q), v_diff, v_neg, lse

    def scratch(self, *shape: int) -> Tensor:
        """Allocate uninitialized float32."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def split(self, tiles: BlockSizes) -> tuple[int, int]:
        """Return the number of non-empty splits of N, and the tokens per split."""
        num_programs = self.num_bh * cdiv(self.n, tiles.BLOCK_C)
        splits = num_splits(num_programs, self.num_tokens, tiles.BLOCK_N, self.device)
        size = cdiv(cdiv(self.num_tokens, tiles.BLOCK_N), splits) * tiles.BLOCK_N
        return cdiv(self.num_tokens, size), size

    def contrast_tokens_fwd(self, q: Tensor, t: Tensor | None, e_pos: Tensor | None, e_neg: Tensor | None) -> Tensor:
        """Compute the contrast tokens `(B, M, S, n, D)`; `t` replaces the average of q."""
        x, grid, prefix = (q, self.grid, self.prefix) if t is None else (t, self.contrast_grid, 0)
        tokens = q.new_empty(self.batch, self.heads, self.streams, self.n, self.dim)
        max_cell = math.prod(map(largest_bin, grid, self.contrast_grid))
        block_cell = min(next_power_of_2(max_cell), 64)
        block = 64 // block_cell
        forward.contrast_tokens_fwd_kernel[(self.num_bh, cdiv(self.n, block))](
            x,
            q if e_pos is None else e_pos,  # placeholder, not read
            q if e_neg is None else e_neg,
            tokens,
            *x.stride()[:3],
            self.heads,
            self.n,
            prefix,
            *grid,
            *self.contrast_grid,
            max_cell,
            POOL_POS=self.pooled[0],
            POOL_NEG=self.pooled[1],
            EMBED_POS=e_pos is not None,
            EMBED_NEG=e_neg is not None,
            STREAMS=self.streams,
            D=self.dim,
            BLOCK_D=next_power_of_2(self.dim),
            BLOCK_C=block,
            BLOCK_CELL=block_cell,
            num_warps=self.pool_warps,
        )
        return tokens

    def stage1_fwd(self, tokens: Tensor, k: Tensor, v: Tensor, v_diff: Tensor, v_neg: Tensor, lse: Tensor) -> None:
        """Compute `v_diff`, `v_neg` and `lse`, in place."""
        tiles, streams = self.tiles.stage1_fwd, lse.shape[2]
        splits, size = self.split(tiles)
        num_partials = splits if splits > 1 else 0
        partial = partial_lse = lse  # placeholders, not read
        if num_partials:
            partial_lse = self.scratch(splits, self.num_bh, streams, self.n)
            partial = self.scratch(splits, self.num_bh, streams, self.n, self.dim)
        lambda1 = lse if self.lambda1 is None else self.lambda1
        blocks = cdiv(self.n, tiles.BLOCK_C)
        contrast_stage = {"CONTRAST": streams == 2, **self.width}
        forward.stage1_fwd_kernel[(self.num_bh, blocks, splits)](
            tokens,
            k,
            v,
            lambda1,
            v_diff,
            v_neg,
            lse,
            partial,
            partial_lse,
            *k.stride()[:3],
            self.heads,
            self.num_tokens,
            self.n,
            size,
            self.scale,
            NUM_SPLITS=num_partials,
            STREAMS=self.streams,
            **tiles._asdict(),
            **contrast_stage,
            **self.precision,
        )
        if num_partials:
            contrast_stage |= {"BLOCK_C": tiles.BLOCK_C, "num_warps": tiles.num_warps}
            forward.stage1_fwd_kernel_combine[(self.num_bh, blocks)](
                partial, partial_lse, lambda1, v_diff, v_neg, lse, self.n, splits, **contrast_stage
            )

    def stage2_options(self, tiles: BlockSizes) -> dict[str, int | bool | str]:
        """Return the constants of the Stage II kernels."""
        return {
            "STREAMS": self.streams,
            "CONTRAST": self.lambda2 is not None,
            "JOINT": self.joint,
            "NUM_BLOCKS_C": cdiv(self.n, tiles.BLOCK_C),
            **tiles._asdict(),
            **self.width,
            **self.precision,
        }

    def stage2_fwd(self, q: Tensor, tokens: Tensor, v_diff: Tensor, norm1: Tensor, norm2: Tensor, out: Tensor) -> None:
        """Compute `out`, in place."""
        forward.stage2_fwd_kernel[(self.num_bh, cdiv(self.num_tokens, self.tiles.stage2_fwd.BLOCK_N))](
            q,
            tokens,
            v_diff,
            norm1 if self.lambda2 is None else self.lambda2,
            norm1,
            norm2,
            out,
            *q.stride()[:3],
            *out.stride()[:3],
            self.heads,
            self.num_tokens,
            self.n,
            self.scale,
            self.gain,
            self.eps,
            **self.stage2_options(self.tiles.stage2_fwd),
        )

    def stage2_bwd_preprocess(
        self, q: Tensor, tokens: Tensor, v_diff: Tensor, norm1: Tensor, norm2: Tensor, do: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Backward preprocessing of Stage II: do before the norm, lse, delta, dlambda2, dnorm2."""
        blocks = cdiv(self.num_tokens, self.tiles.stage2_fwd.BLOCK_N)
        do_raw = self.empty_tokens(q)
        lse, delta = (self.scratch(self.num_bh, 2, self.num_tokens) for _ in range(2))
        dnorm2, dlambda2 = self.scratch(blocks, self.num_bh, self.dim), self.scratch(blocks, self.num_bh)
        backward_stage2.stage2_bwd_kernel_preprocess[(self.num_bh, blocks)](
            q,
            tokens,
            v_diff,
            norm1 if self.lambda2 is None else self.lambda2,
            norm1,
            norm2,
            do,
            do_raw,
            lse,
            delta,
            dnorm2,
            dlambda2,
            *q.stride()[:3],
            *do.stride()[:3],
            *do_raw.stride()[:3],
            self.heads,
            self.num_tokens,
            self.n,
            self.scale,
            self.gain,
            self.eps,
            **self.stage2_options(self.tiles.stage2_fwd),
        )
        return do_raw, lse, delta, dlambda2.sum(), dnorm2.sum((0, 1))

    def stage2_bwd(
        self, q: Tensor, tokens: Tensor, v_diff: Tensor, norm1: Tensor, do_raw: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Backward of Stage II: dq `(B, M, N, D)`, dv^ `(splits, B M, n, D)`, dtokens `(B, M, S, n, D)`."""
        tiles = self.tiles.stage2_bwd
        blocks, (splits, size) = cdiv(self.n, tiles.BLOCK_C), self.split(tiles)
        # Partial sums, in float32: dq per block of contrast tokens, the others per split.
        dq = self.empty_tokens(q, blocks, dtype=q.dtype if blocks == 1 else torch.float32)
        dtype = q.dtype if splits == 1 else torch.float32
        dv_hat = q.new_empty(splits, self.num_bh, self.n, self.dim, dtype=dtype)
        dtokens = q.new_empty(splits, self.batch, self.heads, self.streams, self.n, self.dim, dtype=dtype)
        backward_stage2.stage2_bwd_kernel[(self.num_bh, blocks, splits)](
            q,
            tokens,
            v_diff,
            norm1 if self.lambda2 is None else self.lambda2,
            norm1,
            do_raw,
            lse,
            delta,
            dq,
            dv_hat,
            dtokens,
            *q.stride()[:3],
            *do_raw.stride()[:3],
            *dq.stride()[:4],
            self.heads,
            self.num_tokens,
            self.n,
            size,
            self.scale,
            self.gain,
            self.eps,
            STREAMS=self.streams,
            CONTRAST=self.lambda2 is not None,
            **tiles._asdict(),
            **self.width,
            **self.precision,
        )
        return sum_partials(dq, q.dtype), dv_hat, sum_partials(dtokens, q.dtype)

    def avg_pool_bwd(self, dq: Tensor, dtokens: Tensor) -> None:
        """Add the gradient through the pooled queries to dq `(B, M, N, D)`, in place."""
        pool_pos, pool_neg = self.pooled[0], self.pooled[1] and self.streams == 2
        if not self.averages or not (pool_pos or pool_neg):
            return
        block_n = 32
        backward_stage2.avg_pool_bwd_kernel[(self.num_bh, cdiv(self.num_tokens - self.prefix, block_n))](
            dtokens,
            dq,
            *dq.stride()[:3],
            self.heads,
            self.num_tokens,
            self.n,
            self.prefix,
            *self.grid,
            *self.contrast_grid,
            MAX_ROWS=overlaps(self.grid[0], self.contrast_grid[0]),
            MAX_COLUMNS=overlaps(self.grid[1], self.contrast_grid[1]),
            POOL_POS=pool_pos,
            POOL_NEG=pool_neg,
            STREAMS=self.streams,
            D=self.dim,
            BLOCK_D=next_power_of_2(self.dim),
            BLOCK_N=block_n,
            num_warps=self.pool_warps,
        )

    def stage1_bwd_preprocess(
        self, v_diff: Tensor, v_neg: Tensor, norm1: Tensor, dv_hat: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Backward preprocessing of Stage I: dv_diff, delta, dlambda1, dnorm1."""
        tiles = self.tiles.stage1_bwd
        blocks = cdiv(self.n, tiles.BLOCK_C)
        dv_diff = torch.empty_like(v_diff)
        delta = self.scratch(self.num_bh, 1 if self.lambda1 is None else 2, self.n)
        dnorm1 = self.scratch(blocks, self.num_bh, self.dim)
        dlambda1 = self.scratch(blocks, self.num_bh)
        backward_stage1.stage1_bwd_kernel_preprocess[(self.num_bh, blocks)](
            v_diff,
            v_neg,
            norm1 if self.lambda1 is None else self.lambda1,
            norm1,
            dv_hat,
            dv_diff,
            delta,
            dnorm1,
            dlambda1,
            self.n,
            dv_hat.shape[0],
            self.gain,
            self.eps,
            CONTRAST=self.lambda1 is not None,
            BLOCK_C=tiles.BLOCK_C,
            num_warps=tiles.num_warps,
            **self.width,
        )
        return dv_diff, delta, dlambda1.sum(), dnorm1.sum((0, 1))

    def stage1_bwd(
        self,
        tokens: Tensor,
        k: Tensor,
        v: Tensor,
        dv_diff: Tensor,
        lse: Tensor,
        delta: Tensor,
        dtokens_stage2: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Backward of Stage I: dk and dv `(B, M, N, D)`, and dtokens `(B, M, S, n, D)` with `dtokens_stage2` added."""
        tiles = self.tiles.stage1_bwd
        blocks, (splits, size) = cdiv(self.n, tiles.BLOCK_C), self.split(tiles)
        # Partial sums, in float32: dk and dv per block of contrast tokens, dtokens per split.
        dtype = k.dtype if blocks == 1 else torch.float32
        dk, dv = (self.empty_tokens(k, blocks, dtype=dtype) for _ in range(2))
        dtype = k.dtype if splits == 1 else torch.float32
        dtokens = k.new_empty(splits, self.batch, self.heads, self.streams, self.n, self.dim, dtype=dtype)
        backward_stage1.stage1_bwd_kernel[(self.num_bh, blocks, splits)](
            tokens,
            k,
            v,
            dv_diff,
            lse if self.lambda1 is None else self.lambda1,
            lse,
            delta,
            dtokens_stage2,
            dk,
            dv,
            dtokens,
            *k.stride()[:3],
            *dk.stride()[:4],
            self.heads,
            self.num_tokens,
            self.n,
            size,
            self.scale,
            STREAMS=self.streams,
            CONTRAST=self.lambda1 is not None,
            **tiles._asdict(),
            **self.width,
            **self.precision,
        )
        return sum_partials(dk, k.dtype), sum_partials(dv, k.dtype), sum_partials(dtokens, k.dtype)
