"""Kills at random moments, by every signal, in a save and out of it: the end equals the unbroken run."""

import inspect
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from torch.distributed.launcher import api

from tests.conftest import (
    ROOT,
    SMALL_DIT,
    TINY,
    assert_same,
    environment,
    kill_all,
    launcher,
    marked,
    metrics,
    train,
    untimed,
)
from vca.training.checkpoint import list_checkpoints, load_latest

EVERY = 2  # updates between two checkpoints
TRAINERS = {
    "train_cls.py": (*TINY, "trainer.eval_every=30"),
    "train_gen.py": (*SMALL_DIT, "trainer.log_every=1", "trainer.eval_every=0", "trainer.global_batch=60"),
}
KILLS = ("SIGKILL", "SIGTERM", "SIGUSR1", "SIGUSR2")


def last_step(folder) -> int:
    records = metrics(folder)
    return records[-1]["step"] if records else 0


def start(*arguments, ranks=1, restarts=0, script):
    """A training in the background; the process and the mark of all of its processes."""
    mark = uuid.uuid4().hex
    command = [*launcher(ranks, restarts), str(ROOT / script), *arguments]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment(VCA_TEST=mark), cwd=ROOT, text=True, **pipe), mark


def of_rank(rank, mark):
    """Ids of the processes of one rank: the training and its loaders."""
    said = f"RANK={rank}".encode()
    return [pid for pid in marked(mark) if said in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]


def interrupt(folder, name, in_save, after, arguments, script):
    """Start a training, stop it by a signal once it has made `after` updates more; what it had reported and saved."""
    first = last_step(folder)
    process, mark = start(*arguments, script=script)
    saving = folder / "checkpoints"

    def ready():
        return last_step(folder) >= first + after and (not in_save or any(saving.glob("*.tmp*")))

    deadline = time.monotonic() + 120
    while process.poll() is None and not ready():
        assert time.monotonic() < deadline, "no update in two minutes"
        time.sleep(0.0005)
    if process.poll() is None:
        if name == "SIGKILL":
            kill_all(mark)
        else:
            process.send_signal(getattr(signal, name))
    said = process.communicate(timeout=60)[0]
    return process.returncode, said


def storm(tmp_path, script, kills, seed, steps):
    """Interrupt a training again and again, let it end, and compare it with one that was left in peace."""
    rng = random.Random(seed)
    options = [*TRAINERS[script], f"out_dir={tmp_path}", f"trainer.steps={steps}", f"trainer.checkpoint_every={EVERY}"]
    whole = train(*options, "name=whole", script=script)
    assert whole.returncode == 0, whole.stderr[-3000:]
    folder = tmp_path / "broken"
    arguments = [*options, "name=broken"]
    lost, codes = [], {}
    for index in range(kills):
        name, in_save = KILLS[index % len(KILLS)], index % 3 == 0
        code, said = interrupt(folder, name, in_save, rng.randint(1, 4), arguments, script)
        if code == 0:
            pytest.fail(f"the training ended before kill {index}:\n{said[-2000:]}")
        newest = load_latest(folder / "checkpoints")
        reported, saved = last_step(folder), newest["step"] if newest else 0  # none, if the first save was cut
        lost.append(reported - saved)
        codes.setdefault(name, set()).add(code)
        if name == "SIGKILL":
            assert lost[-1] <= EVERY, said
        else:
            assert code == 75, said[-3000:]
            assert f"{name}; saved after step {saved} of {steps}" in said
            assert lost[-1] == 0
    done = train(*arguments, script=script)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (load_latest(path / "checkpoints") for path in (tmp_path / "whole", folder))
    assert one["step"] == steps
    assert_same(one, other)
    assert untimed(tmp_path / "whole") == untimed(folder)
    assert not list((folder / "checkpoints").glob("*.damaged"))
    print(f"{script}: {kills} kills, exit codes {codes}, steps lost {lost}")


