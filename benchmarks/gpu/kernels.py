"""Stage 2: time and bandwidth of each kernel, a search of tiles, and the cores and layers beside SDPA.

The time of a kernel is that of its launches with the same arguments in one CUDA graph. Its floor is the time in which
the device copies as many bytes as the kernel's tensors have, each counted once.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.attention import HEADS, SHAPES, WIDTH, Shape, at_shape
from benchmarks.gpu.runner import Context, Row
from benchmarks.timing import graphed, take_turns
from vca.runtime.files import write_text

TINY = Shape((4, 4), 1, (2, 2))
CALLS = 10  # of a kernel in one CUDA graph


class Tiles(NamedTuple):
    """Launch constants of a kernel."""

    BLOCK_C: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


CANDIDATES = [Tiles(*values) for values in product((64, 32), (64, 32, 128, 16), (8, 4), (3, 2))]


class Launch(NamedTuple):
    """A recorded launch of a kernel."""

    kernel: str
    run: Callable[[], object]
    constants: dict[str, Any]
    num_bytes: int


class Recorded:
    """A kernel whose launches are appended to a list."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            def run() -> object:
                return self.kernel[grid](*arguments, **constants)

            name = self.kernel.__name__.replace("_kernel", "")
            tensors = {x.data_ptr(): x.numel() * x.element_size() for x in arguments if isinstance(x, Tensor)}
            num_bytes = sum(tensors.values())
            self.launches.append(Launch(name, run, constants, num_bytes))
            run()

        return launch


class Sizes(NamedTuple):
    """Sizes of a stage: shapes, dtype, tokens of a batch, heads."""

    shapes: list[Shape]
    dtype: torch.dtype
    tokens: int
    heads: int


def sizes(tiny: bool) -> Sizes:
    return Sizes([TINY], torch.float32, 1, 1) if tiny else Sizes(SHAPES, torch.bfloat16, 65_536, HEADS)


