"""Being asked to stop. SLURM, before it takes a node back, sends SIGTERM, SIGUSR1 or SIGUSR2; people press Ctrl-C."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
EXIT_PREEMPTED = 75  # of a training that was asked to stop and has saved; EX_TEMPFAIL of sysexits.h: try again


@dataclass
class StopRequest:
    """Name of the last stop signal that came, None while there was none."""

    received: str | None = None


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Only note the stop signals, so that a training can end between two updates; afterwards they do what they did."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.received = signal.Signals(number).name
        if os.environ.get("RANK", "0") == "0":  # os.write, since print is not reentrant
            again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            os.write(2, f"{request.received} received: stopping after the current step or evaluation{again}\n".encode())
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)  # who presses Ctrl-C again means at once

    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody handle signals
        yield request
        return
    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_worker(*_: object) -> None:
    """Initialize a loader worker: it ignores the stop signals, which reach the whole job, and dies with its parent.

    The parent ends its workers by `end_workers`. Where Linux's `prctl` is missing, a worker whose parent was killed
    ends when torch's own watchdog notices, seconds later.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def end_workers() -> None:
    """Kill the loader workers of this process.

    At exit Python sends SIGTERM to them and joins them. They ignore SIGTERM, so that would wait for ever.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:  # torch's handler would raise an error for each worker that is killed
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    if in_main_thread:
        signal.signal(signal.SIGCHLD, handler)
