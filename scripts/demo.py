"""The demo behind `make demo`: VCA on handwritten digits, as a classifier and as a generator.

    python scripts/demo.py

Trains a small DeiT with VCA and with softmax attention on 1,438 real 8 x 8 digits, and evaluates both on 359 held-out
digits. Then trains a small VCA DiT and SiT on the same digits and samples from them. The VCA classifier predicts the
class of each sample, and its features give Frechet distances of samples, training digits and noise from the held-out
digits. Two runs train at a time. Rerunning the demo resumes it, or prints the results again.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch.utils.data import Subset

from models import rebuild
from scripts.report import write_report
from vca.data import load_dataset
from vca.data.config import DataConfig
from vca.evaluation.extractor import ClassifierConfig, Extractor, load_extractor
from vca.evaluation.features import measure
from vca.evaluation.images import DatasetImages, ImageSet, NpzImages, open_png_folder
from vca.generation.sample_folder import SampleFolder
from vca.metrics.fid import frechet_distance
from vca.runtime.distributed import World
from vca.runtime.rundir import RunDirectory
from vca.training.curves import plot_curves
from vca.training.pretrained import InitWeights

CLASSIFICATION = {
    name: [f"attention={name}", "trainer.eval_every=110", "trainer.log_every=55"] for name in ("vca", "softmax")
}
NETWORK = ["model.patch_size=2", "model.hidden_size=144", "optim=small", "optim.lr=2e-3"]
NETWORK += ["trainer.eval_every=0", "trainer.log_every=110"]
GENERATION = {
    "dit": [*NETWORK, "objective=diffusion", "sampler=ddim", "sampler.steps=20"],
    "sit": [*NETWORK, "objective=interpolant", "sampler=ode_heun", "sampler.steps=20"],
}
GUIDANCE = (1.0, 1.5)
ONE = World(0, 0, 1, torch.device("cpu"))


def main() -> None:
    """Train, sample, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="outputs/demo", help="output folder (default outputs/demo)")
    parser.add_argument("--samples", type=int, default=200, help="samples per generator (default 200)")
    parser.add_argument("overrides", nargs="*", help="config overrides for all runs, such as trainer.epochs=5")
    options = parser.parse_args()
    out, start = Path(options.out), time.perf_counter()

    print("VCA on handwritten digits: two classifiers, two generators. Six to eight minutes on two CPU cores.")
    for script, runs in {"train_cls.py": CLASSIFICATION, "train_gen.py": GENERATION}.items():
        run_parallel(
            {name: [script, f"name={name}", f"out_dir={out}", *own, *options.overrides] for name, own in runs.items()}
        )
    for guidance in GUIDANCE:
        sampling = [f"count={options.samples}", "labels=balanced", "grid=true", f"sampler.cfg_scale={guidance}"]
        run_parallel(
            {
                name: [
                    "sample.py",
                    f"run={out / name}",
                    f"out={sample_path(out, name, guidance)}",
                    *own[-2:],
                    *sampling,
                ]
                for name, own in GENERATION.items()
            }
        )

    records = {name: RunDirectory(out / name).records() for name in CLASSIFICATION}
    plot_curves(records, out / "curves.png")
    print(f"\n{'classifier':<12}top-1 accuracy on the held-out digits")
    for name, lines in records.items():
        last = next(line for line in reversed(lines) if "val/top1" in line)
        print(f"{name:<12}{last['val/top1']:.2f} % of {last['val/images']}")
    classifier = load_extractor(ClassifierConfig(run=str(out / "vca"), weights=InitWeights.raw), ONE, rebuild)
    print(f"\n{'generator':<12}samples that the VCA classifier assigns to the requested class, of {options.samples}")
    print(f"{'':<12}" + "".join(f"{guidance_label(guidance):<16}" for guidance in GUIDANCE) + "grid")
    for name in GENERATION:
        folders = [sample_path(out, name, guidance) for guidance in GUIDANCE]
        shares = [f"{class_accuracy(classifier, folder):.1f} %" for folder in folders]
        print(f"{name:<12}" + "".join(f"{share:<16}" for share in shares) + str(folders[-1] / "grid.png"))
    print(f"\n{'Frechet distance':<24}to the held-out digits, {options.samples} images, in the classifier's features")
    for name, distance in distances(classifier, out, options.samples).items():
        print(f"{name:<24}{distance:.2f}")
    print(f"\n{write_report([out], out / 'report.html', maps=3)}")
    print(f"curves: {out / 'curves.png'}   (total time {time.perf_counter() - start:.0f} s)")


