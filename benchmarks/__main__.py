"""Benchmarks: alternatives timed in turn within one run, reported as ratios with their quartiles.

    python -m benchmarks attention              attention layers and cores over N: VCA, MHSA, Agent, Differential
    python -m benchmarks model                  images/s of whole models, VCA and softmax, by image size
    python -m benchmarks loop                   overhead of the trainer over a bare loop on the same batches
    python -m benchmarks all --minutes 9        the three above; with --root also `data`
    python -m benchmarks data --root DIR        the ImageNet training pipeline compared with timm's loader
    python -m benchmarks data --root DIR --forms     the same images in each form: folders, zip, ...
    python -m benchmarks table1 --root DIR      the ten rows of Table 1: 20 steps, a kill, a resume
    python -m benchmarks inception --weights FILE    eval_fid.py compared with torch-fidelity's command
    python -m benchmarks evaluation --threads 2      eval_fid.py on 50,000 images: time and peak memory
    python -m benchmarks gpu --help                  everything to measure on a GPU, in five stages

DIR is an image folder for `data=imagefolder`; FILE contains the weights of torch-fidelity's Inception network.

Timings are noisy: quote the ratio and its quartiles, not the milliseconds. `--json FILE` saves the results; `attention`
also saves a plot of time and memory over N.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

if sys.argv[1:2] == ["gpu"] and "--rehearse" in sys.argv:  # before Triton is imported: its interpreter runs the kernels
    os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.attention import benchmark_attention
from benchmarks.commands import benchmark_evaluation, benchmark_inception, benchmark_table1
from benchmarks.data import benchmark_data, deit_recipe
from benchmarks.loop import benchmark_loop
from benchmarks.model import benchmark_model
from benchmarks.plot import plot_attention
from benchmarks.readers import benchmark_readers
from benchmarks.timing import Budget
from models.timm_registry import load_sizes

ALL = {"attention": 0.5, "model": 0.4, "loop": 0.1}  # benchmarks of `all` -> share of the time budget
ON_CPU = ("data", "table1", "inception", "evaluation")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*ALL, "all", *ON_CPU))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--rounds", type=int, default=15, help="maximum number of rounds (default 15)")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="time budget; afterwards fewer rounds, at least three"
    )
    parser.add_argument("--tokens", type=int, default=16384, help="attention: largest N (default 16384)")
    parser.add_argument("--levels", nargs="+", default=["layer", "core"], choices=("layer", "variants", "core"))
    parser.add_argument("--models", nargs="+", default=[], choices=load_sizes(), metavar="NAME")
    parser.add_argument("--size", type=int, help="model: largest image size in pixels (default 1024; on a CPU 256)")
    parser.add_argument("--root", type=Path, help="image folder with train/ and val/, for data and table1")
    parser.add_argument("--workers", type=int, default=0, help="data: loader workers (default 0: this process)")
    parser.add_argument("--forms", action="store_true", help="data: compare the forms of images instead of loaders")
    parser.add_argument("--weights", type=Path, help="torch-fidelity's Inception weights, for inception")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    if options.what in ("data", "table1") and (options.root is None or not (options.root / "train").is_dir()):
        parser.error(f"{options.what} needs --root, a folder with train/ and val/")
    if options.what == "inception" and (options.weights is None or not options.weights.is_file()):
        parser.error("inception needs --weights, torch-fidelity's Inception weights")
    if options.rounds < (1 if options.what == "inception" else 3) or options.threads < 1 or options.minutes <= 0:
        parser.error("--rounds must be >= 3, --threads >= 1 and --minutes > 0")
    if options.what in ON_CPU:
        options.device = "cpu"
    options.size = options.size or (1024 if options.device.startswith("cuda") else 256)
    return options


def measure_data(options: argparse.Namespace, budget: Budget) -> list[dict]:
    """Measure loaders, or with `--forms` the forms of images."""
    if options.forms:
        return benchmark_readers(options.root, *deit_recipe(options.root), budget)
    return benchmark_data(options.root, budget, options.workers)


def main() -> None:
    """Run the benchmarks; the JSON file is written after each of them."""
    options = parse()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    machine = {"device": name, "threads": options.threads, "torch": torch.__version__}
    benchmarks: dict[str, Callable[[Budget], list[dict]]] = {
        "attention": lambda budget: benchmark_attention(device, budget, options.tokens, options.levels),
        "model": lambda budget: benchmark_model(device, budget, options.size, options.models),
        "loop": lambda budget: benchmark_loop(device, budget),
        "data": lambda budget: measure_data(options, budget),
        "table1": lambda _: benchmark_table1(options.root, options.threads),
        "evaluation": lambda _: benchmark_evaluation(options.threads),
        "inception": lambda budget: benchmark_inception(options.weights.resolve(), budget, options.threads),
    }
    parts = ALL if options.what == "all" else {options.what: 1.0}
    if options.what == "all" and options.root is not None:
        parts = {**parts, "data": 0.1}
    budget, results = Budget(options.rounds, time.perf_counter() + 60 * options.minutes), []
    left = sum(parts.values())
    for what, share in parts.items():
        print(f"\n{what}: {name}, {options.threads} thread(s), torch {torch.__version__}\n", flush=True)
        rows = benchmarks[what](budget.share(share / left))
        left -= share
        results.append({"what": what, **machine, "rows": rows})
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            record = {"what": "all", **machine, "parts": results} if options.what == "all" else results[0]
            options.json.write_text(json.dumps(record, indent=1) + "\n")
            if what == "attention" and "layer" in options.levels:
                plot_attention(rows, name, options.json.with_suffix(".png"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["gpu"]:
        from benchmarks.gpu.command import main as gpu

        gpu(sys.argv[2:])
    else:
        main()
