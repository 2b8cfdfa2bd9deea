"""Things timed in turn within one run, and what they keep and need of memory.

Machines are noisy: what counts is the ratio of two things in the same round, with the middle half of the rounds.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


class Budget(NamedTuple):
    """How long to measure: so many rounds, or fewer (three at least) where the time is over."""

    rounds: int = 15
    end: float = float("inf")  # of `time.perf_counter`

    def share(self, part: float) -> "Budget":
        """The same rounds in a part of the time that is left."""
        now = time.perf_counter()
        return Budget(self.rounds, now + part * max(0.0, self.end - now))


class Timing(NamedTuple):
    """Seconds of one contestant (median), its ratio to the baseline in the same rounds, and their middle half."""

    seconds: float
    ratio: float
    low: float
    high: float


def clock(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, to the end of what it has started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    baseline: str | None,
    budget: Budget,
    device: torch.device,
    warm: int = 2,
) -> dict[str, Timing]:
    """Time functions in turn, the order reversed each round; `baseline` None takes the fastest."""
    for function in contestants.values():
        for _ in range(warm):
            function()
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(budget.rounds):
        if turn >= 3 and time.perf_counter() > budget.end:
            break
        for name in names if turn % 2 else names[::-1]:
            times[name].append(clock(contestants[name], device))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    base = times[baseline or min(medians, key=medians.__getitem__)]

    def timing(name: str) -> Timing:
        ratios = sorted(a / b for a, b in zip(times[name], base, strict=True))
        quarter = len(ratios) // 4
        return Timing(medians[name], statistics.median(ratios), ratios[quarter], ratios[-1 - quarter])

    return {name: timing(name) for name in contestants}


def compare(
    one: Callable[[], object], other: Callable[[], object], budget: Budget, device: torch.device, warm: int = 2
) -> dict[str, float]:
    """Two functions: the ratio one / other with its middle half, and the median milliseconds of each."""
    timings = take_turns({"one": one, "other": other}, "other", budget, device, warm)
    of_one, of_other = timings["one"], timings["other"]
    found = {"ratio": of_one.ratio, "low": of_one.low, "high": of_one.high}
    return {**found, "ms": 1e3 * of_one.seconds, "other_ms": 1e3 * of_other.seconds}


def kept_bytes(forward: Callable[[], Tensor], module: nn.Module | None = None) -> int:
    """What autograd keeps between forward and backward, the parameters of `module` not counted."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()} if module is not None else set()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return sum(kept.values())


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call has at once, beside what was there before it."""
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
