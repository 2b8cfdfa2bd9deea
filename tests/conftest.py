"""Shared fixtures. An artefact (a trained run, a cache, a VAE) is built once for all pytest-xdist workers."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

# Before torch is imported, also in subprocesses: one thread, and torch.compile without a process pool.
os.environ.update(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")

import subprocess

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

if not torch.cuda.is_available():  # before Triton is imported, so that it interprets kernels on the CPU
    os.environ["TRITON_INTERPRET"] = "1"

import eval_fid
import sample
import train_cls
import train_gen
from scripts import doctor, prepare_images, prepare_latents, reference_stats
from tests import processes
from tests.support import DRAWN, EXTRACTOR, SMALL_DIT, TINY
from vca.config import compose

for script in (train_cls, train_gen, sample, eval_fid, prepare_images, prepare_latents, reference_stats, doctor):
    script.register_configs()


@pytest.fixture(autouse=True)
def _alike():
    """Seed torch and use one thread, so that tests do not depend on their order.

    What exists already is exempt from garbage collection: a run starts with a full one, 0.25 s for all imports.
    """
    gc.freeze()
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Run the SLURM tests first, since they take longest; the other workers run the rest."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Only tests marked `process`, and their fixtures, may start processes."""
    processes.allowed = item.get_closest_marker("process") is not None


@pytest.fixture(autouse=True)
def _no_process_survives():
    yield
    while processes.started:
        launch = processes.started.pop()
        launch.kill()
        launch.wait()


@pytest.fixture
def process_group(tmp_path):
    """A world of one under gloo, so that DDP can wrap."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def artefact(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`artefact(name, build)` returns a folder that `build(folder)` filled once, in the first worker that needs it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def get(name: str, build: Callable[[Path], object]) -> Path:
        folder, ready = root / "artefacts" / name, root / "artefacts" / f"{name}.ready"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not ready.exists():
                torch.set_num_threads(1)
                folder.mkdir()
                build(folder)
                ready.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def vaes(artefact):
    """Two random `AutoencoderKL` in diffusers' format with 4 latent channels and downsampling factor 4."""

    def build(folder):
        from diffusers.models import AutoencoderKL

        for seed, (name, more) in enumerate({"sd-vae-ft-mse": {}, "other": {"shift_factor": 0.3}}.items()):
            torch.manual_seed(seed)
            AutoencoderKL(
                down_block_types=["DownEncoderBlock2D"] * 3,
                up_block_types=["UpDecoderBlock2D"] * 3,
                block_out_channels=(8, 8, 16),
                layers_per_block=1,
                norm_num_groups=4,
                latent_channels=4,
                scaling_factor=0.18215,
                sample_size=32,
                **more,
            ).save_pretrained(folder / name)

    return artefact("vaes", build)


@pytest.fixture(scope="session")
def generator_run(artefact):
    """A `train_gen.py` run of two steps with random weights."""

    def build(folder):
        length = ["trainer.steps=2", "trainer.eval_every=0", "trainer.checkpoint_every=1", "sampler.steps=2"]
        train_gen.run(compose("train_gen", [*SMALL_DIT, *length, f"out_dir={folder}", "name=run"]))
        for step in (1, 2):
            path = folder / "run" / "checkpoints" / f"step_{step:08d}.pt"
            saved = torch.load(path, weights_only=True)
            for seed, weights in enumerate(("model", "ema")):
                torch.manual_seed(10 * step + seed)
                for name, tensor in saved[weights].items():
                    if name != "pos_embed":
                        tensor.normal_(std=0.05)
            torch.save(saved, path)

    return artefact("generator", build) / "run"


@pytest.fixture(scope="session")
def classifier_run(artefact):
    """A `train_cls.py` run of four steps on digits."""

    def build(folder):
        train_cls.run(compose("train_cls", [*TINY, f"out_dir={folder}", "name=run", "trainer.steps=4"]))

    return artefact("classifier", build) / "run"


@pytest.fixture(scope="session")
def extractor_file(artefact):
    """A file for `extractor=file`."""
    return artefact("extractor", lambda folder: (folder / "blocks.py").write_text(EXTRACTOR)) / "blocks.py"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], check=False).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def use(extractor_file):
    """Overrides that select the extractor."""
    return ("extractor=file", f"extractor.source={extractor_file}")


@pytest.fixture(scope="session")
def samples(artefact, generator_run):
    """`DRAWN` images of `sample.py`, also as npz."""

    def build(folder):
        how = ("npz=true", "sampler=ddpm", "sampler.steps=4", "device=cpu")
        sample.run(compose("sample", [f"out={folder}/set", f"run={generator_run}", f"count={DRAWN}", *how]))

    return artefact("samples", build) / "set"
