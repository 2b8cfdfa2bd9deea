"""Faults during a run: it continues, or exits with one line and keeps its checkpoints."""

import os
import re
import signal
import subprocess
import time

import pytest

import train_cls
from tests.data.test_latents import QUICK
from tests.data.test_loader import write_image_folder
from tests.processes import ROOT, Launch, process_table, run_script
from tests.support import DRAWN, SMALL_DIT, TINY, assert_same, last_step, metrics, train_and_kill, untimed
from vca.cli import exit_on_user_error
from vca.config import compose
from vca.runtime.errors import NonFiniteError, RankZeroError
from vca.training.checkpoint import load_latest

pytestmark = pytest.mark.process

CLASSIFIER = (
    *TINY,
    "trainer.ema_decay=null",
    "trainer.steps=20",
    "trainer.checkpoint_every=10",
    "trainer.eval_every=10",
)
GENERATOR = (
    *SMALL_DIT,
    "trainer.steps=20",
    "trainer.global_batch_size=60",
    "trainer.log_every=1",
    "trainer.checkpoint_every=10",
    "trainer.eval_every=10",
)

# A root script with a function replaced; `faulty` may call `original` and use `folder`.
FAULTY = """
import importlib, os, runpy, time
from pathlib import Path

module, name = importlib.import_module("{module}"), "{name}"
original, folder = getattr(module, name), Path("{folder}")

def attempt():
    attempts = folder / "attempts"
    attempts.write_text((attempts.read_text() if attempts.exists() else "") + "x")
    return len(attempts.read_text())

def faulty(*arguments, **options):
{body}

setattr(module, name, faulty)
runpy.run_path("{script}", run_name="__main__")
"""


def faulty(folder, script, target, body):
    """Write a root script in which the function `target` (`module.function`) has another body."""
    module, _, name = target.rpartition(".")
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    path = folder / f"faulty_{script}"
    path.write_text(FAULTY.format(module=module, name=name, folder=folder, body=lines, script=ROOT / script))
    return path


def truncate_image(launch, data):
    file = data / "train" / "dog" / "1.jpg"
    file.write_bytes(file.read_bytes()[:-300])
    return f"stopped: {file} cannot be read (its size changed from "


def delete_image(launch, data):
    file = data / "train" / "cat" / "2.jpg"
    file.unlink()
    return f"stopped: {file} cannot be read ([Errno 2] No such file"


def kill_worker(launch, data):
    os.kill(launch.members(-1)[-1], signal.SIGKILL)
    return "stopped: a loader worker was killed "


def block_checkpoints(launch, data):
    folder = data.parent / "run" / "checkpoints"
    folder.rename(data / "moved")
    folder.write_text("")
    return f"stopped: [Errno 17] File exists: '{folder}'"


def kill_rank(launch, data):
    os.kill(launch.processes[-1].pid, signal.SIGKILL)
    return "stopped: another rank exited or is unreachable ("


def stop_rank(launch, data):
    os.kill(launch.processes[-1].pid, signal.SIGSTOP)
    return "stopped: another rank timed out ("


FAULTS = [
    (fault, ranks) for fault in (truncate_image, delete_image, kill_worker, block_checkpoints) for ranks in (1, 2)
]
FAULTS += [(kill_rank, 2), (stop_rank, 2)]


@pytest.mark.parametrize(("fault", "ranks"), FAULTS)
def test_fault_with_workers_ends_run(tmp_path, fault, ranks):
    """Exits within 20 s with a one-line reason; no loader worker outlives its rank."""
    data = tmp_path / "data"
    write_image_folder(data)
    options = ["data=imagefolder", f"data.root={data}", "data.num_classes=2", "data.check_seconds=0", "data.img_size=8"]
    options += ["model=deit_mini", "augment=none", "trainer.steps=40000", "trainer.global_batch_size=4"]
    options += ["trainer.workers=2", "trainer.checkpoint_every=20", "trainer.log_every=1", "trainer.device=cpu"]
    options += ["trainer.eval_every=0", "trainer.timeout_minutes=0.1"]
    launch = Launch("train_cls.py", *options, f"out_dir={tmp_path}", "name=run", ranks=ranks)
    launch.wait_until(lambda: last_step(tmp_path / "run") >= 25)
    members = [pid for rank in range(ranks) for pid in launch.members(rank)]
    line = fault(launch, data)
    stopped = launch.processes[-1] if fault is stop_rank else None
    deadline = time.monotonic() + 20
    running = [process for process in launch.processes if process is not stopped]
    while launch.returncode is None and any(process.exitcode is None for process in running):
        # `returncode` passes SIGTERM on, as torchrun does.
        assert time.monotonic() < deadline, launch.stderr[-3000:]
        time.sleep(0.05)
    if stopped:
        launch.kill()
    assert launch.wait(20) != 0
    reported = any(text.startswith(line) for text in launch.stderr.splitlines())
    by_launcher = fault is kill_rank and launch.processes[0].exitcode == -signal.SIGTERM  # which names the killed rank
    assert reported or by_launcher, launch.stderr[-3000:]
    assert 'train_cls.py", line' not in launch.stderr  # no traceback
    time.sleep(0.5)
    assert not [pid for pid in members if any(process.pid == pid for process in process_table())]


