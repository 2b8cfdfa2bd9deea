"""What several backbones need and timm does not have."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from timm.layers import trunc_normal_
from torch import nn

Config = TypeVar("Config")


def init_linear(module: nn.Module) -> None:
    """Truncated normal 0.02 for the weight of a linear layer, zero for its bias; other modules are left alone."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def select_options(config_class: type[Config], options: Mapping[str, Any]) -> Config:
    """Build a config dataclass from a mapping of its fields; `ValueError` names a key that it does not have."""
    known = {f.name for f in fields(config_class)}  # type: ignore[arg-type]
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"{config_class.__name__} has no key '{unknown[0]}'; it has {', '.join(sorted(known))}")
    return config_class(**options)
