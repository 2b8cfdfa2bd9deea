"""The strict way from YAML files and overrides to dataclasses.

Hydra composes; it refuses a misspelt key in a file or an override, but not one behind `+`, and what it says when it
refuses is for people who know Hydra. Here every such mistake becomes one line that names key, value and remedy.
"""

import dataclasses
import difflib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vca.attention import describe
from vca.config import sweep
from vca.config.help import help_text, options
from vca.runtime.distributed import is_main_process
from vca.runtime.errors import ConfigError, NonFiniteError, PreemptedError, check, config_errors, known_cause
from vca.runtime.rundir import REFERENCE_KEYS, FromEnvironment
from vca.runtime.signals import EXIT_PREEMPTED

Registry = Mapping[str, tuple[type, Any]]  # name -> (config dataclass, what is built from it)

CONFIGS = Path(__file__).parents[2] / "configs"

# Exit codes of the root scripts, beside 0 and Python's 1.
EXIT_CONFIG = 2
EXIT_NON_FINITE = 3


def register_schemas(root: Mapping[str, type], groups: Mapping[str, Registry]) -> None:
    """Tell Hydra the dataclasses behind the YAML files, and OmegaConf what `${divide:a,b}`, ... in them are.

    Args:
        root: script name -> its config dataclass, stored as `<name>_schema`.
        groups: config group -> registry, whose dataclasses are stored as `<group>/<name>_schema`.
    """
    OmegaConf.register_new_resolver("divide", lambda value, by: value // max(by, 1), replace=True)
    OmegaConf.register_new_resolver("multiply", lambda value, by: value * by, replace=True)
    OmegaConf.register_new_resolver("sbatch", sbatch_options, replace=True)
    OmegaConf.register_new_resolver("strictly", lambda lines: ["set -e", *lines] if lines else [], replace=True)
    OmegaConf.register_new_resolver("variant", lambda node: describe(dict(node)), replace=True)
    store = ConfigStore.instance()
    for name, node in root.items():
        store.store(name=f"{name}_schema", node=node)
    for group, registry in groups.items():
        for name, (node, _) in registry.items():
            store.store(group=group, name=f"{name}_schema", node=node)


def sbatch_options(lines: Iterable[str], requeue: bool) -> dict[str, Any]:
    """`["exclude=node7", "exclusive"]` as submitit wants it, an option without a value as True."""
    options = (line.lstrip("-").partition("=") for line in [*lines, "requeue" if requeue else "no-requeue"])
    return {name: value if equals else True for name, equals, value in options}


def compose(config_name: str, overrides: Iterable[str] = ()) -> Any:
    """The dataclass that `python <config_name>.py <overrides>` would run with.

    Raises:
        ConfigError: on anything wrong in the files or the overrides.
    """
    inside = GlobalHydra.instance().is_initialized()  # a root script, which has these configs already
    with nullcontext() if inside else hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            return to_dataclass(hydra.compose(config_name, list(overrides)))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(error)) from error


