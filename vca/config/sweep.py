"""Sweeps: what `python train_cls.py -m ...` does, on this machine or on a cluster.

Hydra composes the jobs and hands them to its launcher: the basic one, which runs them here one after the other, or
submitit's, which submits them to SLURM. Every job starts torchrun on the same script without `-m`. Before the first one
every config is checked, and the code is copied, so that jobs which wait in a queue run what was submitted.

    outputs/sweeps/2026-11-22_14-05-09/
      jobs.json       the command, the commit, and of each job its name, overrides and run directory
      code/           the code as it was, which the jobs run
      logs/           what each job printed, also in earlier attempts; NAME.node1.log of a second node
      ends/           how each job ended: exit code, SLURM job id
      slurm/          submitit's files: the sbatch script, its own logs
"""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from vca.evaluation.sweep_table import sweep_table
from vca.runtime.errors import ConfigError
from vca.runtime.files import write_text
from vca.runtime.launch import run_and_survive, torchrun
from vca.runtime.provenance import CODE, COMMIT, DIFF, provenance


def table(folder: Path) -> str:
    """The table of a sweep's runs."""
    return sweep_table([Path(job["run"]) for job in read_jobs(folder)])


def main(start: Callable[[Any], Any], program: Sequence[str], summary: Callable[[Path], str] = table) -> int:
    """Run a sweep and print what came out; the exit code.

    Args:
        start: what `hydra.main(...)` gave.
        program: the script that every job runs, relative to the repository, and arguments before the job's own.
        summary: what to print about the sweep of a folder.
    """

    def job(config: DictConfig) -> None:
        run_job(config, program)

    try:
        start(job)()
    except Exception as error:
        if Sweep.folder is None:  # not even begun
            raise
        print(f"the launcher gave up: {error}", file=sys.stderr, flush=True)  # submitit on a cancelled job
        wait_for_jobs(Sweep.folder)
    assert Sweep.folder is not None
    print(summary(Sweep.folder), flush=True)
    failed = failures(Sweep.folder)
    for line in failed:
        print(line, file=sys.stderr, flush=True)
    return 1 if failed else 0


class Sweep(Callback):
    """Hydra's callback around a sweep: check and keep everything before the first job starts.

    Attributes:
        folder: of the sweep that runs in this process, None while there is none.
    """

    folder: ClassVar[Path | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Compose every job, refuse a wrong or doubled one, write `jobs.json`, copy the code."""
        from vca.config.load import mistakes_in_one_line

        with mistakes_in_one_line():
            try:
                self.begin(config, kwargs["config_name"])
            except OSError as error:
                raise ConfigError(f"out_dir: {error}") from error

    def begin(self, config: DictConfig, config_name: str) -> None:
        """What `on_multirun_start` does. Hydra passes over errors of a callback, but not over an exit."""
        folder = Path(config.hydra.sweep.dir).absolute()
        jobs = plan(config, config_name)
        commit, diff = provenance()
        record = {"command": shlex.join(sys.argv), "commit": commit, "jobs": jobs}
        for name in ("code", "logs", "ends"):
            (folder / name).mkdir(parents=True)
        write_text(folder / "jobs.json", json.dumps(record, indent=2) + "\n")
        copy_code(folder / "code", commit, diff)
        Sweep.folder = folder
        print(f"{len(jobs)} job(s), kept in {config.hydra.sweep.dir}", flush=True)


def ablations() -> list[str]:
    """Names of the sweeps in `configs/ablation/`."""
    return sorted(path.stem for path in (CODE / "configs" / "ablation").glob("*.yaml"))


def rows_of_ablation(name: str) -> list[list[str]]:
    """The rows of an ablation, its seeds left out: the attention, then the overrides of each."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    params: Any = OmegaConf.load(CODE / "configs" / "ablation" / f"{name}.yaml").hydra.sweeper.params
    overrides = [f"{key}={value}" for key, value in params.items() if key != "seed"]
    rows = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)[0]
    return [[row[0].removeprefix("attention="), *row[1:]] for row in rows]


