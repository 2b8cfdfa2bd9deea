"""Strict composition of YAML files and overrides to dataclasses.

Hydra composes. It accepts unknown keys behind `+`, and its errors assume knowledge of Hydra; here every unknown key is
an error, and every error is one line with key, value and remedy.
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
from yaml import MarkedYAMLError

from vca.attention import variant_name
from vca.config.hydra_errors import CONFIGS, did_you_mean, explain, keys_of
from vca.runtime.errors import ConfigError, check, config_errors
from vca.runtime.rundir import REFERENCE_KEYS, FromEnvironment

Registry = Mapping[str, tuple[type, Any]]  # name -> (config dataclass, what is built from it)


def register_schemas(root: Mapping[str, type], groups: Mapping[str, Registry]) -> None:
    """Register the dataclasses behind the YAML files with Hydra, and the resolvers (`${divide:a,b}`) with OmegaConf.

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
    """Convert `["exclude=node7", "exclusive"]` to submitit's dict, in which an option without a value is True."""
    options = (line.lstrip("-").partition("=") for line in [*lines, "requeue" if requeue else "no-requeue"])
    return {name: value if equals else True for name, equals, value in options}


def compose(config_name: str, overrides: Iterable[str] = ()) -> Any:
    """Return the config dataclass of `python <config_name>.py <overrides>`.

    Raises:
        ConfigError: on an error in the files or the overrides.
    """
    inside = GlobalHydra.instance().is_initialized()  # in a root script, Hydra already uses these configs
    with nullcontext() if inside else hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            return to_dataclass(hydra.compose(config_name, list(overrides)))
        except (HydraException, OmegaConfBaseException, MarkedYAMLError) as error:
            raise ConfigError(explain(error)) from error


def to_dataclass(config: DictConfig) -> Any:
    """Convert a composed config to its dataclasses and check their ranges.

    Raises:
        ConfigError: on an unknown key, a missing value, or a value out of range.
    """
    known = list(keys_of(config))
    for key in extra_keys(config):
        raise ConfigError(f"unknown key '{key}'" + did_you_mean(key, known))
    if missing := OmegaConf.missing_keys(config):
        key = min(missing)
        raise ConfigError(f"{key} has no value; set {key}=...")
    with config_errors():
        try:
            values: Any = OmegaConf.to_object(config)
        except OmegaConfBaseException as error:
            raise ConfigError(explain(error)) from error
    return keep_references(config, config, values)


def keep_references(config: DictConfig, node: Any, value: Any, key: str = "", kept: bool = False) -> Any:
    """Replace the strings of `REFERENCE_KEYS` that environment variables decide by `FromEnvironment`.

    Args:
        config: the composed config, interpolations not resolved.
        node: the node of `config` that `value` was made from.
        value: the value to convert; dataclasses and lists are changed in place.
        key: full key of the node.
        kept: whether the node is below one of `REFERENCE_KEYS`.
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
    """Whether a node contains `${oc.env:...}`, directly or through another key."""
    text = str(node._value() if node is not None else None)
    keys = re.findall(r"\$\{([\w.]+)\}", text)
    relative = "${." in text  # not followed
    return relative or "oc.env" in text or any(reads_environment(config, node_of(config, key)) for key in keys)


def node_of(config: DictConfig, key: str) -> Any:
    """Return the node of a full key, not resolved."""
    node: Any = config
    for name in key.split("."):
        node = node._get_node(name) if isinstance(node, DictConfig) else None
    return node


def from_registry(registry: Registry, values: Mapping[str, Any], key: str = "name") -> Any:
    """Build the dataclass that plain values, such as those of a `config.json`, name under `key`."""
    check(values[key] in registry, key, f"one of {sorted(registry)}", values[key])
    return from_plain(registry[values[key]][0], values)


def from_plain(config_class: type, values: Mapping[str, Any]) -> Any:
    """Build a config dataclass from plain values.

    Raises:
        ConfigError: on an unknown key or an invalid value.
    """
    with config_errors():
        try:
            return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config_class), dict(values)))
        except OmegaConfBaseException as error:
            raise ConfigError(explain(error)) from error


def read_protocol(name: str) -> dict[str, Any]:
    """Return the values that `configs/protocol/<name>.yaml` fixes, including those of its sampler."""
    values: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "protocol" / f"{name}.yaml"))
    (choice,) = values.pop("defaults")
    sampler: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "sampler" / f"{choice['override /sampler']}.yaml"))
    return {**values, "sampler": {**sampler, **values["sampler"]}}


def extra_keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Return the full keys in `config` that its dataclass does not have."""
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
