"""Check a data set or a cluster before a run.

    python scripts/doctor.py data=imagenet data.root=/data/imagenet
    python scripts/doctor.py data.root=/data/imagenet data.check_seconds=3600      every file of a large data set
    python scripts/doctor.py data=latents data.root=/data/latents data.check_seconds=3600   the sha256 of every file
    python scripts/doctor.py --cluster                            this machine: its GPUs, or two CPU ranks
    python scripts/doctor.py --cluster experiment=table1/deit_tiny_vca data.root=/data/imagenet out_dir=/scratch/runs
    python scripts/doctor.py --cluster -m cluster=slurm cluster.nodes=2 cluster.partition=gpu ...      SLURM nodes

For a data set, it prints a line for each problem, with the file, or the archive and its member, and the fix. Every run
makes the same check at its start, for `data.check_seconds`.

With `--cluster`, it takes the overrides of `train_cls.py` and prints a line for each check (about 30 s): ranks and
devices, rendezvous, all-reduce, bandwidth, stragglers, bf16, data, disk, exact resume of a run of ten steps.

The exit code is 0 if all checks pass.
"""

import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

import train_cls
from models import build_model
from vca.cli import command_line, exit_on_user_error
from vca.config import DoctorConfig, TrainClsConfig, compose, register_schemas
from vca.data import identify_files, load_dataset
from vca.data.config import DataConfig
from vca.data.doctor import Examination, examine_datasets
from vca.data.imagefolder import IndexedImages
from vca.data.indexing import index_readable, scan_split
from vca.runtime import distributed
from vca.runtime.errors import ConfigError
from vca.sweep.job import torchrun
from vca.training import cluster_check
from vca.training.checkpoint import load_latest

# A small run of ten steps, on the digits that come with scikit-learn.
TEN_STEPS = (
    "trainer.steps=10",
    "trainer.checkpoint_every=5",
    "trainer.eval_every=0",
    "trainer.log_every=5",
    "trainer.workers=0",
    "trainer.deterministic=true",
    "model.drop_path_rate=0.1",
    "augment.mixup=0.8",
    "name=ten",
)


def run(config: DoctorConfig) -> None:
    """Check both splits and print the problems; raise `ConfigError` if a run cannot use the data."""
    problems, result = examine_data(config.data)
    for problem in problems:
        print(f"error: {problem}")
    for finding in result.findings:
        print(f"{'error' if finding.fatal else 'note'}: {finding}")
    print(result)
    if errors := len(problems) + len(result.errors):
        raise ConfigError(f"data.root={config.data.root}: {errors} error{'s' if errors > 1 else ''}")


def examine_data(data: DataConfig) -> tuple[list[str], Examination]:
    """Return the problems of the splits and the examination of their readable images.

    A latent cache has no evaluation split.
    """
    datasets, problems, readable = {}, [], []
    for split in ("train",) if data.name == "latents" else ("train", "val"):
        try:
            datasets[split] = load_dataset(data, train=split == "train")
        except ConfigError as error:
            problems += problems_of(data, split) or [str(error)]
            readable += readable_images(data, split)
    if not problems:
        try:
            identify_files(**datasets)
        except ConfigError as error:
            problems = [str(error)]
        kinds = {"train": "training", "val": "evaluation"}
        counts = " and ".join(f"{len(dataset)} {kinds[split]}" for split, dataset in datasets.items())
        print(f"{data.name}: {counts} images")
    return list(dict.fromkeys(problems)), examine_datasets([*datasets.values(), *readable], data.check_seconds)


def problems_of(data: DataConfig, split: str) -> list[str]:
    """Return all problems of the files of a split, of which loading it reports the first."""
    try:
        return scan_split(data, split)[1].problems if data.name == "imagefolder" else []
    except ConfigError:
        return []


def readable_images(data: DataConfig, split: str) -> list[IndexedImages]:
    """Return the readable images of a split that cannot be loaded; [] if it has no files."""
    try:
        return [IndexedImages(index_readable(data, split))] if data.name == "imagefolder" else []
    except (ConfigError, OSError):
        return []


