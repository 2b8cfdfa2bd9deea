"""Load initial weights: every matching parameter, with a report of loaded, resized, unexpected and missing ones."""

import argparse
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vca.runtime.errors import ConfigError
from vca.runtime.files import load_tensors


class InitWeights(Enum):
    """Weights to load from a file with both: the EMA (falls back to raw) or the raw ones."""

    ema = "ema"
    raw = "raw"


# Keys of the parameters in checkpoints of this project, timm, DeiT, Swin, PVT and CSWin.
EMA_KEYS = ("ema", "state_dict_ema", "model_ema")
RAW_KEYS = ("model", "state_dict")


@dataclass
class LoadReport:
    """Result of loading a file into a model.

    Attributes:
        source: key of the parameters in the file, empty if they are the whole file.
        loaded: names of all loaded parameters, resized ones included.
        resized: name -> both shapes, of interpolated position embeddings.
        unexpected: name -> reason, of parameters that the model does not have, or has in another shape.
        missing: names of the model's parameters that were not loaded.
    """

    source: str
    loaded: list[str]
    resized: dict[str, str]
    unexpected: dict[str, str]
    missing: list[str]

    @property
    def complete(self) -> bool:
        """Whether the file contains exactly this model."""
        return not (self.resized or self.unexpected or self.missing)

    def check_complete(self, needs: str) -> None:
        """Raise `ConfigError("<needs> with exactly this model; ...")` unless `complete`."""
        differs = [*self.missing, *self.unexpected, *self.resized]
        if differs:
            raise ConfigError(
                f"{needs} with exactly this model; {len(differs)} parameters differ, such as {differs[0]}"
            )

    def __str__(self) -> str:
        lines = [f"loaded: {len(self.loaded)} parameters" + (f" from '{self.source}'" if self.source else "")]
        lines += [f"resized: {name} ({shapes})" for name, shapes in self.resized.items()]
        lines += [f"unexpected: {name} ({reason})" for name, reason in self.unexpected.items()] or ["unexpected: none"]
        lines += [f"missing: {name}" for name in self.missing] or ["missing: none"]
        return "\n".join(lines)


def read_weights(
    path: Path, which: InitWeights = InitWeights.ema, key: str = "trainer.init_from"
) -> tuple[dict[str, Tensor], str]:
    """Read parameters by name from a `.safetensors` file or a checkpoint, and their key in the file.

    Only tensors and plain values are read (`weights_only=True`). `key` is the config key of `path`, for errors.

    Raises:
        ConfigError: if the file cannot be read or has no parameters.
    """
    if not path.is_file():
        raise ConfigError(f"{key} must be a file, got '{path}'")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            # The original repositories store their command line as a Namespace, which is safe.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = load_tensors(path)
    except Exception as error:  # safetensors raises many kinds of errors on corrupt files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{key}: '{path}' is not a readable checkpoint: {reason}") from error
    keys = (*EMA_KEYS, *RAW_KEYS) if which is InitWeights.ema else (*RAW_KEYS, *EMA_KEYS)
    source = ""
    if isinstance(content, dict):
        source = next((name for name in keys if isinstance(content.get(name), dict)), "")
        content = content[source] if source else content
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"{key}: '{path}' must contain a state dict (parameter names to tensors)")
    return {strip_wrappers(name): value for name, value in content.items() if isinstance(value, Tensor)}, source


def strip_wrappers(name: str) -> str:
    """Remove the components that DDP and `torch.compile` add to a parameter's name."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def init_from(
    model: nn.Module, path: Path, which: InitWeights = InitWeights.ema, key: str = "trainer.init_from"
) -> LoadReport:
    """Load every parameter of a file that matches `model` by name and shape.

    `model.convert_official` converts names of the original repositories, `model.adapt` resizes position embeddings.

    Raises:
        ConfigError: if the file cannot be read or no parameter matches.
    """
    weights, source = read_weights(path, which, key)
    convert: Any = getattr(model, "convert_official", dict)
    adapt: Any = getattr(model, "adapt", lambda name, tensor: None)
    weights = convert(weights)
    state = model.state_dict()
    loaded, resized, unexpected = [], {}, {}
    with torch.no_grad():
        for name, tensor in weights.items():
            if name not in state:
                unexpected[name] = "not in the model"
                continue
            if state[name].shape != tensor.shape:
                shapes = f"{format_shape(tensor)} in the file, {format_shape(state[name])} in the model"
                tensor = adapt(name, tensor)
                if tensor is None:
                    unexpected[name] = shapes
                    continue
                resized[name] = shapes
            state[name].copy_(tensor)
            loaded.append(name)
    if not loaded:
        raise ConfigError(f"{key}: none of the {len(weights)} parameters in '{path}' matches the model")
    return LoadReport(source, loaded, resized, unexpected, [name for name in state if name not in set(loaded)])


def format_shape(tensor: Tensor) -> str:
    """Format a shape as `2 x 3`."""
    return " x ".join(map(str, tensor.shape)) or "scalar"
