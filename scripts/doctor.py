"""Check a data set before training on it, or a cluster.

    python scripts/doctor.py data=imagenet data.root=/data/imagenet
    python scripts/doctor.py data.root=/data/imagenet data.check_seconds=3600      every file of a large set
    python scripts/doctor.py data=latents data.root=/data/latents data.check_seconds=3600   the sha256 of every file
    python scripts/doctor.py --cluster                            this machine: its GPUs, or two CPU ranks
    python scripts/doctor.py --cluster experiment=table1/deit_tiny_vca data.root=/data/imagenet out_dir=/scratch/runs
    python scripts/doctor.py --cluster -m cluster=slurm cluster.nodes=2 cluster.partition=gpu ...      on the nodes

Of a data set it prints a line for each thing found, with the file and the remedy. A training makes the same check at
its start, for `data.check_seconds` of its own config.

Of a cluster it prints a line for each thing that a training relies on: ranks and devices, the rendezvous, sums over
the ranks, bandwidth, the slowest rank, bf16, data, disk, exact resume of a run of ten updates. What is to be trained is
told as to `train_cls.py`.

Exit code 0 if all is well.
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

from vca.cli import command_line, exit_on_user_error

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

import train_cls
from models import build_model
from vca.config import DoctorConfig, TrainClsConfig, compose, register_schemas
from vca.data import load_dataset
from vca.data.config import DataConfig
from vca.data.doctor import Examination, examine, examine_datasets
from vca.runtime import distributed
from vca.runtime.errors import ConfigError
from vca.sweep.job import torchrun
from vca.training import cluster_check
from vca.training.checkpoint import load_latest

register_schemas(root={"doctor": DoctorConfig}, groups={})

# The run of ten updates: small, on data that is always there.
TEN_UPDATES = (
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
    """Examine both splits and print what was found; `ConfigError` if a training cannot use them."""
    problems, result = examine_data(config.data)
    for problem in problems:
        print(f"error: {problem}")
    for finding in result.findings:
        print(f"{'error' if finding.fatal else 'note'}: {finding}")
    print(result)
    if errors := len(problems) + len(result.errors):
        raise ConfigError(f"data.root={config.data.root}: {errors} error{'s' if errors > 1 else ''}")


def examine_data(data: DataConfig) -> tuple[list[str], Examination]:
    """What is wrong with the folders, and in the files: those of the data set, or if it is none, all images there are.

    A latent cache has a training split alone.
    """
    datasets, problems = {}, []
    for split in ("train",) if data.name == "latents" else ("train", "val"):
        try:
            datasets[split] = load_dataset(data, train=split == "train")
        except ConfigError as error:
            problems.append(str(error))
    if not problems:
        kinds = {"train": "training", "val": "evaluation"}
        counts = " and ".join(f"{len(dataset)} {kinds[split]}" for split, dataset in datasets.items())
        print(f"{data.name}: {counts} images")
        return [], examine_datasets(datasets.values(), data.check_seconds)

    from torchvision.datasets.folder import IMG_EXTENSIONS

    folders = [Path(data.root or "") / split for split in ("train", "val")] if data.root else []
    paths = (path for folder in folders for path in folder.rglob("*"))
    files = [str(path) for path in paths if path.suffix.lower() in IMG_EXTENSIONS]
    return list(dict.fromkeys(problems)), examine(files, data.check_seconds)


def check_cluster(config: TrainClsConfig) -> None:
    """Make every check on every rank; `ConfigError` if one found something that would break a training."""
    trainer, start = config.trainer, time.perf_counter()
    with distributed.start(trainer.device.value, timeout_minutes=1.0 + config.data.check_seconds / 60) as world:
        met = time.perf_counter() - start
        parameters = sum(p.numel() for p in build_model(config.model, config.attention).parameters())
        out, keep, ema = Path(config.out_dir), trainer.keep_checkpoints, trainer.ema_decay is not None
        # Without a rank's batch the shared memory of a training cannot be reckoned.
        batch_bytes = -(-trainer.global_batch_size // world.size) * config.data.image_bytes

        def load() -> list[Any]:
            return [load_dataset(config.data, train=train) for train in (True, False)]

        def ten_updates(folder: Path) -> dict[str, Tensor]:
            return train_ten_updates(folder, trainer.device.value, world.size)

        def resume() -> str:
            folder = Path(world.from_main(lambda: tempfile.mkdtemp(dir=out, prefix="doctor-")))
            try:
                return cluster_check.resume(world, ten_updates, folder)
            finally:
                world.barrier()
                if world.is_main:
                    shutil.rmtree(folder)

        checks: dict[str, Callable[[], str]] = {
            "ranks": lambda: cluster_check.ranks_and_devices(world),
            "rendezvous": lambda: f"all {world.size} ranks met in {met:.1f} s",
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
            print(f"{time.perf_counter() - start:.0f} s in all", flush=True)
        if failed:
            raise ConfigError(f"not ready for a training: {', '.join(failed)}")


def train_ten_updates(folder: Path, device: str, ranks: int) -> dict[str, Tensor]:
    """Run, or go on with, a small training of ten updates that saves after five; its weights."""
    batch = f"trainer.global_batch_size={-(-32 // ranks) * 2 * ranks}"  # Mixup wants an even share
    options = [*TEN_UPDATES, f"trainer.device={device}", batch, f"out_dir={folder}"]
    with redirect_stdout(io.StringIO()):
        train_cls.run(compose("train_cls", options))
    saved = load_latest(folder / "ten" / "checkpoints", set_aside=False)
    assert saved is not None
    return saved["model"]


def said(folder: Path) -> str:
    """What the job of a check on a cluster printed on its first node."""
    logs = sorted((folder / "logs").glob("*.log"))
    lines = [line for log in logs for line in log.read_text().splitlines()]
    return "\n".join(line for line in lines if line.startswith(("ok ", "error ", "config error:")))


def main() -> None:
    """One check or the other; that of a cluster starts ranks where nobody has."""
    if "--cluster" not in sys.argv:
        command_line("doctor", run)
        return
    sys.argv.remove("--cluster")
    alone = "RANK" not in os.environ and not {"-m", "--multirun", "-h", "--help"} & set(sys.argv)
    if alone:
        with exit_on_user_error():
            compose("train_cls", [argument for argument in sys.argv[1:] if not argument.startswith("-")])
        ranks = torch.cuda.device_count() or 2
        command = torchrun(Path(__file__), ["--cluster", *sys.argv[1:]], 1, ranks, 0)
        os.execv(command[0], command)
    command_line("train_cls", check_cluster, ("scripts/doctor.py", "--cluster"), said)


if __name__ == "__main__":
    main()
