"""Shared test helpers: small configs that run in seconds, reading a run's files, exact comparison, kills."""

import json
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.processes import ROOT, Launch, run_script
from vca.cli import command_line
from vca.training.checkpoint import load_latest

GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared" / "data"  # real data, not part of the repository

# A classification run of 24 steps, about two epochs, with all random augmentation enabled.
TINY = (
    "trainer.steps=24",
    "trainer.global_batch_size=120",
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

# A small DiT for tests of its surroundings.
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

# Twelve features of an image of 8 x 8 pixels, logits and spatial features.
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


def write_png16(path: Path, size: int = 8) -> None:
    """Write an RGB PNG with 16 bits per channel, which Pillow opens as mode RGB but cannot write."""
    raw = b"".join(b"\0" + np.arange(3 * size, dtype=">u2").tobytes() for _ in range(size))  # each row: filter 0
    chunks = {b"IHDR": struct.pack(">IIBBBBB", size, size, 16, 2, 0, 0, 0), b"IDAT": zlib.compress(raw), b"IEND": b""}
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks.items()]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def metrics(folder: Path) -> list[dict]:
    """Return the records of a run's `metrics.jsonl`, without an unfinished last line."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def last_step(folder: Path) -> int:
    """Return the step of the last complete line of a run's `metrics.jsonl`; 0 without one."""
    file = folder / "metrics.jsonl"
    lines = file.read_bytes().rsplit(b"\n", 2) if file.exists() else []
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


def untimed(folder: Path) -> list[dict]:
    """Return the records without timings."""
    clocked = ("images_per_second", "data_wait", "data_wait_rank", "flops_per_second", "mfu", "peak_memory")
    clocked += ("device_hours", "device_hours_total")
    return [{k: v for k, v in record.items() if k not in clocked} for record in metrics(folder)]


def train_and_kill(folder: Path, at_step: int, script: str, *overrides: str, ranks: int = 1) -> int:
    """Start a run, `kill -9` its processes after `at_step` and the first checkpoint, and return the last step."""

    def ready() -> bool:
        return last_step(folder) >= at_step and any((folder / "checkpoints").glob("step_*.pt"))

    start_and_kill(ready, script, *overrides, ranks=ranks)
    return last_step(folder)


def assert_resume_exact(out_dir: Path, at_steps: Sequence[int], script: str, *overrides: str, ranks: int = 1) -> None:
    """Check that a run of 28 steps with a `kill -9` at each of `at_steps` is bit-identical to an uninterrupted one."""
    whole, broken = out_dir / "whole", out_dir / "broken"
    command = (script, f"out_dir={out_dir}", *overrides)
    done = run_script(*command, "name=whole", ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    for at_step in at_steps:
        reached = train_and_kill(broken, at_step, *command, "name=broken", ranks=ranks)
        assert at_step <= reached < 28
        log_every = json.loads((broken / "config.json").read_text())["trainer"]["log_every"]
        assert load_latest(broken / "checkpoints")["step"] in range(5, reached + log_every, 5)
    done = run_script(*command, "name=broken", ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (load_latest(folder / "checkpoints") for folder in (whole, broken))
    assert one["step"] == 28
    assert one["consumed"] > 0
    assert_same(one, other)  # step, model, EMA, optimizer, scaler, checksum of the images
    assert untimed(whole) == untimed(broken)


def start_and_kill(ready: Callable[[], bool], script: str, *overrides: str, ranks: int = 1) -> None:
    """Start a script and `kill -9` all of its processes when `ready()`."""
    launch = Launch(script, *overrides, ranks=ranks)
    launch.wait_until(ready)
    launch.kill()
    launch.wait()


def one_line(script: str, run: Callable, arguments: list[str], monkeypatch, capsys) -> str:
    """Run a script with invalid arguments; return its one line on stderr, checking exit code 2."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command_line(script, run)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith("config error: ")
    assert said.count("\n") == 1, said
    return said


def assert_same(one, other, path: str = "") -> None:
    """Check that nested dicts, lists and tensors are bit-identical; name the first difference."""
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
