"""The command `python -m benchmarks gpu`.

    python -m benchmarks gpu --stage 1 --out OUT              one stage, at most nine minutes; rerun to continue it
    python -m benchmarks gpu --stage 4 --out OUT --root DIR   DIR has cifar10.xz or cifar-10-batches-py/, train/, val/
    python -m benchmarks gpu --rehearse --out OUT             all stages on a CPU with tiny sizes, in two minutes
    python -m benchmarks gpu --report OUT                     tables, plots, goals; blocks of docs/

Each row is a line of OUT/stageK.jsonl as soon as it is measured. `plan.py` has the measurements of each stage.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

DOCS = Path(__file__).parents[2] / "docs"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--stage", type=int, choices=range(1, 6))
    what.add_argument("--rehearse", action="store_true")
    what.add_argument("--report", type=Path, metavar="OUT")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--root", type=Path, help="folder with data, for stage 4")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of a stage (default 9)")
    options = parser.parse_args(arguments)
    if options.report is None and options.out is None:
        parser.error("--out must be set, a folder for the results")
    if options.report is not None and not options.report.is_dir():
        parser.error(f"--report must be a folder with stage1.jsonl, ..., got {options.report}")
    return options


def main(arguments: list[str]) -> None:
    """Run a stage, a rehearsal or the report; exit with code 1 if a measurement failed."""
    end, options = time.perf_counter(), parse(arguments)
    end += 60 * options.minutes
    if options.report is not None:
        from benchmarks.gpu.report import report

        report(options.report, DOCS)
        return
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("--stage needs a GPU; --rehearse runs all stages on a CPU")

    from benchmarks.gpu.plan import STAGES
    from benchmarks.gpu.runner import Context, run_stage

    device, numbers = torch.device("cuda", 0), [options.stage]
    if options.rehearse:
        torch.set_num_threads(1)
        torch.compile = lambda function, **_: function  # type: ignore[assignment]  # compiling takes a minute
        device, numbers = torch.device("cpu"), list(STAGES)
    context = Context(device, options.out, options.root, options.rehearse, end)
    succeeded = [run_stage(number, STAGES[number], context) for number in numbers]
    sys.exit(0 if all(succeeded) else 1)
