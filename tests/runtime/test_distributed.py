"""Real processes with gloo: ranks, gradients, evaluation, the run directory, and a NaN on one rank."""

import json
import shutil
import socket

import pytest
import torch

from tests.processes import ROOT, forked_torchrun, run_script, torchrun
from tests.support import TINY, metrics

pytestmark = pytest.mark.process


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch_script(script, out, ranks):
    """Run a script on several ranks of one node; return what each wrote to `<out>/<rank>.pt`."""
    done = run_script(script, str(out), ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.fixture(scope="module")
def worlds(artefact):
    """Results of each rank for world sizes 1, 2, 3 and 4, the last on two nodes."""
    worlds = {}
    for size, nodes in ((1, 1), (2, 1), (3, 1), (4, 2)):

        def build(folder, size=size, nodes=nodes):
            done = run_script("tests/runtime/workers.py", str(folder), ranks=size, nodes=nodes)
            assert done.returncode == 0, done.stderr[-3000:]

        folder = artefact(f"world-{size}", build)
        worlds[size] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]
    return worlds


def test_world_rank_numbers_on_two_nodes(worlds):
    """The local rank selects the device, the global rank the data, and only rank 0 is main."""
    ranks = worlds[4]
    assert [r["rank"] for r in ranks] == [0, 1, 2, 3]
    assert [r["local_rank"] for r in ranks] == [0, 1, 0, 1]
    assert [r["node"] for r in ranks] == ["0", "0", "1", "1"]
    assert [r["main"] for r in ranks] == [True, False, False, False]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loaders_ranks_cover_data_once(worlds, size):
    """Every image is on exactly one rank."""
    for split, count in (("train", 96), ("eval", 103)):
        together = [index for r in worlds[size] for index in r["indices"][split]]
        assert sorted(together) == list(range(count))


