"""`--help` of the root scripts: the script's docstring, its config keys, and the config groups."""

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def help_text(script: str | None, config: type, file: Path, schemas: Mapping[str, set[str]]) -> str:
    """Return the help text of a script.

    Args:
        script: docstring of the script.
        config: dataclass of its config; docstrings describe the keys.
        file: YAML file of the script, whose defaults list names the groups.
        schemas: group -> the schemas that the script registered; only options with these schemas are listed.
    """
    parts = [(script or "").strip(), "Keys (write key=value):", *key_lines(config)]
    lines = ["Groups (write group=option; the default in brackets):"]
    defaults: Any = OmegaConf.to_container(OmegaConf.load(file))
    for entry in defaults["defaults"]:
        if isinstance(entry, dict) and not next(iter(entry)).startswith("override"):
            ((group, chosen),) = entry.items()
            names = ", ".join(options([file.parent / group], schemas.get(group)))
            lines.append(f"{group}: {names} ({'null' if chosen is None else chosen})")
    return "\n\n".join([*parts, "\n".join(lines), "All keys with their values: --cfg job --resolve"])


def key_lines(config: type) -> list[str]:
    """Return the attribute docstrings of a dataclass, its bases and its sections."""
    own = [attributes(part) for part in reversed(config.__mro__) if dataclasses.is_dataclass(part)]
    sections: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(config)}
    nested = {name: attributes(part) for name, part in sections.items() if dataclasses.is_dataclass(part)}
    return [text for text in own if text] + [
        f"{name}, such as {name}.KEY=value:\n{text}" for name, text in nested.items() if text
    ]


def attributes(part: Any) -> str:
    """Return the lines under `Attributes:` of a class's own docstring."""
    text = inspect.cleandoc(part.__doc__ or "").partition("Attributes:\n")[2]
    return inspect.cleandoc("\n" + text).rstrip()


def attribute_docs(part: type) -> dict[str, str]:
    """Return attribute -> description of a dataclass and its bases, each on one line."""
    docs: dict[str, str] = {}
    for base in reversed(part.__mro__):
        names: list[str] = []
        for line in attributes(base).splitlines() if dataclasses.is_dataclass(base) else []:
            if line[:1].strip():
                keys, _, text = line.partition(": ")
                names = [key.strip() for key in keys.split(",")]
                docs |= dict.fromkeys(names, text.strip())
            else:
                docs |= {name: f"{docs[name]} {line.strip()}".strip() for name in names}
    return docs


def options(folders: Iterable[Path], schemas: set[str] | None) -> list[str]:
    """Return the options of a group that use one of these schemas, directly or through another option.

    For a group without schemas, return all options.
    """
    files = {
        str(file.relative_to(folder).with_suffix("")): file for folder in folders for file in folder.rglob("*.yaml")
    }
    if not schemas:
        return sorted(files)
    bases = {name: bases_of(file) for name, file in files.items()}
    fit: set[str] = set()
    while more := {name for name, of in bases.items() if of & (schemas | fit)} - fit:
        fit |= more
    return sorted(fit)


def bases_of(file: Path) -> set[str]:
    """Return the options of its own group that a YAML file names in its defaults list."""
    content: Any = OmegaConf.to_container(OmegaConf.load(file))
    defaults = content.get("defaults", []) if isinstance(content, dict) else []
    return {entry for entry in defaults if isinstance(entry, str)}
