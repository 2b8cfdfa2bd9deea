"""`--help` of the root scripts: what the script says of itself, what its config says of its keys, and the groups."""

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def help_text(script: str | None, config: type, file: Path, schemas: Mapping[str, set[str]]) -> str:
    """All that a person needs to begin.

    Args:
        script: docstring of the script.
        config: dataclass of its config; docstrings explain the keys.
        file: the YAML file of the script, whose defaults list names the groups.
        schemas: group -> the schemas that the script registered for it; other options of it are not for this script.
    """
    parts = [(script or "").strip(), "Keys (write key=value):", *key_lines(config)]
    lines = ["Groups (write group=option; the default in brackets):"]
    defaults: Any = OmegaConf.to_container(OmegaConf.load(file))
    for entry in defaults["defaults"]:
        if isinstance(entry, dict) and not next(iter(entry)).startswith("override"):
            ((group, chosen),) = entry.items()
            names = ", ".join(options(file.parent / group, schemas.get(group)))
            lines.append(f"{group}: {names} ({'null' if chosen is None else chosen})")
    return "\n\n".join([*parts, "\n".join(lines), "All keys with their values: --cfg job --resolve"])


def key_lines(config: type) -> list[str]:
    """What the docstrings of a dataclass, of its bases and then of its sections say about their attributes."""
    own = [attributes(part) for part in reversed(config.__mro__) if dataclasses.is_dataclass(part)]
    sections: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(config)}
    nested = {name: attributes(part) for name, part in sections.items() if dataclasses.is_dataclass(part)}
    return [text for text in own if text] + [
        f"{name}, such as {name}.KEY=value:\n{text}" for name, text in nested.items() if text
    ]


def attributes(part: Any) -> str:
    """The lines under `Attributes:` of a class's own docstring."""
    text = inspect.cleandoc(part.__doc__ or "").partition("Attributes:\n")[2]
    return inspect.cleandoc("\n" + text).rstrip()


def options(folder: Path, schemas: set[str] | None) -> list[str]:
    """Files of a group that have one of these schemas, or build on one that has, where it has schemas at all."""
    texts = {str(file.relative_to(folder).with_suffix("")): file.read_text() for file in sorted(folder.rglob("*.yaml"))}
    if not schemas:
        return list(texts)
    fit: set[str] = set()
    while more := {name for name, text in texts.items() if any(f"- {base}\n" in text for base in schemas | fit)} - fit:
        fit |= more
    return [name for name in texts if name in fit]
