"""Snapshots of EMA weights: their values, their files, resume, and the forms of `trainer.ema_decay`."""

import json
import re
import shutil
import warnings

import pytest
import torch
from safetensors import safe_open

import train_cls
import vca.training.run
from tests.support import TINY, assert_same
from vca.config import compose
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError
from vca.runtime.rundir import read_config
from vca.training.checkpoint import checkpoint_path, load_checkpoint, load_latest
from vca.training.config import TrainerConfig
from vca.training.pretrained import InitWeights
from vca.training.restore import load_run
from vca.training.snapshots import ALL, list_snapshots, load_snapshot, save_snapshots, select_weights, snapshot_path

DECAYS = (0.9, 0.5)
RUN = (*TINY, "trainer.steps=20", "trainer.snapshot_every=5", "trainer.ema_decay=[0.9,0.5]", "trainer.log_every=10")
EVERY_STEP = ("trainer.checkpoint_every=1", "trainer.keep_checkpoints=20")


def train(folder, *overrides):
    """Train a run of 20 steps, with snapshots every 5 steps for two decays, and return its folder."""
    train_cls.run(compose("train_cls", [*RUN, f"out_dir={folder}", "name=run", *overrides]))
    return folder / "run"


def first_weights(*overrides):
    """Return the initial weights of the run: its EMAs start there."""
    config = compose("train_cls", [*RUN, "name=run", *overrides])
    train_cls.seed_torch(config.seed, "model")
    return train_cls.build_model(config.model, config.attention).state_dict()


@pytest.fixture(scope="module")
def run(artefact):
    return artefact("snapshots", lambda folder: train(folder, *EVERY_STEP)) / "run"


def test_snapshots_equal_closed_form_of_raw_weights(run):
    """Snapshot at step n: decay^n w_0 + (1 - decay) sum_i decay^(n - i) w_i, from the raw weights w_i of step i."""
    raw = [first_weights(), *(load_checkpoint(checkpoint_path(run / "checkpoints", i))["model"] for i in range(1, 21))]
    assert [(s.step, s.decay) for s in list_snapshots(run / "snapshots")] == [
        (step, decay) for step in (5, 10, 15, 20) for decay in (0.5, 0.9)
    ]
    for step in (5, 10, 15, 20):
        for decay in DECAYS:
            factors = [decay**step, *((1 - decay) * decay ** (step - i) for i in range(1, step + 1))]
            snapshot = load_snapshot(run / "snapshots" / f"step_{step:08d}_ema_{decay}.safetensors")
            assert snapshot.keys() == raw[0].keys()
            for name, tensor in snapshot.items():
                expected = sum(factor * raw[i][name].double() for i, factor in enumerate(factors))
                torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
                assert tensor.dtype == torch.float32
        far = [load_snapshot(snapshot_path(run / "snapshots", step, decay)) for decay in DECAYS]
        assert not torch.equal(far[0]["head.weight"], far[1]["head.weight"])


def test_snapshots_equal_emas_of_checkpoints(run):
    """Of the same step, to the bit; the first decay has the key `ema`, as in checkpoints with one decay."""
    for step in (5, 20):
        saved = load_checkpoint(checkpoint_path(run / "checkpoints", step))
        assert saved["further_emas"].keys() == {"0.5"}
        for decay, ema in ((0.9, saved["ema"]), (0.5, saved["further_emas"]["0.5"])):
            assert_same(dict(ema), load_snapshot(snapshot_path(run / "snapshots", step, decay)))


@pytest.mark.process
def test_two_decays_train_as_one_decay(run, tmp_path):
    """A further decay changes neither the weights nor the first EMA."""
    one = load_latest(train(tmp_path, "trainer.ema_decay=0.9", "trainer.snapshot_every=7") / "checkpoints")
    both = load_latest(run / "checkpoints")
    for key in ("model", "ema", "optimizer"):
        assert_same(one[key], both[key], key)
    assert "further_emas" not in one
    steps = [snapshot.step for snapshot in list_snapshots(tmp_path / "run" / "snapshots")]
    assert steps == [7, 14, 20]  # and at the end