def command_line(
    config_name: str,
    run: Callable[[Any], Any],
    program: Sequence[str] = (),
    summary: Callable[[Path], str] = sweep.table,
) -> None:
    """Body of a root script: compose the config from the command line and run, with mistakes told in one line.

    Args:
        config_name: of the YAML file.
        run: what to do with the config.
        program: what the jobs of a sweep (`-m`) run, see `sweep.main`; the root script of that name if it is empty.
        summary: what a sweep prints at its end.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that Hydra raises instead of printing and exiting
    if any(argument.startswith("--local-rank") for argument in sys.argv):
        sys.exit("config error: start ranks with torchrun, which sets LOCAL_RANK; --local-rank is not an option here")

    told = set(sys.argv[1:])
    root: Any = OmegaConf.get_type(ConfigStore.instance().repo[f"{config_name}_schema.yaml"].node)
    if {"-h", "--help"} & told:
        print(help_text(sys.modules["__main__"].__doc__, root, CONFIGS / f"{config_name}.yaml", registered_schemas()))
        return

    with mistakes_in_one_line():
        refuse_without_effect(root)
    start = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
    if {"-m", "--multirun"} & told:
        program = program or (f"{config_name}.py",)
        with mistakes_in_one_line():
            if {"-c", "--cfg", "-i", "--info"} & told:
                raise ConfigError("-m and --cfg do not go together: leave -m out to print the config of one job")
            if sweep.LAUNCHER not in os.environ:
                sys.exit(sweep.main(config_name, program, summary))
            sweep.launch(start, program)
            return

    def main(config: DictConfig) -> None:
        with mistakes_in_one_line():
            if sweep.LAUNCHER not in os.environ:
                refuse_half_a_sweep(config_name)
            run(to_dataclass(config))

    with mistakes_in_one_line():
        start(main)()


def refuse_without_effect(root: type) -> None:
    """Raise `ConfigError` on an option of Hydra that would do nothing here, or on a `--config-dir` that is no folder.

    Args:
        root: dataclass of the script's config, which has the keys to use instead.
    """
    config_dir = sweep.config_dir()
    check(config_dir is None or config_dir.is_dir(), "--config-dir", "a folder", str(config_dir))
    names = {field.name for field in dataclasses.fields(root)}
    instead = " and ".join(key for key in ("out_dir", "name", "out") if key in names)
    for argument in sys.argv[1:]:
        if match := re.match(r"\+{0,2}(hydra\.(?:run\.dir|sweep\.subdir))=", argument):
            raise ConfigError(f"{match[1]} has no effect; {f'set {instead} instead' if instead else 'leave it out'}")


def refuse_half_a_sweep(config_name: str) -> None:
    """Raise `ConfigError` on a choice that does nothing without `-m`."""
    choices = HydraConfig.get().runtime.choices
    for group, nothing in (("ablation", "null"), ("cluster", "local")):
        choice = str(choices.get(group) or nothing)
        if choice not in (nothing, "None"):
            raise ConfigError(f"{group}={choice} is for sweeps: python {config_name}.py -m {group}={choice} ...")


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Exit with one line on an error that is the user's to mend; others keep their traceback."""
    try:
        yield
    except ConfigError as error:
        fail(f"config error: {error}", EXIT_CONFIG)
    except (HydraException, OmegaConfBaseException) as error:
        fail(f"config error: {explain(error)}", EXIT_CONFIG)
    except ValueError as error:
        if "Config group override must be" not in str(error):
            raise
        fail("config error: leave a group out instead of giving it null; recipe=none is no recipe", EXIT_CONFIG)
    except NonFiniteError as error:
        fail(f"stopped: {error}", EXIT_NON_FINITE)
    except PreemptedError as error:
        fail(f"stopped: {error}", EXIT_PREEMPTED)
    except Exception as error:
        if (cause := known_cause(error)) is None:
            raise
        fail(f"stopped: {cause}", 1, alike=False)


def fail(line: str, code: int, alike: bool = True) -> None:
    """Print a line to stderr and exit. Where all ranks fail alike, torchrun ends the others while they wait."""
    if alike and not is_main_process():
        time.sleep(3.0)
    print(line, file=sys.stderr, flush=True)
    sys.exit(code)


def to_dataclass(config: DictConfig) -> Any:
    """A composed config as its dataclasses, their ranges checked.

    Raises:
        ConfigError: on a key that no dataclass has, a missing value, or a value out of its range.
    """
    known = list(keys_of(config))
    for key in extra_keys(config):
        raise ConfigError(f"unknown key '{key}'" + did_you_mean(key, known))
    missing = OmegaConf.missing_keys(config)
    if missing:
        key = sorted(missing)[0]
        raise ConfigError(f"{key} has no value; give it one: {key}=...")
    with config_errors():
        try:
            values: Any = OmegaConf.to_object(config)
        except OmegaConfBaseException as error:
            raise ConfigError(explain(error)) from error
    return keep_references(config, config, values)


