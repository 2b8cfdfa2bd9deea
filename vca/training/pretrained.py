"""Starting from the weights of a file: what fits is taken, and what was taken, left and new is told."""

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
    """Which weights of a file that holds several: the average where there is one, or the raw ones."""

    ema = "ema"
    raw = "raw"


# Where the checkpoints of this project, timm, DeiT, Swin, PVT and CSWin keep their parameters.
EMA_KEYS = ("ema", "state_dict_ema", "model_ema")
RAW_KEYS = ("model", "state_dict")


@dataclass
class LoadReport:
    """What became of the parameters of a file.

    Attributes:
        source: the key under which the file holds them, empty if they are the whole file.
        taken: names.
        adapted: names, with both shapes: positions that were interpolated.
        left: names, with the reason: the model has no such parameter, or one of another shape.
        new: names that the model has and the file has not, or not in that shape.
    """

    source: str
    taken: list[str]
    adapted: dict[str, str]
    left: dict[str, str]
    new: list[str]

    @property
    def complete(self) -> bool:
        """Whether the model is exactly what the file holds."""
        return not (self.adapted or self.left or self.new)

    def check_complete(self, needs: str) -> None:
        """Raise `ConfigError("<needs> that holds this model exactly; ...")` unless it does."""
        differs = [*self.new, *self.left, *self.adapted]
        if differs:
            raise ConfigError(
                f"{needs} that holds this model exactly; {len(differs)} parameters differ, such as {differs[0]}"
            )

    def __str__(self) -> str:
        lines = [f"taken: {len(self.taken)} parameters" + (f" under '{self.source}'" if self.source else "")]
        lines += [f"adapted: {name} ({shapes})" for name, shapes in self.adapted.items()]
        lines += [f"left: {name} ({reason})" for name, reason in self.left.items()] or ["left: none"]
        lines += [f"new: {name}" for name in self.new] or ["new: none"]
        return "\n".join(lines)


def read_weights(
    path: Path, which: InitWeights = InitWeights.ema, key: str = "trainer.init_from"
) -> tuple[dict[str, Tensor], str]:
    """Parameters by name from a `.safetensors` file or a checkpoint, and the key under which it holds them.

    Tensors and plain values only are read (`weights_only=True`). `key` is what the user calls the file.

    Raises:
        ConfigError: if the file cannot be read, or holds no parameters.
    """
    if not path.is_file():
        raise ConfigError(f"{key} must be a file, got '{path}'")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            # The original repositories store their command line; a Namespace holds values and runs nothing.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = load_tensors(path)
    except Exception as error:  # safetensors' parser of unknown bytes raises anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{key}: '{path}' is not a readable checkpoint: {reason}") from error
    keys = (*EMA_KEYS, *RAW_KEYS) if which is InitWeights.ema else (*RAW_KEYS, *EMA_KEYS)
    source = ""
    if isinstance(content, dict):
        source = next((name for name in keys if isinstance(content.get(name), dict)), "")
        content = content[source] if source else content
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"{key}: '{path}' holds no parameters by name")
    return {strip_wrappers(name): value for name, value in content.items() if isinstance(value, Tensor)}, source


def strip_wrappers(name: str) -> str:
    """A parameter's name without the components that DDP and `torch.compile` put into it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def init_from(
    model: nn.Module, path: Path, which: InitWeights = InitWeights.ema, key: str = "trainer.init_from"
) -> LoadReport:
    """Copy into `model` what fits by name and shape.

    Names of the original repositories are understood where the model has a `convert_official`, positions of another
    size are interpolated where it has an `adapt`.

    Raises:
        ConfigError: if the file cannot be read, or nothing in it fits: it belongs to another model.
    """
    weights, source = read_weights(path, which, key)
    convert: Any = getattr(model, "convert_official", dict)
    adapt: Any = getattr(model, "adapt", lambda name, tensor: None)
    weights = convert(weights)
    ours = model.state_dict()
    taken, adapted, left = [], {}, {}
    with torch.no_grad():
        for name, tensor in weights.items():
            if name not in ours:
                left[name] = "the model has none"
                continue
            if ours[name].shape != tensor.shape:
                shapes = f"{shape(tensor)} there, {shape(ours[name])} here"
                tensor = adapt(name, tensor)
                if tensor is None:
                    left[name] = shapes
                    continue
                adapted[name] = shapes
            ours[name].copy_(tensor)
            taken.append(name)
    if not taken:
        raise ConfigError(f"{key}: none of the {len(weights)} parameters in '{path}' fits the model")
    return LoadReport(source, taken, adapted, left, [name for name in ours if name not in set(taken)])


def shape(tensor: Tensor) -> str:
    """`2 x 3`."""
    return " x ".join(map(str, tensor.shape)) or "a number"
