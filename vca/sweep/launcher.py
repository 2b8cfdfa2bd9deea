"""The two processes of a sweep: the one that plans and waits, and its copy that hands the jobs to Hydra's launcher."""

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
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig

from vca.runtime.errors import ConfigError
from vca.runtime.files import write_text
from vca.runtime.provenance import CODE, COMMIT, DIFF, PARTS, provenance
from vca.sweep.job import run_job
from vca.sweep.plan import config_dir, globs, plan, search_path
from vca.sweep.slurm import queued, wait_for_jobs
from vca.sweep.summary import table, tell

LAUNCHER = "VCA_SWEEP_LAUNCHER"  # in the environment of the copy that hands the jobs to Hydra's launcher


def run_sweep(config_name: str, program: Sequence[str], summary: Callable[[Path], str] = table) -> int:
    """Run the sweep that the command line asks for and print what came out; the exit code.

    Args:
        config_name: of the YAML file.
        program: the script that every job runs, relative to the repository, and arguments before the job's own.
        summary: what to print about the sweep of a folder.

    Raises:
        ConfigError: before anything has started, if a job could not run.
    """
    folder, arguments = begin(config_name)
    code = folder / "code"
    path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
    # Without a safe path Python would look for this project in the current folder first.
    environment = {**os.environ, LAUNCHER: "1", "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(code / program[0]), *program[1:], *sys.argv[1:], *arguments]
    launcher = subprocess.Popen(command, env=environment)
    signal.signal(signal.SIGTERM, lambda *_: launcher.terminate())
    try:
        wait_for_jobs(launcher, folder)
    except KeyboardInterrupt:
        launcher.wait()
        if queued(folder):
            print(f"the jobs stay in the queue; their table: scripts/table.py {folder} --runs", file=sys.stderr)
    return tell(folder, summary)


def begin(config_name: str) -> tuple[Path, list[str]]:
    """Compose every job, refuse a wrong or doubled one, make the sweep's folder with `jobs.json` and the code.

    Returns:
        The folder, and what the launcher's command line needs besides this one's.
    """
    from hydra._internal.utils import get_args_parser

    if "RANK" in os.environ:
        raise ConfigError("-m starts torchrun by itself, once for each job: python train_cls.py -m ...")
    mine = config_dir()
    overrides = [*get_args_parser().parse_args().overrides, *search_path(mine)]
    with hydra.initialize_config_dir(str(CODE / "configs"), version_base="1.3"):
        composer = GlobalHydra.instance().hydra
        assert composer is not None
        config = composer.compose_config(config_name, overrides, RunMode.MULTIRUN, with_log_configuration=False)
        jobs = plan(config, config_name, mine)
        folder = Path(config.hydra.sweep.dir).absolute()
    commit, diff = provenance()
    record = {"command": shlex.join(sys.argv), "commit": commit, "jobs": jobs}
    files = [] if mine is None else sorted(mine.rglob("*.yaml"))  # before the sweep's folder, which may be in there
    arguments = [f"hydra.sweep.dir='{folder}'", *globs(config, mine).values()]
    try:
        for name in ("code", "logs", "ends"):
            (folder / name).mkdir(parents=True)
        write_text(folder / "jobs.json", json.dumps(record, indent=2) + "\n")
        copy_code(folder / "code", commit, diff)
        if mine is not None:
            for file in files:
                target = folder / "config_dir" / file.relative_to(mine)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, target)
            arguments += ["--config-dir", str(folder / "config_dir")]  # the last one of a command line counts
    except OSError as error:
        raise ConfigError(f"out_dir: {error}") from error
    print(f"{len(jobs)} job(s), kept in {config.hydra.sweep.dir}", flush=True)
    return folder, arguments


def copy_code(folder: Path, commit: str | None, diff: str) -> None:
    """The part of this checkout that runs, and what it is."""
    leave = shutil.ignore_patterns("__pycache__")
    for name in PARTS:
        shutil.copytree(CODE / name, folder / name, ignore=leave)
    for script in CODE.glob("*.py"):
        shutil.copy2(script, folder)
    write_text(folder / COMMIT, f"{commit or ''}\n")
    write_text(folder / DIFF, diff)


def launch(start: Callable[[Any], Any], program: Sequence[str]) -> None:
    """Hand the jobs to Hydra's launcher, in the copy of the code, and wait for them.

    Args:
        start: what `hydra.main(...)` gave.
        program: see `main`.
    """
    from submitit.core.utils import UncompletedJobError

    logging.getLogger("submitit").setLevel(logging.ERROR)  # without accounting it warns at every look

    mine = config_dir()
    program = [*program, *(["--config-dir", str(mine)] if mine is not None else [])]

    def job(config: DictConfig) -> None:
        run_job(config, program)

    try:
        start(job)()
    except (KeyboardInterrupt, UncompletedJobError):  # a failed or cancelled job, which `main` tells
        sys.exit(1)
    except Exception as error:
        sys.exit(f"the launcher gave up: {' '.join(str(error).split())}")
