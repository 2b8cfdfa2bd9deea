"""How the kernels are launched: tiles, splits, scratch memory. One `Call` is one call of the operator.

Shape letters: B batch, M heads, N = P + H W tokens, D head dim, n = h w contrast tokens, S streams of the tokens (2, or
1 where both stages are plain).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vca.attention.kernels import backward, forward

LOG2E = math.log2(math.e)
NUM_WARPS = 8


class Tiles(NamedTuple):
    """Sides of the tiles of a kernel."""

    TOKENS: int  # contrast tokens
    ROWS: int  # tokens


def tiles_of(num_contrast: int, dim: int, dtype: torch.dtype) -> tuple[Tiles, Tiles]:
    """Tiles of the forward and of the backward kernels, the largest that fit the registers of sm_80 and sm_90.

    `python -m benchmarks kernels` lists what the compiler makes of them.
    """
    if dtype.itemsize == 4:
        forward_tiles = backward_tiles = Tiles(32, 16) if dim <= 64 else Tiles(16, 16)
    else:
        forward_tiles, backward_tiles = Tiles(64, 64), Tiles(64, 32) if dim <= 64 else Tiles(64, 16)
    fitting = max(16, triton.next_power_of_2(num_contrast))
    return tuple(tiles._replace(TOKENS=min(tiles.TOKENS, fitting)) for tiles in (forward_tiles, backward_tiles))  # type: ignore[return-value]


def splits_of(programs: int, num_tokens: int, rows: int, device: torch.device) -> int:
    """Into how many parts N is split so that the device is filled twice; each has four blocks of rows at least."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(2 * processors // programs, num_tokens // (4 * rows)))


def bins(size: int, count: int) -> list[tuple[int, int]]:
    """Half-open ranges of adaptive pooling."""
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def overlaps(size: int, count: int) -> int:
    """In how many bins of adaptive pooling one place lies, at most."""
    return max(sum(first <= place < last for first, last in bins(size, count)) for place in range(size))


