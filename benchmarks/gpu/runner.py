"""Runs a stage: every row is a JSON line on disk at once, so that a stage can be interrupted at any time.

A line has the fields of `machine()`, `stage`, `measurement`, `started` (time of the attempt) and those of the row. The
last line of an attempt has `finished` (its seconds) or `raised` (its error).
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.timing import Budget
from vca.runtime.devices import device_name
from vca.runtime.files import append_line
from vca.runtime.provenance import code_sha256, provenance

Row = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """What a measurement is given.

    Attributes:
        device: device to measure.
        folder: folder of the results.
        root: folder with data, or None.
        tiny: sizes of a rehearsal.
        end: end of the stage in `time.perf_counter`.
    """

    device: torch.device
    folder: Path
    root: Path | None = None
    tiny: bool = False
    end: float = float("inf")

    @property
    def minutes_left(self) -> float:
        return (self.end - time.perf_counter()) / 60

    def budget(self, minutes: float) -> Budget:
        """Return the budget of a timing that takes at most `minutes`, and ends with the stage."""
        return Budget(3 if self.tiny else 15, min(self.end, time.perf_counter() + 60 * minutes))

    def parallel(self, function: Callable[[Any], Any], cases: Sequence[Any]) -> Iterator[Any]:
        """Yield `function(case)` in order of completion; on a GPU in processes, since compilation uses one core.

        Raises:
            TimeoutError: if the stage ends first.
        """
        if self.device.type == "cpu":
            yield from map(function, cases)
            return
        pool = ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 2), get_context("spawn"))
        try:
            futures = [pool.submit(function, case) for case in cases]
            for future in as_completed(futures, timeout=max(0.0, 60 * self.minutes_left)):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():  # a case that is not finished would delay the exit
                process.terminate()


class Measurement(NamedTuple):
    """A measurement, the minutes that it is expected to take on an H200, and whether a rehearsal has it."""

    name: str
    function: Callable[[Context], Iterable[Row]]
    minutes: float
    rehearsed: bool = True


class Stage(NamedTuple):
    """Measurements in their order, the most decisive first."""

    title: str
    measurements: list[Measurement]


def machine(device: torch.device, rehearsal: bool) -> Row:
    """Return the fields that say where a row is from; `code` is a digest of the Python files."""
    code = hashlib.sha256(json.dumps(code_sha256(), sort_keys=True).encode()).hexdigest()[:12]
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "commit": provenance()[0],
        "code": code,
        "rehearsal": rehearsal,
    }


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a file, without a last line that was cut off."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def remaining(measurements: list[Measurement], rows: list[Row]) -> tuple[list[Measurement], list[Measurement]]:
    """Return the measurements that were never finished nor failed, and those that failed."""
    finished = {row["measurement"] for row in rows if "finished" in row}
    failed = {row["measurement"] for row in rows if "raised" in row} - finished
    left = [one for one in measurements if one.name not in finished]
    return [one for one in left if one.name not in failed], [one for one in left if one.name in failed]


def run_stage(number: int, stage: Stage, context: Context) -> bool:
    """Run the measurements that are not finished, failed ones last; return whether none of these failed."""
    file = context.folder / f"stage{number}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and not file.read_bytes().endswith(b"\n"):
        append_line(file, "")  # ends a line that was cut off
    about = machine(context.device, context.tiny)
    same = [row for row in read_rows(file) if all(row[key] == about[key] for key in ("device", "rehearsal"))]
    measurements = [one for one in stage.measurements if one.rehearsed or not context.tiny]
    fresh, failed = remaining(measurements, same)
    print(f"stage {number}: {stage.title}; {len(fresh) + len(failed)} of {len(measurements)} left", flush=True)
    good = True
    for place, one in enumerate([*fresh, *failed]):
        if one.minutes > context.minutes_left:
            print(f"{one.name}: left out, {one.minutes:g} min expected, {context.minutes_left:.1f} left", flush=True)
            continue
        succeeded = measure(one, context, file, {"stage": number, "measurement": one.name, **about})
        good = good and succeeded
        if not succeeded and place + 1 < len(fresh) and not is_usable(context.device):
            restart(context)
    return good


def measure(one: Measurement, context: Context, file: Path, about: Row) -> bool:
    """Append the rows of a measurement to a file, then its duration or error; return whether it succeeded."""
    start, about = time.perf_counter(), {**about, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    try:
        for row in one.function(context):
            append_line(file, json.dumps({**about, **row}))
        last: Row = {"finished": round(time.perf_counter() - start, 1)}
    except Exception as error:  # of any part of the project, torch or the driver; the next measurement runs
        last = {"raised": f"{type(error).__name__}: {error}"[:2000]}
    append_line(file, json.dumps({**about, **last}))
    print(f"{one.name}: {last.get('raised', 'finished')}, {time.perf_counter() - start:.0f} s", flush=True)
    return "finished" in last


def is_usable(device: torch.device) -> bool:
    """Return whether the device works; after an illegal access, every call of this process fails."""
    try:
        return torch.ones(1, device=device).item() == 1
    except RuntimeError:
        return False


def restart(context: Context) -> None:
    """Run this command again in a new process, with the minutes that are left."""
    minutes = ["--minutes", f"{max(0.1, context.minutes_left):.2f}"]
    print("restart: the device does not respond to this process", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:], *minutes])
