"""Stage 5: the test suite on the GPU, exact resume after SIGKILL and SIGUSR1, one and two processes on one GPU.

Runs are those of the tests, on the context's device. They start processes by `tests.processes`.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import numpy as np

from benchmarks.gpu.runner import Context, Row

LINE = re.compile(r"^(?:\[gw\d+\] \[ *\d+%\] (?P<a>[A-Z]+) (?P<x>tests/.+?)|(?P<y>tests/.+?) (?P<b>[A-Z]+) +\[.*)\s*$")
TIMEOUT = 120.0  # seconds of a run


def suite(*paths: str) -> Callable[[Context], Iterator[Row]]:
    """Return the measurement of tests: a row for each failed test, then the counts; raise if one failed."""

    def measure(context: Context) -> Iterator[Row]:
        workers = 0 if context.tiny else max(1, (os.cpu_count() or 1) - 2)
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "-rfE", "--tb=short", "-n", str(workers)]
        command += ["-m", "not slow and not slurm", *(["tests/metrics/test_fid.py"] if context.tiny else paths)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        seconds = min(3600.0, max(1.0, 60 * context.minutes_left))
        timer = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        outcomes, reasons, tail = {}, {}, ""
        for line in process.stdout or ():
            if match := LINE.match(line):
                outcomes[match["x"] or match["y"]] = match["a"] or match["b"]
            elif line.startswith(("FAILED ", "ERROR ")):
                name, _, reason = line.split(" ", 1)[1].strip().partition(" - ")
                reasons[name] = reason[:300]
            tail = (tail + line)[-500:]
        timer.cancel()
        code = process.wait()
        failed = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
        for name in failed:
            yield {"test": name, "failed": reasons.get(name, "")}
        counts = {key.lower(): list(outcomes.values()).count(key) for key in ("PASSED", "SKIPPED", "FAILED", "ERROR")}
        yield {"suite": " ".join(paths) or "all", **counts, "complete": code in (0, 1)}
        if code:
            raise AssertionError(f"pytest exited with {code}, {len(failed)} failed: {failed[:9] or tail}")

    return measure


def folder_of(context: Context, name: str) -> Path:
    """Return an empty folder for the runs of a measurement."""
    folder = context.folder.resolve() / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def succeed(script: str, *arguments: str, ranks: int = 1) -> None:
    """Run a script; several ranks share one GPU. Raises if it fails."""
    wrapped = (script, *arguments) if ranks == 1 else ("benchmarks/gpu/one_gpu.py", script, *arguments)
    done = import_module("tests.processes").run_script(*wrapped, ranks=ranks, nodes=ranks, timeout=TIMEOUT)
    if done.returncode:
        raise RuntimeError(f"{script} exited with {done.returncode}: {done.stderr[-1500:]}")


def resume(script: str, stop: signal.Signals) -> Callable[[Context], Iterator[Row]]:
    """Return the measurement of a run that a signal stopped, resumed, compared with an uninterrupted one."""

    def measure(context: Context) -> Iterator[Row]:
        tests = import_module("tests.support")
        folder = folder_of(context, f"{script[:-3]}-{stop.name}")
        options = [
            *(tests.TINY if script == "train_cls.py" else tests.SMALL_DIT),
            f"trainer.steps={28}",
            "trainer.log_every=1",
        ]
        options += ["trainer.checkpoint_every=5", "trainer.eval_every=0", "trainer.deterministic=true"]
        options += ["trainer.global_batch_size=32", f"trainer.device={context.device.type}", f"out_dir={folder}"]
        succeed(script, *options, "name=whole")
        launch = tests.Launch(script, *options, "name=broken")
        launch.wait_until(lambda: tests.last_step(folder / "broken") >= 7)
        for process in launch.processes:
            os.kill(process.pid or 0, stop)
        code, reached = launch.wait(TIMEOUT), tests.last_step(folder / "broken")
        succeed(script, *options, "name=broken")
        one, other = (tests.load_latest(folder / name / "checkpoints") for name in ("whole", "broken"))
        tests.assert_same(one, other)
        if tests.untimed(folder / "whole") != tests.untimed(folder / "broken"):
            raise AssertionError("metrics.jsonl differs")
        yield {"script": script, "signal": stop.name, "exit_code": code, "stopped_after": reached, "equal": True}

    return measure


def ranks(context: Context) -> Iterator[Row]:
    """Yield the losses of a run on one and on two processes, and whether samples and metrics are equal."""
    tests = import_module("tests.support")
    folder, device = folder_of(context, "ranks"), context.device.type
    losses: dict[int, list[float]] = {}
    for size in (1, 2):
        options = [*tests.TINY, "trainer.steps=4", f"trainer.device={device}", f"out_dir={folder}", f"name=cls{size}"]
        succeed("train_cls.py", *options, "trainer.micro_batch_size=60", ranks=size)
        losses[size] = [record["loss"] for record in tests.metrics(folder / f"cls{size}") if "loss" in record]
    difference = max(abs(a / b - 1) for a, b in zip(*losses.values(), strict=True))
    yield {"ranks": "losses of train_cls.py", "largest_difference": difference, "equal": difference < 1e-3}

    options = [*tests.SMALL_DIT, "trainer.steps=2", f"trainer.device={device}", f"out_dir={folder}", "name=gen"]
    succeed("train_gen.py", *options, "trainer.eval_every=0")
    (folder / "extractor.py").write_text(tests.EXTRACTOR)
    noise = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "reference.npz", arr_0=noise)
    digests, figures = [], []
    for size in (1, 2):
        out, record = folder / f"samples{size}", folder / f"metrics{size}.json"
        options = [f"run={folder / 'gen'}", f"out={out}", "count=14", "batch_size=6", "sampler.steps=4"]
        succeed("sample.py", *options, f"device={device}", ranks=size)
        digests.append(json.loads((out / "manifest.json").read_text())["result"]["sha256"])
        options = [f"samples={folder / 'samples1'}", f"reference={folder / 'reference.npz'}", f"out={record}"]
        options += ["extractor=file", f"extractor.source={folder / 'extractor.py'}", f"device={device}"]
        succeed("eval_fid.py", *options, ranks=size)
        figures.append(json.loads(record.read_text())["metrics"])
    yield {"ranks": "sha256 of the samples", "equal": digests[0] == digests[1]}
    yield {"ranks": "metrics of eval_fid.py", "equal": figures[0] == figures[1]}
    if difference >= 1e-3 or digests[0] != digests[1] or figures[0] != figures[1]:
        raise AssertionError("one and two processes differ, see the rows")
