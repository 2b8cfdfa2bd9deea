"""A run around its steps: no step waits for the device, checkpoints are written in the background."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import train_cls
import train_gen
import vca.data.loader
import vca.training.run
from tests.host_reads import HostReads
from tests.support import SMALL_DIT, TINY, metrics
from vca.config import compose
from vca.runtime.errors import NonFiniteError
from vca.training.checkpoint import list_checkpoints, load_latest

SCRIPTS = {"train_cls": (train_cls, TINY), "train_gen": (train_gen, SMALL_DIT)}


class StepReads(HostReads):
    """Counts by step, from the first one on, without the loader's work on the CPU."""

    def __init__(self, monkeypatch):
        super().__init__(monkeypatch)
        self.state = None
        train_step, batches = train_cls.TrainState.train_step, vca.data.loader.worker_batches

        def step(state, *arguments):
            self.state = state
            return train_step(state, *arguments)

        def outside(*arguments):
            source = batches(*arguments)
            while True:
                with _disable_current_modes(), monkeypatch.context() as patch:
                    patch.setattr(self, "state", None)
                    batch = next(source, None)
                if batch is None:
                    return
                yield batch

        monkeypatch.setattr(train_cls.TrainState, "train_step", step)
        monkeypatch.setattr(vca.data.loader, "worker_batches", outside)

    @property
    def place(self):
        return self.state.step if self.state is not None else None


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_step_never_waits_for_device(tmp_path, monkeypatch, script, precision):
    """Only steps that log, evaluate or save read a value."""
    module, options = SCRIPTS[script]
    run = ["trainer.steps=13", "trainer.log_every=4", "trainer.eval_every=9", "trainer.checkpoint_every=6"]
    more = ["trainer.ema_decay=0.9", "optim.clip_grad=1.0", "augment.re_prob=0.5", f"trainer.precision={precision}"]
    config = compose(script, [*options, *run, *more, f"out_dir={tmp_path}", "name=run"])
    with StepReads(monkeypatch) as reads:
        module.run(config)
    assert {step for step, _ in reads.counts} == {4, 6, 8, 9, 12, 13}, reads.counts


def test_nonfinite_gradient_stops_run_at_report(tmp_path, monkeypatch):
    """It is noticed at the next report; no step since then was applied, and the message has the step's images."""
    train_step, weights, indices = train_cls.TrainState.train_step, {}, {}

    def faulty(self, batches, loss_of, seed):
        scale = float("nan") if self.step == 5 else 1.0
        indices[self.step] = batches[0].indices.tolist()
        result = train_step(self, batches, lambda *arguments: loss_of(*arguments) * scale, seed)
        weights[self.step] = [p.detach().clone() for p in self.model.parameters()]
        return result

    monkeypatch.setattr(train_cls.TrainState, "train_step", faulty)
    options = [*TINY, f"out_dir={tmp_path}", "name=run", "trainer.log_every=4", "trainer.checkpoint_every=4"]
    with pytest.raises(NonFiniteError, match=r"gradient norm nan in step 5; .* the newest checkpoint is of step 4"):
        train_cls.run(compose("train_cls", options))
    assert max(weights) == 8
    assert all(torch.equal(before, after) for before, after in zip(weights[5], weights[8], strict=True))
    failure = (tmp_path / "run" / "nonfinite_rank0.json").read_text()
    assert f'"indices": {indices[5]}'.replace(" ", "") in failure.replace(" ", "").replace("\n", "")
    assert load_latest(tmp_path / "run" / "checkpoints")["step"] == 4


def test_checkpoint_written_while_steps_run(tmp_path, monkeypatch):
    """Steps do not wait for a slow writer; the next checkpoint does, since there is at most one copy of the state."""
    save, record = vca.training.run.save_checkpoint, vca.training.run.TrainingRun.record
    events: list[str] = []
    free = threading.Event()

    def slow(folder, step, state, keep):
        assert free.wait(30)
        events.append(f"written {step}")
        return save(folder, step, state, keep)

    def recorded(self, result, batches):
        record(self, result, batches)
        events.append(f"step {self.state.step}")
        if self.state.step == 7:
            free.set()

    monkeypatch.setattr(vca.training.run, "save_checkpoint", slow)
    monkeypatch.setattr(vca.training.run.TrainingRun, "record", recorded)
    options = [*TINY, f"out_dir={tmp_path}", "name=run", "trainer.checkpoint_every=4", "trainer.steps=9"]
    train_cls.run(compose("train_cls", options))
    assert events.index("step 7") < events.index("written 4") < events.index("written 8") < events.index("written 9")
    names = [path.stem for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step_00000008", "step_00000009"]
    monkeypatch.undo()
    train_cls.run(compose("train_cls", [*options[:-1], "trainer.steps=9", "name=unbroken"]))
    one, other = (load_latest(tmp_path / name / "checkpoints") for name in ("run", "unbroken"))
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])


def test_checkpoint_that_cannot_be_written_stops_run(tmp_path, monkeypatch):
    """At the next report, although the write runs in the background."""

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vca.training.run, "save_checkpoint", fail)
    options = [*TINY, f"out_dir={tmp_path}", "name=run", "trainer.checkpoint_every=4", "trainer.log_every=2"]
    with pytest.raises(OSError, match="No space left"):
        train_cls.run(compose("train_cls", options))
    assert metrics(tmp_path / "run")[-1]["step"] in (4, 6)
