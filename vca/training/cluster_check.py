"""A self-check of a cluster before a training spends days on it: one line for each thing that a training relies on.

Every check is a function of the world that all ranks call; it returns what it found, or raises `CheckError` on every
rank alike: what a rank does by itself it does in `alone`, so that none waits for one that has failed.
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

Found = TypeVar("Found")


class CheckError(Exception):
    """Something that would break a training, or spoil it."""


def alone(world: World, do: Callable[[], Found]) -> Found:
    """What each rank finds by itself.

    Raises:
        CheckError: on every rank, if it fails on one; names the rank and its machine.
    """
    failure = None
    try:
        found = do()
    except (CheckError, OSError, ValueError, RuntimeError) as error:
        failure = CheckError(f"rank {world.rank} on {platform.node()}: {' '.join(str(error).split())}")
    world.raise_first(failure)
    return found


def report(name: str, check: Callable[[], str], world: World) -> bool:
    """Make one check on all ranks and print its line; whether all was well."""
    try:
        state, line = "ok", check()
    except (CheckError, OSError, ValueError, RuntimeError) as error:
        state, line = "error", " ".join(str(error).split())
    if world.is_main:
        print(f"{state:6} {name:14} {line}", flush=True)
    return state == "ok"


def ranks_and_devices(world: World) -> str:
    """Each rank has a device of its own, and all run the same code on the same versions."""
    cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if cuda else f"CPU, {torch.get_num_threads()} threads a rank"
    place = (platform.node(), os.environ.get("SLURM_NODEID", "0"))
    mine = {
        "place": place,
        "device": device,
        "index": world.device.index,
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "commit": (provenance()[0] or "unknown")[:12],
    }
    ranks = world.broadcast(world.gather(mine))
    for key in ("versions", "commit", "device"):
        if len({rank[key] for rank in ranks}) > 1:
            raise CheckError(f"ranks differ in {key}: {', '.join(sorted({rank[key] for rank in ranks}))}")
    if cuda and len({(rank["place"], rank["index"]) for rank in ranks}) < len(ranks):
        raise CheckError("two ranks share a GPU")
    nodes = len({rank["place"] for rank in ranks})
    return f"{world.size} on {nodes} node(s), {device}; {mine['versions']}, commit {mine['commit']} on all"


def all_reduce(world: World) -> str:
    """Sums over the ranks against what is known, float and integer."""
    steps = torch.arange(1000, device=world.device)
    for dtype in (torch.float32, torch.int64):
        found = world.sum((steps + world.rank).to(dtype))
        expected = (steps * world.size + world.size * (world.size - 1) // 2).to(dtype)
        if not torch.equal(found, expected):
            raise CheckError(f"a sum of {dtype} over the ranks is wrong by {(found - expected).abs().max().item()}")
    return f"sums over {world.size} ranks are exact"


def bandwidth(world: World, parameters: int, megabytes: int = 64, rounds: int = 5) -> str:
    """Time of an all-reduce as large as DDP's, and what it makes of this model's gradients."""
    if world.size == 1:
        return "one rank, nothing to send"
    data = torch.ones(megabytes * 2**18, device=world.device)  # float32
    times = []
    for _ in range(rounds + 1):
        wait_for_device(world)
        world.barrier()
        start = time.perf_counter()
        world.sum(data)
        wait_for_device(world)
        times.append(time.perf_counter() - start)
    seconds = sorted(times[1:])[rounds // 2]  # the first one sets up connections
    moved = 2 * (world.size - 1) / world.size * data.numel() * 4
    gradients = seconds * parameters * 4 / (data.numel() * 4)
    rate = moved / seconds / 1e9
    return f"{rate:.2f} GB/s a rank (bus); the gradients of this model take {gradients * 1e3:.0f} ms an update"


def speed(world: World, size: int = 2048, rounds: int = 10) -> str:
    """The same product on each rank: one slow device makes all wait."""
    size = size if world.device.type == "cuda" else size // 4
    a = torch.ones(size, size, device=world.device)
    times = []
    for _ in range(rounds + 2):
        wait_for_device(world)
        start = time.perf_counter()
        a @ a
        wait_for_device(world)
        times.append(time.perf_counter() - start)
    mine = sorted(times[2:])[rounds // 2]
    ranks = world.broadcast(world.gather((mine, world.rank, platform.node())))
    fastest, slowest = min(ranks), max(ranks)
    ratio = slowest[0] / fastest[0]
    note = "; a training goes at the pace of the slowest" if ratio > 1.2 else ""
    return f"slowest rank {slowest[1]} ({slowest[2]}) takes {ratio:.2f} x the time of the fastest{note}"


def wait_for_device(world: World) -> None:
    """Until all that was asked of the device is done."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def bf16(world: World) -> str:
    """A product in bfloat16 against float32, forward and backward."""
    error = max(world.broadcast(world.gather(alone(world, lambda: bf16_error(world.device)))))
    native = world.device.type == "cpu" or torch.cuda.get_device_capability(world.device) >= (8, 0)
    note = "" if native else "; emulated and slow on this GPU, trainer.precision=fp16 is not"
    return f"within {error:.2%} of float32{note}"


