"""Runs scripts and ranks as real processes, forked from a server that has imported all packages.

Starting Python takes seconds of imports, a fork milliseconds. A fork has its own session, environment, working
directory, output and exit code, as the process of a command line. Several ranks get torchrun's environment and store.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from torch.distributed import TCPStore, run

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.preload"])
GRACE = 30.0  # seconds before torchrun kills the other ranks when one has failed
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")

allowed = True  # whether the test may start processes; conftest sets it
started: list["Launch"] = []  # by the current test


def check_allowed() -> None:
    """Fail a test that starts a process without the mark, so that `make check` remains fast."""
    assert allowed, "mark this test with @pytest.mark.process"


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of a subprocess: one thread, this checkout on PYTHONPATH, no variables of torchrun."""
    inherited = {key: value for key, value in os.environ.items() if key not in OF_TORCHRUN}
    fresh_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # for torchrun's restarts, see vca.sweep.job
    return {**inherited, **fresh_store, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def become(script: str, arguments: Sequence[str], env: dict[str, str], cwd: str, outputs: tuple[str, str]) -> None:
    """Run `python script *arguments` in a new session; the body of a fork."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a process of the command line
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


class Launch:
    """A script that runs in the background on one or more ranks of this machine.

    Args:
        script: path, absolute or relative to the repository.
        arguments: command-line arguments.
        ranks: number of processes over all nodes.
        nodes: number of simulated nodes.
        cwd: working directory.
        env: additional environment variables.
    """

    def __init__(
        self,
        script: str | Path,
        *arguments: str,
        ranks: int = 1,
        nodes: int = 1,
        cwd: Path = ROOT,
        env: dict[str, str] | None = None,
    ) -> None:
        check_allowed()
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None
        paths = (str(self.outputs[0]), str(self.outputs[1]))
        self.processes = [
            SERVER.Process(
                target=become,
                args=(
                    str(ROOT / script),
                    arguments,
                    self.environment_of(rank, ranks, nodes, env or {}),
                    str(cwd),
                    paths,
                ),
            )
            for rank in range(ranks)
        ]
        self.failed_at: float | None = None
        started.append(self)
        for process in self.processes:
            process.start()

    def environment_of(self, rank: int, ranks: int, nodes: int, extra: dict[str, str]) -> dict[str, str]:
        """Return the environment of a rank, with torchrun's variables if there are several ranks."""
        if self.store is None:
            return environment(**extra)
        node, local = divmod(rank, ranks // nodes)
        numbers = {"RANK": rank, "LOCAL_RANK": local, "GROUP_RANK": node}
        numbers |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks // nodes}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        return environment(**{key: str(value) for key, value in {**numbers, **where}.items()}, **extra)

    @property
    def stdout(self) -> str:
        """The stdout of all ranks so far."""
        return self.outputs[0].read_text() if self.outputs[0].exists() else ""

    @property
    def stderr(self) -> str:
        """The stderr of all ranks so far."""
        return self.outputs[1].read_text() if self.outputs[1].exists() else ""

    @property
    def returncode(self) -> int | None:
        """None while a rank runs; with several ranks 1 if one failed, as torchrun; negative after a signal."""
        codes = [process.exitcode for process in self.processes]
        if any(codes) and len(codes) > 1:
            self.end_others()
        if None in codes:
            return None
        return codes[0] if len(codes) == 1 else int(any(codes))

    def end_others(self) -> None:
        """Stop the other ranks as torchrun does when one has failed: SIGTERM, then SIGKILL after `GRACE`."""
        if self.failed_at is None:
            self.failed_at = time.monotonic()
            self.signal(signal.SIGTERM)
        elif time.monotonic() > self.failed_at + GRACE:
            self.kill()

    def signal(self, number: int) -> None:
        """Send a signal to every running rank, but not to its loader workers."""
        for process in self.processes:
            if process.exitcode is None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def members(self, rank: int = 0) -> list[int]:
        """Return the process ids of a rank and its loader workers."""
        return in_session(self.processes[rank].pid)

    def kill(self) -> None:
        """Kill every rank and its workers, repeatedly, since a worker may be forked meanwhile."""
        for rank in range(len(self.processes)):
            while pids := self.members(rank):
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def wait(self, timeout: float = 300.0) -> int:
        """Wait until every rank has exited and return the exit code.

        Raises:
            TimeoutError: if that takes longer than `timeout` seconds; all processes are then killed.
        """
        deadline = time.monotonic() + timeout
        while (code := self.returncode) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"still running after {timeout:.0f} s:\n{self.stderr[-3000:]}")
            time.sleep(0.01)
        return code

    def wait_until(self, ready: Callable[[], bool], timeout: float = 120.0) -> None:
        """Wait until `ready()`; fail if the script exits before or `timeout` seconds pass."""
        deadline = time.monotonic() + timeout
        while not ready():
            assert self.returncode is None, f"ended too early:\n{self.stdout[-2000:]}{self.stderr[-3000:]}"
            assert time.monotonic() < deadline, f"not ready after {timeout:.0f} s"
            time.sleep(0.005)


class Process(NamedTuple):
    """An entry of the process table."""

    pid: int
    parent: int
    session: int


def process_table() -> Iterator[Process]:
    """Yield all processes of this machine except zombies."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                yield Process(int(folder.name), int(parent), int(session))


def in_session(session: int) -> list[int]:
    """Return the process ids of a session."""
    return [process.pid for process in process_table() if process.session == session]


def run_script(
    script: str | Path,
    *arguments: str,
    ranks: int = 1,
    nodes: int = 1,
    cwd: Path = ROOT,
    timeout: float = 300.0,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Run a script in forked processes and wait for it."""
    launch = Launch(script, *arguments, ranks=ranks, nodes=nodes, cwd=cwd, env=env)
    code = launch.wait(timeout)
    return subprocess.CompletedProcess([str(script), *arguments], code, launch.stdout, launch.stderr)


def run_command(*command: str, cwd: Path = ROOT, timeout: float = 300.0, **env: str) -> subprocess.CompletedProcess:
    """Run a real command line and wait for it, for tests of the command line itself."""
    check_allowed()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.run(command, env=environment(**env), cwd=cwd, timeout=timeout, check=False, **pipes)


def forked_torchrun(*arguments: str, ranks: int) -> Launch:
    """Start a real torchrun whose agent and ranks are forks, which import nothing; all have one session."""
    return Launch(run.__file__, "--run-path", "--start-method=fork", f"--nproc_per_node={ranks}", *arguments)


def torchrun(ranks: int) -> list[str]:
    """Return a torchrun command that uses a free port of this machine."""
    return [sys.executable, run.__file__, "--standalone", f"--nproc_per_node={ranks}"]
