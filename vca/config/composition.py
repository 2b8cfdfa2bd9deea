"""The strict way from YAML files and overrides to dataclasses.

Hydra composes; it refuses a misspelt key in a file or an override, but not one behind `+`, and what it says when it
refuses is for people who know Hydra. Here every such mistake becomes one line that names key, value and remedy.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vca.attention import variant_name
from vca.config.hydra_errors import CONFIGS, did_you_mean, explain, keys_of
from vca.runtime.errors import ConfigError, check, config_errors
from vca.runtime.rundir import REFERENCE_KEYS, FromEnvironment

Registry = Mapping[str, tuple[type, Any]]  # name -> (config dataclass, what is built from it)


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
    OmegaConf.register_new_resolver("variant", lambda node: variant_name(dict(node)), replace=True)
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
