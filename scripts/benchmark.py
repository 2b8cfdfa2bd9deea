"""Timings that can be repeated: two things side by side in one run, interleaved, as a ratio with its spread.

    python scripts/benchmark.py attention --device cpu      the VCA layer beside timm's Attention (softmax, SDPA)
    python scripts/benchmark.py loop --device cpu           the trainer's loop beside a bare loop on the same batches
    python scripts/benchmark.py data --root DIR             the ImageNet training pipeline beside timm's loader
    python scripts/benchmark.py table1 --root DIR           the ten rows of Table 1: 20 updates, a kill, a resume
    python scripts/benchmark.py inception --weights FILE    eval_fid.py beside torch-fidelity's own command
    python scripts/benchmark.py evaluation --threads 2      eval_fid.py on 50,000 images: time and peak memory

DIR holds images as `data=imagefolder` reads them, FILE the weights of torch-fidelity's Inception network.

Machines are noisy: quote the ratio and its spread, not the milliseconds. `--json FILE` keeps the figures.
"""

import argparse
import copy
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

# Width, and (grid, prefix tokens, contrast grid): the shapes of DeiT and of DiT, then longer inputs.
WIDTH, HEADS = 384, 6
CALLS = 4  # a timing is that many calls in a row, as the layers of a model are
SHAPES = [
    ((14, 14), 1, (7, 7)),
    ((16, 16), 0, (8, 8)),
    ((32, 32), 0, (8, 8)),
    ((64, 64), 0, (8, 8)),
]


