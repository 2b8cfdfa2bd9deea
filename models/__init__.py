"""Architectures, one per file. To add one: a file with its config dataclass, and one line in `MODELS`."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from models.cswin import CSWin, CSWinConfig
from models.deit import DeiT, DeiTConfig
from models.dit import DiT, DiTConfig
from models.layers import Backbone
from models.pvt import PVT, PVTConfig
from models.swin import Swin, SwinConfig
from vca.attention import ATTENTIONS

__all__ = ["CLASSIFIERS", "GENERATORS", "MODELS", "build_model", "rebuild", "register_timm"]

# family -> (config dataclass, module)
MODELS: dict[str, tuple[type, type[nn.Module]]] = {
    "cswin": (CSWinConfig, CSWin),
    "deit": (DeiTConfig, DeiT),
    "dit": (DiTConfig, DiT),
    "pvt": (PVTConfig, PVT),
    "swin": (SwinConfig, Swin),
}
CLASSIFIERS = {family: pair for family, pair in MODELS.items() if issubclass(pair[1], Backbone)}
GENERATORS = {family: pair for family, pair in MODELS.items() if family not in CLASSIFIERS}


def build_model(config: Any, attention: Any) -> Any:
    """Build a network from a model config (one of the dataclasses in `MODELS`) and a config in `ATTENTIONS`."""
    if config.family not in MODELS:
        raise ValueError(f"model.family must be one of {sorted(MODELS)}, got '{config.family}'")
    config_class, module = MODELS[config.family]
    if type(config) is not config_class:
        raise ValueError(
            f"config of model.family '{config.family}' must be a {config_class.__name__}, got {type(config).__name__}"
        )
    return module(config, attention)


def rebuild(config: Mapping[str, Any]) -> Any:
    """Build the network of a run's `config.json` with new weights. `attention.backend` is left at its default."""
    model = config["model"]
    attention = {key: value for key, value in config["attention"].items() if key != "backend"}
    if model["family"] not in MODELS or attention["name"] not in ATTENTIONS:
        raise ValueError(f"unknown model '{model['family']}' or attention '{attention['name']}'")
    return build_model(MODELS[model["family"]][0](**model), ATTENTIONS[attention["name"]][0](**attention))


def register_timm() -> None:
    """Register the classifiers of `configs/model/` with timm as `vca_<name>...`; see `models.timm_registry`."""
    from models import timm_registry

    timm_registry.register(CLASSIFIERS)
