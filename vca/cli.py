"""Command line of the scripts: help, sweeps and single runs; user errors as one line; exit codes."""

import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from vca.config.composition import to_dataclass
from vca.config.help import help_text
from vca.config.hydra_errors import CONFIGS, config_dir, explain, options
from vca.runtime.distributed import is_main_process
from vca.runtime.errors import ConfigError, NonFiniteError, PreemptedError, RankZeroError, check, known_cause
from vca.runtime.signals import EXIT_PREEMPTED
from vca.sweep.launcher import LAUNCHER, launch, run_sweep
from vca.sweep.summary import table

# Exit codes of the root scripts, besides 0, Python's 1 and `EXIT_PREEMPTED`.
EXIT_CONFIG = 2
EXIT_NON_FINITE = 3


def command_line(
    config_name: str,
    run: Callable[[Any], Any],
    program: Sequence[str] = (),
    summary: Callable[[Path], str] = table,
) -> None:
    """Compose the config from the command line and run it; user errors exit with one line.

    Args:
        config_name: name of the YAML file.
        run: function to call with the config.
        program: script and arguments of the jobs of a sweep (`-m`), see `run_sweep`; default `<config_name>.py`.
        summary: returns the text that a sweep prints when all jobs finished.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that Hydra raises instead of printing and exiting
    if any(argument.startswith("--local-rank") for argument in sys.argv):
        sys.exit("config error: --local-rank is not supported; start ranks with torchrun, which sets LOCAL_RANK")

    flags = set(sys.argv[1:])
    root: Any = OmegaConf.get_type(ConfigStore.instance().repo[f"{config_name}_schema.yaml"].node)
    if {"-h", "--help"} & flags:
        print(help_text(sys.modules["__main__"].__doc__, root, CONFIGS / f"{config_name}.yaml", options))
        return

    with exit_on_user_error():
        check_arguments(root)
    start = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
    if {"-m", "--multirun"} & flags:
        program = program or (f"{config_name}.py",)
        with exit_on_user_error():
            if {"-c", "--cfg", "-i", "--info"} & flags:
                raise ConfigError("-m cannot be combined with --cfg; omit -m to print the config of one job")
            if LAUNCHER not in os.environ:
                sys.exit(run_sweep(config_name, program, summary))
            launch(start, program)
            return

    def main(config: DictConfig) -> None:
        with exit_on_user_error():
            if LAUNCHER not in os.environ:
                check_not_sweep(config_name)
            run(to_dataclass(config))

    with exit_on_user_error():
        start(main)()


def check_arguments(root: type) -> None:
    """Raise `ConfigError` on an option of Hydra without effect, or if `--config-dir` is not a folder."""
    folder = config_dir()
    check(folder is None or folder.is_dir(), "--config-dir", "a folder", str(folder))
    names = {field.name for field in dataclasses.fields(root)}
    instead = " and ".join(key for key in ("out_dir", "name", "out") if key in names)
    for argument in sys.argv[1:]:
        if match := re.match(r"\+{0,2}(hydra\.(?:run\.dir|sweep\.subdir))=", argument):
            raise ConfigError(f"{match[1]} has no effect; {f'set {instead} instead' if instead else 'omit it'}")


def check_not_sweep(config_name: str) -> None:
    """Raise `ConfigError` on an option that has no effect without `-m`."""
    choices = HydraConfig.get().runtime.choices
    for group, default in (("ablation", "null"), ("cluster", "local")):
        choice = str(choices.get(group) or default)
        if choice not in (default, "None"):
            raise ConfigError(f"{group}={choice} requires -m: python {config_name}.py -m {group}={choice} ...")


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print user errors and known runtime errors as one line and exit; other errors keep their traceback."""
    try:
        yield
    except ConfigError as error:
        fail(f"config error: {error}", EXIT_CONFIG)
    except (HydraException, OmegaConfBaseException, MarkedYAMLError) as error:
        fail(f"config error: {explain(error)}", EXIT_CONFIG)
    except ValueError as error:
        if "Config group override must be" not in str(error):
            raise
        fail("config error: a config group must not be null; omit it (or use recipe=none)", EXIT_CONFIG)
    except NonFiniteError as error:
        fail(f"stopped: {error}", EXIT_NON_FINITE)
    except PreemptedError as error:
        fail(f"stopped: {error}", EXIT_PREEMPTED)
    except RankZeroError as error:
        fail(f"stopped: {str(error).splitlines()[0]}", 1)
    except Exception as error:
        if (cause := known_cause(error)) is None:
            raise
        fail(f"stopped: {cause}", 1, on_all_ranks=False)


def fail(line: str, code: int, on_all_ranks: bool = True) -> None:
    """Print a line to stderr and exit; of ranks that all fail, only rank 0 prints before torchrun ends the others."""
    if on_all_ranks and not is_main_process():
        time.sleep(3.0)
    print(line, file=sys.stderr, flush=True)
    sys.exit(code)