def plan(config: DictConfig, config_name: str) -> list[dict[str, Any]]:
    """Every job of a sweep: its number, name, run directory and overrides.

    Raises:
        ConfigError: on a job that could not run, or two that would share a directory.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    from vca.config.load import compose

    swept = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*swept, *config.hydra.overrides.task])
    jobs: list[dict[str, Any]] = []
    for number, job in enumerate(BasicSweeper.split_arguments(overrides, None)[0]):
        try:
            one = compose(config_name, job)
        except ConfigError as error:
            raise ConfigError(f"{error} (job {number}: {' '.join(job)})") from error
        run = f"{one.out_dir}/{one.name}"
        for other in jobs:
            if other["run"] == run:
                raise ConfigError(
                    f"jobs {other['number']} and {number} would both be {run}; put what you sweep into the name, "
                    f"such as name='lr${{optim.lr}}-seed${{seed}}'"
                )
        jobs.append({"number": number, "name": one.name, "run": run, "overrides": job})
    return jobs


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """The jobs of a sweep, as `plan` made them."""
    return json.loads((folder / "jobs.json").read_text())["jobs"]


def copy_code(folder: Path, commit: str | None, diff: str) -> None:
    """The part of this checkout that runs, and what it is."""
    leave = shutil.ignore_patterns("__pycache__")
    for name in ("configs", "models", "scripts", "vca"):
        shutil.copytree(CODE / name, folder / name, ignore=leave)
    for script in CODE.glob("*.py"):
        shutil.copy2(script, folder)
    write_text(folder / COMMIT, f"{commit or ''}\n")
    write_text(folder / DIFF, diff)


def run_job(config: DictConfig, program: Sequence[str]) -> None:
    """What Hydra's launcher calls, on the node where the job runs: all ranks of this node, to their end."""
    settings = HydraConfig.get()
    folder, number = Path(settings.sweep.dir).absolute(), settings.job.num
    cluster: Any = OmegaConf.to_object(config.cluster)
    node = int(os.environ.get("SLURM_NODEID", 0)) if cluster.name == "slurm" else 0
    log = folder / "logs" / (f"{config.name}.log" if node == 0 else f"{config.name}.node{node}.log")
    if cluster.name == "local":
        print(f"[{number + 1}/{len(read_jobs(folder))}] {config.name}", flush=True)
    command = torchrun(
        folder / "code" / program[0],
        [*program[1:], *settings.overrides.task],
        cluster.nodes,
        cluster.ranks_per_node,
        cluster.max_restarts,
    )
    started = time.time()
    code = run_and_survive(command, log, patience=120 if cluster.name == "slurm" else 0)
    if node == 0:
        end = {
            "exit_code": code,
            "seconds": round(time.time() - started, 1),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID") if cluster.name == "slurm" else None,
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        }
        write_text(folder / "ends" / f"{number}.json", json.dumps(end) + "\n")


def wait_for_jobs(folder: Path) -> None:
    """Wait until SLURM has done with every job of a sweep, also with those that it cancelled."""
    import submitit

    for pickled in sorted((folder / "slurm").glob("*/*_submitted.pkl")):
        submitit.SlurmJob(pickled.parent, pickled.name.removesuffix("_submitted.pkl")).wait()


def failures(folder: Path) -> list[str]:
    """A line for each job that did not end well: its name, how it ended, where its log is."""
    lines = []
    for job in read_jobs(folder):
        file = folder / "ends" / f"{job['number']}.json"
        code = json.loads(file.read_text())["exit_code"] if file.exists() else None
        log = folder / "logs" / f"{job['name']}.log"
        if code != 0:
            how = "did not come to its end" if code is None else f"exit code {code}"
            lines.append(f"failed: {job['name']}: {how}; {last_line(log)} ({log})")
    return lines


def last_line(log: Path) -> str:
    """What a job said last of its own: the line of a mistake, or the last one of a traceback."""
    if not log.exists():
        return "it wrote no log"
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in said if line.startswith(("config error:", "stopped:")) or "Error: " in line]
    own = [line for line in errors if "ChildFailedError" not in line and "elastic" not in line]
    return (own or said or ["its log is empty"])[-1]