def interleaved(
    one: Callable[[], object], other: Callable[[], object], rounds: int, device: torch.device, warm: int = 2
) -> dict[str, float]:
    """Time two functions in turn, the order changing each round; the ratio one / other, and the median ms of each.

    Both are called `warm` times before.
    """

    def clock(function: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for _ in range(warm):
        one(), other()
    pairs = []
    for turn in range(rounds):
        first, second = (one, other) if turn % 2 else (other, one)
        times = clock(first), clock(second)
        pairs.append(times if turn % 2 else times[::-1])
    ratios = sorted(a / b for a, b in pairs)
    return {
        "ratio": statistics.median(ratios),
        "low": ratios[len(ratios) // 4],
        "high": ratios[-1 - len(ratios) // 4],
        "ms": 1e3 * statistics.median(a for a, _ in pairs),
        "other_ms": 1e3 * statistics.median(b for _, b in pairs),
    }


def benchmark_attention(device: torch.device, rounds: int) -> list[dict]:
    """VCA beside timm's Attention at width 384 in float32: forward, and forward + backward."""
    from timm.layers import Attention

    from vca import VisualContrastAttention

    print(f"{'N':>6} {'n':>4}  {'pass':<18} {'VCA ms':>9} {'timm ms':>9} {'ratio':>7}  middle half")
    rows = []
    for grid, prefix, pool in SHAPES:
        tokens = prefix + grid[0] * grid[1]
        ours = VisualContrastAttention(WIDTH, HEADS, grid, pool, prefix).to(device)
        theirs = Attention(WIDTH, HEADS, qkv_bias=True).to(device)
        x = torch.randn(max(1, 2048 // tokens), tokens, WIDTH, device=device, requires_grad=True)

        def forward(module: nn.Module, x: Tensor = x) -> None:
            with torch.no_grad():
                for _ in range(CALLS):
                    module(x)

        def both(module: nn.Module, x: Tensor = x) -> None:
            for _ in range(CALLS):
                module(x).sum().backward()

        for name, run in (("forward", forward), ("forward + backward", both)):
            times = interleaved(lambda run=run, m=ours: run(m), lambda run=run, m=theirs: run(m), rounds, device)  # type: ignore[misc]
            rows.append({"tokens": tokens, "contrast_tokens": pool[0] * pool[1], "pass": name, **times})
            ours_ms, theirs_ms = times["ms"] / CALLS, times["other_ms"] / CALLS
            print(
                f"{tokens:>6} {pool[0] * pool[1]:>4}  {name:<18} {ours_ms:>9.2f} {theirs_ms:>9.2f} "
                f"{times['ratio']:>7.2f}  {times['low']:.2f} to {times['high']:.2f}"
            )
    return rows


def benchmark_loop(device: torch.device, rounds: int) -> list[dict]:
    """What the trainer adds to forward, backward and step (seeds, norms, clipping, EMA, reports): two sizes of model.

    Each round is ten updates of the trainer, and of a bare loop on a copy of the model and the same batches.
    """
    from models.deit import DeiTConfig

    return [
        loop_row(device, rounds, "8 px, 16 tokens", DeiTConfig(img_size=8, patch_size=2, depth=4, **SMALL), 64),
        loop_row(device, rounds, "32 px, 64 tokens", DeiTConfig(img_size=32, patch_size=4, depth=6, **SMALL), 128),
    ]


SMALL: dict[str, Any] = {"embed_dim": 96, "num_heads": 3, "num_classes": 10, "contrast_grid": [2, 2]}


def loop_row(device: torch.device, rounds: int, name: str, model_config: Any, batch: int) -> dict:
    """The trainer's loop beside the bare one for one model."""
    from models import build_model
    from vca import VCAConfig
    from vca.data.augment import AugmentConfig, BatchMixer
    from vca.data.loader import Batch
    from vca.runtime.distributed import World
    from vca.runtime.logging import WandbConfig
    from vca.runtime.rundir import RunDirectory
    from vca.training.classification import ClassificationLoss
    from vca.training.config import TrainerConfig
    from vca.training.optim import OptimConfig, build_optimizer
    from vca.training.run import TrainingRun
    from vca.training.step import TrainState

    trainer = TrainerConfig(steps=1_000_000, global_batch=batch, ema_decay=0.99, log_every=20)
    optim = OptimConfig(lr=1e-3, clip_grad=1.0)
    state = TrainState(build_model(model_config, VCAConfig()), trainer, optim, World(0, 0, 1, device), 100)
    bare = copy.deepcopy(state.model)
    optimizer = build_optimizer(optim, bare, 1e-3)
    loss_of = ClassificationLoss(BatchMixer(AugmentConfig(), 10, 0))
    numbers = torch.arange(batch)
    size = model_config.img_size
    batches = [Batch(torch.randn(batch, 3, size, size), numbers % 10, numbers, numbers) for _ in range(10)]

    def bare_loop() -> None:
        for step, cpu_batch in enumerate(batches):
            loss = loss_of(bare, cpu_batch.to(device), step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    with tempfile.TemporaryDirectory() as folder:
        training = TrainingRun(RunDirectory(Path(folder)), state, trainer, state.world)

        def trainer_loop() -> None:
            for cpu_batch in batches:
                update = state.update([cpu_batch.to(device)], loss_of, 0)
                training.record(update, [cpu_batch])

        with training.open("benchmark", {}, WandbConfig()):
            training.reporter.say = lambda line: None  # type: ignore[method-assign]
            times = interleaved(trainer_loop, bare_loop, rounds, device)
    overhead, low, high = (100 * (times[key] - 1) for key in ("ratio", "low", "high"))
    print(
        f"{name:<18} trainer {times['ms'] / 10:.2f} ms/update, bare {times['other_ms'] / 10:.2f} ms/update: "
        f"{overhead:+.1f} % ({low:+.1f} to {high:+.1f})",
        flush=True,
    )
    return {"loop": name, "batch": batch, **times}


def benchmark_data(root: Path, rounds: int) -> list[dict]:
    """Images per second of one core: our loader and timm's, the same transforms on the same photos, no workers.

    Each round is four batches of 16 images of each. RandAugment draws its own operations on either side.
    """
    from timm.data import ImageDataset, create_loader

    import train_cls  # noqa: F401 - registers the schemas
    from vca.config import compose
    from vca.data import load_dataset
    from vca.data.augment import train_transform
    from vca.data.loader import MicroBatches, TrainOrder, train_loader
    from vca.runtime.distributed import World

    classes = sum(entry.is_dir() for entry in (root / "train").iterdir())
    options = ["data=imagefolder", f"data.root={root}", f"data.num_classes={classes}", "recipe=deit_original"]
    config = compose("train_cls", [*options, "augment.repeats=1"])
    data, augment, batch, batches = config.data, config.augment, 16, 4

    images = load_dataset(data, train=True)
    world = World(0, 0, 1, torch.device("cpu"))
    shares = MicroBatches(TrainOrder(len(images), batch, 0), world, batch, 1, 0, 1_000_000)
    ours = iter(train_loader(images, train_transform(augment, data), 0, shares, workers=0))

    loader = create_loader(
        ImageDataset(str(root / "train")),
        (3, data.img_size, data.img_size),
        batch,
        is_training=True,
        use_prefetcher=False,
        scale=(augment.scale[0], augment.scale[1]),
        ratio=(augment.ratio[0], augment.ratio[1]),
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        mean=tuple(data.mean),
        std=tuple(data.std),
        re_prob=augment.erase_prob,
        re_mode=augment.erase_mode,
        re_count=augment.erase_count,
        num_workers=0,
        pin_memory=False,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    endless = (item for _ in range(1_000_000) for item in loader)

    def draw(batches_of: Any) -> None:
        for _ in range(batches):
            next(batches_of)

    times = interleaved(lambda: draw(endless), lambda: draw(ours), rounds, world.device)
    rate, timm_rate = (1e3 * batch * batches / times[key] for key in ("other_ms", "ms"))
    print(
        f"ours {rate:.1f} images/s, timm {timm_rate:.1f} images/s; ours / timm "
        f"{times['ratio']:.3f} ({times['low']:.3f} to {times['high']:.3f})"
    )
    row = {"images_per_second": rate, "timm_images_per_second": timm_rate}
    return [{**row, **{key: times[key] for key in ("ratio", "low", "high")}}]


def benchmark_table1(root: Path, threads: int) -> list[dict]:
    """Each row of Table 1 by its own experiment file: 20 updates of 16 images, killed after the 12th and resumed."""
    from vca.config.load import CONFIGS

    classes = sum(entry.is_dir() for entry in (root / "train").iterdir())
    rows = []
    print(f"{'row':<22} {'s / update':>10} {'memory GiB':>10} {'loss':>7}  evaluated images, resumed at")
    for file in sorted((CONFIGS / "experiment" / "table1").glob("*.yaml")):
        with tempfile.TemporaryDirectory() as folder:
            row = {"row": file.stem, **train_row(file.stem, root, classes, Path(folder), threads)}
        rows.append(row)
        print(
            f"{row['row']:<22} {row['seconds_per_update']:>10.2f} {row['memory_gib']:>10.2f} {row['loss']:>7.3f}  "
            f"{row['evaluated']}, {row['resumed_at']}",
            flush=True,
        )
    return rows


def train_row(row: str, root: Path, classes: int, folder: Path, threads: int) -> dict[str, Any]:
    """Train one row in a process of its own, twice: to a `kill -9`, and from the last checkpoint to the end."""
    options = ["trainer.steps=20", "trainer.global_batch=16", "trainer.log_every=1", "trainer.checkpoint_every=5"]
    options += [
        f"data.root={root}",
        f"data.num_classes={classes}",
        f"out_dir={folder}",
        "name=row",
        "trainer.workers=0",
    ]
    options += ["trainer.eval_every=0", "trainer.eval_batch=50", "trainer.device=cpu", "augment.repeats=1"]
    command = [sys.executable, "train_cls.py", f"experiment=table1/{row}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def records() -> list[dict]:
        file = folder / "row" / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []

    def start() -> subprocess.Popen:
        here = Path(__file__).parents[1]
        return subprocess.Popen(command, cwd=here, env=environment, stdout=subprocess.DEVNULL)

    process = start()
    while process.poll() is None and not any(record["step"] >= 12 for record in records()):
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()

    process = start()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{row} failed: {' '.join(command)}")
    launches = [json.loads(line) for line in (folder / "row" / "launches.jsonl").read_text().splitlines()]
    training = [record for record in records() if "loss" in record]
    evaluation = next(record for record in records() if "val/top1" in record)
    if [record["step"] for record in training] != list(range(1, 21)):
        raise RuntimeError(f"{row} reported steps {[record['step'] for record in training]}")
    return {
        "seconds_per_update": statistics.median(16 / record["images_per_second"] for record in training),
        "memory_gib": usage.ru_maxrss / 2**20,
        "loss": training[-1]["loss"],
        "evaluated": evaluation["val/images"],
        "resumed_at": launches[-1]["first_step"],
    }


def benchmark_inception(weights: Path, rounds: int, threads: int, images: int = 192) -> list[dict]:
    """Both whole commands, their start included, on the same two folders of PNG files; FID alone on their side."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        folders = [Path(folder) / name for name in ("samples", "reference")]
        for path in folders:
            path.mkdir()
            for number in range(images):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / f"{number:06d}.png")
        ours = [sys.executable, "eval_fid.py", f"samples={folders[0]}", f"reference={folders[1]}", "batch_size=32"]
        ours += ["allow_few=true", "device=cpu", f"extractor.weights={weights}", "extractor.sha256=null"]
        theirs = [str(Path(sys.executable).parent / "fidelity"), "--cpu", "--fid", "--no-cache", "--batch-size", "32"]
        theirs += ["--input1", str(folders[0]), "--input2", str(folders[1])]
        theirs += ["--feature-extractor-weights-path", str(weights)]

        def run(command: list[str]) -> None:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            here = Path(__file__).parents[1]
            subprocess.run(command, cwd=here, env=environment, check=True, capture_output=True)

        times = interleaved(lambda: run(ours), lambda: run(theirs), rounds, torch.device("cpu"), warm=0)
    ours_rate, their_rate = (2 * images / (times[key] / 1e3) / threads for key in ("ms", "other_ms"))
    print(f"images a second and core: eval_fid.py {ours_rate:.2f}, fidelity {their_rate:.2f}")
    print(f"time, eval_fid.py / fidelity: {times['ratio']:.2f} ({times['low']:.2f} to {times['high']:.2f})")
    return [{"images": 2 * images, "ours_per_core": ours_rate, "theirs_per_core": their_rate, **times}]


EXTRACTOR = """
import torch
from torch import nn

def load_extractor(weights):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 256, 3, 2, 1)]
    return nn.Sequential(Scale(), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

class Scale(nn.Module):
    def forward(self, images):
        return images / 128 - 1
"""


def benchmark_evaluation(threads: int, images: int = 50_000) -> list[dict]:
    """The whole path in a small extractor's features: a folder of PNG files against an npz, all metrics."""
    with tempfile.TemporaryDirectory() as folder:
        root, rng = Path(folder), np.random.default_rng(0)
        (root / "extractor.py").write_text(EXTRACTOR)
        (root / "samples").mkdir()
        for number in range(images):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "samples" / f"{number:06d}.png", compress_level=1)
        np.savez(root / "reference.npz", arr_0=rng.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8))
        command = [sys.executable, "eval_fid.py", f"samples={root / 'samples'}", f"reference={root / 'reference.npz'}"]
        command += ["extractor=file", f"extractor.source={root / 'extractor.py'}", "batch_size=250", "device=cpu"]
        start, here = time.perf_counter(), Path(__file__).parents[1]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, cwd=here, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"failed: {' '.join(command)}")
    row = {"images": images, "seconds": time.perf_counter() - start, "memory_gib": usage.ru_maxrss / 2**20}
    print(f"{images} images against {images}: {row['seconds']:.0f} s, at most {row['memory_gib']:.2f} GiB")
    return [row]


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("attention", "loop", "data", "table1", "inception", "evaluation"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of timings for each figure (default 15)")
    parser.add_argument("--root", type=Path, help="folder with train/ and val/, for data and table1")
    parser.add_argument("--weights", type=Path, help="torch-fidelity's file of weights, for inception")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if options.what in ("data", "table1"):
        if options.root is None or not (options.root / "train").is_dir():
            parser.error(f"{options.what} needs --root, a folder that holds train/ and val/")
        options.device = "cpu"
    if options.what == "inception":
        if options.weights is None or not options.weights.is_file():
            parser.error("inception needs --weights, torch-fidelity's file of weights")
        options.device = "cpu"
    if options.rounds < (1 if options.what == "inception" else 3) or options.threads < 1:
        parser.error("--rounds must be >= 3 and --threads >= 1")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    machine = {"device": name, "threads": options.threads, "torch": torch.__version__}
    print(f"{options.what}: {name}, {options.threads} thread(s), torch {torch.__version__}")
    rows = {
        "attention": lambda: benchmark_attention(device, options.rounds),
        "loop": lambda: benchmark_loop(device, options.rounds),
        "data": lambda: benchmark_data(options.root, options.rounds),
        "table1": lambda: benchmark_table1(options.root, options.threads),
        "evaluation": lambda: benchmark_evaluation(options.threads),
        "inception": lambda: benchmark_inception(options.weights.resolve(), options.rounds, options.threads),
    }[options.what]()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"what": options.what, **machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
