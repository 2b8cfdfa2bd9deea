"""Interleaved timing, saved activations and peak memory.

Timings are noisy, so results are ratios of two functions in the same round, with the quartiles over the rounds.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


class Budget(NamedTuple):
    """Number of rounds and end time; after the end time, at least three rounds are run."""

    rounds: int = 15
    end: float = float("inf")  # in `time.perf_counter`

    def share(self, part: float) -> "Budget":
        """Return a budget with the same rounds and a fraction of the remaining time."""
        now = time.perf_counter()
        return Budget(self.rounds, now + part * max(0.0, self.end - now))


class Timing(NamedTuple):
    """Median seconds of a function, and its ratio to the baseline: median and quartiles over the rounds."""

    seconds: float
    ratio: float
    low: float
    high: float


def clock(function: Callable[[], object], device: torch.device) -> float:
    """Measure the seconds of a call, including its work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def cpu_clock(function: Callable[[], object], device: torch.device) -> float:
    """Measure the CPU seconds of this process in a call, so that other processes on the machine matter less."""
    start = time.process_time()
    function()
    return time.process_time() - start


def take_turns(
    functions: Mapping[str, Callable[[], object]],
    baseline: str | None,
    budget: Budget,
    device: torch.device,
    warm: int = 2,
    measure: Callable[[Callable[[], object], torch.device], float] = clock,
) -> dict[str, Timing]:
    """Time functions in turn, in reversed order every other round; `baseline=None` uses the fastest.

    `measure` returns the seconds of a call: `clock`, or `cpu_clock`.
    """
    for function in functions.values():
        for _ in range(warm):
            function()
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(budget.rounds):
        if turn >= 3 and time.perf_counter() > budget.end:
            break
        for name in names if turn % 2 else names[::-1]:
            times[name].append(measure(functions[name], device))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    base = times[baseline or min(medians, key=medians.__getitem__)]

    def timing(name: str) -> Timing:
        ratios = sorted(a / b for a, b in zip(times[name], base, strict=True))
        quarter = len(ratios) // 4
        return Timing(medians[name], statistics.median(ratios), ratios[quarter], ratios[-1 - quarter])

    return {name: timing(name) for name in functions}


def compare(
    one: Callable[[], object], other: Callable[[], object], budget: Budget, device: torch.device, warm: int = 2
) -> dict[str, float]:
    """Time two functions in turn; return the ratio one / other with quartiles, and the median milliseconds of each."""
    timings = take_turns({"one": one, "other": other}, "other", budget, device, warm)
    seconds, ratio, low, high = timings["one"]
    return {"ratio": ratio, "low": low, "high": high, "ms": 1e3 * seconds, "other_ms": 1e3 * timings["other"].seconds}


def graphed(function: Callable[[], object], device: torch.device, calls: int = 1) -> Callable[[], object]:
    """Return a function that makes `calls` calls; on a GPU by one CUDA graph, without the time of launches on the host.

    Raises:
        RuntimeError: if the calls cannot be captured.
    """

    def repeated() -> None:
        for _ in range(calls):
            function()

    if device.type == "cpu":
        return repeated
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        repeated()
    return graph.replay


def saved_bytes(forward: Callable[[], Tensor], module: nn.Module | None = None) -> int:
    """Return the bytes that autograd saves for backward, without the parameters of `module`."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()} if module is not None else set()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return sum(saved.values())


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory of a call in bytes, above the memory allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
