"""Results of a run: run directory, reports, wandb, evaluation of saved files."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import train_cls
import vca.report.classifier
from models import build_model
from tests.processes import ROOT, Launch, run_script
from tests.support import TINY, assert_same, metrics, untimed
from vca.config import compose
from vca.data import images_identity, load_dataset
from vca.data.loader import Address
from vca.evaluation.record import read_record
from vca.runtime import provenance
from vca.runtime.digest import file_sha256, tensors_sha256
from vca.runtime.errors import ConfigError, PreemptedError
from vca.runtime.rundir import to_dict
from vca.runtime.seeding import seed_torch
from vca.training.checkpoint import load_latest

pytestmark = pytest.mark.process

SHORT = (*TINY, "trainer.steps=6", "trainer.ema_decay=0.5")


def run(tmp_path, *overrides, name="run"):
    return train_cls.run(compose("train_cls", [f"out_dir={tmp_path}", f"name={name}", *SHORT, *overrides]))


@pytest.fixture
def finished(artefact, tmp_path):
    """A copy of a finished run: its `out_dir` and its result."""
    made = artefact("finished", lambda folder: (folder / "result.json").write_text(json.dumps(run(folder))))
    folder = shutil.copytree(made, tmp_path / "finished")
    return folder, json.loads((folder / "result.json").read_text())


def test_run_directory_files_of_finished_run(finished):
    folder, result = finished
    records = metrics(folder / "run")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 6]
    assert {"loss", "lr", "grad_norm", "epoch", "consumed", "images_per_second"} <= set(records[0])
    assert {key: records[-1][key] for key in result} == result
    assert {"val/top1", "val/top5", "val/loss", "val/images", "ema/top1"} <= set(result)
    config = json.loads((folder / "run" / "config.json").read_text())
    assert {**config, "out_dir": "out"} == to_dict(compose("train_cls", ["out_dir=out", "name=run", *SHORT]))
    assert (folder / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    launch = json.loads((folder / "run" / "launches.jsonl").read_text())
    assert launch["torch"] == torch.__version__
    assert launch["first_step"] == 0


def test_checkpoint_loads_with_weights_only(finished):
    """Tensors and plain values: loads without trusting the file."""
    path = finished[0] / "run" / "checkpoints" / "step_00000006.pt"
    state = torch.load(path, weights_only=True)
    assert set(state) == {"step", "consumed", "report", "model", "ema", "optimizer", "scaler"}


def test_resume_of_finished_run_returns_result(finished):
    folder, result = finished
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    assert run(folder) == result
    assert (folder / "run" / "metrics.jsonl").read_bytes() == before
    assert len((folder / "run" / "launches.jsonl").read_text().splitlines()) == 1


def test_eval_only_equals_evaluation_of_run(finished):
    """The run, `trainer.eval_only=true`, and two ranks give the same accuracy."""
    folder, result = finished
    assert run(folder, "trainer.eval_only=true") == result
    done = run_script("train_cls.py", f"out_dir={folder}", "name=run", *SHORT, "trainer.eval_only=true", ranks=2)
    assert f"top-1 {result['val/top1']:.2f} % of 359 images" in done.stdout


def records_of(folder):
    """The accuracy records in a run directory, by weights."""
    found = [read_record(path) for path in sorted(folder.glob("evaluation-accuracy-*.json"))]
    return {record["weights"]["name"]: record for record in found}


def test_accuracy_records_of_finished_run(finished):
    """A record of raw and of EMA weights: figures, sha256 of the checkpoint's weights, log, launch, and data."""
    folder, result = finished
    saved = load_latest(folder / "run" / "checkpoints")
    records = records_of(folder / "run")
    assert list(records) == ["ema", "raw"]
    for name, prefix, key in (("raw", "val", "model"), ("ema", "ema", "ema")):
        record = records[name]
        assert record["metrics"] == {k: result[f"{prefix}/{k}"] for k in ("top1", "top5", "loss")}
        sha256 = tensors_sha256(saved[key])
        assert record["weights"] == {"name": name, "source": "run", "step": 6, "steps": 6, "sha256": sha256}
        assert (record["count"], record["data"]["images"], record["data"]["name"]) == (359, 359, "digits")
        assert record["log"]["sha256"] == file_sha256(folder / "run" / "metrics.jsonl")
        (launch,) = record["training"]["launches"]
        assert launch.items() <= json.loads((folder / "run" / "launches.jsonl").read_text()).items()
        assert record["config"]["trainer"]["steps"] == 6
    data = load_dataset(compose("train_cls").data, train=False)
    assert records["raw"]["data"]["sha256"] == images_identity(data)["sha256"]
    data.labels[0] = (data.labels[0] + 1) % 10
    assert records["raw"]["data"]["sha256"] != images_identity(data)["sha256"]