def test_fault_of_rank_0_is_reported_by_other_ranks_after_it(monkeypatch, capsys):
    """An exit of another rank before would end rank 0, since torchrun stops all ranks."""
    waits = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(SystemExit, match="1"), exit_on_user_error():
        raise RankZeroError("rank 0 failed: no space left\non the device")
    assert waits == [3.0]
    assert capsys.readouterr().err == "stopped: rank 0 failed: no space left\n"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("script", ["train_cls.py", "scripts/prepare_latents.py"])
def test_fault_unreadable_image_ends_evaluation_and_scripts(tmp_path, script, workers):
    """The loader of an evaluation, and of a script, as that of the training."""
    write_image_folder(tmp_path / "data")
    file = tmp_path / "data" / ("val" if script == "train_cls.py" else "train") / "dog" / "1.jpg"
    file.write_bytes(file.read_bytes()[:-300])
    options = ["data=imagefolder", f"data.root={tmp_path}/data", "data.num_classes=2", "data.check_seconds=0"]
    if script == "train_cls.py":
        options += ["model=deit_mini", "augment=none", "data.img_size=8", "trainer.steps=8", "trainer.device=cpu"]
        options += ["trainer.global_batch_size=2", f"trainer.workers={workers}", f"out_dir={tmp_path}"]
    else:
        (tmp_path / "quick.py").write_text(QUICK)
        options += ["autoencoder=file", f"autoencoder.source={tmp_path}/quick.py", "autoencoder.factor=4"]
        options += ["data.img_size=32", "device=cpu", f"workers={workers}", f"out={tmp_path}/latents"]
    done = run_script(script, *options, timeout=60)
    assert done.returncode == 1
    assert any(
        line.startswith(f"stopped: {file} cannot be read (image file is truncated") for line in done.stderr.splitlines()
    ), done.stderr[-3000:]


