"""`--help` of the root scripts: the script's docstring, its config keys, and the config groups."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def help_text(script: str | None, config: type, file: Path, options: Callable[[str], list[str]]) -> str:
    """Return the help text of a script.

    Args:
        script: docstring of the script.
        config: dataclass of its config; docstrings describe the keys.
        file: YAML file of the script, whose defaults list names the groups.
        options: returns the options of a group that fit the script.
    """
    parts = [(script or "").strip(), "Keys (write key=value):", *key_lines(config)]
    lines = ["Groups (write group=option; the default in brackets):"]
    defaults: Any = OmegaConf.to_container(OmegaConf.load(file))
    for entry in defaults["defaults"]:
        if isinstance(entry, dict) and not next(iter(entry)).startswith("override"):
            ((group, chosen),) = entry.items()
            lines.append(f"{group}: {', '.join(options(group))} ({'null' if chosen is None else chosen})")
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


def fitting_options(group: str, roots: Collection[Path], schemas: Mapping[str, set[str]]) -> list[str]:
    """Return the options of a group below `roots` that use only these schemas, directly or through other options."""
    folders = [root / group for root in roots]
    files = {str(path.relative_to(at).with_suffix("")): path for at in folders for path in at.rglob("*.yaml")}
    defaults = {name: defaults_of(file) for name, file in files.items()}
    bases = {name: {option for other, option in pairs if not other} for name, pairs in defaults.items()}
    if group in schemas:
        fit: set[str] = set()
        while more := {name for name, of in bases.items() if of & (schemas[group] | fit)} - fit:
            fit |= more
        return sorted(fit)
    overridden = {other for pairs in defaults.values() for other, _ in pairs if other in schemas}
    valid = {other: fitting_options(other, roots, schemas) for other in overridden}
    unfit = {name for name, pairs in defaults.items() if any(one not in valid.get(of, [one]) for of, one in pairs)}
    while more := {name for name, of in bases.items() if of & unfit} - unfit:
        unfit |= more
    return sorted(files.keys() - unfit)


def defaults_of(file: Path) -> list[tuple[str, str]]:
    """Return the pairs (overridden group, option) of a YAML file's defaults list; "" is the file's own group."""
    content: Any = OmegaConf.to_container(OmegaConf.load(file))
    entries = content.get("defaults", []) if isinstance(content, dict) else []
    chosen = [next(iter(entry.items())) if isinstance(entry, dict) else ("", entry) for entry in entries]
    return [(key.removeprefix("override /"), option) for key, option in chosen]
