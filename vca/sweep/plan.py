"""Planning of a sweep: composes and checks every job before the first one starts."""

import json
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from omegaconf import DictConfig, OmegaConf

from vca.config.composition import compose
from vca.config.hydra_errors import config_dir, options
from vca.data.splits import check_class_folders
from vca.report.sweep_table import FinishedRun, read_finished_run
from vca.runtime.errors import ConfigError
from vca.runtime.provenance import CODE
from vca.runtime.rundir import FromEnvironment


def search_path(own: Path | None) -> list[str]:
    """Return the override that adds a `--config-dir` to Hydra's search path."""
    return [] if own is None else [f"hydra.searchpath=['file://{own}']"]


def ablations() -> list[str]:
    """Return the names of the sweeps in `configs/ablation/`."""
    return sorted(path.stem for path in (CODE / "configs" / "ablation").glob("*.yaml"))


def rows_of_ablation(name: str) -> list[list[str]]:
    """Return the rows of an ablation without seeds: each is the attention, then its overrides."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    params: Any = OmegaConf.load(CODE / "configs" / "ablation" / f"{name}.yaml").hydra.sweeper.params
    overrides = [f"{key}={value}" for key, value in params.items() if key != "seed"]
    rows = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)[0]
    return [[row[0].removeprefix("attention="), *row[1:]] for row in rows]


def sweep_overrides(config: DictConfig) -> dict[str, Override]:
    """Return key -> override of a sweep; the command line takes precedence over the config."""
    swept = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    task: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)  # keeps name='lr${optim.lr}'
    return {one.get_key_element(): one for one in OverridesParser.create().parse_overrides([*swept, *task])}


def globs(config: DictConfig) -> dict[str, str]:
    """Return the overrides `group=glob(...)` of a sweep by key, expanded to choices `group=a,b`.

    Hydra's own expansion includes the schemas and the options of other scripts.

    Raises:
        ConfigError: if a pattern matches no option.
    """
    choices = {}
    for key, override in sweep_overrides(config).items():
        pattern: Any = override.value()
        if isinstance(pattern, Glob):
            valid = options(override.key_or_group)
            if not (names := pattern.filter(valid)):
                raise ConfigError(f"{key}=glob(): no option matches (options: {', '.join(valid) or 'none'})")
            choices[key] = f"{key}={','.join(names)}"
    return choices


def plan(config: DictConfig, config_name: str) -> list[dict[str, Any]]:
    """Return number, name, run directory and overrides of every job, and whether its run has already finished.

    Raises:
        ConfigError: if the config of a job is invalid, or two jobs have the same run directory.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    chosen = {key: OverridesParser.create().parse_override(text) for key, text in globs(config).items()}
    overrides = list({**sweep_overrides(config), **chosen}.values())
    jobs: list[dict[str, Any]] = []
    for number, job in enumerate(BasicSweeper.split_arguments(overrides, None)[0]):
        try:
            one = compose(config_name, [*job, *search_path(config_dir())])
            if (
                one.data.name == "imagefolder" and Path(one.data.root or "", "train").expanduser().is_dir()
            ):  # visible here
                check_class_folders(one.data)
        except ConfigError as error:
            raise ConfigError(f"{error} (job {number}: {' '.join(job)})") from error
        if one.out_dir != config.out_dir:
            raise ConfigError("out_dir must not be swept; put the swept values into the name, such as name='${seed}'")
        for line in (*one.cluster.setup, *one.cluster.sbatch):
            if isinstance(line, FromEnvironment):
                raise ConfigError(
                    f"cluster.setup and cluster.sbatch must not use oc.env, whose value would be stored in the sbatch "
                    f"script, got '{line.reference}'; use a shell variable: $NAME"
                )
        run = str(Path(one.out_dir, one.name).absolute())
        for other in jobs:
            if other["run"] == run:
                raise ConfigError(
                    f"jobs {other['number']} and {number} have the same run directory {run}; put the swept values into "
                    f"the name, such as name='lr${{optim.lr}}-seed${{seed}}'"
                )
        finished = isinstance(read_finished_run(Path(run)), FinishedRun)
        jobs.append({"number": number, "name": one.name, "run": run, "overrides": job, "already_finished": finished})
    return jobs


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """Read the jobs of a sweep, see `plan`."""
    return json.loads((folder / "jobs.json").read_text())["jobs"]
