"""Sweeps: what `python train_cls.py -m ...` does, on this machine or on a cluster.

Every config is checked, and the code is copied, before the first job starts. Then that copy goes on: Hydra composes the
jobs and hands them to its launcher, the basic one, which runs them here one after the other, or submitit's, which
submits them to SLURM. Every job starts torchrun on the same script without `-m`. All that runs, however long it waits
in a queue, is what was submitted.

    outputs/sweeps/2026-11-22_14-05-09/
      jobs.json       the command, the commit, and of each job its name, overrides and run directory
      code/           the code as it was, which the jobs run
      config_dir/     the YAML files of --config-dir as they were
      logs/           what each job printed, also in earlier attempts; NAME.node1.log of a second node
      ends/           how each job ended: exit code, SLURM job id
      slurm/          submitit's files: the sbatch script, its own logs
"""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vca.config.help import options
from vca.evaluation.sweep_table import sweep_table
from vca.runtime.errors import ConfigError
from vca.runtime.files import write_text
from vca.runtime.launch import ATTEMPT, run_and_survive, torchrun
from vca.runtime.provenance import CODE, COMMIT, DIFF, PARTS, provenance
from vca.runtime.rundir import FromEnvironment

LAUNCHER = "VCA_SWEEP_LAUNCHER"  # in the environment of the copy that hands the jobs to Hydra's launcher
POLL = 10.0  # seconds between two questions to SLURM


def table(folder: Path) -> str:
    """The table of a sweep's runs: of those jobs that ended well, others may have met a run that is not theirs."""
    return sweep_table([Path(job["run"]) for job in read_jobs(folder) if exit_code(folder, job) == 0])


def main(config_name: str, program: Sequence[str], summary: Callable[[Path], str] = table) -> int:
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
            print(f"the jobs stay in the queue; their table: scripts/table.py {folder} --sweep", file=sys.stderr)
    return tell(folder, summary)


def tell(folder: Path, summary: Callable[[Path], str] = table) -> int:
    """Print what came of a sweep, then its failures; 1 if there are any."""
    failed = failures(folder)
    try:
        print(summary(folder), flush=True)
    finally:
        for line in failed:
            print(line, file=sys.stderr, flush=True)
    return 1 if failed else 0


def config_dir() -> Path | None:
    """The folder of further configs, `--config-dir`, that the command line names; absolute."""
    from hydra._internal.utils import get_args_parser

    given = get_args_parser().parse_known_args()[0].config_dir
    return None if given is None else Path(given).absolute()


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


def search_path(mine: Path | None) -> list[str]:
    """The override that makes Hydra find the configs of a `--config-dir`."""
    return [] if mine is None else [f"hydra.searchpath=['file://{mine}']"]


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


def told(config: DictConfig) -> dict[str, Override]:
    """The overrides of a sweep by their keys, the last of each: those of the config, then the command line's."""
    swept = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    task: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)  # name='lr${optim.lr}' as it stands
    return {one.get_key_element(): one for one in OverridesParser.create().parse_overrides([*swept, *task])}


def globs(config: DictConfig, mine: Path | None) -> dict[str, str]:
    """The overrides `group=glob(...)` of a sweep by their keys, as choices: `group=a,b`.

    Hydra's own expansion would also take the schemas, and options of other scripts.

    Raises:
        ConfigError: on one that matches no option.
    """
    from vca.config.load import registered_schemas

    roots, choices = [CODE / "configs", *([mine] if mine is not None else [])], {}
    for key, override in told(config).items():
        pattern: Any = override.value()
        if isinstance(pattern, Glob):
            group = override.key_or_group
            there = options([root / group for root in roots], registered_schemas().get(group))
            if not (names := pattern.filter(there)):
                raise ConfigError(f"{key}=glob(): no option matches (there are {', '.join(there) or 'none'})")
            choices[key] = f"{key}={','.join(names)}"
    return choices


def plan(config: DictConfig, config_name: str, mine: Path | None = None) -> list[dict[str, Any]]:
    """Every job of a sweep: its number, name, run directory and overrides.

    Args:
        config: of the sweep.
        config_name: of the YAML file.
        mine: the `--config-dir`.

    Raises:
        ConfigError: on a job that could not run, or two that would share a directory.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    from vca.config.load import compose

    chosen = {key: OverridesParser.create().parse_override(text) for key, text in globs(config, mine).items()}
    overrides = list({**told(config), **chosen}.values())
    jobs: list[dict[str, Any]] = []
    for number, job in enumerate(BasicSweeper.split_arguments(overrides, None)[0]):
        try:
            one = compose(config_name, [*job, *search_path(mine)])
        except ConfigError as error:
            raise ConfigError(f"{error} (job {number}: {' '.join(job)})") from error
        if one.out_dir != config.out_dir:
            raise ConfigError("out_dir may not be swept, it holds the sweep itself; put what you sweep into the name")
        for line in (*one.cluster.setup, *one.cluster.sbatch):
            if isinstance(line, FromEnvironment):
                raise ConfigError(
                    f"cluster.setup and cluster.sbatch must not read the environment, SLURM's script would hold the "
                    f"value, got '{line.reference}'; let the shell of the job read it: $NAME"
                )
        run = str(Path(one.out_dir, one.name).absolute())
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
    for name in PARTS:
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
    code = run_and_survive(command, log, cluster.signal_seconds, scheduled=cluster.name == "slurm")
    if node == 0:
        end = {
            "exit_code": code,
            "seconds": round(time.time() - started, 1),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID") if cluster.name == "slurm" else None,
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        }
        write_text(folder / "ends" / f"{number}.json", json.dumps(end) + "\n")
    if cluster.name == "slurm" and code != 0:
        sys.exit(code)  # so that SLURM counts it as failed too


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