def keep_references(config: DictConfig, node: Any, value: Any, key: str = "", kept: bool = False) -> Any:
    """A value whose strings are `FromEnvironment`, below `REFERENCE_KEYS`, where environment variables decide them.

    Args:
        config: as composed, its interpolations not resolved.
        node: of `config`, from which the value was made.
        value: dataclasses are changed in place.
        key: of the node.
        kept: whether the node is below one of those keys.
    """
    kept = kept or key in REFERENCE_KEYS
    if dataclasses.is_dataclass(value) and isinstance(node, DictConfig):
        for name in (field.name for field in dataclasses.fields(value)):
            old, child = getattr(value, name), node._get_node(name)
            new = keep_references(config, child, old, f"{key}.{name}" if key else name, kept)
            if new is not old:
                setattr(value, name, new)
    elif isinstance(value, list) and isinstance(node, ListConfig):
        value[:] = [keep_references(config, node._get_node(i), one, key, kept) for i, one in enumerate(value)]
    elif kept and type(value) is str and reads_environment(config, node):
        return FromEnvironment(value, node._value())
    return value


def reads_environment(config: DictConfig, node: Any) -> bool:
    """Whether the text of a node has `${oc.env:...}`, or refers to a key whose text has it."""
    text = str(node._value() if node is not None else None)
    keys = re.findall(r"\$\{([\w.]+)\}", text)
    relative = "${." in text  # not followed
    return relative or "oc.env" in text or any(reads_environment(config, node_of(config, key)) for key in keys)


def node_of(config: DictConfig, key: str) -> Any:
    """The node of a full key, not resolved."""
    node: Any = config
    for name in key.split("."):
        node = node._get_node(name) if isinstance(node, DictConfig) else None
    return node


def from_registry(registry: Registry, values: Mapping[str, Any], key: str = "name") -> Any:
    """The dataclass of a registry that plain values, as a run's `config.json` holds them, name under `key`."""
    check(values[key] in registry, key, f"one of {sorted(registry)}", values[key])
    return from_plain(registry[values[key]][0], values)


def from_plain(config_class: type, values: Mapping[str, Any]) -> Any:
    """A dataclass from its plain values.

    Raises:
        ConfigError: if they are not those of that dataclass.
    """
    with config_errors():
        try:
            return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config_class), dict(values)))
        except OmegaConfBaseException as error:
            raise ConfigError(explain(error)) from error


def read_protocol(name: str) -> dict[str, Any]:
    """What `configs/protocol/<name>.yaml` fixes, the sampler that it names included."""
    values: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "protocol" / f"{name}.yaml"))
    (choice,) = values.pop("defaults")
    sampler: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "sampler" / f"{choice['override /sampler']}.yaml"))
    return {**values, "sampler": {**sampler, **values["sampler"]}}


