"""Stage 2: time and bandwidth of each kernel, a search of block sizes, and the cores and layers beside SDPA.

The time of a kernel is that of its launches with the same arguments in one CUDA graph. Its floor is the time in which
the device copies as many bytes as the kernel's tensors have, each counted once.
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.attention import HEADS, SHAPES, WIDTH, Shape, at_shape, built
from benchmarks.gpu.runner import Context, Row
from benchmarks.timing import graphed, take_turns
from vca.attention.kernels import Backend, launch
from vca.attention.kernels.launch import KernelInputs, KernelOptions
from vca.attention.kernels.operator import contrast_attention, contrast_attention_backward

TINY = Shape((4, 4), 1, (2, 2))
CALLS = 10  # of a kernel in one CUDA graph


class Launch(NamedTuple):
    """A recorded launch of a kernel."""

    kernel: str
    run: Callable[[], object]
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
            self.launches.append(Launch(name, run, num_bytes))
            run()

        return launch


class Sizes(NamedTuple):
    """Sizes of a measurement: shapes, dtype, tokens of a batch, heads, head dim."""

    shapes: list[Shape]
    dtype: torch.dtype
    tokens: int
    heads: int
    dim: int = WIDTH // HEADS


def sizes(tiny: bool) -> Sizes:
    return Sizes([TINY], torch.float32, 1, 1) if tiny else Sizes(SHAPES, torch.bfloat16, 65_536, HEADS)


def problem(shape: Shape, device: torch.device, size: Sizes) -> tuple[KernelInputs, KernelOptions]:
    """Return random arguments of the operator; q, k and v are views of one projection."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*lengths: int) -> Tensor:
        return torch.randn(lengths, generator=generator, device=device)

    packed = random(max(1, size.tokens // shape.tokens), shape.tokens, 3, size.heads, size.dim).to(size.dtype)
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    n = shape.contrast_grid[0] * shape.contrast_grid[1]
    e_pos, e_neg = random(size.heads, n, size.dim), random(size.heads, n, size.dim)
    inputs = KernelInputs(q, k, v, None, e_pos, e_neg, random(), random(), random(size.dim), random(size.dim))
    return inputs, KernelOptions(0.2, shape.grid, shape.contrast_grid, shape.prefix, 1e-5, (True, True), False)


def launches_of(shape: Shape, device: torch.device, size: Sizes) -> list[Launch]:
    """Run forward and backward of the operator; return its launches."""
    inputs, options = problem(shape, device, size)
    launches: list[Launch] = []

    def recorded(name: str) -> Any:
        kernels = {key: one for key, one in vars(getattr(launch, name)).items() if "_kernel" in key}
        recorders = {key: Recorded(one, launches) for key, one in kernels.items()}
        return mock.patch.object(launch, name, SimpleNamespace(**recorders))

    with recorded("forward"), recorded("backward_stage1"), recorded("backward_stage2"):
        out, *saved = contrast_attention(*inputs, *options)
        contrast_attention_backward(torch.ones_like(out), *saved, *inputs, *options)
    return launches


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
    """Measure the bytes per second of a kernel that reads a tensor and writes another, both counted."""
    x = torch.ones(2**18 if context.tiny else 2**28, device=context.device)
    y = torch.empty_like(x)
    run = graphed(lambda: torch.neg(x, out=y), context.device)
    seconds = take_turns({"copy": run}, None, context.budget(0.1), context.device)["copy"].seconds
    return 2 * x.numel() * x.element_size() / seconds


def kernels(context: Context) -> Iterator[Row]:
    """Yield time, bandwidth and share of the floor of each kernel at each N."""
    bandwidth, size = copy_bandwidth(context), sizes(context.tiny)
    yield {"copy_bandwidth": bandwidth}
    for shape in size.shapes:
        launches = launches_of(shape, context.device, size)
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


def parts(context: Context) -> Iterator[Row]:
    """Yield forward and backward of a VCA layer with and without local branch, and its convolution in two layouts."""
    device, size = context.device, sizes(context.tiny)
    for shape in size.shapes[:2]:
        batch = max(1, size.tokens // shape.tokens)
        x = torch.randn(batch, shape.tokens, WIDTH, device=device, requires_grad=True)
        image = torch.randn(batch, WIDTH, *shape.grid, device=device)
        kind = {"backend": Backend.triton if device.type == "cuda" else Backend.eager}
        whole, bare = (built("vca", shape, device, local_branch=local, **kind) for local in (True, False))
        functions: dict[str, tuple[nn.Module, Tensor]] = {"layer": (whole, x), "layer without local branch": (bare, x)}
        for layout in (torch.channels_last, torch.contiguous_format):
            convolution = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH).to(device).to(memory_format=layout)
            given = image.to(memory_format=layout).requires_grad_()
            functions[f"convolution, {str(layout).removeprefix('torch.')}"] = convolution, given

        def run(module: nn.Module, given: Tensor) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = module(given)
            out.backward(torch.ones_like(out))

        runs = {name: graphed(partial(run, *pair), device) for name, pair in functions.items()}
        for name, timing in take_turns(runs, None, context.budget(0.1), device).items():
            yield {"part": name, "tokens": shape.tokens, "batch": batch, "seconds": timing.seconds}


def attentions(context: Context, level: str) -> Iterator[Row]:
    for shape in sizes(context.tiny).shapes:
        yield from at_shape(shape, level, context.device, context.budget(0.1 if context.tiny else 0.3))
