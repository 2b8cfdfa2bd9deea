"""Starting from the weights of a file: what fits is taken, and what was taken, left and new is told."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vca.runtime.errors import ConfigError

# Where the checkpoints of this project, timm, DeiT, Swin, PVT and CSWin keep their parameters; averages come first.
WRAPPERS = ("ema", "state_dict_ema", "model_ema", "model", "state_dict")


@dataclass
class InitReport:
    """What became of the parameters of a file.

    Attributes:
        taken: names.
        left: names, with the reason: the model has no such parameter, or one of another shape.
        new: names that the model has and the file has not.
    """

    taken: list[str]
    left: dict[str, str]
    new: list[str]

    def __str__(self) -> str:
        lines = [f"taken: {len(self.taken)} parameters"]
        lines += [f"left: {name} ({reason})" for name, reason in self.left.items()] or ["left: none"]
        lines += [f"new: {name}" for name in self.new] or ["new: none"]
        return "\n".join(lines)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Parameters by name from a `.safetensors` file or a checkpoint, tensors and plain values only.

    Of a checkpoint that holds several sets, the first of `WRAPPERS` is taken: the average where there is one.

    Raises:
        ConfigError: if the file cannot be read, or holds no parameters.
    """
    if not path.is_file():
        raise ConfigError(f"trainer.init_from must be a file, got '{path}'")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            # The original repositories store their command line; a Namespace holds values and runs nothing.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the parser of unknown bytes ran into
        raise ConfigError(f"trainer.init_from: '{path}' is not a readable checkpoint: {first_line(error)}") from error
    if isinstance(content, dict):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"trainer.init_from: '{path}' holds no parameters by name")
    return {strip_wrappers(name): value for name, value in content.items() if isinstance(value, Tensor)}


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def strip_wrappers(name: str) -> str:
    """A parameter's name without the prefixes of DDP and `torch.compile`."""
    for prefix in ("module.", "_orig_mod."):
        name = name.replace(prefix, "")
    return name


def init_from(model: nn.Module, path: Path) -> InitReport:
    """Copy into `model` what fits by name and shape.

    Names of the original repositories are understood where the model has a `convert_official`.

    Raises:
        ConfigError: if the file cannot be read, or nothing in it fits: it belongs to another model.
    """
    convert: Any = getattr(model, "convert_official", dict)
    weights = convert(read_weights(path))
    ours = model.state_dict()
    taken, left = [], {}
    with torch.no_grad():
        for name, tensor in weights.items():
            if name not in ours:
                left[name] = "the model has none"
            elif ours[name].shape != tensor.shape:
                left[name] = f"{shape(tensor)} there, {shape(ours[name])} here"
            else:
                ours[name].copy_(tensor)
                taken.append(name)
    if not taken:
        raise ConfigError(f"trainer.init_from: none of the {len(weights)} parameters in '{path}' fits the model")
    return InitReport(taken, left, [name for name in ours if name not in set(taken)])


def shape(tensor: Tensor) -> str:
    """`2 x 3`."""
    return " x ".join(map(str, tensor.shape)) or "a number"