@pytest.mark.parametrize("script", TRAINERS)
def test_four_kills(tmp_path, script):
    storm(tmp_path, script, kills=4, seed=0, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize("script", TRAINERS)
def test_twenty_five_kills(tmp_path, script):
    storm(tmp_path, script, kills=25, seed=1, steps=160)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_one_of_two_ranks_stops_both(tmp_path, name):
    """Both leave after the same update; SIGTERM goes to torchrun, which passes it on, SIGUSR1 to one rank alone."""
    length = ("trainer.steps=4000", "trainer.checkpoint_every=3000", "trainer.workers=1")
    options = [*TINY, f"out_dir={tmp_path}", "name=run", *length]
    process, mark = start(*options, ranks=2, script="train_cls.py")
    folder = tmp_path / "run"
    deadline = time.monotonic() + 120
    while last_step(folder) < 3:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if name == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        assert len(of_rank(1, mark)) >= 2  # and its loader process, which must not mind
        for pid in of_rank(1, mark):
            os.kill(pid, signal.SIGUSR1)
    said = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    saved = load_latest(folder / "checkpoints")["step"]
    assert saved == last_step(folder) < 4000
    assert f"saved after step {saved} of 4000" in said
    assert len(list_checkpoints(folder / "checkpoints")) == 1
    kill_all(mark)


# A training whose checkpoints take long to write.
SLOW_SAVE = """
import runpy, sys, time
from vca.training import checkpoint

write = checkpoint.write_checkpoint

def slowly(*arguments):
    time.sleep({seconds})
    write(*arguments)

checkpoint.write_checkpoint = slowly
runpy.run_path("{script}", run_name="__main__")
"""


def slow_save(tmp_path, seconds):
    script = tmp_path / "slow.py"
    script.write_text(SLOW_SAVE.format(seconds=seconds, script=ROOT / "train_cls.py"))
    return script


def until_step(folder, step, process):
    deadline = time.monotonic() + 120
    while last_step(folder) < step:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, f"no step {step} in two minutes"
        time.sleep(0.01)


def test_all_ranks_stay_until_the_checkpoint_is_written(tmp_path):
    """Or torchrun would kill the one that writes, half a minute after another has left."""
    options = [*TINY, f"out_dir={tmp_path}", "name=run", "trainer.steps=4000", "trainer.checkpoint_every=3000"]
    mark = uuid.uuid4().hex
    command = [*launcher(2), str(slow_save(tmp_path, 9)), *options]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=environment(VCA_TEST=mark), cwd=ROOT, text=True, **pipe)
    until_step(tmp_path / "run", 3, process)
    for pid in of_rank(1, mark):
        os.kill(pid, signal.SIGUSR1)
    time.sleep(7)  # three of them is how long a rank that fails gives the first one to tell
    assert of_rank(1, mark)
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")
    said = process.communicate(timeout=90)[0]
    saved = load_latest(tmp_path / "run" / "checkpoints")
    assert saved is not None, said[-3000:]
    assert f"saved after step {saved['step']} of 4000" in said


@pytest.mark.skipif("TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in inspect.getsource(api), reason="waits 30 s")
@pytest.mark.parametrize(("save_seconds", "saves"), [(2, False), (20, True)])
def test_a_job_has_the_time_it_is_given_to_save(tmp_path, save_seconds, saves):
    """`cluster.signal_seconds` reaches torchrun, which would kill after half a minute."""
    options = [*TINY, f"out_dir={tmp_path}", "name=run", "trainer.steps=4000", "trainer.checkpoint_every=3000"]
    command = [*launcher(2)[:-2], "--nproc_per_node=1", str(slow_save(tmp_path, 8)), *options]
    code = (
        f"from vca.runtime.launch import *; run_and_survive({command}, Path('{tmp_path}/log'), {save_seconds}, False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(), cwd=ROOT)
    until_step(tmp_path / "run", 3, process)
    process.terminate()
    assert process.wait(90) == 75
    assert bool(list_checkpoints(tmp_path / "run" / "checkpoints")) == saves, (tmp_path / "log").read_text()[-3000:]


@pytest.mark.parametrize("name", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.slow)])
def test_a_lost_rank_of_three(tmp_path, name):
    """A rank that dies, or stands still, holds the others up for `trainer.timeout_minutes` at most; torchrun starts all
    of them again, and the end equals the unbroken run."""
    limit = 12.0  # seconds
    options = [*TINY, f"out_dir={tmp_path}", "trainer.steps=150", "trainer.checkpoint_every=20"]
    options += [f"trainer.timeout_minutes={limit / 60}", "data.check_seconds=1"]
    whole = train(*options, "name=whole", ranks=3)
    assert whole.returncode == 0, whole.stderr[-3000:]
    folder = tmp_path / "broken"
    process, mark = start(*options, "name=broken", ranks=3, restarts=1, script="train_cls.py")
    deadline = time.monotonic() + 120
    while last_step(folder) < 30:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for pid in of_rank(1, mark):
        os.kill(pid, getattr(signal, name))
    lost = time.monotonic()
    others = of_rank(0, mark) + of_rank(2, mark)
    while any(Path(f"/proc/{pid}").exists() for pid in others):
        assert time.monotonic() < lost + limit + 45  # torchrun gives the one that stands still half a minute
        time.sleep(0.05)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said[-3000:]
    assert len((folder / "launches.jsonl").read_text().splitlines()) == 2
    one, other = (load_latest(path / "checkpoints") for path in (tmp_path / "whole", folder))
    assert one["step"] == 150
    assert_same(one, other)
    assert untimed(tmp_path / "whole") == untimed(folder)


def test_two_trainings_do_not_share_a_directory(tmp_path):
    """The second is refused while the first goes on, its loader process dead or alive, and not after it was killed."""
    options = [*TINY, f"out_dir={tmp_path}", "name=run", "trainer.steps=4000", "trainer.checkpoint_every=10"]
    process, mark = start(*options, "trainer.workers=1", script="train_cls.py")
    folder = tmp_path / "run"
    while last_step(folder) < 10:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.01)
    refused = train(*options)
    assert refused.returncode != 0
    line = f"config error: {folder} is being trained by another process; wait for it or stop it"
    assert refused.stderr.count(line) == 1, refused.stderr[-3000:]
    process.kill()  # the training alone: its loader process lives on for some seconds
    process.wait()
    again, other = start(*options, script="train_cls.py")
    at = last_step(folder)
    while last_step(folder) < at + 10:
        assert again.poll() is None, again.communicate()[0][-3000:]
        time.sleep(0.01)
    for one in (mark, other):
        kill_all(one)
