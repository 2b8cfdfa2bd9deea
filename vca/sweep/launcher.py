"""The two processes of a sweep: one plans and waits; the other, run from the code copy, calls Hydra's launcher."""

import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig

from vca.config.hydra_errors import config_dir
from vca.runtime.errors import ConfigError
from vca.runtime.files import write_text
from vca.runtime.provenance import CODE, COMMIT, DIFF, PARTS, provenance
from vca.sweep.job import run_job
from vca.sweep.plan import globs, plan, search_path
from vca.sweep.slurm import queued, wait_for_jobs
from vca.sweep.summary import report, table

LAUNCHER = "VCA_SWEEP_LAUNCHER"  # environment variable of the process that calls Hydra's launcher


def run_sweep(config_name: str, program: Sequence[str], summary: Callable[[Path], str] = table) -> int:
    """Run the sweep of the command line, print its results and return the exit code.

    Args:
        config_name: name of the YAML file.
        program: script of every job, relative to the repository, and arguments before those of the job.
        summary: returns the text to print about the sweep in a folder.

    Raises:
        ConfigError: if the config of a job is invalid; no job has started then.
    """
    folder, arguments = prepare(config_name)
    code = folder / "code"
    path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
    # PYTHONSAFEPATH: else Python would import this project from the current folder.
    environment = {**os.environ, LAUNCHER: "1", "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(code / program[0]), *program[1:], *sys.argv[1:], *arguments]
    launcher = subprocess.Popen(command, env=environment)
    signal.signal(signal.SIGTERM, lambda *_: launcher.terminate())
    try:
        wait_for_jobs(launcher, folder)
    except KeyboardInterrupt:
        launcher.wait()
        if queued(folder):
            print(f"the jobs stay queued; for their table: python scripts/table.py {folder} --runs", file=sys.stderr)
    return report(folder, summary)


def prepare(config_name: str) -> tuple[Path, list[str]]:
    """Check every job and create the sweep's folder; return it, and arguments to add to the launcher's command line."""
    if "RANK" in os.environ:
        raise ConfigError("-m must not run under torchrun, it starts torchrun per job; use python train_cls.py -m ...")
    own = config_dir()
    overrides = [*get_args_parser().parse_args().overrides, *search_path(own)]
    with hydra.initialize_config_dir(str(CODE / "configs"), version_base="1.3"):
        composer = GlobalHydra.instance().hydra
        assert composer is not None
        config = composer.compose_config(config_name, overrides, RunMode.MULTIRUN, with_log_configuration=False)
        jobs = plan(config, config_name)
        folder = Path(config.hydra.sweep.dir).absolute()
    commit, diff = provenance()
    record = {"command": shlex.join(sys.argv), "commit": commit, "jobs": jobs}
    files = [] if own is None else sorted(own.rglob("*.yaml"))  # listed before the sweep's folder may be created in it
    arguments = [f"hydra.sweep.dir='{folder}'", *globs(config).values()]
    try:
        for name in ("code", "logs", "ends"):
            (folder / name).mkdir(parents=True)
        write_text(folder / "jobs.json", json.dumps(record, indent=2) + "\n")
        copy_code(folder / "code", commit, diff)
        if own is not None:
            for file in files:
                target = folder / "config_dir" / file.relative_to(own)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, target)
            arguments += ["--config-dir", str(folder / "config_dir")]  # the last one takes effect
    except OSError as error:
        raise ConfigError(f"out_dir: {error}") from error
    finished = sum(job["already_finished"] for job in jobs)
    print(f"{len(jobs)} job(s), {finished} already finished, sweep folder {config.hydra.sweep.dir}", flush=True)
    return folder, arguments


def copy_code(folder: Path, commit: str | None, diff: str) -> None:
    """Copy the code of this checkout, with its commit and diff."""
    leave = shutil.ignore_patterns("__pycache__")
    for name in PARTS:
        shutil.copytree(CODE / name, folder / name, ignore=leave)
    for script in CODE.glob("*.py"):
        shutil.copy2(script, folder)
    write_text(folder / COMMIT, f"{commit or ''}\n")
    write_text(folder / DIFF, diff)


def launch(start: Callable[[Any], Any], program: Sequence[str]) -> None:
    """Pass the jobs to Hydra's launcher, in the copy of the code, and wait; `start` is what `hydra.main` returned."""
    from submitit.core.utils import UncompletedJobError

    logging.getLogger("submitit").setLevel(logging.ERROR)  # without accounting it warns at every poll

    own = config_dir()
    program = [*program, *(["--config-dir", str(own)] if own is not None else [])]

    def job(config: DictConfig) -> None:
        run_job(config, program)

    try:
        start(job)()
    except (KeyboardInterrupt, UncompletedJobError):  # `run_sweep` reports failed jobs; submitit printed sbatch's error
        sys.exit(1)
    except Exception as error:
        sys.exit(f"the launcher failed: {' '.join(str(error).split())}")