def test_corrupt_log_and_config_resume(tmp_path):
    """With NUL bytes in the log a run resumes; with an empty config.json it does once that is removed."""
    options = [*CLASSIFIER, f"out_dir={tmp_path}", "name=run"]
    whole = run_script("train_cls.py", *CLASSIFIER, f"out_dir={tmp_path}", "name=whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    train_and_kill(tmp_path / "run", 14, "train_cls.py", *options)
    log = tmp_path / "run" / "metrics.jsonl"
    lines = log.read_bytes().split(b"\n")
    log.write_bytes(b"\n".join([*lines[:3], b"\0" * 512 + lines[3], *lines[4:]]))
    config = tmp_path / "run" / "config.json"
    content = config.read_bytes()
    config.write_bytes(b"")
    refused = run_script("train_cls.py", *options)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"config error: {config} cannot be read (")
    assert refused.stderr.count("\n") == 1
    config.unlink()
    done = run_script("train_cls.py", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 corrupt line(s); old file saved as metrics.jsonl.1" in done.stderr
    assert config.read_bytes() == content.replace(b'"whole"', b'"run"')
    assert_same(*(load_latest(tmp_path / name / "checkpoints") for name in ("whole", "run")))
    records = untimed(tmp_path / "whole")
    assert untimed(tmp_path / "run") == [*records[:3], *records[4:]]


# A run in its own mount namespace, with less shared memory than its batches need.
SMALL_SHM = """
import ctypes, runpy, subprocess
assert ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", "/dev/shm"], check=True)
runpy.run_path("{script}", run_name="__main__")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount")
@pytest.mark.parametrize("ranks", [1, 2])
def test_fault_full_shared_memory_ends_run(tmp_path, ranks):
    (tmp_path / "small.py").write_text(SMALL_SHM.format(script=ROOT / "train_cls.py"))
    options = [*TINY, f"out_dir={tmp_path}", "name=run", "trainer.workers=2", "trainer.global_batch_size=1200"]
    done = run_script(tmp_path / "small.py", *options, ranks=ranks, timeout=60)
    assert done.returncode != 0
    assert "stopped: /dev/shm is full; start the container" in done.stderr, done.stderr[-3000:]


EVALUATIONS = {
    "train_cls.py": (CLASSIFIER, "vca.report.classifier.evaluate"),
    "train_gen.py": (GENERATOR, "vca.generation.pipeline.save_image_grid"),
}


@pytest.mark.parametrize("script", EVALUATIONS)
def test_kill_during_evaluation_loses_no_step(tmp_path, script):
    """The checkpoint is written in the background; the missing evaluation runs on resume."""
    options, target = EVALUATIONS[script]
    whole = run_script(script, *options, f"out_dir={tmp_path}", "name=whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    broken = tmp_path / "broken"
    body = "\n".join(
        (
            "number = attempt()",
            "if number % 2:",
            f"    while len(list(Path({str(broken)!r}).glob('checkpoints/step_*.pt'))) <= number // 2:",
            "        time.sleep(0.01)",
            "    os._exit(9)",
            "return original(*arguments, **options)",
        )
    )
    for step in (10, 20):
        killed = run_script(faulty(tmp_path, script, target, body), *options, f"out_dir={tmp_path}", "name=broken")
        assert killed.returncode == 9, killed.stderr[-3000:]
        assert load_latest(broken / "checkpoints")["step"] == step
    done = run_script(script, *options, f"out_dir={tmp_path}", "name=broken")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(*(load_latest(tmp_path / name / "checkpoints") for name in ("whole", "broken")))
    assert untimed(tmp_path / "whole") == untimed(broken)
    if script == "train_gen.py":
        drawn = [sorted((tmp_path / name / "samples").iterdir()) for name in ("whole", "broken")]
        assert len(drawn[0]) == 2
        assert [path.read_bytes() for path in drawn[0]] == [path.read_bytes() for path in drawn[1]]


def test_sample_not_finite_is_warning(tmp_path, use):
    """In a sample grid and in an FID; the run continues."""
    fid = ("trainer.fid_every=10", "fid.reference=data:test", f"fid.count={DRAWN}", *use)
    target, body = "vca.generation.pipeline.sample_latents", "found = original(*arguments, **options)\n"
    body += "import torch\nwith torch.inference_mode():\n    found.x[0] = float('nan')\nreturn found"
    script = faulty(tmp_path, "train_gen.py", target, body)
    script.write_text(script.read_text().replace("setattr(", "import vca.generation.pipeline as generator\nsetattr("))
    script.write_text(script.read_text().replace("runpy.run", "generator.draw_samples = faulty\nrunpy.run"))
    done = run_script(script, *GENERATOR, *fid, f"out_dir={tmp_path}", "name=run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("sampling 10 images\n") == 2
    assert done.stdout.count("warning: 1 of 10 samples are NaN or infinite\n") == 2
    assert done.stdout.count(f"sampling {DRAWN} images for the Frechet distance\n") == 2
    assert done.stdout.count("warning: skipping the Frechet distance: samples are NaN or infinite") == 2
    measured = [record for record in metrics(tmp_path / "run") if "frechet" in record]
    assert [(record["step"], record["frechet"]) for record in measured] == [(10, None), (20, None)]
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 2


def overflow_from(step, monkeypatch):
    """Overflow in every step from `step` on."""
    original = train_cls.TrainState.train_step

    def train_step(self, batches, loss_of, seed):
        scale = 1e38 if self.step >= step else 1.0
        return original(self, batches, lambda *arguments: loss_of(*arguments) * scale, seed)

    monkeypatch.setattr(train_cls.TrainState, "train_step", train_step)


FP16 = (*TINY, "trainer.precision=fp16", "augment.mixup=0", "augment.cutmix=0", "trainer.checkpoint_every=2")


@pytest.mark.parametrize(("first", "newest"), [(4, 4), (0, None)])
def test_fp16_overflow_in_every_step_saves_nothing(tmp_path, monkeypatch, first, newest):
    """Until the loss scale is below 1: the newest checkpoint is the last one with an applied step."""
    overflow_from(first, monkeypatch)
    config = compose("train_cls", [*FP16, f"out_dir={tmp_path}", "name=run", "trainer.log_every=2"])
    said = "the newest checkpoint is of step 4" if newest else "no checkpoint exists"
    with pytest.raises(NonFiniteError, match=said):
        train_cls.run(config)
    saved = load_latest(tmp_path / "run" / "checkpoints")
    assert (saved and saved["step"]) == newest
    last = metrics(tmp_path / "run")[-1]
    assert (last["loss"], last["overflows"]) == (None, 2)


def test_fp16_overflow_of_all_steps_is_no_success(tmp_path, monkeypatch):
    """A run too short to lower the loss scale below 1."""
    overflow_from(0, monkeypatch)
    config = compose("train_cls", [*FP16, f"out_dir={tmp_path}", "name=run", "trainer.steps=5"])
    with pytest.raises(NonFiniteError, match=r"in step 4; .* no checkpoint exists"):
        train_cls.run(config)


def test_fp16_overflow_in_last_step_ends_run(tmp_path, monkeypatch):
    overflow_from(5, monkeypatch)
    train_cls.run(compose("train_cls", [*FP16, f"out_dir={tmp_path}", "name=run", "trainer.steps=6"]))
    assert load_latest(tmp_path / "run" / "checkpoints")["step"] == 6


def test_checkpoint_of_another_model_refused(tmp_path):
    """A checkpoint of another model in the run directory: a one-line error, and it is not renamed."""
    for name, depth in (("small", 1), ("large", 2)):
        options = [*TINY, f"out_dir={tmp_path}", f"name={name}", "trainer.steps=2", f"model.depth={depth}"]
        assert run_script("train_cls.py", *options).returncode == 0
    copied = tmp_path / "large" / "checkpoints" / "step_00000002.pt"
    copied.write_bytes((tmp_path / "small" / "checkpoints" / "step_00000002.pt").read_bytes())
    done = run_script("train_cls.py", *options)
    assert done.returncode == 2
    assert done.stderr.startswith(f"config error: {copied} is the checkpoint of another model (Missing key(s)")
    assert done.stderr.count("\n") == 1
    assert copied.exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_full_disk_stops_at_checkpoint_and_resumes(small_disk, tmp_path, ranks):
    """Full from step 15 on: the sample grid is lost with a warning, the checkpoint at step 20 is an error."""
    options = [*GENERATOR, "trainer.steps=30", "trainer.eval_every=15", "name=run"]
    whole = run_script("train_gen.py", *options, f"out_dir={tmp_path}", ranks=ranks)
    assert whole.returncode == 0, whole.stderr[-3000:]
    filler = small_disk / "filler"
    body = f"""with open("{filler}", "wb", buffering=0) as file:
    try:
        while file.write(b"x" * 4096):
            pass
    except OSError:
        pass
return original(*arguments, **options)"""
    script = faulty(tmp_path, "train_gen.py", "vca.generation.pipeline.save_image_grid", body)
    folder = small_disk / "run"
    stopped = run_script(script, *options, f"out_dir={small_disk}", ranks=ranks)
    assert stopped.returncode != 0
    assert stopped.stderr.count(f"{folder}/samples cannot be written ([Errno 28] No space left on device, ") == 1
    line = rf"No space left on device, 0\.\d MB needed, 0\.0 MB free: '{folder}/checkpoints/step_00000020.pt'"
    assert re.search(line, stopped.stderr), stopped.stderr[-3000:]
    assert load_latest(folder / "checkpoints")["step"] == 10
    assert not list(folder.rglob("*.tmp"))
    filler.unlink()
    done = run_script("train_gen.py", *options, f"out_dir={small_disk}", ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(*(load_latest(path / "run" / "checkpoints") for path in (tmp_path, small_disk)))
    assert untimed(tmp_path / "run") == untimed(folder)


def test_read_only_out_dir_refused(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = run_script("train_cls.py", *TINY, f"out_dir={small_disk}", "name=run")
    assert done.returncode == 2
    assert done.stderr.startswith(f"config error: out_dir: {small_disk}/run cannot be written ([Errno 30] Read-only")
    assert done.stderr.count("\n") == 1