def test_accuracy_records_replaced_by_evaluation(finished):
    """An evaluation of the same weights replaces the record."""
    folder, _ = finished
    before = records_of(folder / "run")
    for file in (folder / "run").glob("evaluation-*.json"):
        file.unlink()
    run(folder, "trainer.eval_only=true")
    assert records_of(folder / "run") == before


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_reads_each_image_once_for_all_weights(tmp_path, monkeypatch, workers):
    """Also the loader workers are started once, not for each evaluation."""
    reads = tmp_path / "reads"
    reads.mkdir()

    def counted(images, index):
        with open(reads / str(os.getpid()), "a") as file:
            file.write(f"{index}\n")
        return images[index]

    monkeypatch.setattr("vca.data.loader.read_image", counted)
    one_image = [Address(0, 0, 0)]
    monkeypatch.setattr(train_cls.TrainOrder, "batch", lambda order, step, start, stop: one_image * (stop - start))
    run(tmp_path, "trainer.eval_every=3", f"trainer.workers={workers}", "augment.mixup=0", "augment.cutmix=0")
    records = [record for record in metrics(tmp_path / "run") if "val/top1" in record]
    assert [record["step"] for record in records] == [3, 6]
    assert all("ema/top1" in record for record in records)
    by_process = [[int(line) for line in file.read_text().split()] for file in reads.iterdir()]
    evaluated = [Counter(index for index in process if index) for process in by_process]
    assert [counts for counts in evaluated if counts] == [Counter(dict.fromkeys(range(1, 359), 2))]


def test_resume_with_other_config_refused(finished):
    folder, _ = finished
    with pytest.raises(ConfigError, match=r"another config \(optim.lr: 0.001 -> 0.5\); choose another name"):
        run(folder, "optim.lr=0.5")
    run(folder, "trainer.workers=1", "trainer.checkpoint_every=3")  # these do not change results
    checkpoint = f"{folder}/run/checkpoints/step_00000006.pt"
    with pytest.raises(ConfigError, match=rf"steps: 6 -> 9.*name=\.\.\. trainer.init_from={checkpoint}$"):
        run(folder, "trainer.steps=9")


def test_resume_with_other_intervals_keeps_results(tmp_path, monkeypatch, capsys):
    """Other `log_every` and `eval_every`: the same weights, and each report covers the steps since the last one."""
    train_step = train_cls.TrainState.train_step

    def overflow(self, batches, loss_of, seed):
        scale = 1e38 if self.step == 4 else 1.0
        return train_step(self, batches, lambda *arguments: loss_of(*arguments) * scale, seed)

    monkeypatch.setattr(train_cls.TrainState, "train_step", overflow)
    options = ["trainer.steps=12", "trainer.precision=fp16", "augment.mixup=0", "augment.cutmix=0"]
    options += ["trainer.checkpoint_every=6", "trainer.keep_checkpoints=9"]
    run(tmp_path, *options, name="whole")
    run(tmp_path, *options, "trainer.log_every=4", name="changed")
    changed = tmp_path / "changed" / "checkpoints"
    (changed / "step_00000012.pt").unlink()
    capsys.readouterr()
    run(tmp_path, *options, "trainer.log_every=5", "trainer.eval_every=10", name="changed")
    assert "\nresumed from step 6, 6 steps left\n" in capsys.readouterr().out
    one, other = (load_latest(folder / "checkpoints") for folder in (tmp_path / "whole", tmp_path / "changed"))
    assert_same(one["model"], other["model"])
    losses = [record["loss"] for record in metrics(tmp_path / "whole") if "lr" in record]
    records = metrics(tmp_path / "changed")
    assert [(record["step"], "lr" in record) for record in records] == [
        (4, True),
        (10, True),
        (10, False),
        (12, True),
        (12, False),
    ]
    assert records[1]["overflows"] == 1
    assert records[1]["loss"] == pytest.approx(sum(losses[5:10]) / 5)
    assert records[3]["loss"] == pytest.approx(sum(losses[10:]) / 2)
    assert "overflows" not in records[3]