def extra_keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Full names of the keys in `config` that its dataclass does not have."""
    schema = OmegaConf.get_type(config)
    if not dataclasses.is_dataclass(schema):
        return []
    fields = {f.name for f in dataclasses.fields(schema)}
    extra = []
    for name in config:
        key = f"{prefix}{name!s}"
        if name not in fields:
            extra.append(key)
        elif isinstance(child := config._get_node(name), DictConfig) and not child._is_none():
            extra += extra_keys(child, f"{key}.")
    return extra


def keys_of(config: DictConfig, prefix: str = "") -> Iterable[str]:
    """Full names of all keys that the dataclasses behind `config` have."""
    schema = OmegaConf.get_type(config)
    if not dataclasses.is_dataclass(schema):
        return
    for field in dataclasses.fields(schema):
        yield f"{prefix}{field.name}"
        child = config._get_node(field.name)
        if isinstance(child, DictConfig):
            yield from keys_of(child, f"{prefix}{field.name}.")


def all_known_keys() -> list[str]:
    """Keys of every registered schema: what a misspelt key may have meant when nothing could be composed."""
    store = ConfigStore.instance().repo
    keys: set[str] = set()
    for name, entry in store.items():
        if isinstance(entry, dict):  # a group: its members' keys stand under the group's name
            for member, node in entry.items():
                if member.endswith("_schema.yaml"):
                    keys.update(keys_of(node.node, f"{name}."))
        elif name.endswith("_schema.yaml"):
            keys.update(keys_of(entry.node))
    return sorted(keys)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean '...'?"`, or nothing where nothing is near."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:  # the right key under the wrong parent
        tail = word.rsplit(".", 1)[-1]
        near = [key for key in known if key.rsplit(".", 1)[-1] == tail][:1]
    return f"; did you mean '{near[0]}'?" if near and near[0] != word else ""


def registered_schemas() -> dict[str, set[str]]:
    """Group -> names of the schemas that this script registered for it."""
    store = ConfigStore.instance().repo
    return {
        group: {name.removesuffix(".yaml") for name in members}
        for group, members in store.items()
        if isinstance(members, dict) and group != "hydra"
    }


def not_for_this_script(group: str, option: str) -> str:
    """An option whose schema another script registers; names those whose schemas this one has."""
    fit = options([CONFIGS / group], registered_schemas().get(group))
    return f"{group}={option}: not for this script ({', '.join(fit)} are)"


def explain(error: BaseException) -> str:
    """What an exception of Hydra or OmegaConf means, in one line: key, value, remedy."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    text = "\n".join(str(link) for link in chain)

    if match := re.search(r"In '([^']+)/([^']+)': Could not load '[^']+_schema'", text):
        return not_for_this_script(match[1], match[2])
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match[1].rpartition("/")
        folder = CONFIGS / group
        there = sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml")) if group else []
        choices = f" (there are {', '.join(there)})" if there else ""
        return f"{group or 'config'}={option}: no such option" + did_you_mean(option, there) + choices
    if match := re.search(r"In '([^']+)/([^']+)': Could not override '[^']+'\.\s*No match in the defaults list", text):
        return f"{match[1].replace('/', '=', 1)}/{match[2]}: not for this script"
    if match := re.search(r"Could not override '([^']+)'\.\s*No match in the defaults list", text):
        return f"unknown group '{match[1]}'" + did_you_mean(match[1], all_known_keys())
    if match := (
        re.search(r"Multiple values for (?P<key>\S+)\. To override a value use 'override \S+: (?P<value>.*)'", text)
        or re.search(r"force-add of config groups is not supported: '(?P<plus>\+\+)(?P<key>[^=]+)=(?P<value>.*)'", text)
        or re.search(r"already at '(?P<key>[^']+)'.*\nEither remove \+ prefix: '[^=]+=(?P<value>.*)'", text)
    ):
        plus = match.groupdict().get("plus", "+")
        return f"{match['key']} has a value already; write {match['key']}={match['value']} without '{plus}'"
    full_key = re.search(r"full_key: (\S+)", text)
    if re.search(r"Key '[^']*' (is not in struct|not in '\w+')", text):
        key = re.search(r"Could not override '([^']+)'", text) or full_key
        if key is not None:
            return f"unknown key '{key[1]}'" + did_you_mean(key[1], all_known_keys())
    if match := re.search(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", text):
        null = " (write null for no value)" if match[1].lower() == "none" else ""
        kind = {"Integer": "an integer"}.get(match[2], f"a {match[2].lower()}")
        return f"{full_key[1] if full_key else 'a value'} must be {kind}, got '{match[1]}'{null}"
    if match := re.search(r"Value '(.*)' is not a valid bool", text):
        return f"{full_key[1] if full_key else 'a value'} must be true or false, got '{match[1]}'"
    if match := re.search(r"Invalid value assigned: (\w+) is not a ListConfig, list or tuple", text):
        return f"{full_key[1] if full_key else 'a value'} must be a list such as [1, 2], got a {match[1]}"
    if match := re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", text):
        return f"{full_key[1] if full_key else 'a value'} must be one of {match[2]}, got '{match[1]}'"
    if match := re.search(
        r"field '([\w.]+)' is not Optional|Incompatible value 'None' for field of type '(\w+)'", text
    ):
        return f"{full_key[1] if full_key else match[1]} may not be null"
    if match := re.search(r"Interpolation key '([^']+)' not found", text):
        return f"{full_key[1] if full_key else 'a value'} refers to '{match[1]}', which does not exist"
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
