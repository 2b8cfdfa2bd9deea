"""A killed and resumed run is bit-identical to an uninterrupted one."""

import pytest
import torch

from tests.processes import run_script
from tests.support import TINY, assert_resume_exact, assert_same, metrics, train_and_kill
from vca.training.checkpoint import list_checkpoints, load_latest
from vca.training.snapshots import list_snapshots

pytestmark = pytest.mark.process

# 28 steps of 120 of the 1,438 digits: an epoch is 11.98 steps, so every cut is in mid-epoch.
LONG = (
    *TINY,
    "trainer.steps=28",
    "trainer.checkpoint_every=5",
    "trainer.micro_batch_size=20",
    "trainer.log_every=3",
    "trainer.ema_decay=0.9",
    "trainer.eval_every=25",
)


def run(tmp_path, name, *overrides, ranks=1):
    done = run_script("train_cls.py", f"out_dir={tmp_path}", f"name={name}", *LONG, *overrides, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp_path / name


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (3, 0)], ids=["one rank", "two ranks", "three ranks"])
def test_resume_after_kill_is_exact(tmp_path, ranks, workers):
    options = [f"trainer.workers={workers}", *(["trainer.micro_batch_size=60"] if workers else [])]
    options += ["trainer.snapshot_every=4", "trainer.ema_decay=[0.9,0.5]"]
    assert_resume_exact(tmp_path, [7, 18], "train_cls.py", *LONG, *options, ranks=ranks)
    whole, broken = (list_snapshots(tmp_path / name / "snapshots") for name in ("whole", "broken"))
    assert [(one.step, one.decay) for one in whole] == [
        (step, decay) for step in range(4, 29, 4) for decay in (0.5, 0.9)
    ]
    assert [one.path.read_bytes() for one in broken] == [one.path.read_bytes() for one in whole]
    assert (tmp_path / "broken" / "curves.png").stat().st_size > 1000


def test_resume_from_two_ranks_to_one(tmp_path):
    """The world size may change: steps and images are the same, weights agree up to rounding."""
    micro = "trainer.micro_batch_size=60"
    whole = run(tmp_path, "whole", micro)
    folder = tmp_path / "moved"
    train_and_kill(folder, 12, "train_cls.py", f"out_dir={tmp_path}", "name=moved", *LONG, micro, ranks=2)
    run(tmp_path, "moved", micro)
    one, other = (load_latest(path / "checkpoints") for path in (whole, folder))
    assert (one["step"], one["consumed"]) == (other["step"], other["consumed"])
    fingerprints = [[record.get("consumed") for record in metrics(path)] for path in (whole, folder)]
    assert fingerprints[0] == fingerprints[1]
    for name, tensor in one["model"].items():
        torch.testing.assert_close(other["model"][name], tensor, rtol=1e-3, atol=1e-4)


def test_resume_damaged_checkpoint_uses_previous(tmp_path):
    """The newest checkpoint is truncated: the run resumes from the previous one, with a warning."""
    folder = run(tmp_path, "whole")
    before = load_latest(folder / "checkpoints")
    newest = list_checkpoints(folder / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:5000])
    done = run_script("train_cls.py", f"out_dir={tmp_path}", "name=whole", *LONG)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step_00000028.pt is corrupt" in done.stderr
    assert_same(before, load_latest(folder / "checkpoints"))
