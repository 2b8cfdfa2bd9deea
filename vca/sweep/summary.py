"""The end of a sweep: the table of its runs, and a line for each job that failed."""

import json
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vca.report.sweep_table import sweep_table
from vca.sweep.job import ATTEMPT
from vca.sweep.plan import read_jobs


def table(folder: Path) -> str:
    """The table of a sweep's runs: of those jobs that ended well, others may have met a run that is not theirs."""
    return sweep_table([Path(job["run"]) for job in read_jobs(folder) if exit_code(folder, job) == 0])


def tell(folder: Path, summary: Callable[[Path], str] = table) -> int:
    """Print what came of a sweep, then its failures; 1 if there are any."""
    failed = failures(folder)
    try:
        print(summary(folder), flush=True)
    finally:
        for line in failed:
            print(line, file=sys.stderr, flush=True)
    return 1 if failed else 0


def failures(folder: Path) -> list[str]:
    """A line for each job that did not end well: its name, how it ended, where its log is."""
    lines = []
    for job in read_jobs(folder):
        code = exit_code(folder, job)
        if code != 0:
            how = "did not come to its end" if code is None else f"exit code {code}"
            log, line = last_words(folder / "logs", job["name"])
            lines.append(f"failed: {job['name']}: {how}; {line} ({log})")
    return lines


def exit_code(folder: Path, job: Mapping[str, Any]) -> int | None:
    """How a job ended, None while it has not."""
    file = folder / "ends" / f"{job['number']}.json"
    return json.loads(file.read_text())["exit_code"] if file.exists() else None


def last_words(folder: Path, name: str) -> tuple[Path, str]:
    """What a job said last, and the log that has it: that of the first node which named a reason."""
    first = folder / f"{name}.log"
    logs = [log for log in (first, *sorted(folder.glob(f"{name}.node*.log"))) if log.exists()]
    if not logs:
        return first, "it wrote no log"
    for log in logs:
        if reason := reason_in(last_attempt(log)):
            return log, reason
    return logs[0], (last_attempt(logs[0]) or ["its log is empty"])[-1]


def last_attempt(log: Path) -> list[str]:
    """The lines of a log since its job was started the last time."""
    text = log.read_text(errors="replace").rpartition(ATTEMPT)[2]
    return [line.strip() for line in text.splitlines()[1:] if line.strip()]


def reason_in(lines: Iterable[str]) -> str | None:
    """The line of a mistake, or the last one of a traceback; else the signal that killed a rank."""
    reason = None
    for line in lines:
        if "ChildFailedError" in line or "SignalException" in line or "torch.distributed.elastic" in line:
            continue
        if line.startswith(("config error:", "stopped:")) or re.search(r"(Error|Exception)\b.*: ", line):
            reason = line
        elif reason is None and (killed := re.search(r"exitcode *: -(\d+)", line)):
            reason = f"a rank was killed by {signal.Signals(int(killed[1])).name}"
    return reason
