"""Self-check of a cluster before a long run, one line per check.

All ranks call every check. It returns its result as a line, or raises `CheckError` on every rank: work of a single rank
runs in `on_each_rank`, so that no rank waits for one that failed.
"""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vca.data.doctor import check_before_training
from vca.runtime.distributed import World
from vca.runtime.provenance import provenance

Result = TypeVar("Result")


class CheckError(Exception):
    """A failed check."""


def on_each_rank(world: World, function: Callable[[], Result]) -> Result:
    """Call a function that uses no collective on each rank.

    Raises:
        CheckError: on every rank, if it fails on one; the message has the rank and its node.
    """
    failure = None
    try:
        result = function()
    except (CheckError, OSError, ValueError, RuntimeError) as error:
        failure = CheckError(f"rank {world.rank} on {platform.node()}: {' '.join(str(error).split())}")
    world.raise_first(failure)
    return result


def report(name: str, check: Callable[[], str], world: World) -> bool:
    """Run a check on all ranks, print its line, and return whether it passed."""
    try:
        state, line = "ok", check()
    except (CheckError, OSError, ValueError, RuntimeError) as error:
        state, line = "error", " ".join(str(error).split())
    if world.is_main:
        print(f"{state:6} {name:14} {line}", flush=True)
    return state == "ok"


def ranks_and_devices(world: World) -> str:
    """Check that each rank has its own device, and all run the same code and versions."""
    cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if cuda else f"CPU, {torch.get_num_threads()} threads per rank"
    local = {
        "node": (platform.node(), os.environ.get("SLURM_NODEID", "0")),
        "device": device,
        "index": world.device.index,
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "commit": (provenance()[0] or "unknown")[:12],
    }
    ranks = world.broadcast(world.gather(local))
    for key in ("versions", "commit", "device"):
        if len({rank[key] for rank in ranks}) > 1:
            raise CheckError(f"ranks differ in {key}: {', '.join(sorted({rank[key] for rank in ranks}))}")
    if cuda and len({(rank["node"], rank["index"]) for rank in ranks}) < len(ranks):
        raise CheckError("two ranks use the same GPU; start one rank per GPU")
    nodes = len({rank["node"] for rank in ranks})
    return f"{world.size} on {nodes} node(s), {device}; {local['versions']}, commit {local['commit']} on all"


