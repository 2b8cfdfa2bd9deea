"""Shared fixtures: the golden figures, the scripts as subprocesses, and small configs that run in seconds."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: it then runs kernels on the CPU
    os.environ["TRITON_INTERPRET"] = "1"

from vca.config import command_line, compose
from vca.runtime.launch import FRESH_STORE

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"

# A classification run of 24 updates with everything random switched on; about 12 updates are an epoch.
TINY = (
    "trainer.steps=24",
    "trainer.global_batch=120",
    "trainer.device=cpu",
    "trainer.log_every=1",
    "trainer.eval_every=0",
    "trainer.workers=0",
    "model.embed_dim=32",
    "model.num_heads=2",
    "model.depth=2",
    "model.drop_rate=0.1",
    "model.drop_path_rate=0.2",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
)


# A DiT for tests of the path around it.
SMALL_DIT = (
    "model.hidden_size=16",
    "model.num_heads=2",
    "model.depth=2",
    "model.patch_size=2",
    "trainer.device=cpu",
    "trainer.workers=0",
    "sampler.steps=4",
    "samples_per_class=1",
)


# Twelve features of an image of 8 x 8 pixels, and logits and spatial features of their own.
EXTRACTOR = """
import torch

class Blocks(torch.nn.Module):
    def forward(self, images):
        x = images.float().mean(dim=1)
        if x.shape[-1] != 8:
            raise ValueError(f"wants 8 x 8 pixels, got {x.shape[-1]}")
        pool = torch.nn.functional.avg_pool2d(x[:, None], (2, 3)).flatten(1)[:, :8]
        return {"pool": pool, "logits": pool[:, :5] / 30, "spatial": x[:, ::3, ::3].flatten(1)}

def load_extractor(weights):
    return Blocks()
"""
DRAWN = 40  # images of the fixture `samples`


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: more threads only fight each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def vaes(tmp_path_factory):
    """Two `AutoencoderKL` of random weights in diffusers' format, 4 latent channels, a quarter of the size."""
    from diffusers.models import AutoencoderKL

    root = tmp_path_factory.mktemp("vaes")
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
        ).save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def generator_run(tmp_path_factory):
    """A run of `train_gen.py` of two updates, whose weights are then made random."""
    import train_gen

    out = tmp_path_factory.mktemp("runs")
    length = ["trainer.steps=2", "trainer.eval_every=0", "trainer.checkpoint_every=1", "sampler.steps=2"]
    train_gen.run(compose("train_gen", [*SMALL_DIT, *length, f"out_dir={out}", "name=run", "trainer.device=cpu"]))
    for step in (1, 2):
        path = out / "run" / "checkpoints" / f"step_{step:08d}.pt"
        saved = torch.load(path, weights_only=True)
        for seed, weights in enumerate(("model", "ema")):
            torch.manual_seed(10 * step + seed)
            for name, tensor in saved[weights].items():
                if name != "pos_embed":
                    tensor.normal_(std=0.05)
        torch.save(saved, path)
    return out / "run"


@pytest.fixture(scope="session")
def classifier_run(tmp_path_factory):
    """A run of `train_cls.py` on digits, long enough to have weights of its own."""
    import train_cls

    out = tmp_path_factory.mktemp("classifiers")
    train_cls.run(compose("train_cls", [*TINY, f"out_dir={out}", "name=run", "trainer.steps=4"]))
    return out / "run"


@pytest.fixture(scope="session")
def extractor_file(tmp_path_factory):
    """A file for `extractor=file`."""
    path = tmp_path_factory.mktemp("extractor") / "blocks.py"
    path.write_text(EXTRACTOR)
    return path


@pytest.fixture(scope="session")
def use(extractor_file):
    """Overrides that choose the extractor."""
    return ("extractor=file", f"extractor.source={extractor_file}")


@pytest.fixture(scope="session")
def samples(generator_run, tmp_path_factory):
    """`DRAWN` images by `sample.py`, also as npz."""
    import sample

    out = tmp_path_factory.mktemp("drawn") / "set"
    how = ("npz=true", "sampler=ddpm", "sampler.steps=4", "device=cpu")
    sample.run(compose("sample", [f"out={out}", f"run={generator_run}", f"count={DRAWN}", *how]))
    return out


def environment(**extra: str) -> dict[str, str]:
    """Environment of a subprocess: one thread, this checkout importable."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return {**inherited, **FRESH_STORE, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def launcher(ranks: int, restarts: int = 0) -> list[str]:
    """`python`, or torchrun on a free port."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    torchrun.append(f"--max_restarts={restarts}")
    return [sys.executable] if ranks == 1 else torchrun


def train(*overrides: str, ranks: int = 1, script: str = "train_cls.py", timeout: int = 300, **env: str):
    """Run a training script to its end; returns the finished process."""
    command = [*launcher(ranks), str(ROOT / script), *overrides]
    return subprocess.run(
        command, env=environment(**env), cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )


def train_and_kill(folder: Path, at_step: int, *overrides: str, ranks: int = 1, script: str = "train_cls.py") -> int:
    """Start a training, `kill -9` all of its processes once `metrics.jsonl` reports `at_step`; the step reached."""

    def reached() -> int:
        records = metrics(folder)
        return records[-1]["step"] if records else 0

    start_and_kill(lambda: reached() >= at_step, *overrides, ranks=ranks, script=script)
    step = reached()
    time.sleep(0.2)
    assert reached() == step, "something survived"
    return step


def start_and_kill(ready: Callable[[], bool], *overrides: str, ranks: int = 1, script: str = "train_cls.py") -> None:
    """Start a script, and `kill -9` all of its processes once `ready`."""
    command = [*launcher(ranks), str(ROOT / script), *overrides]
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        command, env=environment(VCA_TEST=mark), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None and not ready():
        time.sleep(0.002)
    assert process.poll() is None, f"ended before it could be killed:\n{process.communicate()[0].decode()[-3000:]}"
    assert ready(), "not ready after four minutes"
    kill_all(mark)
    process.communicate()


def one_line(script: str, run: Callable, arguments: list[str], monkeypatch, capsys) -> str:
    """The one line to stderr with which a root script refuses its arguments, with exit code 2."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command_line(script, run)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith("config error: ")
    assert said.count("\n") == 1, said
    return said


def kill_all(mark: str) -> None:
    """SIGKILL every process with `mark` in its environment, until none is left: torchrun puts each rank into a session
    of its own, and a loader worker may be born while the others die."""
    while found := marked(mark):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def marked(mark: str) -> list[int]:
    """Ids of all processes with `mark` in their environment."""
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if has_mark(int(p.name), mark)]


def has_mark(pid: int, mark: str) -> bool:
    """Whether a process was started with `VCA_TEST=<mark>`; one that is gone was not."""
    try:
        return f"VCA_TEST={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def metrics(folder: Path) -> list[dict]:
    """Whole lines of a run's `metrics.jsonl`."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def untimed(folder: Path) -> list[dict]:
    """The records without what the clock decides."""
    clocked = ("images_per_second", "data_wait", "data_wait_rank")
    return [{k: v for k, v in record.items() if k not in clocked} for record in metrics(folder)]


def assert_same(one, other, path: str = "") -> None:
    """Equality to the bit of nested dicts, lists and tensors; names the first place that differs."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{path}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), f"{path} differs by {(one - other).abs().max()}"
    else:
        assert one == other, path
