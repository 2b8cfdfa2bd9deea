"""Write one HTML page about runs or a sweep: curves, config differences, results, samples, cost, provenance, failures.

    python scripts/report.py outputs/RUN                        outputs/RUN/report.html
    python scripts/report.py outputs/A outputs/B --out AB.html  two runs beside each other
    python scripts/report.py outputs/sweeps/...                 the runs of a sweep, and its failed jobs
    python scripts/report.py outputs/demo                       all runs, sample folders and records below a folder

The file opens without a network, on a phone and in print. Attention maps are those in RUN/attention_maps; with --maps N
they are first computed for N evaluation images of each classifier that has none.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from models import MODELS, rebuild
from scripts.attention_maps import maps_of_run, plot_layer, read_images
from vca.cli import exit_on_user_error
from vca.evaluation.complexity import Complexity, count, example_inputs
from vca.report.page import Sweep, build_page, render
from vca.report.page_run import find_runs
from vca.runtime.errors import ConfigError, check
from vca.runtime.files import write_text
from vca.runtime.rundir import parse_json, read_config
from vca.sweep.summary import outcomes


def read_sweep(folder: Path) -> tuple[Sweep, list[Path]]:
    """Read a sweep and the directories of the runs that its jobs started.

    Raises:
        ConfigError: if `jobs.json` is corrupt.
    """
    record = parse_json((folder / "jobs.json").read_bytes()) or {}
    try:
        jobs = record["jobs"]
        failed = outcomes(folder)[1]
        runs = [run for job in jobs if (run := run_of_job(folder, job)) is not None]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder / 'jobs.json'} is corrupt ({type(error).__name__}: {error})") from error
    return Sweep(folder, str(record.get("command")), record.get("commit"), len(jobs), failed), runs


def run_of_job(folder: Path, job: dict[str, Any]) -> Path | None:
    """Return the run directory of a job, also if the output folder was moved; None if the job did not start it.

    A failed job may have the directory of a run with another config.
    """
    moved = folder.resolve().parent.parent / job["name"]
    run = next((path for path in (Path(job["run"]), moved) if path.is_dir()), None)
    if run is None:
        return None
    launches = run / "launches.jsonl"
    code = f"{folder.resolve().name}/code/"
    started = launches.is_file() and code in launches.read_text(errors="replace")
    return run if started or job.get("already_finished") else None


def count_complexity(config: dict[str, Any]) -> Complexity:
    """Count parameters and MACs of the network of a config."""
    model = config["model"]
    return count(lambda: rebuild(config), lambda: example_inputs(MODELS[model["family"]][0](**model)))


def add_maps(runs: Sequence[Path], images: int) -> None:
    """Compute the attention maps of the classifiers without any, and print why a classifier has none."""
    for run in runs:
        folder = run / "attention_maps"
        try:
            config = read_config(run)
            if folder.exists() or "objective" in config:
                continue
            pixels = read_images(config, None, [str(number) for number in range(images)])
            layers = maps_of_run(run, pixels, None)
        except (ConfigError, OSError) as error:
            print(f"no attention maps: {error}", flush=True)
            continue
        folder.mkdir()
        for index, maps in enumerate(layers):
            plot_layer(index, pixels, maps, None, folder / f"layer_{index:02d}.png")


def write_report(folders: Sequence[Path], out: Path, maps: int = 0) -> str:
    """Write the page of some runs, sweeps or folders with runs; return a line with its name and size.

    Raises:
        ConfigError: if a folder is not a directory or contains no run, or the file cannot be written.
    """
    sweeps, runs, others = [], list[Path](), []
    for folder in folders:
        if (folder / "jobs.json").exists():
            sweep, found = read_sweep(folder)
            sweeps.append(sweep)
        else:
            found = find_runs([folder])
            others.append(folder)
        runs += [run for run in found if run not in runs]
    if not runs:
        raise ConfigError(f"no run in {', '.join(map(str, folders))}")
    if maps:
        add_maps(runs, maps)
    html = render(build_page(runs, sweeps, others, count_complexity))
    try:
        write_text(out, html)
    except OSError as error:
        raise ConfigError(f"--out: cannot write {out} ({error.strerror})") from error
    return f"page of {len(runs)} run{'s' if len(runs) != 1 else ''}: {out} ({len(html.encode()) / 1e6:.1f} MB)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="run, sweep, or folder with runs")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="default: report.html in the first folder")
    parser.add_argument("--maps", type=int, default=0, metavar="N", help="images for attention maps; default: 0")
    options = parser.parse_args()
    with exit_on_user_error():
        check(options.maps >= 0, "--maps", ">= 0", options.maps)
        torch.set_num_threads(1)
        print(write_report(options.folders, options.out or options.folders[0] / "report.html", options.maps))


if __name__ == "__main__":
    main()