def launches_of(shape: Shape, device: torch.device, size: Sizes) -> tuple[list[Launch], Tensor]:
    """Run forward and backward of the operator; return its launches, and the output with dq, dk and dv."""
    from vca.attention.kernels import launch
    from vca.attention.kernels.operator import contrast_attention, contrast_attention_backward

    heads, dim, generator = size.heads, WIDTH // HEADS, torch.Generator(device).manual_seed(0)

    def random(*lengths: int) -> Tensor:
        return torch.randn(lengths, generator=generator, device=device)

    packed = random(max(1, size.tokens // shape.tokens), shape.tokens, 3, heads, dim).to(size.dtype)
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    n = shape.contrast_grid[0] * shape.contrast_grid[1]
    e_pos, e_neg, weight = random(heads, n, dim), random(heads, n, dim), random(dim)
    arguments = (q, k, v, None, e_pos, e_neg, random(), random(), weight, weight.clone())
    options = (0.2, shape.grid, shape.contrast_grid, shape.prefix, 1e-5, (True, True), False)
    launches: list[Launch] = []

    def recorded(name: str) -> Any:
        kernels = {key: one for key, one in vars(getattr(launch, name)).items() if "_kernel" in key}
        recorders = {key: Recorded(one, launches) for key, one in kernels.items()}
        return mock.patch.object(launch, name, SimpleNamespace(**recorders))

    with recorded("forward"), recorded("backward_stage1"), recorded("backward_stage2"):
        out, *saved = contrast_attention(*arguments, *options)
        grads = contrast_attention_backward(torch.ones_like(out), *saved, *arguments, *options)
    return launches, torch.stack((out, *grads[:3])).float()


@contextmanager
def launched_with(tiles: Tiles) -> Iterator[None]:
    """Launch all kernels with these constants, except the pooling of the contrast tokens, which has other tiles."""
    from vca.attention.kernels.launch import BlockSizes, KernelBlocks, KernelLaunch, next_power_of_2

    default = KernelLaunch.__init__

    def configured(self: KernelLaunch, *arguments: Any) -> None:
        default(self, *arguments)
        limit = max(16, next_power_of_2(self.n))
        self.tiles = KernelBlocks(*4 * [BlockSizes(min(tiles.BLOCK_C, limit), tiles.BLOCK_N)])
        self.width |= {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}

    with mock.patch.object(KernelLaunch, "__init__", configured):
        yield


def kernel_times(context: Context, launches: list[Launch]) -> dict[str, float]:
    """Return the seconds of each kernel; launches of one kernel are added."""
    calls = 1 if context.tiny else CALLS
    runs = {str(place): graphed(one.run, context.device, calls) for place, one in enumerate(launches)}
    timings = take_turns(runs, None, context.budget(0.1), context.device, 1)
    seconds: dict[str, float] = {}
    for one, timing in zip(launches, timings.values(), strict=True):
        seconds[one.kernel] = seconds.get(one.kernel, 0.0) + timing.seconds / calls
    return seconds


def copy_bandwidth(context: Context) -> float:
    """Measure the bytes per second of a copy, read and written."""
    x = torch.ones(2**18 if context.tiny else 2**28, device=context.device)
    y = torch.empty_like(x)
    run = graphed(lambda: y.copy_(x), context.device)
    seconds = take_turns({"copy": run}, None, context.budget(0.1), context.device)["copy"].seconds
    return 2 * x.numel() * x.element_size() / seconds


def kernels(context: Context) -> Iterator[Row]:
    """Yield time, bandwidth and share of the floor of each kernel at each N."""
    bandwidth, size = copy_bandwidth(context), sizes(context.tiny)
    yield {"copy_bandwidth": bandwidth}
    for shape in size.shapes:
        launches, _ = launches_of(shape, context.device, size)
        for kernel, seconds in kernel_times(context, launches).items():
            num_bytes = sum(one.num_bytes for one in launches if one.kernel == kernel)
            row = {"tokens": shape.tokens, "kernel": kernel, "seconds": seconds, "bytes": num_bytes}
            yield {**row, "bandwidth": num_bytes / seconds, "floor_share": num_bytes / bandwidth / seconds}


def cores(context: Context) -> Iterator[Row]:
    """Yield the cores at each N, VCA and every SDPA backend, forward and backward."""
    yield from attentions(context, "core")


def layers(context: Context) -> Iterator[Row]:
    """Yield the layers at each N, with their saved activations and peak memory."""
    yield from attentions(context, "layer")


def attentions(context: Context, level: str) -> Iterator[Row]:
    for shape in sizes(context.tiny).shapes:
        yield from at_shape(shape, level, context.device, context.budget(0.1 if context.tiny else 0.3))


def compile_candidate(case: tuple[Shape, Sizes, Tiles]) -> None:
    """Compile the kernels of a candidate into Triton's cache; `search` reports the error of one that fails."""
    shape, size, tiles = case
    with suppress(Exception), launched_with(tiles):
        launches_of(shape, torch.device("cuda"), size)


def search(context: Context) -> Iterator[Row]:
    """Time each kernel with each candidate; `tiles.json` has the fastest so far for each kernel and N.

    A candidate that the device refuses, or whose results differ, is a row with the reason.
    """
    size, candidates = sizes(context.tiny), CANDIDATES[:2] if context.tiny else CANDIDATES
    best: dict[tuple[str, int], Row] = {}
    for shape in size.shapes:
        launches, expected = launches_of(shape, context.device, size)
        default, scale = kernel_times(context, launches), expected.abs().amax()
        about: Row = {"tokens": shape.tokens, "contrast_tokens": shape.contrast_grid[0] * shape.contrast_grid[1]}
        about |= {"head_dim": WIDTH // HEADS, "dtype": str(size.dtype).removeprefix("torch.")}
        if context.device.type == "cuda":
            list(context.parallel(compile_candidate, [(shape, size, tiles) for tiles in candidates]))
        for tiles in candidates:
            try:
                with launched_with(tiles):
                    launches, found = launches_of(shape, context.device, size)
                difference = ((found - expected).abs().amax() / scale).item()
                if not difference <= 0.02:
                    raise ValueError(f"results differ by {difference:.2g}")
                times = kernel_times(context, launches)
            except Exception as error:  # of the compiler or the driver
                yield {**about, **tiles._asdict(), "failed": f"{type(error).__name__}: {error}"[:300]}
                continue
            for kernel in {one.kernel: None for one in launches if "num_stages" in one.constants}:
                row = {**about, "kernel": kernel, **tiles._asdict(), "seconds": times[kernel]}
                row["default_seconds"] = default[kernel]
                yield row
                key = kernel, shape.tokens
                if key not in best or row["seconds"] < best[key]["seconds"]:
                    best[key] = row
            write_text(context.folder / "tiles.json", json.dumps(list(best.values()), indent=1) + "\n")