@pytest.mark.process
def test_resume_writes_equal_snapshots(run, tmp_path, monkeypatch):
    """A run that stops between two checkpoints keeps the snapshots of the repeated steps; a new one has equal bytes."""
    expected = {s.path.name: s.path.read_bytes() for s in list_snapshots(run / "snapshots")}
    train_step = train_cls.TrainState.train_step

    def stops(self, *arguments):
        if self.step == 13:
            raise KeyboardInterrupt
        return train_step(self, *arguments)

    monkeypatch.setattr(train_cls.TrainState, "train_step", stops)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "trainer.checkpoint_every=8")
    monkeypatch.undo()
    folder = tmp_path / "run"
    assert {s.step for s in list_snapshots(folder / "snapshots")} == {5, 10}
    kept = [snapshot_path(folder / "snapshots", step, 0.5) for step in (5, 10)]
    before = [path.stat().st_mtime_ns for path in kept]
    snapshot_path(folder / "snapshots", 10, 0.9).unlink()
    (folder / "snapshots" / "step_00000010_ema_0.9.tmp").write_bytes(b"of a killed process")
    train(tmp_path, "trainer.checkpoint_every=8")  # from step 8
    assert {s.path.name: s.path.read_bytes() for s in list_snapshots(folder / "snapshots")} == expected
    assert {path.name for path in (folder / "snapshots").iterdir()} == set(expected)
    assert [path.stat().st_mtime_ns for path in kept] == before
    saved = load_latest(folder / "checkpoints")
    assert_same(saved, load_latest(run / "checkpoints"))


@pytest.mark.process
def test_checkpoint_implies_snapshots_of_its_step(tmp_path, monkeypatch):
    """The snapshots of a step are written before its checkpoint, from which a resumed run starts."""
    events = []

    def recorded(name, original):
        def save(folder, step, *rest):
            original(folder, step, *rest)
            events.append((step, name))

        return save

    for name in ("save_snapshots", "save_checkpoint"):
        monkeypatch.setattr(vca.training.run, name, recorded(name, getattr(vca.training.run, name)))
    train(tmp_path, "trainer.steps=10", "trainer.checkpoint_every=5")
    assert events == [(step, name) for step in (5, 10) for name in ("save_snapshots", "save_checkpoint")]


@pytest.mark.process
def test_failed_snapshot_is_written_on_resume(tmp_path, monkeypatch):
    """The checkpoint of the step is written all the same, and the run that resumes from it writes the snapshots."""
    options = ("trainer.steps=10", "trainer.checkpoint_every=5")

    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr(vca.training.run, "save_snapshots", full)
    with pytest.raises(OSError, match="no space"):
        train(tmp_path, *options)
    monkeypatch.undo()
    folder = tmp_path / "run"
    assert load_latest(folder / "checkpoints")["step"] == 5
    assert not list_snapshots(folder / "snapshots")
    train(tmp_path, *options)
    assert {snapshot.step for snapshot in list_snapshots(folder / "snapshots")} == {5, 10}
    saved = load_checkpoint(checkpoint_path(folder / "checkpoints", 5))
    assert_same(dict(saved["ema"]), load_snapshot(snapshot_path(folder / "snapshots", 5, 0.9)))