def test_signal_during_evaluation_acknowledged(tmp_path, monkeypatch, capfd):
    """At once on stderr; the run then stops after the next step."""
    evaluate = vca.report.classifier.evaluate

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return evaluate(*arguments)

    monkeypatch.setattr(vca.report.classifier, "evaluate", interrupted)
    with pytest.raises(PreemptedError, match=r"run: SIGINT: checkpoint saved at step 3 of 6; rerun the same command"):
        run(tmp_path, "trainer.eval_every=2", "trainer.ema_decay=null")
    printed = capfd.readouterr()
    assert "\nstarting, 6 steps\n" in printed.out
    assert "evaluating 359 images\n" in printed.out
    line = "SIGINT received: stopping after the next step; press Ctrl-C again to stop at once\n"
    assert printed.err.count(line) == 1


def test_train_cls_independent_of_workers(tmp_path):
    run(tmp_path, name="none")
    run(tmp_path, "trainer.workers=2", name="two")
    one, two = (load_latest(tmp_path / name / "checkpoints") for name in ("none", "two"))
    assert_same(one, two)


def test_gradient_checkpointing_equals_plain(tmp_path):
    """Bit-identical, and may change on resume."""
    run(tmp_path, name="plain")
    run(tmp_path, "trainer.grad_checkpointing=true", name="checkpointed")
    one, two = (load_latest(tmp_path / name / "checkpoints") for name in ("plain", "checkpointed"))
    assert_same(one, two)
    run(tmp_path, "trainer.grad_checkpointing=true", name="plain")


@pytest.mark.parametrize("attention", ["vca", "softmax"])
def test_compile_close_to_eager(tmp_path, attention):
    """The difference to `trainer.compile=default` is small compared with the change in training."""
    still = ["model.drop_rate=0", "model.drop_path_rate=0", "model.depth=1", "optim.warmup_epochs=0"]
    options = [f"attention={attention}", *still]
    run(tmp_path, *options, name="eager")
    run(tmp_path, *options, "trainer.compile=default", name="compiled")
    config = compose("train_cls", [*SHORT, *options])
    seed_torch(config.seed, "model")
    start = torch.cat([p.flatten() for p in build_model(config.model, config.attention).parameters()])
    names = [name for name, _ in build_model(config.model, config.attention).named_parameters()]
    eager, compiled = (
        torch.cat([load_latest(tmp_path / name / "checkpoints")["model"][key].flatten() for key in names])
        for name in ("eager", "compiled")
    )
    learned = (eager - start).norm()
    assert learned > 0.1
    assert (compiled - eager).norm() < 0.05 * learned


# Rank 1 compiles for longer than the time limit of collectives; the backend generates no code.
SLOW_COMPILER = """
import os, runpy, time, torch
from functools import partial
from torch._dynamo.backends.debugging import aot_eager

def slow(*arguments, **options):
    if os.environ["RANK"] == "1":
        time.sleep(9)
    return aot_eager(*arguments, **options)

torch.compile = partial(torch.compile, backend=slow)
runpy.run_path("{script}", run_name="__main__")
"""


