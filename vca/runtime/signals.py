"""Stop signals: SIGTERM, SIGUSR1 and SIGUSR2 from SLURM before a job ends, SIGINT from Ctrl-C."""

import ctypes
import gc
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
EXIT_PREEMPTED = 75  # a signal stopped the run after a checkpoint; EX_TEMPFAIL of sysexits.h


@dataclass
class StopRequest:
    """The last stop signal received, None if none was."""

    received: str | None = None


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Record stop signals, so that a run can stop between two steps; restore the previous handlers on exit."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.received = signal.Signals(number).name
        if os.environ.get("RANK", "0") == "0":  # os.write, since print is not reentrant
            again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            os.write(2, f"{request.received} received: stopping after the next step{again}\n".encode())
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)  # a second Ctrl-C stops at once

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield request
        return
    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_worker(*_: object) -> None:
    """Initialize a loader worker: collect garbage, ignore stop signals (the whole job gets them), exit with the parent.

    A batch that cannot be sent ends the worker, and so the run: multiprocessing would drop it, and the run would wait.

    The parent ends its workers with `end_workers`. Without Linux's `prctl`, a worker whose parent was killed exits
    seconds later, through torch's watchdog.
    """
    gc.enable()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(exit_unsent)  # type: ignore[attr-defined]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def exit_unsent(error: Exception, batch: object) -> None:
    """Exit because a batch cannot be sent, with the kernel's signal if shared memory is full."""
    traceback.print_exception(error)
    os.kill(os.getpid(), signal.SIGBUS if "shared memory" in str(error) else signal.SIGKILL)


def end_workers() -> None:
    """Kill the loader workers of this process.

    Python's own exit handler sends SIGTERM, which they ignore, and would join them forever.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:  # torch's handler raises an error for each killed worker
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    if in_main_thread:
        signal.signal(signal.SIGCHLD, handler)
