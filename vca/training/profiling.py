"""A trace of a few steps, `trainer.profile=STEP`, which https://ui.perfetto.dev opens."""

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

STEPS = 3


class StepProfiler:
    """Records the operators of `STEPS` steps with `torch.profiler`.

    Args:
        first: the first of these steps; None never starts.
        total: steps of the run, which may end earlier.
        device: device of the run.
    """

    def __init__(self, first: int | None, total: int, device: torch.device) -> None:
        self.first, self.device = first, device
        self.last = min(first + STEPS, total) if first is not None else 0
        self.profiler: Any = None
        self.span: Any = None

    def begin(self, step: int) -> bool:
        """Call before a step, with its number; return whether the trace is complete."""
        if self.span is not None:
            self.span.__exit__(None, None, None)
            self.span = None
        if self.first is None or not self.first <= step <= self.last:
            return False
        if step == self.first < self.last:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self.profiler = profile(activities=activities)
            self.profiler.start()
        if self.profiler is None:  # resumed after the first step
            return False
        if step == self.last:
            self.profiler.stop()
            return True
        self.span = record_function(f"step {step}")
        self.span.__enter__()
        return False

    def save(self, file: Path) -> None:
        """Write the trace as JSON, compressed if the name ends in .gz.

        Raises:
            OSError: if it cannot be written.
        """
        self.profiler.export_chrome_trace(str(file))
        self.profiler = None
