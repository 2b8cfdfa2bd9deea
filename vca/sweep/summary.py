"""Results of a sweep: the table of its runs, and a line for each failed job."""

import json
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vca.report.sweep_table import sweep_table
from vca.sweep.job import ATTEMPT
from vca.sweep.plan import read_jobs


def table(folder: Path) -> str:
    """Return the table of the runs whose jobs succeeded, as a failed job's directory may contain another run."""
    runs = [Path(job["run"]) for job in read_jobs(folder) if ending(folder, job).get("exit_code") == 0]
    if not runs:
        return "no job finished"
    out_dir = shlex.quote(str(runs[0].parent))
    return f"{sweep_table(runs)}\nwith the runs of other sweeps: python scripts/table.py {out_dir} --runs"


def report(folder: Path, summary: Callable[[Path], str] = table) -> int:
    """Print the finished jobs of a sweep, its summary, then its failed jobs; return 1 if any failed, else 0."""
    finished, failed = outcomes(folder)
    try:
        print("\n".join([*finished, summary(folder)]), flush=True)
    finally:
        for line in failed:
            print(line, file=sys.stderr, flush=True)
    return 1 if failed else 0


def outcomes(folder: Path) -> tuple[list[str], list[str]]:
    """Return a line for each finished job (last line of its log, duration), and for each failed job (its reason)."""
    finished, failed = [], []
    for job in read_jobs(folder):
        end, name, log = ending(folder, job), job["name"], folder / "logs" / f"{job['name']}.log"
        if end.get("exit_code") == 0:
            how = "already finished" if job.get("already_finished") else "finished"
            result = (last_attempt(log) or ["no log"])[-1]
            finished.append(f"{how}: {name}: {result} ({end.get('seconds', 0):.0f} s; {log})")
        else:
            how = f"exit code {end['exit_code']}" if end else "did not finish"
            log, line = failure_reason(folder / "logs", name)
            failed.append(f"failed: {name}: {how}; {line} ({log})")
    return finished, failed


def ending(folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Read how a job ended, see `run_job`; empty if it did not finish."""
    file = folder / "ends" / f"{job['number']}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def failure_reason(folder: Path, name: str) -> tuple[Path, str]:
    """Return the log and the line that explain a failure: those of the first node that printed a reason."""
    first = folder / f"{name}.log"
    logs = [log for log in (first, *sorted(folder.glob(f"{name}.node*.log"))) if log.exists()]
    if not logs:
        return first, "no log"
    for log in logs:
        if reason := reason_in(last_attempt(log)):
            return log, reason
    return logs[0], (last_attempt(logs[0]) or ["empty log"])[-1]


def last_attempt(log: Path) -> list[str]:
    """Return the lines of a log since the last start of its job, `[]` without a log."""
    text = log.read_text(errors="replace").rpartition(ATTEMPT)[2] if log.exists() else ""
    return [line.strip() for line in text.splitlines()[1:] if line.strip()]


def reason_in(lines: Iterable[str]) -> str | None:
    """Return the line of a user error or the last line of a traceback; else the signal that killed a rank."""
    reason = None
    for line in lines:
        if "ChildFailedError" in line or "SignalException" in line or "torch.distributed.elastic" in line:
            continue
        if line.startswith(("config error:", "stopped:")) or re.search(r"(Error|Exception)\b.*: ", line):
            reason = line
        elif reason is None and (killed := re.search(r"exitcode *: -(\d+)", line)):
            reason = f"a rank was killed by {signal.Signals(int(killed[1])).name}"
    return reason