def sample_path(out: Path, name: str, guidance: float) -> Path:
    """Return the sample folder of a generator."""
    return out / f"{name}-samples-{guidance}"


def guidance_label(guidance: float) -> str:
    """Return a column heading."""
    return "no guidance" if guidance == 1 else f"guidance {guidance}"


def run_parallel(commands: dict[str, list[str]]) -> None:
    """Run scripts in parallel, each on its share of the cores, and print their output with their names."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // len(commands)))
    processes = []
    for name, (script, *overrides) in commands.items():
        print(f"\n$ python {script} {' '.join(overrides)}", flush=True)
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *overrides],
            env={**os.environ, "OMP_NUM_THREADS": threads},
            stdout=subprocess.PIPE,
            text=True,
        )
        reader = threading.Thread(target=relay, args=(name, process))
        reader.start()
        processes.append((name, process, reader))
    for _, process, reader in processes:
        process.wait()
        reader.join()
    if failed := [name for name, process, _ in processes if process.returncode]:
        sys.exit(f"{' and '.join(failed)} failed; see above")


def relay(name: str, process: "subprocess.Popen[str]") -> None:
    """Print the lines of a process with its name."""
    for line in process.stdout or ():
        print(f"[{name}] {line}", end="", flush=True)


def distances(extractor: Extractor, out: Path, count: int) -> dict[str, float]:
    """Compute the Frechet distance of training digits, samples and noise from the held-out digits."""
    config = DataConfig(**json.loads((out / "vca" / "config.json").read_text())["data"])
    held_out, training = (load_dataset(config, train=train) for train in (False, True))
    noise = out / "noise.npz"
    shape = (count, config.img_size, config.img_size, config.in_chans)
    np.savez(noise, arr_0=np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    of_class = [[n for n, label in enumerate(training.labels) if label == k] for k in range(config.num_classes)]
    chosen = Subset(training, [n for numbers in of_class for n in numbers[: count // config.num_classes]])
    sets: dict[str, ImageSet] = {"training digits": DatasetImages(chosen, config.img_size, config.in_chans, "", "")}
    for guidance in GUIDANCE:
        for name in GENERATION:
            folder = sample_path(out, name, guidance) / "images"
            sets[f"{name}, {guidance_label(guidance)}"] = open_png_folder(folder, "samples")
    sets["noise"] = NpzImages(noise, "samples")
    reference = measure(
        DatasetImages(held_out, config.img_size, config.in_chans, "", ""), extractor, ONE, 100, 0, verbose=False
    )
    features = {name: measure(images, extractor, ONE, 100, 0, verbose=False) for name, images in sets.items()}
    return {name: frechet_distance(*part.pooled, *reference.pooled) for name, part in features.items()}


def class_accuracy(extractor: Extractor, path: Path) -> float:
    """Return the percentage of samples in a folder that a classifier assigns to their class."""
    folder = SampleFolder(path)
    samples = list(folder.read_all(len(folder.existing())))
    logits = extractor(torch.from_numpy(np.stack([sample.pixels for sample in samples])).permute(0, 3, 1, 2)).logits
    assert logits is not None
    hits = logits.argmax(dim=1) == torch.tensor([sample.label for sample in samples])
    return 100 * hits.float().mean().item()


if __name__ == "__main__":
    main()
