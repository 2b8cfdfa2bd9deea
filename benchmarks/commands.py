"""Benchmarks of whole commands, including startup: the rows of Table 1, and `eval_fid.py`."""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import Budget, compare

ROOT = Path(__file__).parents[1]


def write_random_images(folder: Path, images: int, rng: np.random.Generator) -> None:
    """Write PNG files of 32 x 32 pixels."""
    folder.mkdir()
    for number in range(images):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.png", compress_level=1)


def benchmark_table1(root: Path, threads: int) -> list[dict]:
    """Run each experiment of Table 1 for 20 steps of 16 images, killed after step 12 and resumed."""
    from vca.config.composition import CONFIGS

    classes = sum(entry.is_dir() for entry in (root / "train").iterdir())
    rows = []
    print(f"{'row':<22} {'s / step':>10} {'memory GiB':>10} {'loss':>7}  evaluated images, resumed at")
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
    """Train one row in a subprocess until a `kill -9`, then resume it from the last checkpoint to the end."""
    options = ["trainer.steps=20", "trainer.global_batch_size=16", "trainer.log_every=1", "trainer.workers=0"]
    options += [
        f"data.root={root}",
        f"data.num_classes={classes}",
        f"out_dir={folder}",
        "name=row",
        "trainer.workers=0",
    ]
    options += ["trainer.checkpoint_every=5", "trainer.eval_every=0", "trainer.eval_batch_size=50"]
    options += ["trainer.device=cpu", "augment.aug_repeats=1"]
    command = [sys.executable, "train_cls.py", f"experiment=table1/{row}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def records() -> list[dict]:
        file = folder / "row" / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    process = start()
    while process.poll() is None and not any(record["step"] >= 12 for record in records()):
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()

    process = start()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{row}: command failed: {' '.join(command)}")
    launches = [json.loads(line) for line in (folder / "row" / "launches.jsonl").read_text().splitlines()]
    training = [record for record in records() if "loss" in record]
    evaluation = next(record for record in records() if "val/top1" in record)
    if [record["step"] for record in training] != list(range(1, 21)):
        raise RuntimeError(f"{row}: steps must be 1 to 20, got {[record['step'] for record in training]}")
    return {
        "seconds_per_update": statistics.median(16 / record["images_per_second"] for record in training),
        "memory_gib": usage.ru_maxrss / 2**20,
        "loss": training[-1]["loss"],
        "evaluated": evaluation["val/images"],
        "resumed_at": launches[-1]["first_step"],
    }


def benchmark_inception(weights: Path, budget: Budget, threads: int, images: int = 192) -> list[dict]:
    """Time `eval_fid.py` and torch-fidelity's command (FID only) on the same two folders of PNG files."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        folders = [Path(folder) / name for name in ("samples", "reference")]
        for path in folders:
            write_random_images(path, images, rng)
        ours = [sys.executable, "eval_fid.py", f"samples={folders[0]}", f"reference={folders[1]}", "batch_size=32"]
        ours += ["allow_few=true", "device=cpu", f"extractor.weights={weights}", "extractor.sha256=null"]
        theirs = [str(Path(sys.executable).parent / "fidelity"), "--cpu", "--fid", "--no-cache", "--batch-size", "32"]
        theirs += ["--input1", str(folders[0]), "--input2", str(folders[1])]
        theirs += ["--feature-extractor-weights-path", str(weights)]

        def run(command: list[str]) -> None:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)

        times = compare(lambda: run(ours), lambda: run(theirs), budget, torch.device("cpu"), warm=0)
    ours_rate, their_rate = (2 * images / (times[key] / 1e3) / threads for key in ("ms", "other_ms"))
    print(f"images/s per core: eval_fid.py {ours_rate:.2f}, fidelity {their_rate:.2f}")
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
    """Time `eval_fid.py` with all metrics and a small extractor: a folder of PNG files against an npz."""
    with tempfile.TemporaryDirectory() as folder:
        root, rng = Path(folder), np.random.default_rng(0)
        (root / "extractor.py").write_text(EXTRACTOR)
        write_random_images(root / "samples", images, rng)
        np.savez(root / "reference.npz", arr_0=rng.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8))
        command = [sys.executable, "eval_fid.py", f"samples={root / 'samples'}", f"reference={root / 'reference.npz'}"]
        command += ["extractor=file", f"extractor.source={root / 'extractor.py'}", "batch_size=250", "device=cpu"]
        start = time.perf_counter()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"command failed: {' '.join(command)}")
    row = {"images": images, "seconds": time.perf_counter() - start, "memory_gib": usage.ru_maxrss / 2**20}
    print(f"{images} images against {images}: {row['seconds']:.0f} s, peak memory {row['memory_gib']:.2f} GiB")
    return [row]
