"""Stage 2: search of block sizes, warps and pipeline stages, for each kernel on its own.

`tiles.json` in the folder of the results has the installed entries and those found so far, in the format that
`vca/attention/kernels/block_sizes.py` reads.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention import HEADS, SHAPES, WIDTH, Shape
from benchmarks.gpu.kernels import CALLS, TINY, Sizes, problem
from benchmarks.gpu.runner import Context, Row
from benchmarks.timing import graphed, take_turns
from vca.attention.kernels import block_sizes
from vca.attention.kernels.block_sizes import BlockSizes, KernelBlocks
from vca.attention.kernels.launch import KernelLaunch
from vca.runtime.devices import device_name
from vca.runtime.files import write_text

MINUTES = 4.0  # limit of the search
MARGIN = 0.98  # ratio to the time of the default sizes below which others replace them
TILES = "tiles.json"

CANDIDATES = [BlockSizes(64, n, warps) for n, warps in ((64, 4), (128, 8), (64, 8), (32, 4), (32, 8), (128, 4))]
CANDIDATES += [BlockSizes(64, 64, 4, 2), BlockSizes(64, 128, 8, 2), BlockSizes(32, 64), BlockSizes(32, 32)]


def problems(tiny: bool) -> list[Sizes]:
    """Return the problems in the order of the search. Dtypes after the first have its fastest candidates only."""
    if tiny:
        return [Sizes([TINY], dtype, 1, 1) for dtype in (torch.float32, torch.float16)]
    at = {shape.tokens: shape for shape in SHAPES}
    plan = {64: (HEADS, [256, 197, 1024, 4096, 16384]), 72: (16, [256, 1024]), 32: (12, [1024, 4096])}
    return [
        Sizes([at[n] for n in tokens], dtype, 65_536 * WIDTH // (heads * dim), heads, dim)
        for dtype in (torch.bfloat16, torch.float16)
        for dim, (heads, tokens) in plan.items()
    ]


def calls_of(
    shape: Shape, device: torch.device, size: Sizes
) -> tuple[KernelLaunch, dict[str, Callable[[], tuple[Tensor, ...]]]]:
    """Return a launch with the default sizes, and for each field of its `tiles` the calls that use it.

    The calls return their results. The length of the first axis may depend on the sizes.
    """
    x, options = problem(shape, device, size)
    launch = KernelLaunch(x, options)
    launch.tiles = block_sizes.default_blocks(size.dim, size.dtype)
    out, v_diff, v_neg, lse = launch.empty_results(x.q)
    do = torch.ones_like(out)
    tokens = launch.contrast_tokens_fwd(x.q, x.t, x.e_pos, x.e_neg)
    stage2 = x.q, tokens, v_diff, x.norm1

    def stage1_fwd() -> tuple[Tensor, ...]:
        launch.stage1_fwd(tokens, x.k, x.v, v_diff, v_neg, lse)
        return v_diff, v_neg

    def stage2_fwd() -> tuple[Tensor, ...]:
        launch.stage2_fwd(*stage2, x.norm2, out)
        return (out,)

    stage1_fwd()
    do_raw, *rows = launch.stage2_bwd_preprocess(*stage2, x.norm2, do)[:3]
    _, dv_hat, dtokens2 = launch.stage2_bwd(*stage2, do_raw, *rows)

    def stage1_bwd() -> tuple[Tensor, ...]:
        dv_diff, delta, *_ = launch.stage1_bwd_preprocess(v_diff, v_neg, x.norm1, dv_hat)
        return launch.stage1_bwd(tokens, x.k, x.v, dv_diff, lse, delta, dtokens2)

    return launch, {
        "stage1_fwd": stage1_fwd,
        "stage2_fwd": stage2_fwd,
        "stage1_bwd": stage1_bwd,
        "stage2_bwd": lambda: launch.stage2_bwd(*stage2, do_raw, *rows),
    }


def compile_candidate(case: tuple[Shape, Sizes, str, BlockSizes]) -> None:
    """Compile a candidate into Triton's cache by a call; `search` reports the error of one that fails."""
    shape, size, kernel, sizes = case
    with suppress(Exception):
        launch, calls = calls_of(shape, torch.device("cuda"), size)
        launch.tiles = launch.tiles._replace(**{kernel: sizes})
        calls[kernel]()


