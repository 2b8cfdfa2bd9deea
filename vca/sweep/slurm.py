"""The jobs of a sweep in SLURM's queue."""

import subprocess
import time
from contextlib import suppress
from pathlib import Path

from vca.sweep.plan import read_jobs

POLL = 10.0  # seconds between two calls of squeue


def wait_for_jobs(launcher: subprocess.Popen, folder: Path) -> None:
    """Wait for the launcher, and for the jobs that it left in SLURM's queue when another job failed.

    Without accounting, submitit waits forever for a cancelled job; the launcher is stopped once the queue is empty.
    """
    empty, announced = 0, False
    while launcher.poll() is None or queued(folder):
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(POLL)
        if len(submitted(folder)) == len(read_jobs(folder)) and not announced:
            ids = ", ".join(sorted(submitted(folder)))
            print(f"submitted as {ids}; waiting for the jobs (safe to interrupt)", flush=True)
            announced = True
        if launcher.returncode is not None:
            if not queued(folder):
                return
            time.sleep(POLL)
        elif len(submitted(folder)) == len(read_jobs(folder)):
            empty = 0 if queued(folder) else empty + 1
            if empty > 1:
                launcher.terminate()


def submitted(folder: Path) -> set[str]:
    """Return the SLURM ids of a sweep's jobs, such as `17_0`."""
    return {path.name.removesuffix("_submitted.pkl") for path in (folder / "slurm").glob("*/*_submitted.pkl")}


def queued(folder: Path) -> set[str]:
    """Return the SLURM ids of the jobs that are pending or running; all ids if squeue fails."""
    ids = submitted(folder)
    if not ids:
        return ids
    jobs = ",".join(sorted({one.partition("_")[0] for one in ids}))
    done = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={jobs}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        return ids
    return ids & set(done.stdout.split())