def check_cluster(config: TrainClsConfig) -> None:
    """Run every check on every rank; raise `ConfigError` if one fails."""
    trainer, start = config.trainer, time.perf_counter()
    with distributed.start(trainer.device.value, timeout_minutes=1.0 + config.data.check_seconds / 60) as world:
        rendezvous_seconds = time.perf_counter() - start
        parameters = sum(p.numel() for p in build_model(config.model, config.attention).parameters())
        out, keep, ema = Path(config.out_dir), trainer.keep_checkpoints, len(trainer.ema_decays)
        # A rank's batch, from which the required shared memory is computed.
        batch_bytes = -(-trainer.global_batch_size // world.size) * config.data.image_bytes

        def load() -> list[Any]:
            return [load_dataset(config.data, train) for train in (True, False)]

        def ten_steps(folder: Path) -> dict[str, Tensor]:
            return train_ten_steps(folder, trainer.device.value, world.size)

        def resume() -> str:
            folder = Path(world.from_main(lambda: tempfile.mkdtemp(dir=out, prefix="doctor-")))
            try:
                return cluster_check.resume(world, ten_steps, folder)
            finally:
                world.barrier()
                if world.is_main:
                    shutil.rmtree(folder)

        checks: dict[str, Callable[[], str]] = {
            "ranks": lambda: cluster_check.ranks_and_devices(world),
            "rendezvous": lambda: f"{world.size} ranks joined in {rendezvous_seconds:.1f} s",
            "all-reduce": lambda: cluster_check.all_reduce(world),
            "bandwidth": lambda: cluster_check.bandwidth(world, parameters),
            "speed": lambda: cluster_check.speed(world),
            "bf16": lambda: cluster_check.bf16(world),
            "data": lambda: cluster_check.data(world, load, config.data, trainer.workers, batch_bytes),
            "disk": lambda: cluster_check.disk(world, out, parameters, keep, ema),
            "resume": resume,
        }
        failed = [name for name, check in checks.items() if not cluster_check.report(name, check, world)]
        if world.is_main:
            print(f"total time {time.perf_counter() - start:.0f} s", flush=True)
        if failed:
            raise ConfigError(f"failed checks: {', '.join(failed)}")


def train_ten_steps(folder: Path, device: str, ranks: int) -> dict[str, Tensor]:
    """Start or resume a run of ten steps with a checkpoint after five; return its weights."""
    batch = f"trainer.global_batch_size={-(-32 // ranks) * 2 * ranks}"  # Mixup needs an even batch per rank
    options = [*TEN_STEPS, f"trainer.device={device}", batch, f"out_dir={folder}"]
    with redirect_stdout(io.StringIO()):
        train_cls.run(compose("train_cls", options))
    saved = load_latest(folder / "ten" / "checkpoints", set_aside=False)
    assert saved is not None
    return saved["model"]


def job_output(folder: Path) -> str:
    """Return the lines that the checks of a SLURM job printed."""
    logs = sorted((folder / "logs").glob("*.log"))
    lines = [line for log in logs for line in log.read_text().splitlines()]
    return "\n".join(line for line in lines if line.startswith(("ok ", "error ", "config error:")))


def register_configs() -> None:
    """Register the config schemas of both checks with Hydra."""
    register_schemas(root={"doctor": DoctorConfig}, groups={})
    train_cls.register_configs()


def main() -> None:
    """Run the data check or, with `--cluster`, the cluster check, which starts ranks unless torchrun did."""
    register_configs()
    if "--cluster" not in sys.argv:
        command_line("doctor", run)
        return
    sys.argv.remove("--cluster")
    if "RANK" not in os.environ and not {"-m", "--multirun", "-h", "--help"} & set(sys.argv):
        with exit_on_user_error():
            compose("train_cls", [argument for argument in sys.argv[1:] if not argument.startswith("-")])
        ranks = torch.cuda.device_count() or 2
        command = torchrun(Path(__file__), ["--cluster", *sys.argv[1:]], 1, ranks, 0)
        os.execv(command[0], command)
    command_line("train_cls", check_cluster, ("scripts/doctor.py", "--cluster"), job_output)


if __name__ == "__main__":
    main()
