"""Planning a sweep: every job composed and checked before the first one starts."""

import json
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from omegaconf import DictConfig, OmegaConf

from vca.config.composition import compose
from vca.config.help import options
from vca.config.hydra_errors import registered_schemas
from vca.runtime.errors import ConfigError
from vca.runtime.provenance import CODE
from vca.runtime.rundir import FromEnvironment


def config_dir() -> Path | None:
    """The folder of further configs, `--config-dir`, that the command line names; absolute."""
    from hydra._internal.utils import get_args_parser

    given = get_args_parser().parse_known_args()[0].config_dir
    return None if given is None else Path(given).absolute()


def search_path(mine: Path | None) -> list[str]:
    """The override that makes Hydra find the configs of a `--config-dir`."""
    return [] if mine is None else [f"hydra.searchpath=['file://{mine}']"]


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