def test_first_snapshot_of_a_step_is_kept(tmp_path):
    """A repeated step with other weights is a warning; a corrupt file is written again."""
    first, other = ({"x": torch.full((8,), value)} for value in (1.0, 2.0))
    path = snapshot_path(tmp_path, 5, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            save_snapshots(tmp_path, 5, {0.5: first})
    content = path.read_bytes()
    with pytest.warns(UserWarning, match=r"ema_0.5.safetensors differs from .* step 5; the first snapshot is kept"):
        save_snapshots(tmp_path, 5, {0.5: other})
    assert path.read_bytes() == content
    path.write_bytes(content[:-4])
    save_snapshots(tmp_path, 5, {0.5: first})
    assert path.read_bytes() == content


def test_missing_snapshot_is_skipped(run, tmp_path, capsys):
    shutil.copy(run / "config.json", tmp_path)
    shutil.copytree(run / "snapshots", tmp_path / "snapshots")
    every = select_weights(tmp_path, ALL, ALL)
    assert every == [(step, decay) for step in (5, 10, 15, 20) for decay in DECAYS]
    assert not capsys.readouterr().out
    snapshot_path(tmp_path / "snapshots", 10, 0.5).unlink()
    assert select_weights(tmp_path, ALL, ALL) == [one for one in every if one != (10, 0.5)]
    assert re.fullmatch(r"step=all: \S+ lacks step_00000010_ema_0.5.safetensors; skipped\n", capsys.readouterr().out)


class OtherRank(World):
    """A rank whose file system lacks the snapshot that rank 0 has found; the other ranks have no error."""

    def from_main(self, function):
        return {bool: True, list: list(DECAYS)}[type(function())]

    def raise_first(self, error):
        raise error


def test_load_run_source_chosen_by_rank_0(run, tmp_path):
    """This rank does not read the checkpoint instead."""
    shutil.copy(run / "config.json", tmp_path)
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    world = OtherRank(1, 1, 2, torch.device("cpu"))
    with pytest.raises(ConfigError, match="is not a readable snapshot"):
        load_run(torch.nn.Linear(1, 1), tmp_path, 5, InitWeights.ema, world)


@pytest.mark.process
def test_checkpoint_of_one_decay_resumes(tmp_path):
    """Runs of earlier versions have a float in `config.json`, and no key of a snapshot."""
    one = ("trainer.ema_decay=0.9", "trainer.snapshot_every=0", "trainer.steps=4")
    folder = train(tmp_path, *one)
    assert read_config(folder)["trainer"]["ema_decay"] == 0.9
    config = json.loads((folder / "config.json").read_text())
    del config["trainer"]["snapshot_every"], config["trainer"]["eval_snapshots"]
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint_path(folder / "checkpoints", 4).unlink()
    train(tmp_path, *one, "trainer.ema_decay=[0.9]", "trainer.snapshot_every=2")
    assert [snapshot.step for snapshot in list_snapshots(folder / "snapshots")] == [2, 4]
    with pytest.raises(ConfigError, match=r"trainer.ema_decay: 0.9 -> \[0.9, 0.5\]"):
        train(tmp_path, *one, "trainer.ema_decay=[0.9,0.5]")


def test_snapshot_that_changed_is_rejected(run, tmp_path):
    path = snapshot_path(run / "snapshots", 5, 0.5)
    with safe_open(path, "pt") as file:
        assert re.fullmatch(r'\{"step": 5, "decay": 0.5, "sha256": "[0-9a-f]{64}"\}', file.metadata()["snapshot"])
    content = bytearray(path.read_bytes())
    for name, position, message in (
        ("changed", -1, "has changed since it was written"),
        ("header", 9, "not a readable"),
    ):
        damaged = bytearray(content)
        damaged[position] ^= 1
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ConfigError, match=message):
            load_snapshot(tmp_path / name)
    with pytest.raises(ConfigError, match="not a readable snapshot"):
        load_snapshot(tmp_path / "missing")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (1.5, r"trainer.ema_decay must be in \[0, 1\) or null, got 1.5"),
        (True, r"trainer.ema_decay must be in \[0, 1\) or null, got True"),
        ([0.9, 1], r"trainer.ema_decay must be one or more distinct numbers in \[0, 1\), got \[0.9, 1\]"),
        ([0.9, 0.9], r"trainer.ema_decay must be one or more distinct numbers in \[0, 1\), got \[0.9, 0.9\]"),
        ([], r"trainer.ema_decay must be one or more distinct numbers in \[0, 1\), got \[\]"),
        ("fast", r"trainer.ema_decay must be null, a number or a list of numbers .*, got 'fast'"),
        ([0.9, None], r"trainer.ema_decay must be null, a number or a list of numbers .*, got \[0.9, None\]"),
    ],
)
def test_ema_decay_invalid(value, says):
    with pytest.raises(ConfigError, match=says):
        TrainerConfig(ema_decay=value)


def test_ema_decay_one_form_for_each_meaning():
    forms = {0.9: [0.9], 0: [0.0], None: [], (0.9999, 0.999): [0.9999, 0.999], (0.9,): [0.9]}
    for value, decays in forms.items():
        trainer = TrainerConfig(ema_decay=list(value) if isinstance(value, tuple) else value)
        assert trainer.ema_decays == decays
        assert trainer.ema_decay == (decays if len(decays) > 1 else decays[0] if decays else None)


def test_snapshots_need_ema():
    with pytest.raises(ConfigError, match=r"trainer.snapshot_every must be 0 with trainer.ema_decay=null, .*, got 5"):
        TrainerConfig(snapshot_every=5)
    with pytest.raises(ConfigError, match=r"trainer.snapshot_every must be >= 0, got -1"):
        TrainerConfig(snapshot_every=-1, ema_decay=0.9)