class Call:
    """The shapes and options of one call; its methods launch a kernel each.

    Args:
        q: `(B, M, N, D)`.
        lambda1, lambda2: scalars, or None for a plain stage.
        lambda_init, grid, contrast_grid, num_prefix_tokens, eps: as `visual_contrast_attention` has them.
        pooled: whether the pooled queries are part of the positive and of the negative stream.
        joint: one softmax over both streams in Stage II.
    """

    def __init__(
        self,
        q: Tensor,
        lambda1: Tensor | None,
        lambda2: Tensor | None,
        lambda_init: float,
        grid: Sequence[int],
        contrast_grid: Sequence[int],
        num_prefix_tokens: int,
        eps: float,
        pooled: Sequence[bool],
        joint: bool,
    ) -> None:
        self.batch, self.heads, self.num_tokens, self.dim = q.shape
        self.n, self.programs = contrast_grid[0] * contrast_grid[1], q.shape[0] * q.shape[1]
        self.grid, self.contrast_grid, self.prefix, self.pooled = grid, contrast_grid, num_prefix_tokens, pooled
        self.lambda1, self.lambda2, self.joint = lambda1, lambda2, joint
        self.streams = 1 if lambda1 is None and lambda2 is None else 2
        self.scale, self.gain, self.eps = self.dim**-0.5 * LOG2E, 1 - lambda_init, eps
        self.device = q.device
        self.forward_tiles, self.backward_tiles = tiles_of(self.n, self.dim, q.dtype)
        head = max(16, 1 << (self.dim.bit_length() - 1))  # the head dim is HEAD + TAIL
        tail = max(16, triton.next_power_of_2(self.dim - head)) if self.dim > head else 0
        self.width = {"D": self.dim, "HEAD": head, "TAIL": tail, "num_warps": NUM_WARPS}
        precise = torch.get_float32_matmul_precision() == "highest"
        self.products = {"PRECISION": "ieee" if precise else "tf32"}

    def empty_tokens(self, like: Tensor, *parts: int, dtype: torch.dtype | None = None) -> Tensor:
        """An empty `(*parts, B, M, N, D)`, the heads of a token beside each other."""
        empty = like.new_empty(*parts, self.batch, self.num_tokens, self.heads, self.dim, dtype=dtype)
        return empty.transpose(-3, -2)

    def empty_results(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the operator returns, not yet filled: output, `v+ - l1 v-`, `v-`, log-sum-exps of Stage I."""
        streams = 1 if self.lambda1 is None else 2
        contrast = q.new_empty(self.batch, self.heads, self.n, self.dim)
        v_neg = torch.empty_like(contrast) if streams == 2 else q.new_empty(0)
        lse = q.new_empty(self.batch, self.heads, streams, self.n, dtype=torch.float32)
        return self.empty_tokens(q), contrast, v_neg, lse

    def scratch(self, *shape: int) -> Tensor:
        """Uninitialised float32."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def split(self, tiles: Tiles) -> tuple[int, int]:
        """Into how many parts N is split, and the tokens in each; none is empty."""
        programs = self.programs * triton.cdiv(self.n, tiles.TOKENS)
        splits = splits_of(programs, self.num_tokens, tiles.ROWS, self.device)
        size = triton.cdiv(triton.cdiv(self.num_tokens, tiles.ROWS), splits) * tiles.ROWS
        return triton.cdiv(self.num_tokens, size), size

    def contrast_tokens(self, q: Tensor, t: Tensor | None, e_pos: Tensor | None, e_neg: Tensor | None) -> Tensor:
        """Tokens of the streams, `(B, M, S, n, D)`; t stands for the average where it is given."""
        source, grid, prefix = (q, self.grid, self.prefix) if t is None else (t, self.contrast_grid, 0)
        tokens = q.new_empty(self.batch, self.heads, self.streams, self.n, self.dim)
        largest = math.prod(max(b - a for a, b in bins(*sizes)) for sizes in zip(grid, self.contrast_grid, strict=True))
        cell = min(triton.next_power_of_2(largest), 64)
        block = 64 // cell
        forward.contrast_tokens_kernel[(self.programs, triton.cdiv(self.n, block))](
            source,
            q if e_pos is None else e_pos,  # what is not there is not read
            q if e_neg is None else e_neg,
            tokens,
            *source.stride()[:3],
            self.heads,
            self.n,
            prefix,
            *grid,
            *self.contrast_grid,
            largest,
            POOL_POS=self.pooled[0],
            POOL_NEG=self.pooled[1],
            EMBED_POS=e_pos is not None,
            EMBED_NEG=e_neg is not None,
            STREAMS=self.streams,
            D=self.dim,
            WIDTH=triton.next_power_of_2(self.dim),
            TOKENS=block,
            CELL=cell,
            num_warps=NUM_WARPS,
        )
        return tokens

    def stage1(self, tokens: Tensor, k: Tensor, v: Tensor, contrast: Tensor, v_neg: Tensor, lse: Tensor) -> None:
        """Fill `contrast`, `v_neg` and `lse`."""
        tiles, streams = self.forward_tiles, lse.shape[2]
        splits, size = self.split(tiles)
        parts = splits if splits > 1 else 0
        part, part_lse = (self.scratch(parts, self.programs, streams, self.n, *dim) for dim in ((self.dim,), ()))
        lambda1 = lse if self.lambda1 is None else self.lambda1
        blocks = triton.cdiv(self.n, tiles.TOKENS)
        contrast_stage = {"CONTRAST": streams == 2, "TOKENS": tiles.TOKENS, **self.width}
        forward.stage1_kernel[(self.programs, blocks, splits)](
            tokens,
            k,
            v,
            lambda1,
            contrast,
            v_neg,
            lse,
            part,
            part_lse,
            *k.stride()[:3],
            self.heads,
            self.num_tokens,
            self.n,
            size,
            self.scale,
            SPLITS=parts,
            STREAMS=self.streams,
            ROWS=tiles.ROWS,
            **contrast_stage,
            **self.products,
        )
        if parts:
            forward.combine_kernel[(self.programs, blocks)](
                part, part_lse, lambda1, contrast, v_neg, lse, self.n, splits, **contrast_stage
            )

    def stage2_options(self) -> dict[str, int | bool | str]:
        """Constants of the two kernels in which tokens read all contrast tokens."""
        return {
            "STREAMS": self.streams,
            "CONTRAST": self.lambda2 is not None,
            "JOINT": self.joint,
            "BLOCKS": triton.cdiv(self.n, self.forward_tiles.TOKENS),
            **self.forward_tiles._asdict(),
            **self.width,
            **self.products,
        }

    def stage2(self, q: Tensor, tokens: Tensor, contrast: Tensor, norm1: Tensor, norm2: Tensor, out: Tensor) -> None:
        """Fill `out`."""
        forward.stage2_kernel[(self.programs, triton.cdiv(self.num_tokens, self.forward_tiles.ROWS))](
            q,
            tokens,
            contrast,
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
            **self.stage2_options(),
        )

    def stage2_rows(
        self, q: Tensor, tokens: Tensor, contrast: Tensor, norm1: Tensor, norm2: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of the output's gradient: that before the norm, log-sum-exps, deltas; gradients of lambda and norm weight."""
        blocks = triton.cdiv(self.num_tokens, self.forward_tiles.ROWS)
        grad_read = self.empty_tokens(q)
        lse, delta = (self.scratch(self.programs, 2, self.num_tokens) for _ in range(2))
        grad_norm2 = self.scratch(blocks, self.programs, self.dim)
        grad_lambda2 = self.scratch(blocks, self.programs)
        backward.stage2_rows_kernel[(self.programs, blocks)](
            q,
            tokens,
            contrast,
            norm1 if self.lambda2 is None else self.lambda2,
            norm1,
            norm2,
            grad,
            grad_read,
            lse,
            delta,
            grad_norm2,
            grad_lambda2,
            *q.stride()[:3],
            *grad.stride()[:3],
            *grad_read.stride()[:3],
            self.heads,
            self.num_tokens,
            self.n,
            self.scale,
            self.gain,
            self.eps,
            **self.stage2_options(),
        )
        return grad_read, lse, delta, grad_lambda2.sum(), grad_norm2.sum((0, 1))

    def stage1_rows(
        self, contrast: Tensor, v_neg: Tensor, norm1: Tensor, grad_v_hat: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of v^'s gradient: that before the norm, deltas; gradients of lambda and norm weight."""
        tokens = self.backward_tiles.TOKENS
        blocks = triton.cdiv(self.n, tokens)
        grad_seen = torch.empty_like(contrast)
        delta = self.scratch(self.programs, 1 if self.lambda1 is None else 2, self.n)
        grad_norm1 = self.scratch(blocks, self.programs, self.dim)
        grad_lambda1 = self.scratch(blocks, self.programs)
        backward.stage1_rows_kernel[(self.programs, blocks)](
            contrast,
            v_neg,
            norm1 if self.lambda1 is None else self.lambda1,
            norm1,
            grad_v_hat,
            grad_seen,
            delta,
            grad_norm1,
            grad_lambda1,
            self.n,
            grad_v_hat.shape[0],
            self.gain,
            self.eps,
            CONTRAST=self.lambda1 is not None,
            TOKENS=tokens,
            **self.width,
        )
        return grad_seen, delta, grad_lambda1.sum(), grad_norm1.sum((0, 1))

    def stage_backward(
        self,
        stage: int,
        tokens: Tensor,
        x: Tensor,
        y: Tensor,
        values: Tensor,
        norm1: Tensor,
        lse: Tensor,
        delta: Tensor,
        found: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Backward of a stage, see `stage_backward_kernel`.

        Returns:
            Gradients of x `(B, M, N, D)`; of Stage I's v, the same, or of Stage II's v^ `(splits, B M, n, D)`; and of
            the tokens `(B, M, S, n, D)`, to which that which is already `found` is added.
        """
        tiles, weight = self.backward_tiles, self.lambda1 if stage == 1 else self.lambda2
        blocks, (splits, size) = triton.cdiv(self.n, tiles.TOKENS), self.split(tiles)
        # Each block of contrast tokens has its part in the gradients of x and v, each split its part in the others;
        # parts are float32.
        dtype = x.dtype if blocks == 1 else torch.float32
        grad_x = self.empty_tokens(x, blocks, dtype=dtype)
        grad_y = self.empty_tokens(x, blocks, dtype=dtype) if stage == 1 else grad_x
        dtype = x.dtype if splits == 1 else torch.float32
        grad_values = x.new_empty(splits if stage == 2 else 0, self.programs, self.n, self.dim, dtype=dtype)
        grad_tokens = x.new_empty(splits, self.batch, self.heads, self.streams, self.n, self.dim, dtype=dtype)
        backward.stage_backward_kernel[(self.programs, blocks, splits)](
            tokens,
            x,
            y,
            values,
            norm1,
            norm1 if weight is None else weight,
            lse,
            delta,
            grad_tokens if found is None else found,
            grad_x,
            grad_y,
            grad_values,
            grad_tokens,
            *x.stride()[:3],
            *y.stride()[:3],
            *grad_x.stride()[:4],
            self.heads,
            self.num_tokens,
            self.n,
            size,
            self.scale,
            self.gain,
            self.eps,
            STAGE=stage,
            FOUND=found is not None,
            STREAMS=self.streams,
            CONTRAST=weight is not None,
            **tiles._asdict(),
            **self.width,
            **self.products,
        )

        def added(parts: Tensor) -> Tensor:
            return parts[0] if len(parts) == 1 else parts.sum(0).to(x.dtype)

        return added(grad_x), added(grad_y) if stage == 1 else grad_values, added(grad_tokens)

    def unpool(self, grad_tokens: Tensor, grad_q: Tensor) -> None:
        """Add to the queries' gradient what comes through their average."""
        rows = self.forward_tiles.ROWS
        backward.unpool_kernel[(self.programs, triton.cdiv(math.prod(self.grid), rows))](
            grad_tokens,
            grad_q,
            *grad_q.stride()[:3],
            self.heads,
            self.n,
            self.prefix,
            *self.grid,
            *self.contrast_grid,
            DOWN=overlaps(self.grid[0], self.contrast_grid[0]),
            ACROSS=overlaps(self.grid[1], self.contrast_grid[1]),
            POOL_POS=self.pooled[0],
            POOL_NEG=self.pooled[1] and self.streams == 2,
            STREAMS=self.streams,
            ROWS=rows,
            **self.width,
        )