@pytest.mark.parametrize("size", [2, 4])
def test_gradient_independent_of_world_size(worlds, size):
    """(ranks, accumulation) = (1, 4), (2, 2), (4, 1) give the same lr and gradient, with drop path and Mixup."""
    one, others = worlds[1][0]["gradients"], [r["gradients"] for r in worlds[size]]
    for other in others:
        assert other["accumulation"] * size == one["accumulation"] == 4
        assert other["lr"] == one["lr"]
        for name, gradient in one["gradients"].items():
            difference = (other["gradients"][name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
            assert difference < 1e-6 or gradient.norm() < 1e-7, name
        assert all(torch.equal(other["gradients"][n], others[0]["gradients"][n]) for n in one["gradients"])


def test_evaluation_independent_of_world_size(worlds):
    """103 images on 1, 2, 3 and 4 ranks with batch sizes 1, 8 and 16 give the same counts."""
    expected = worlds[1][0]["accuracies"][1]
    assert expected["val/images"] == 103
    for size, ranks in worlds.items():
        for rank in ranks:
            for result in rank["accuracies"].values():
                for key in ("val/top1", "val/top5", "val/images"):
                    assert result[key] == expected[key], size
                assert result["val/loss"] == pytest.approx(expected["val/loss"], rel=1e-6)


def by_two_torchruns(*command):
    """Run a script on two nodes with one rank each, started by two torchrun agents on this machine."""
    where = ("--nnodes=2", f"--master_port={free_port()}", "--master_addr=127.0.0.1")
    agents = [forked_torchrun(*where, f"--node_rank={node}", *command, ranks=1) for node in range(2)]
    for agent in agents:
        assert agent.wait() == 0, agent.stderr[-3000:]


@pytest.mark.parametrize(("how", "ranks"), [("one node", 2), ("two nodes", 4), ("two torchruns", 2)])
def test_run_directory_shared_by_all_ranks(tmp_path, how, ranks):
    """All ranks share one directory, write nothing else, and log each step once."""
    options = [f"out_dir={tmp_path}/out", "name=run", *TINY, "trainer.steps=3"]
    if how == "two torchruns":
        by_two_torchruns(str(ROOT / "train_cls.py"), *options)
    else:
        done = run_script("train_cls.py", *options, ranks=ranks, nodes=1 + (how == "two nodes"))
        assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run"]
    expected = {"checkpoints", "config.json", "curves.png", "launches.jsonl", "lock", "metrics.jsonl"}
    expected |= {"uncommitted.diff"}
    names = {path.name for path in (tmp_path / "out" / "run").iterdir()}
    records = {name for name in names if name.startswith("evaluation-accuracy-")}
    assert (names - records, len(records)) == (expected, 2)
    assert [record["step"] for record in metrics(tmp_path / "out" / "run")] == [1, 2, 3, 3]
    launch = json.loads((tmp_path / "out" / "run" / "launches.jsonl").read_text())
    assert (launch["ranks"], launch["first_step"]) == (ranks, 0)
    assert "name=run" in launch["command"]


NAN = """
import sys
import torch
import train_cls
from vca.cli import command_line
from vca.training.step import TrainState

train_step = TrainState.train_step
def poisoned(self, batches, loss_of, seed):
    if self.step == 5 and self.world.rank == 1:
        batches[0].images[0, 0, 0, 0] = float("nan")
    return train_step(self, batches, loss_of, seed)
TrainState.train_step = poisoned
from vca.cli import command_line

train_cls.register_configs()
command_line("train_cls", train_cls.run)
"""


def test_nan_on_one_rank_stops_all(tmp_path):
    """All ranks stop in the step in which one of them gets a NaN, and write step, indices and gradient norm."""
    script = tmp_path / "poisoned.py"
    script.write_text(NAN)
    options = [f"out_dir={tmp_path}/out", "name=run", *TINY, "trainer.checkpoint_every=2"]
    done = run_script(script, *options, ranks=2, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("stopped: gradient norm nan in step 5") == 1, done.stderr[-3000:]
    folder = tmp_path / "out" / "run"
    failures = [json.loads((folder / f"nonfinite_rank{rank}.json").read_text()) for rank in range(2)]
    assert [f["step"] for f in failures] == [5, 5]
    assert [f["grad_norm"] for f in failures] == ["nan", "nan"]
    assert [len(f["indices"]) for f in failures] == [60, 60]
    assert (failures[0]["loss"] != "nan", failures[1]["loss"]) == (True, "nan")
    assert [record["step"] for record in metrics(folder)] == [1, 2, 3, 4, 5]
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == ["step_00000002.pt", "step_00000004.pt"]


# Rank 1 has other arguments or runs another checkout.
OTHER_RANK = """
import os, runpy, sys
code, *more = sys.argv[1].split()
del sys.argv[1]
if os.environ["RANK"] == "1":
    sys.argv += more
    sys.path.insert(0, code)
else:
    code = "ROOT"
runpy.run_path(f"{code}/train_cls.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("more", "edited", "differs"),
    [
        (
            "optim.lr=0.5 trainer.micro_batch_size=30",
            None,
            "config.optim.lr: 0.001 -> 0.5; config.trainer.micro_batch_size: None -> 30",
        ),
        ("", "models/deit.py", "code.models/deit.py: "),
    ],
    ids=["config", "code"],
)
def test_ranks_with_other_config_or_code_refused(tmp_path, more, edited, differs):
    """Under torchrun: one line on stderr, and no run starts."""
    code = ROOT
    if edited is not None:
        code = tmp_path / "code"
        for part in ("configs", "models", "vca"):
            shutil.copytree(ROOT / part, code / part, ignore=shutil.ignore_patterns("__pycache__"))
        for script in ROOT.glob("*.py"):
            shutil.copy(script, code)
        with open(code / edited, "a") as file:
            file.write("# edited\n")
    script = tmp_path / "other_rank.py"
    script.write_text(OTHER_RANK.replace("ROOT", str(ROOT)))
    options = [f"out_dir={tmp_path}/out", "name=run", *TINY, "trainer.steps=3"]
    done = run_script(*torchrun(2)[1:], str(script), f"{code} {more}", *options)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("config error:")]
    assert len(lines) == 1, done.stderr[-3000:]
    assert lines[0].startswith(
        f"config error: all ranks must have the same config and code; rank 1 differs from rank 0 ({differs}"
    )
    assert lines[0].endswith("); start all ranks with the same command and code")
    assert not (tmp_path / "out").exists()
