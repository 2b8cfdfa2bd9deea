"""Kills at random moments, by every signal: the result equals that of an uninterrupted run."""

import inspect
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from torch.distributed.launcher import api

from tests.data.test_latents import QUICK
from tests.data.test_latents import options as latent_options
from tests.data.test_loader import write_image_folder
from tests.processes import ROOT, Launch, environment, in_session, process_table, run_script, torchrun
from tests.support import SMALL_DIT, TINY, assert_same, last_step, untimed
from vca.training.checkpoint import list_checkpoints, load_latest

pytestmark = pytest.mark.process
EVERY = 2  # steps between two checkpoints
TRAINERS = {
    "train_cls.py": (*TINY, "trainer.eval_every=30"),
    "train_gen.py": (*SMALL_DIT, "trainer.log_every=1", "trainer.eval_every=50", "trainer.global_batch_size=60"),
}
KILLS = ("SIGKILL", "SIGTERM", "SIGUSR1", "SIGUSR2")
ENDLESS = ("trainer.steps=4000", "trainer.checkpoint_every=3000")  # only a signal saves


class Moment:
    """Moment of a kill: a number of steps, files or seconds after the start, or during a save."""

    def __init__(self, rng, folder, progress):
        self.kind = rng.choice(["progress", "save", "time"])
        self.folder, self.progress = folder, progress
        self.target = progress(folder) + rng.randint(1, 4)
        self.time = time.monotonic() + rng.uniform(0.0, 4.0)

    def has_come(self):
        if self.kind == "time":
            return time.monotonic() >= self.time
        reached = self.progress(self.folder) >= self.target
        return reached and (self.kind == "progress" or any(self.folder.rglob("*.tmp*")))


def interrupt(rng, name, launch, moment):
    """Send a signal, SIGKILL also to the loader workers, to all ranks or to one of them; return the seconds it took."""
    deadline = time.monotonic() + 120
    while launch.returncode is None and not moment.has_come():
        assert time.monotonic() < deadline, "no progress in two minutes"
        time.sleep(0.001 if moment.kind == "save" else 0.005)
    ranks = len(launch.processes)
    hit = range(ranks) if rng.random() < 0.5 else [rng.randrange(ranks)]
    for rank in hit:
        for pid in launch.members(rank) if name == "SIGKILL" else [launch.processes[rank].pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, getattr(signal, name))
    sent = time.monotonic()
    launch.wait(60)  # a hang is an error
    return time.monotonic() - sent


def storm(tmp_path, script, kills, seed, steps, ranks=1, workers=0):
    """Interrupt runs repeatedly, finish them, and compare them with an uninterrupted one."""
    rng = random.Random(seed)
    options = [*TRAINERS[script], f"out_dir={tmp_path}", f"trainer.steps={steps}", f"trainer.checkpoint_every={EVERY}"]
    options += [f"trainer.workers={workers}", "trainer.micro_batch_size=30"]
    whole = run_script(script, *options, "name=whole", ranks=ranks)
    assert whole.returncode == 0, whole.stderr[-3000:]
    done, lost, seconds, early = 0, [], [], 0
    while done < kills:
        folder = tmp_path / f"broken{done}"
        arguments = [*options, f"name={folder.name}"]
        while done < kills:
            name, before = KILLS[done % len(KILLS)], last_step(folder)
            moment = Moment(rng, folder, last_step)
            launch = Launch(script, *arguments, ranks=ranks)
            seconds.append(interrupt(rng, name, launch, moment))
            said = launch.stdout + launch.stderr
            if launch.returncode == 0:  # it ended before the kill
                break
            done += 1
            newest = load_latest(folder / "checkpoints") if folder.exists() else None
            reported, saved = last_step(folder), newest["step"] if newest else 0  # none, if the first save was cut
            lost.append(reported - saved)
            if name == "SIGKILL":
                unfinished = [int(file.stem.split("_")[1]) for file in folder.rglob("checkpoints/step_*.tmp")]
                started = max([saved, *unfinished])  # a kill during a save loses also the interval before it
                assert reported - started <= EVERY, said
                assert started - saved <= EVERY, said
            elif "checkpoint saved at step" in said:
                assert f"checkpoint saved at step {saved} of {steps}" in said
                assert lost[-1] == 0
                assert ranks > 1 or launch.returncode == 75, said[-3000:]
            else:  # before the first step
                assert reported <= max(before, saved), said[-3000:]
                early += 1
        ended = run_script(script, *arguments, ranks=ranks)
        assert ended.returncode == 0, ended.stderr[-3000:]
        one, other = (load_latest(path / "checkpoints") for path in (tmp_path / "whole", folder))
        assert one["step"] == steps
        assert_same(one, other)
        assert untimed(tmp_path / "whole") == untimed(folder)
        assert not list(folder.rglob("*.damaged"))
    print(
        f"{script}, {ranks} rank(s), {workers} workers: {done} kills ({early} before the first step), all ends equal; "
        f"steps lost {max(lost)} at most, none after a signal; ended within {max(seconds):.1f} s"
    )