def differ(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Return the largest difference of sums over the first axis, relative to the largest value of each tensor."""
    pairs = [
        (a.sum(0, dtype=torch.float32), b.sum(0, dtype=torch.float32)) for a, b in zip(found, expected, strict=True)
    ]
    return max(((a - b).abs().amax() / b.abs().amax()).item() for a, b in pairs)


def read_best(folder: Path) -> dict[tuple[Any, ...], Row]:
    """Return the installed entries by their keys, replaced by those of the folder."""
    files = [file for file in (block_sizes.FILE, folder / TILES) if file.exists()]
    return {key_of(entry): entry for file in files for entry in block_sizes.read_entries(file)}


def key_of(entry: Row) -> tuple[Any, ...]:
    return tuple(entry[key] for key in block_sizes.KEY)


def fastest_of(rows: list[Row]) -> Row:
    """Return the fastest row, or the first, the default sizes, if no other is clearly faster."""
    first, *others = (row for row in rows if "seconds" in row)
    faster = [row for row in others if row["seconds"] < MARGIN * row["default_seconds"]]
    return min(faster, key=lambda row: row["seconds"] / row["default_seconds"], default=first)


def search(context: Context) -> Iterator[Row]:
    """Yield the time of each kernel with each candidate, beside that with the default sizes in the same rounds.

    A candidate that the device refuses, or whose results differ, is a row with the reason.
    """
    context = replace(context, end=min(context.end, time.perf_counter() + 60 * MINUTES))
    best = read_best(context.folder)
    chosen: dict[tuple[int, str], dict[BlockSizes, None]] = {}  # by head dim and kernel, in the first dtype
    for size in problems(context.tiny):
        every = CANDIDATES[:2] if context.tiny else CANDIDATES
        candidates = {name: list(chosen.get((size.dim, name), every)) for name in KernelBlocks._fields}
        cases = [(s, size, name, sizes) for s in size.shapes for name, some in candidates.items() for sizes in some]
        if context.device.type == "cuda" and context.minutes_left > 0:
            with suppress(TimeoutError):
                list(context.parallel(compile_candidate, cases))
        for shape in size.shapes:
            if context.minutes_left <= 0:
                yield {"left_out": f"head dim {size.dim}, {size.dtype}, {shape.tokens} tokens"}
                continue
            launch, calls = calls_of(shape, context.device, size)
            for name, run in calls.items():
                about = {"device": device_name(context.device), "kernel": name, "head_dim": size.dim}
                about |= {"capability": block_sizes.capability_of(context.device), "tokens": shape.tokens}
                about |= {"dtype": str(size.dtype).removeprefix("torch."), "contrast_tokens": launch.n}
                rows = []
                for row in times(context, launch, name, run, candidates[name]):
                    rows.append({**about, **row})
                    yield rows[-1]
                if not any("seconds" in row for row in rows):
                    continue
                fastest = fastest_of(rows)
                best[key_of(fastest)] = fastest
                sizes = BlockSizes(*(fastest[field] for field in BlockSizes._fields))
                chosen.setdefault((size.dim, name), {})[sizes] = None
                write_text(context.folder / TILES, json.dumps(list(best.values()), indent=1) + "\n")


def times(
    context: Context,
    launch: KernelLaunch,
    name: str,
    run: Callable[[], tuple[Tensor, ...]],
    some: list[BlockSizes],
) -> Iterator[Row]:
    """Yield a row for the default sizes, then for each candidate of the kernel `name` that may replace them."""
    tiles, count = launch.tiles, 1 if context.tiny else CALLS
    default = block_sizes.capped(getattr(tiles, name), launch.n)

    def call(sizes: BlockSizes) -> tuple[Tensor, ...]:
        launch.tiles = tiles._replace(**{name: sizes})
        return run()

    try:
        expected = tuple(x.clone() for x in call(default))
        baseline = graphed(partial(call, default), context.device, count)
    except Exception as error:  # of the compiler or the driver
        yield {**default._asdict(), "failed": f"{type(error).__name__}: {error}"[:300]}
        return
    for sizes in dict.fromkeys((default, *(block_sizes.capped(one, launch.n) for one in some))):
        try:
            if not (difference := differ(call(sizes), expected)) <= 0.02:
                raise ValueError(f"results differ by {difference:.2g}")
            turns = {"default": baseline, "candidate": graphed(partial(call, sizes), context.device, count)}
            timing = take_turns(turns, "default", context.budget(0.02), context.device, 1)
        except Exception as error:  # of the compiler or the driver
            yield {**sizes._asdict(), "failed": f"{type(error).__name__}: {error}"[:300]}
            continue
        seconds, default_seconds = (timing[turn].seconds / count for turn in ("candidate", "default"))
        yield {**sizes._asdict(), "seconds": seconds, "default_seconds": default_seconds}
    launch.tiles = tiles
