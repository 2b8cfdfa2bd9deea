"""GPUs: memory, peak rates of matrix products and links, from the vendors' data sheets."""

import platform
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from vca.runtime.compute import Precision


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        names: pattern of its name in `torch.cuda.get_device_name`, without NVIDIA or Tesla.
        memory: GiB, the number in its name.
        link: GB/s of its links to the other GPUs of a machine, in one direction.
        fp32: TFLOP/s of float32 without tensor cores.
        tf32, fp16, bf16: TFLOP/s of tensor cores with float32 accumulation, without sparsity; None if it has none.
    """

    names: str
    memory: int
    link: int
    fp32: float
    tf32: float | None
    fp16: float
    bf16: float | None

    def peak(self, precision: Precision) -> float | None:
        """Peak FLOP/s of matrix products in a precision."""
        tflops: float | None = getattr(self, precision.value)
        return 1e12 * tflops if tflops is not None else None


# Whole names: laptop, D and Ti variants and MIG slices are other devices. A link is NVLink, else PCIe.
GPUS: dict[str, Gpu] = {
    "v100-16": Gpu(r"V100-SXM2-16GB", 16, 150, 15.7, None, 125, None),
    "v100": Gpu(r"V100-SXM[23]-32GB", 32, 150, 15.7, None, 125, None),
    "v100-pcie": Gpu(r"V100-PCIE-(16|32)GB", 16, 16, 14, None, 112, None),
    "a10": Gpu(r"A10", 24, 32, 31.2, 62.5, 125, 125),
    "a100-40": Gpu(r"A100-(SXM4|PCIE)-40GB", 40, 300, 19.5, 156, 312, 312),
    "a100": Gpu(r"A100-SXM4-80GB|A100 80GB PCIe", 80, 300, 19.5, 156, 312, 312),
    "h100": Gpu(r"H100 80GB HBM3", 80, 450, 67, 494.7, 989.4, 989.4),
    "h100-pcie": Gpu(r"H100 PCIe", 80, 64, 51, 378, 756, 756),
    "h100-nvl": Gpu(r"H100 NVL", 94, 300, 60, 417.5, 835.5, 835.5),
    "h200": Gpu(r"H200", 141, 450, 67, 494.7, 989.4, 989.4),
    "b200": Gpu(r"B200", 180, 900, 75, 1100, 2250, 2250),
    "l40s": Gpu(r"L40S", 48, 32, 91.6, 183, 362, 362),
    "rtx3090": Gpu(r"GeForce RTX 3090", 24, 32, 35.6, 35.6, 71, 71),
    "rtx4090": Gpu(r"GeForce RTX 4090", 24, 32, 82.6, 82.6, 165.2, 165.2),
    "rtx5090": Gpu(r"GeForce RTX 5090", 32, 64, 104.8, 104.8, 209.5, 209.5),
}


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def processor_name() -> str:
    """Return the model name of the CPU, as Linux reports it; elsewhere what `platform` reports."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_flops(name: str, precision: Precision) -> float | None:
    """Peak FLOP/s of the device with this name; None if it is not in `GPUS` or does not support the precision."""
    name = re.sub(r"^(NVIDIA )?(Tesla )?", "", name)
    found = next((gpu for gpu in GPUS.values() if re.fullmatch(gpu.names, name)), None)
    return found.peak(precision) if found is not None else None


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: allocated on a GPU, resident on a CPU. It does not wait for the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
