"""On a real SLURM with two simulated nodes: a requeued job gives the same results as an uninterrupted one.

`scripts/slurm_sandbox.sh` starts SLURM. The tests read:

    outputs/RUN/metrics.jsonl       one JSON object per record, each with `step`
    outputs/RUN/launches.jsonl      one JSON object per start: `first_step`, `slurm_job_id`, `slurm_restarts`
    SWEEP/logs/RUN.log              output of the first node's ranks, all attempts
    SWEEP/ends/0.json               `exit_code`, `slurm_job_id`, `restarts`
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from tests.processes import ROOT, environment, run_script
from tests.support import TINY, assert_same, metrics, untimed
from vca.training.checkpoint import load_latest

PROGRAMS = ("slurmctld", "slurmd", "munged")
pytestmark = [
    pytest.mark.process,
    pytest.mark.slurm,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(shutil.which(name) for name in PROGRAMS),
        reason="needs SLURM and root: scripts/slurm_sandbox.sh install",
    ),
]

# Only a signal saves a checkpoint before the end.
LONG = (*TINY, "trainer.steps=180", "trainer.checkpoint_every=1000", "trainer.eval_every=90")
CLUSTER = (
    "cluster=slurm",
    "cluster.nodes=2",
    "cluster.ranks_per_node=1",
    "cluster.cpus_per_rank=1",
    "cluster.gpus_per_node=null",
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Environment of a client of a SLURM sandbox with two nodes."""
    folder = tmp_path_factory.mktemp("slurm")
    sandbox = [str(ROOT / "scripts" / "slurm_sandbox.sh")]
    done = subprocess.run([*sandbox, "start", str(folder), "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    yield environment(SLURM_CONF=str(folder / "slurm.conf"))
    subprocess.run([*sandbox, "stop", str(folder)], check=True)


@contextmanager
def submitted(slurm, *overrides, script="train_cls.py"):
    """Run `python train_cls.py -m cluster=slurm ...`, which waits for its jobs."""
    command = [sys.executable, str(ROOT / script), "-m", *CLUSTER, *overrides]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=slurm, cwd=ROOT, **pipe)
    try:
        yield process
    finally:
        process.kill()
        subprocess.run(["scancel", "--name=train_cls"], env=slurm, check=False)


def launches(folder):
    file = folder / "launches.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def last_step(folder) -> int:
    records = metrics(folder)
    return records[-1]["step"] if records else 0


def wait_for(condition, process, what):
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, f"ended before {what}:\n{process.communicate()[0][-3000:]}"
        assert time.monotonic() < deadline, f"three minutes without {what}"
        time.sleep(0.02)


def test_slurm_requeue_mid_epoch_resume_is_exact(tmp_path, slurm):
    """A job that is preempted (`scontrol requeue`) and then reaches its time limit (SIGUSR2) resumes twice."""
    whole = run_script("train_cls.py", *LONG, f"out_dir={tmp_path}", "name=whole", ranks=2)
    assert whole.returncode == 0, whole.stderr[-3000:]
    folder = tmp_path / "broken"
    commands = (["scontrol", "requeue"], ["scancel", "--signal=USR2"])
    with submitted(slurm, *LONG, f"out_dir={tmp_path}", "name=broken") as process:
        for attempt, command in enumerate(commands):
            wait_for(lambda n=attempt: len(launches(folder)) == n + 1, process, f"launch {attempt}")
            first = launches(folder)[-1]["first_step"]
            wait_for(
                lambda s=first: bool(metrics(folder)) and metrics(folder)[-1]["step"] >= s + 20, process, "20 steps"
            )
            subprocess.run([*command, launches(folder)[-1]["slurm_job_id"]], env=slurm, check=True)
        said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]

    starts = launches(folder)
    assert [start["slurm_restarts"] for start in starts] == [0, 1, 2]
    assert len({start["slurm_job_id"] for start in starts}) == 1
    assert 20 <= starts[1]["first_step"] < starts[2]["first_step"] < 180
    (sweep,) = (tmp_path / "sweeps").iterdir()
    log = (sweep / "logs" / "broken.log").read_text() + (sweep / "logs" / "broken.node1.log").read_text()
    for start in starts[1:]:
        assert f"checkpoint saved at step {start['first_step']} of 180" in log
    end = json.loads((sweep / "ends" / "0.json").read_text())
    assert (end["exit_code"], end["restarts"]) == (0, 2)
    assert "| vca |" in said

    one, other = (load_latest(tmp_path / name / "checkpoints") for name in ("whole", "broken"))
    assert one["step"] == 180
    assert_same(one, other)
    assert untimed(tmp_path / "whole") == untimed(folder)


def test_slurm_failed_and_cancelled_jobs_reported(tmp_path, slurm):
    """Works from any folder: a failed job also fails in SLURM, and a cancelled one is not waited for."""
    outside = {key: value for key, value in slurm.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "train_cls.py"), "-m", *CLUSTER, "cluster.nodes=1", "cluster.max_restarts=0"]
    command += ["cluster.max_parallel_jobs=1", "data=cifar10", "data.root=/nowhere", "trainer.device=cpu", "seed=0,1"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, f"out_dir={tmp_path / 'out'}"], env=outside, cwd=tmp_path, **pipe)

    def jobs() -> list[str]:
        ask = ["squeue", "--noheader", "--array", "--format=%i"]
        return subprocess.run(ask, env=slurm, capture_output=True, text=True, check=True).stdout.split()

    wait_for(lambda: len(jobs()) == 2, process, "two jobs")
    first, second = sorted(jobs())
    subprocess.run(["scancel", second], env=slurm, check=True)
    said = process.communicate(timeout=200)
    assert process.returncode == 1
    names = [f"cifar10-deit_mini-vca-seed{seed}" for seed in (0, 1)]
    failed = [line for line in said[1].splitlines() if line.startswith("failed:")]
    assert f"{names[0]}: exit code 1; config error: data.root" in failed[0], said[1]
    assert f"{names[1]}: did not finish; no log" in failed[1]
    shown = subprocess.run(["scontrol", "show", "job", first], env=slurm, capture_output=True, text=True, check=True)
    assert "JobState=FAILED" in shown.stdout
