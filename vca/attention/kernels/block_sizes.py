"""Block sizes, warps and pipeline stages of each kernel: measured ones of `tiles.json`, else defaults.

`python -m benchmarks gpu --stage 2` measures `tiles.json`. Each entry has the device's name and compute capability, a
kernel (a field of `KernelBlocks`), head dim, dtype, tokens and contrast tokens of the measurement, the four values of
`BlockSizes`, and the seconds with these and with the default values. An empty list uses the defaults everywhere.
"""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

FILE = Path(__file__).with_name("tiles.json")
NUM_WARPS, NUM_STAGES = 4, 3  # 3 stages are Triton's default


class BlockSizes(NamedTuple):
    """Tile sizes and launch options of a kernel."""

    BLOCK_C: int  # contrast tokens
    BLOCK_N: int  # tokens
    num_warps: int = NUM_WARPS
    num_stages: int = NUM_STAGES


class KernelBlocks(NamedTuple):
    """Block sizes of the forward of Stage I and of Stage II, and of their backward."""

    stage1_fwd: BlockSizes
    stage2_fwd: BlockSizes
    stage1_bwd: BlockSizes
    stage2_bwd: BlockSizes


def cdiv(a: int, b: int) -> int:
    """Return `a / b` rounded up. `triton.cdiv` takes 2 microseconds per call."""
    return -(-a // b)


def next_power_of_2(x: int) -> int:
    """Return the smallest power of 2 that is at least x."""
    return 1 << (x - 1).bit_length()


def default_blocks(dim: int, dtype: torch.dtype) -> KernelBlocks:
    """Return the block sizes of each kernel without a measurement.

    On an H200 those of head dim 64 in bfloat16 were within 2 % of the fastest of ten candidates in 15 of 20 cases. The
    others are the largest without many spills (`python scripts/kernel_resources.py`).
    """
    if dtype.itemsize == 4:
        return KernelBlocks(*4 * [BlockSizes(32, 16, 8) if dim <= 64 else BlockSizes(16, 16, 8)])
    if dim <= 64:
        return KernelBlocks(*4 * [BlockSizes(64, 64)])
    if dim < 128:
        # With 4 warps, 64 x 64 and head dim 72, Triton 3.6 compiles a wrong stage2_fwd for an H200.
        return KernelBlocks(BlockSizes(64, 32), BlockSizes(64, 64, 8), BlockSizes(64, 32), BlockSizes(64, 32, 8))
    return KernelBlocks(BlockSizes(64, 64, 8), BlockSizes(64, 64), BlockSizes(64, 32, 8), BlockSizes(64, 32, 8))


def capped(sizes: BlockSizes, num_contrast: int) -> BlockSizes:
    """Return the sizes with a BLOCK_C that is not larger than the contrast tokens need."""
    return sizes._replace(BLOCK_C=min(sizes.BLOCK_C, max(16, next_power_of_2(num_contrast))))


def is_positive(x: Any) -> bool:
    return type(x) is int and x > 0


def is_power(x: Any) -> bool:
    return is_positive(x) and x == next_power_of_2(x)


def is_block(x: Any) -> bool:
    return is_power(x) and x >= 16  # the smallest size of tensor cores


# Keys of an entry; the first six identify the measurement.
KEY = ("capability", "kernel", "head_dim", "dtype", "tokens", "contrast_tokens")
VALID: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(KEY, is_positive),
    "capability": lambda x: type(x) is int,  # 0 is a CPU
    "kernel": lambda x: x in KernelBlocks._fields,
    "dtype": lambda x: isinstance(x, str),
    "BLOCK_C": is_block,
    "BLOCK_N": is_block,
    "num_warps": is_power,
    "num_stages": is_positive,
}


@functools.cache
def read_entries(file: Path) -> list[dict[str, Any]]:
    """Read and check `tiles.json`.

    Raises:
        ValueError: if it is not a list of entries.
    """

    def refuse(what: str) -> ValueError:
        return ValueError(f"{file}: {what}; write it again with `python -m benchmarks gpu --stage 2`, or write []")

    try:
        entries = json.loads(file.read_text())
    except ValueError as error:
        raise refuse(f"must be JSON ({error})") from None
    if not isinstance(entries, list):
        raise refuse(f"must be a list, got {type(entries).__name__}")
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise refuse(f"entry {place} must have keys and values, got {entry!r}")
        for key, is_valid in VALID.items():
            if not is_valid(entry.get(key)):
                raise refuse(f"{key} of entry {place} is missing or wrong, got {entry.get(key)!r}")
    return entries


def capability_of(device: torch.device) -> int:
    """Return ten times the compute capability, 0 for the CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def block_sizes(num_tokens: int, num_contrast: int, dim: int, dtype: torch.dtype, device: torch.device) -> KernelBlocks:
    """Return the block sizes of each kernel.

    They are those of the entry of `tiles.json` with this compute capability, head dim and dtype whose numbers of tokens
    and contrast tokens are nearest, on a logarithmic scale, else the defaults.
    """
    here = {"capability": capability_of(device), "head_dim": dim, "dtype": str(dtype).removeprefix("torch.")}
    entries = [entry for entry in read_entries(FILE) if here.items() <= entry.items()]

    def distance(entry: dict[str, Any]) -> float:
        tokens, contrast = entry["tokens"] / num_tokens, entry["contrast_tokens"] / num_contrast
        return math.hypot(math.log(tokens), math.log(contrast))

    chosen = default_blocks(dim, dtype)
    for kernel in KernelBlocks._fields:
        if own := [entry for entry in entries if entry["kernel"] == kernel]:
            nearest = min(own, key=distance)
            chosen = chosen._replace(**{kernel: BlockSizes(*(nearest[field] for field in BlockSizes._fields))})
    return KernelBlocks(*(capped(sizes, num_contrast) for sizes in chosen))
