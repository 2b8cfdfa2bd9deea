"""The benchmarks run and say what they promise; what they measure here means nothing."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.timing import Budget, compare, kept_bytes, peak_bytes, take_turns
from tests.conftest import ROOT, environment

CPU = torch.device("cpu")


def benchmark(*options):
    command = [sys.executable, "scripts/benchmark.py", *options, "--device", "cpu", "--rounds", "3"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_attention(tmp_path):
    said = benchmark("attention", "--tokens", "197", "--json", str(tmp_path / "attention.json"))
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    layers = {row["name"]: row for row in rows if row["level"] == "layer"}
    names = {"timm Attention", "VCA eager", "VCA compiled", "Agent Attention", "Differential Attention"}
    assert set(layers) == names
    assert {row["name"] for row in rows if row["level"] == "core"} == {"SDPA flash", "SDPA math", "VCA eager"}
    assert layers["timm Attention"]["forward"]["ratio"] == 1
    assert all(row["kept_bytes"] > 0 and row["peak_bytes"] > row["kept_bytes"] for row in rows)
    assert "| layer | 197 (49) | VCA eager | " in said
    assert (tmp_path / "attention.png").stat().st_size > 10_000


def test_model_and_loop(tmp_path):
    benchmark("model", "--models", "deit_tiny", "--size", "224", "--json", str(tmp_path / "model.json"))
    record = json.loads((tmp_path / "model.json").read_text())
    assert [(row["model"], row["size"], row["name"]) for row in record["rows"]] == [
        ("deit_tiny", 224, "softmax"),
        ("deit_tiny", 224, "VCA eager"),
    ]
    assert "trainer" in benchmark("loop")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data"], "data needs --root, a folder that holds train/ and val/"),
        (["attention", "--rounds", "2"], "--rounds must be >= 3"),
        (["all", "--minutes", "0"], "--minutes > 0"),
        (["inception", "--weights", "nowhere"], "inception needs --weights"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    command = [sys.executable, "scripts/benchmark.py", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def test_turns():
    """Everyone gets as many; ratios are of the same round; time that is over ends it after three."""
    calls = []
    timings = take_turns({n: lambda n=n: calls.append(n) for n in "abc"}, "a", Budget(4), CPU, warm=0)
    assert "".join(calls) == "cbaabccbaabc"
    assert timings["a"].ratio == timings["a"].low == timings["a"].high == 1
    calls.clear()
    compare(lambda: calls.append(1), lambda: calls.append(2), Budget(9, seconds=0), CPU, warm=0)
    assert len(calls) == 6


def test_memory():
    x = torch.ones(1000, requires_grad=True)
    assert kept_bytes(lambda: (x.exp() * 2).sum()) == 4000  # what exp returned
    linear = torch.nn.Linear(10, 10)
    assert kept_bytes(lambda: linear(torch.ones(5, 10)).sum(), linear) == 200  # its input, not its weight
    assert 8000 <= peak_bytes(lambda: torch.ones(1000) + torch.ones(1000), CPU) <= 12100
