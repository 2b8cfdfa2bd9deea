"""SLURM's queue: the jobs of a sweep that it still has."""

import subprocess
import time
from contextlib import suppress
from pathlib import Path

from vca.sweep.plan import read_jobs

POLL = 10.0  # seconds between two questions to SLURM


def wait_for_jobs(launcher: subprocess.Popen, folder: Path) -> None:
    """Wait for the launcher, and for what it left in SLURM's queue when it gave up on one job.

    Where there is no accounting, submitit waits for a cancelled job for ever; then the empty queue ends it.
    """
    empty, told = 0, False
    while launcher.poll() is None or queued(folder):
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(POLL)
        if len(submitted(folder)) == len(read_jobs(folder)) and not told:
            print(f"submitted as {', '.join(sorted(submitted(folder)))}; this waits for them, they do not need it")
            told = True
        if launcher.returncode is not None:
            if not queued(folder):
                return
            time.sleep(POLL)
        elif len(submitted(folder)) == len(read_jobs(folder)):
            empty = 0 if queued(folder) else empty + 1
            if empty > 1:
                launcher.terminate()


def submitted(folder: Path) -> set[str]:
    """SLURM's ids of a sweep's jobs, such as `17_0`."""
    return {path.name.removesuffix("_submitted.pkl") for path in (folder / "slurm").glob("*/*_submitted.pkl")}


def queued(folder: Path) -> set[str]:
    """Those of them that SLURM has not done with; all, while it does not answer."""
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
