"""What a run costs: FLOP/s, utilization, device-hours so far and expected in all."""

import time
from dataclasses import dataclass, field

from vca.runtime.compute import Precision
from vca.runtime.devices import device_name, peak_flops
from vca.runtime.distributed import World


@dataclass
class RunCost:
    """Costs of a run, from the speed of this start and the device-hours of the earlier ones.

    Attributes:
        world, precision, total_steps: of the run.
        macs: MACs of the forward pass of one image; None if unknown.
        earlier: device-hours of the earlier starts.
        first_step: the step at which this start resumed the run.
        started: when it did, in seconds of `time.perf_counter`.
    """

    world: World
    precision: Precision
    total_steps: int
    macs: int | None = None
    earlier: float = 0.0
    first_step: int = 0
    started: float = field(default_factory=time.perf_counter)

    def utilization(self, images_per_second: float) -> dict[str, float | None]:
        """Return FLOP/s of a device, and MFU, their share of its peak; None if unknown.

        An image has 6 FLOPs per MAC: the backward pass has twice those of the forward pass. Recomputation of gradient
        checkpointing is not counted (arXiv 2204.02311, appendix B).
        """
        flops = 6 * self.macs * images_per_second / self.world.size if self.macs is not None else None
        peak = peak_flops(device_name(self.world.device), self.precision)
        return {"flops_per_second": flops, "mfu": flops / peak if flops is not None and peak is not None else None}

    def device_hours(self) -> float:
        """Device-hours up to now, including evaluations, checkpoints and repeated steps."""
        return self.earlier + (time.perf_counter() - self.started) * self.world.size / 3600

    def device_hours_total(self, step: int) -> float:
        """Estimate the device-hours of the whole run, if the steps from `step` on take as long as those before it."""
        spent = self.device_hours()
        return spent + (self.total_steps - step) * (spent - self.earlier) / max(step - self.first_step, 1)
