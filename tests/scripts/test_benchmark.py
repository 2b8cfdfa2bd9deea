"""The benchmarks run and report every part; the measured values are not checked."""

import json
import sys
from functools import partial

import pytest
import torch

import benchmarks.attention
import benchmarks.loop
import benchmarks.model
import benchmarks.readers
from benchmarks import __main__ as command_line
from benchmarks.timing import Budget, compare, peak_bytes, saved_bytes, take_turns
from models.dit import DiTConfig
from tests.data.forms import photos

CPU = torch.device("cpu")


@pytest.mark.process
def test_benchmark_all_writes_every_part(tmp_path, monkeypatch, capsys):
    """`all` with the smallest settings."""
    monkeypatch.setattr(benchmarks.attention, "WIDTH", 48)
    monkeypatch.setattr(benchmarks.model, "PIXELS", {"cpu": 224 * 224})
    monkeypatch.setattr(benchmarks.loop, "STEPS", 1)
    small = DiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=2)
    monkeypatch.setattr(benchmarks.loop, "ROWS", [benchmarks.loop.ROWS[0], ("DiT, softmax", small, 2)])
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # generates no code
    command = ["benchmarks", "all", "--device", "cpu", "--rounds", "3", "--minutes", "0.1"]
    command += ["--tokens", "197", "--models", "deit_tiny", "--size", "224", "--json", str(tmp_path / "all.json")]
    monkeypatch.setattr(sys, "argv", command)
    command_line.main()
    printed = capsys.readouterr().out
    parts = {part["what"]: part["rows"] for part in json.loads((tmp_path / "all.json").read_text())["parts"]}
    assert list(parts) == ["attention", "model", "loop"]

    layers = {row["name"]: row for row in parts["attention"] if row["level"] == "layer"}
    names = {"timm Attention", "VCA eager", "VCA compiled", "Agent Attention", "Differential Attention"}
    assert set(layers) == names
    cores = {row["name"] for row in parts["attention"] if row["level"] == "core"}
    assert cores == {"SDPA flash", "SDPA math", "VCA eager"}
    assert layers["timm Attention"]["forward"]["ratio"] == 1
    assert all(row["peak_bytes"] > row["kept_bytes"] > 0 for row in parts["attention"])
    assert "| layer | 197 (49) | VCA eager | " in printed
    assert "| 197 (49) | VCA compiled | " in printed
    assert (tmp_path / "all.png").stat().st_size > 10_000

    models = [(row["model"], row["size"], row["name"]) for row in parts["model"]]
    assert models == [("deit_tiny", 224, "softmax"), ("deit_tiny", 224, "VCA eager")]
    assert len(parts["loop"]) == 2


def test_benchmark_forms_measures_every_form(tmp_path, monkeypatch, capsys):
    """Each form beside class folders and timm's reader; a missing package is named."""
    monkeypatch.setattr(benchmarks.readers, "BATCH", 2)
    monkeypatch.setattr(benchmarks.readers, "BATCHES", 1)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    root = photos(tmp_path / "data")
    command = ["benchmarks", "data", "--root", str(root), "--forms", "--rounds", "3", "--minutes", "0.001"]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(tmp_path / "forms.json")])
    command_line.main()
    rows = json.loads((tmp_path / "forms.json").read_text())["rows"]
    forms = ["class folders", *benchmarks.readers.FORMS]
    assert [(row["form"], row["stage"]) for row in rows] == [(f, s) for f in forms for s in ("decode", "pipeline")]
    assert all(0 < row["class folders"]["low"] <= row["class folders"]["ratio"] for row in rows[2:])
    assert {"ReaderImageFolder"} < set(rows[0])
    assert {"ReaderImageInTar"} < set(rows[6])
    assert "WebDataset: ReaderWds is not measured: " in capsys.readouterr().out
    assert not (root / ".vca_index").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data"], "data needs --root, a folder with train/ and val/"),
        (["attention", "--rounds", "2"], "--rounds must be >= 3"),
        (["all", "--minutes", "0"], "--minutes > 0"),
        (["inception", "--weights", "nowhere"], "inception needs --weights"),
    ],
    ids=str,
)
def test_benchmark_wrong_options_refused(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *options])
    with pytest.raises(SystemExit):
        command_line.parse()
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_benchmark_turns_alternate_within_budget():
    """Equal turns; ratios within a round; at least three rounds after the end time."""
    calls = []
    timings = take_turns({n: lambda n=n: calls.append(n) for n in "abc"}, "a", Budget(4), CPU, warm=0)
    assert "".join(calls) == "cbaabccbaabc"
    assert timings["a"].ratio == timings["a"].low == timings["a"].high == 1
    calls.clear()
    compare(lambda: calls.append(1), lambda: calls.append(2), Budget(9, end=0), CPU, warm=0)
    assert len(calls) == 6


def test_benchmark_saved_and_peak_bytes():
    x = torch.ones(1000, requires_grad=True)
    assert saved_bytes(lambda: (x.exp() * 2).sum()) == 4000  # the result of exp
    linear = torch.nn.Linear(10, 10)
    assert saved_bytes(lambda: linear(torch.ones(5, 10)).sum(), linear) == 200  # its input, not its weight
    assert 8000 <= peak_bytes(lambda: torch.ones(1000) + torch.ones(1000), CPU) <= 12100