@pytest.mark.parametrize("script", TRAINERS)
def test_resume_after_four_kills_is_exact(tmp_path, script):
    storm(tmp_path, script, kills=4, seed=0, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("script", TRAINERS)
def test_resume_after_30_kills_is_exact(tmp_path, script, ranks, workers):
    storm(tmp_path, script, kills=30, seed=ranks + 10 * workers, steps=300, ranks=ranks, workers=workers)


def count_files(folder):
    return sum(path.is_file() for path in folder.rglob("*"))


def contents(folder):
    """Every file's bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def storm_of_files(tmp_path, script, options, kills, seed, ranks):
    """The same for a script that writes files and resumes with the missing ones."""
    rng, whole, done = random.Random(seed), tmp_path / "whole", 0
    assert run_script(script, *options, f"out={whole}").returncode == 0
    while done < kills:
        folder = tmp_path / f"broken{done}"
        arguments = [*options, f"out={folder}"]
        while done < kills:
            moment = Moment(rng, folder, count_files)
            launch = Launch(script, *arguments, ranks=ranks)
            interrupt(rng, KILLS[done % len(KILLS)], launch, moment)
            if launch.returncode == 0:
                break
            done += 1
        ended = run_script(script, *arguments, ranks=ranks)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert contents(folder) == contents(whole)
    print(f"{script}, {ranks} rank(s): {done} kills, all ends equal")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_sample_after_15_kills_is_exact(tmp_path, generator_run, ranks):
    options = [f"run={generator_run}", "count=400", "sampler.steps=10", "device=cpu", "batch_size=5"]
    storm_of_files(tmp_path, "sample.py", options, kills=15, seed=ranks, ranks=ranks)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_prepare_latents_after_15_kills_is_exact(tmp_path, ranks):
    write_image_folder(tmp_path / "images", ("ape", "bee", "cat"), images=100, splits=("train",))
    (tmp_path / "quick.py").write_text(QUICK)
    options = [*latent_options(tmp_path / "quick.py"), f"data.root={tmp_path}/images", "shard_size=2"]
    options += ["batch_size=2", "workers=2", "device=cpu"]
    storm_of_files(tmp_path, "scripts/prepare_latents.py", options, kills=15, seed=ranks, ranks=ranks)


def start_torchrun(*arguments, ranks, restarts=0):
    """A real torchrun in a session of its own, whose ranks have sessions of their own; its output goes to a pipe."""
    command = [*torchrun(ranks), f"--max_restarts={restarts}", str(ROOT / "train_cls.py"), *arguments]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(), cwd=ROOT, **pipe)


def rank_processes(process, rank):
    """Ids of a rank that torchrun started, and of its loader workers."""
    children = [child.pid for child in process_table() if child.parent == process.pid]
    said = f"RANK={rank}".encode()
    (leader,) = (pid for pid in children if said in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return in_session(leader)


def wait_for(ready, process):
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "not ready in two minutes"
        time.sleep(0.01)


def test_signal_sigterm_to_torchrun_stops_both_ranks(tmp_path):
    """torchrun forwards it; both ranks exit after the same step."""
    options = [*TINY, f"out_dir={tmp_path}", "name=run", *ENDLESS, "trainer.workers=1"]
    process = start_torchrun(*options, ranks=2)
    wait_for(lambda: last_step(tmp_path / "run") >= 3, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    check_one_save(tmp_path / "run", said)


def test_signal_sigusr1_to_one_rank_stops_both_ranks(tmp_path):
    options = [*TINY, f"out_dir={tmp_path}", "name=run", *ENDLESS, "trainer.workers=1"]
    launch = Launch("train_cls.py", *options, ranks=2)
    launch.wait_until(lambda: last_step(tmp_path / "run") >= 3)
    members = launch.members(rank=1)
    assert len(members) >= 2  # and its loader worker, which must ignore the signal
    for pid in members:
        os.kill(pid, signal.SIGUSR1)
    assert launch.wait(60) != 0
    check_one_save(tmp_path / "run", launch.stdout + launch.stderr)


def check_one_save(folder, said):
    """The last reported step is the saved one, and the only checkpoint."""
    saved = load_latest(folder / "checkpoints")["step"]
    assert saved == last_step(folder) < 4000
    assert f"checkpoint saved at step {saved} of 4000" in said
    assert len(list_checkpoints(folder / "checkpoints")) == 1


# A run with slow checkpoints.
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


def test_signal_all_ranks_wait_for_slow_save(tmp_path):
    """Otherwise torchrun would kill the writing rank, 30 s after another one exits."""
    options = [*TINY, f"out_dir={tmp_path}", "name=run", *ENDLESS]
    launch = Launch(slow_save(tmp_path, 9), *options, ranks=2)
    launch.wait_until(lambda: last_step(tmp_path / "run") >= 3)
    os.kill(launch.processes[1].pid, signal.SIGUSR1)
    time.sleep(7)  # a failing rank waits 3 s for the message of rank 0
    assert [process.exitcode for process in launch.processes] == [None, None]
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")
    launch.wait(90)
    saved = load_latest(tmp_path / "run" / "checkpoints")
    assert saved is not None, launch.stderr[-3000:]
    assert f"checkpoint saved at step {saved['step']} of 4000" in launch.stderr


# A rank that takes five seconds to save when it is asked to stop.
SAVING_RANK = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(*_):
    time.sleep(5)
    (folder / "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
(folder / "started").touch()
time.sleep(60)
"""


@pytest.mark.skipif("TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in inspect.getsource(api), reason="waits 30 s")
@pytest.mark.parametrize(("save_seconds", "saves"), [(2, False), (20, True)])
def test_signal_seconds_bounds_time_to_save(tmp_path, save_seconds, saves):
    """`cluster.signal_seconds` reaches torchrun, which would kill after half a minute."""
    (tmp_path / "rank.py").write_text(SAVING_RANK)
    command = [*torchrun(1), str(tmp_path / "rank.py"), str(tmp_path)]
    call = f"run_torchrun({command}, Path('{tmp_path}/log'), {save_seconds}, False)"
    code = f"from pathlib import Path; from vca.sweep.job import *; {call}"
    (tmp_path / "job.py").write_text(code)
    launch = Launch(tmp_path / "job.py")
    launch.wait_until(lambda: (tmp_path / "started").exists())
    launch.signal(signal.SIGTERM)
    assert launch.wait(90) == 75
    assert (tmp_path / "saved").exists() == saves, (tmp_path / "log").read_text()[-3000:]


@pytest.mark.parametrize("name", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.slow)])
def test_resume_after_lost_rank_is_exact(tmp_path, name):
    """A lost rank ends the others within seconds, a hanging one after `trainer.timeout_minutes`; torchrun restarts all
    of them, and the result equals that of an uninterrupted run."""
    limit = 12.0  # seconds
    options = [*TINY, f"out_dir={tmp_path}", "trainer.steps=60", "trainer.checkpoint_every=20", "trainer.workers=2"]
    options += [f"trainer.timeout_minutes={limit / 60}", "data.check_seconds=1"]
    whole = run_script("train_cls.py", *options, "name=whole", ranks=3)
    assert whole.returncode == 0, whole.stderr[-3000:]
    folder = tmp_path / "broken"
    process = start_torchrun(*options, "name=broken", ranks=3, restarts=1)
    wait_for(lambda: last_step(folder) >= 30, process)
    others = rank_processes(process, 0) + rank_processes(process, 2)
    for pid in rank_processes(process, 1):
        os.kill(pid, getattr(signal, name))
    lost = time.monotonic()
    while any(Path(f"/proc/{pid}").exists() for pid in others):
        # torchrun gives the one that hangs half a minute
        assert time.monotonic() < lost + (15 if name == "SIGKILL" else limit + 45)
        time.sleep(0.05)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said[-3000:]
    assert len((folder / "launches.jsonl").read_text().splitlines()) == 2
    one, other = (load_latest(path / "checkpoints") for path in (tmp_path / "whole", folder))
    assert one["step"] == 60
    assert_same(one, other)
    assert untimed(tmp_path / "whole") == untimed(folder)


def test_run_directory_second_process_refused(tmp_path):
    """A second process is an error while the first runs, not after it was killed, even if its workers live."""
    options = [*TINY, f"out_dir={tmp_path}", "name=run", "trainer.steps=4000", "trainer.checkpoint_every=10"]
    launch = Launch("train_cls.py", *options, "trainer.workers=1")
    folder = tmp_path / "run"
    launch.wait_until(lambda: last_step(folder) >= 10)
    refused = run_script("train_cls.py", *options)
    assert refused.returncode == 2
    line = f"config error: {folder} is in use by another process; wait for it or stop it"
    assert refused.stderr.count(line) == 1, refused.stderr[-3000:]
    os.kill(launch.processes[0].pid, signal.SIGKILL)  # the main process only: its loader worker lives for some seconds
    assert launch.wait() == -signal.SIGKILL
    again = Launch("train_cls.py", *options)
    at = last_step(folder)
    again.wait_until(lambda: last_step(folder) >= at + 10)
    again.kill()