def test_compile_longer_than_timeout_on_one_rank(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_COMPILER.format(script=ROOT / "train_cls.py"))
    options = [*SHORT, "model.depth=1", "trainer.compile=default", "trainer.timeout_minutes=0.1"]
    options += ["data.check_seconds=0", f"out_dir={tmp_path}", "name=run"]
    done = run_script(tmp_path / "slow.py", *options, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics(tmp_path / "run")[-1]["step"] == 6


# A run whose stderr is a terminal.
ON_TERMINAL = """
import os, runpy
os.dup2(os.open("{terminal}", os.O_WRONLY | os.O_NOCTTY), 2)
runpy.run_path("{script}", run_name="__main__")
"""


def test_progress_bar_on_terminal_only(tmp_path):
    """A progress bar on a terminal, lines in a file."""
    main, second = pty.openpty()
    termios.tcsetwinsize(second, (24, 120))
    script = tmp_path / "on_terminal.py"
    script.write_text(ON_TERMINAL.format(terminal=os.ttyname(second), script=ROOT / "train_cls.py"))
    launch = Launch(script, f"out_dir={tmp_path}", "name=run", *SHORT, "trainer.log_every=3")
    shown, ended = b"", False
    while not ended:
        ended = launch.returncode is not None  # before the last read
        while select.select([main], [], [], 0.05)[0]:
            shown += os.read(main, 4096)
    os.close(main)
    os.close(second)
    assert launch.returncode == 0, shown.decode()
    assert "img/s" in shown.decode()
    assert "100%" in shown.decode()
    assert "step 6/6" in launch.stdout
    quiet = run_script("train_cls.py", f"out_dir={tmp_path}", "name=quiet", *SHORT)
    assert "img/s" not in quiet.stderr
    assert "images_per_second" in quiet.stdout


class StubRun:
    """A run of wandb that works."""

    def define_metric(self, *_, **__):
        pass

    def log(self, record):
        pass

    def finish(self):
        pass


def raises(*_, **__):
    raise OSError("no network")


def hangs(*_, **__):
    threading.Event().wait()


# Failures of wandb: a fake module, None if not installed.
BROKEN = {
    "init raises": SimpleNamespace(init=raises),
    "init hangs": SimpleNamespace(init=hangs),
    "log raises": SimpleNamespace(init=lambda **_: type("Run", (StubRun,), {"log": raises})()),
    "log hangs": SimpleNamespace(init=lambda **_: type("Run", (StubRun,), {"log": hangs})()),
    "finish raises": SimpleNamespace(init=lambda **_: type("Run", (StubRun,), {"finish": raises})()),
    "finish hangs": SimpleNamespace(init=lambda **_: type("Run", (StubRun,), {"finish": hangs})()),
    "missing": None,
}


@pytest.mark.parametrize("how", BROKEN)
def test_wandb_failure_does_not_stop_run(tmp_path, how, finished, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", BROKEN[how])
    with pytest.warns(UserWarning, match="wandb"):
        run(tmp_path, "wandb.mode=online", "wandb.timeout_seconds=1")
    assert untimed(tmp_path / "run") == untimed(finished[0] / "run")


def history(folder):
    """Read the records of an offline wandb run (protobuf in leveldb's log format)."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, position, record = file.read_bytes(), 7, b""
        while position + 7 <= len(data):
            if 32768 - position % 32768 < 7:  # the tail of a block is padding
                position += 32768 - position % 32768
                continue
            length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
            record += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # full, or last part
                message = wandb_internal_pb2.Record.FromString(record)
                record = b""
                if message.HasField("history"):
                    items = {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in message.history.item}
                    rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def test_wandb_offline_equals_metrics_file(tmp_path):
    """Real wandb, offline, with an interruption: the same records, one id."""
    options = [f"out_dir={tmp_path}", "name=run", *SHORT, "wandb.mode=offline"]
    assert run_script("train_cls.py", *options).returncode == 0
    first = history(tmp_path / "run")
    assert first == metrics(tmp_path / "run")
    run_id = (tmp_path / "run" / "wandb_id").read_text()
    (tmp_path / "run" / "checkpoints" / "step_00000006.pt").unlink()
    assert run_script("train_cls.py", *options).returncode == 0
    second = history(tmp_path / "run")
    assert second == first + metrics(tmp_path / "run")
    assert (tmp_path / "run" / "wandb_id").read_text() == run_id
    assert len(list((tmp_path / "run").glob(f"wandb/offline-run-*-{run_id}"))) == 2
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*/files/media/table/evaluations_summary_*.json"))) == 2


def test_metrics_file_fp16_skipped_step_is_null(tmp_path, monkeypatch):
    """The gradient norm of a skipped step is null: `metrics.jsonl` stays valid JSON."""
    train_step = train_cls.TrainState.train_step

    def overflow(self, batches, loss_of, seed):
        if self.step == 2:
            return train_step(self, batches, lambda *a: loss_of(*a) * 1e38, seed)
        return train_step(self, batches, loss_of, seed)

    monkeypatch.setattr(train_cls.TrainState, "train_step", overflow)
    run(tmp_path, "trainer.precision=fp16", "augment.mixup=0", "augment.cutmix=0")
    records = [record for record in metrics(tmp_path / "run") if "lr" in record]
    assert [record["grad_norm"] is None for record in records] == [False, False, True, False, False, False]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "Infinity" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_curves_drawn_by_rerun_when_missing(finished):
    folder, _ = finished
    (folder / "run" / "curves.png").unlink()
    run(folder)
    assert (folder / "run" / "curves.png").exists()


def test_provenance_diff_of_uncommitted_files(tmp_path, monkeypatch):
    """The diff contains changed and new files; a code snapshot returns those of its source."""
    monkeypatch.setattr(provenance, "CODE", tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "vca").mkdir()
    (tmp_path / "vca" / "old.py").write_text("one\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    commit, diff = provenance.provenance()
    assert (len(commit), diff) == (40, "")
    (tmp_path / "vca" / "old.py").write_text("two\n")
    (tmp_path / "vca" / "new.py").write_text("three\n")
    diff = provenance.provenance()[1]
    assert "-one\n+two\n" in diff
    assert "+++ b/vca/new.py\n@@ -0,0 +1 @@\n+three\n" in diff
    (tmp_path / provenance.COMMIT).write_text("abc\n")
    (tmp_path / provenance.DIFF).write_text("kept")
    assert provenance.provenance() == ("abc", "kept")