def all_reduce(world: World) -> str:
    """Check float and integer sums over the ranks."""
    steps = torch.arange(1000, device=world.device)
    for dtype in (torch.float32, torch.int64):
        result = world.sum((steps + world.rank).to(dtype))
        expected = (steps * world.size + world.size * (world.size - 1) // 2).to(dtype)
        if not torch.equal(result, expected):
            raise CheckError(f"all-reduce of {dtype} must be exact, wrong by {(result - expected).abs().max().item()}")
    return f"sums over {world.size} ranks are exact"


def median_seconds(world: World, work: Callable[[], object], rounds: int) -> float:
    """Time `work` on the device `rounds` times, all ranks at once, after two rounds that set up connections."""
    times = []
    for _ in range(rounds + 2):
        wait_for_device(world)
        world.barrier()
        start = time.perf_counter()
        work()
        wait_for_device(world)
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[rounds // 2]


def bandwidth(world: World, parameters: int) -> str:
    """Measure an all-reduce of 64 MB, and estimate the time for this model's gradients."""
    if world.size == 1:
        return "skipped for one rank"
    data = torch.ones(2**24, device=world.device)  # float32
    seconds = median_seconds(world, lambda: world.sum(data), rounds=5)
    moved = 2 * (world.size - 1) / world.size * data.numel() * 4
    gradients = seconds * parameters / data.numel()
    rate = moved / seconds / 1e9
    return f"{rate:.2f} GB/s per rank (bus); the gradients of this model take {gradients * 1e3:.0f} ms per step"


def speed(world: World) -> str:
    """Time the same matrix product on each rank: the slowest rank sets the pace."""
    size = 2048 if world.device.type == "cuda" else 512
    a = torch.ones(size, size, device=world.device)
    median = median_seconds(world, lambda: a @ a, rounds=10)
    ranks = world.broadcast(world.gather((median, world.rank, platform.node())))
    fastest, slowest = min(ranks), max(ranks)
    ratio = slowest[0] / fastest[0]
    note = "; a run is as fast as its slowest rank" if ratio > 1.2 else ""
    return f"slowest rank {slowest[1]} ({slowest[2]}) takes {ratio:.2f} x the time of the fastest{note}"


def wait_for_device(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def bf16(world: World) -> str:
    """Compare bfloat16 with float32 on each rank, forward and backward."""
    error = max(world.broadcast(world.gather(on_each_rank(world, lambda: bf16_error(world.device)))))
    native = world.device.type == "cpu" or torch.cuda.get_device_capability(world.device) >= (8, 0)
    note = "" if native else "; emulated and slow on this GPU, use trainer.precision=fp16"
    return f"within {error:.2%} of float32{note}"


def bf16_error(device: torch.device) -> float:
    """Return the relative error of a layer under autocast; `CheckError` if too large or not finite."""
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 256).to(device), torch.randn(64, 256, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = layer(x)
    out.float().square().mean().backward()
    exact = layer(x)
    error = ((out.float() - exact).norm() / exact.norm()).item()
    gradient: Any = layer.weight.grad
    if out.dtype is not torch.bfloat16 or not error < 0.01 or not gradient.isfinite().all():
        raise CheckError(f"bfloat16 must be finite and within 1% of float32, got {out.dtype} with error {error:.2%}")
    return error


def data(world: World, load: Callable[[], list[Any]], config: Any, workers: int, batch_bytes: int) -> str:
    """Check that every rank sees the same splits, can read them, and has enough shared memory."""
    datasets = on_each_rank(world, load)
    counts = world.broadcast(world.gather([len(dataset) for dataset in datasets]))
    if any(count != counts[0] for count in counts):
        raise CheckError(f"all ranks must have the same [training, evaluation] images, got {counts}")
    rate = min(world.broadcast(world.gather(on_each_rank(world, lambda: reading_speed(datasets[0])))))
    check_before_training(config, datasets, workers, batch_bytes, world)
    images = f"{counts[0][0]} training and {counts[0][1]} evaluation images"
    return f"{config.name}: {images}; the slowest rank reads {rate:.0f} images/s, before augmentation"


def reading_speed(dataset: Any, count: int = 64) -> float:
    """Measure images per second, over `count` images across the data set."""
    indices = range(0, len(dataset), -(-len(dataset) // count))
    start = time.perf_counter()
    for index in indices:
        dataset[index]
    return len(indices) / (time.perf_counter() - start)


def disk(world: World, folder: Path, parameters: int, keep: int, ema: int) -> str:
    """Check that every node sees the files of rank 0, and that there is space for the checkpoints.

    `ema` is the number of EMAs.
    """
    on_each_rank(world, lambda: folder.mkdir(parents=True, exist_ok=True))

    def token() -> str:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-", delete=False) as file:
            file.write(b"seen")
        return file.name

    name = Path(world.from_main(token))
    deadline = time.monotonic() + 10
    while not name.exists() and time.monotonic() < deadline:  # network file systems may be late
        time.sleep(0.1)
    seen = name.exists() and name.read_bytes() == b"seen"
    blind = [node for node in world.broadcast(world.gather(None if seen else platform.node())) if node]
    if world.is_main:
        name.unlink()
    if blind:
        raise CheckError(f"out_dir={folder} must be on a shared file system; {blind[0]} cannot read files of rank 0")
    size = parameters * 4 * (3 + ema)  # weights, AdamW's two moments, EMAs
    need, free = size * (keep + 1), shutil.disk_usage(folder).free  # the oldest is deleted after the newest is written
    if free < need:
        raise CheckError(f"out_dir={folder} has {free / 2**30:.1f} GiB free, checkpoints need {need / 2**30:.1f} GiB")
    return f"{free / 2**30:.0f} GiB free; a checkpoint takes {size / 2**30:.2f} GiB, {keep} are kept"


def resume(world: World, train: Callable[[Path], dict[str, Tensor]], folder: Path) -> str:
    """Check that a run of ten steps and one resumed after five have bit-identical weights.

    `train` starts or resumes a run of ten steps, with a checkpoint at step 5, in a folder, and returns the weights.
    All ranks see `folder`, which is empty.
    """
    whole = train(folder / "whole")
    without_end = shutil.ignore_patterns("step_00000010.pt")
    world.from_main(lambda: shutil.copytree(folder / "whole", folder / "again", ignore=without_end))
    again = train(folder / "again")
    differ = [name for name, tensor in whole.items() if not torch.equal(tensor, again[name])]
    if differ:
        raise CheckError(f"{len(differ)} of {len(whole)} tensors differ after a resume, such as {differ[0]}")
    return "ten steps, uninterrupted and resumed after five, have bit-identical weights"