def bf16_error(device: torch.device) -> float:
    """Relative error of a layer under autocast; `CheckError` if it is too large or the gradient is not finite."""
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 256).to(device), torch.randn(64, 256, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = layer(x)
    out.float().square().mean().backward()
    exact = layer(x)
    error = ((out.float() - exact).norm() / exact.norm()).item()
    gradient: Any = layer.weight.grad
    if out.dtype is not torch.bfloat16 or not error < 0.01 or not gradient.isfinite().all():
        raise CheckError(f"bfloat16 is off by {error:.2%} from float32")
    return error


def data(world: World, load: Callable[[], list[Any]], config: Any, workers: int, batch_bytes: int) -> str:
    """Both splits as every rank sees them, and some of the files; notes about shared memory are printed."""
    datasets = alone(world, load)
    counts = world.broadcast(world.gather([len(dataset) for dataset in datasets]))
    if any(count != counts[0] for count in counts):
        raise CheckError(f"ranks see different numbers of images: {counts}")
    rate = min(world.broadcast(world.gather(alone(world, lambda: reading_speed(datasets[0])))))
    check_before_training(config, datasets, workers, batch_bytes, world)
    images = f"{counts[0][0]} training and {counts[0][1]} evaluation images"
    return f"{config.name}: {images}; the slowest process reads {rate:.0f} a second, before augmentation"


def reading_speed(dataset: Any, most: int = 64) -> float:
    """Images a second, of some that lie spread over the data set."""
    indices = range(0, len(dataset), -(-len(dataset) // most))
    start = time.perf_counter()
    for index in indices:
        dataset[index]
    return len(indices) / (time.perf_counter() - start)


def disk(world: World, folder: Path, parameters: int, keep: int, ema: bool) -> str:
    """Every rank sees what rank 0 writes, and there is room for the checkpoints to come."""
    alone(world, lambda: folder.mkdir(parents=True, exist_ok=True))

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
        raise CheckError(f"out_dir={folder} is another folder on {blind[0]}; it must be on a shared file system")
    size = parameters * 4 * (4 if ema else 3)  # weights, AdamW's two moments, the average
    need, free = size * (keep + 1), shutil.disk_usage(folder).free  # one more while the oldest is still there
    if free < need:
        raise CheckError(f"out_dir={folder} has {free / 2**30:.1f} GiB free, checkpoints need {need / 2**30:.1f} GiB")
    return f"{free / 2**30:.0f} GiB free; a checkpoint takes {size / 2**30:.2f} GiB, {keep} are kept"


def resume(world: World, train: Callable[[Path], dict[str, Tensor]], folder: Path) -> str:
    """A run of ten updates, once whole and once from the middle: the same weights to the bit.

    Args:
        world: this process.
        train: runs, or goes on with, ten updates with a checkpoint after five, in a folder; gives the weights.
        folder: an empty one, that all ranks see.
    """
    whole = train(folder / "whole")
    without_end = shutil.ignore_patterns("step_00000010.pt")
    world.from_main(lambda: shutil.copytree(folder / "whole", folder / "again", ignore=without_end))
    again = train(folder / "again")
    differ = [name for name, tensor in whole.items() if not torch.equal(tensor, again[name])]
    if differ:
        raise CheckError(f"{len(differ)} of {len(whole)} tensors differ after a resume, such as {differ[0]}")
    return "ten updates, once whole and once resumed after five: the same weights to the bit"
