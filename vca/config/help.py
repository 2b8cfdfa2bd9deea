"""`--help` of the root scripts: the script's docstring, its config keys, and the config groups."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException


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
    sections: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(config)}
    nested = {name: all_attributes(part) for name, part in sections.items() if isinstance(part, type)}
    return all_attributes(config) + [
        f"{name}, such as {name}.KEY=value:\n" + "\n".join(texts) for name, texts in nested.items() if texts
    ]


def all_attributes(part: type) -> list[str]:
    """Return the attribute docstrings of a dataclass and its bases, without empty ones."""
    own = [attributes(base) for base in reversed(part.__mro__) if dataclasses.is_dataclass(base)]
    return [text for text in own if text]


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


def fitting_options(
    group: str, roots: Collection[Path], schemas: Mapping[str, set[str]], sections: Mapping[str, Collection[type]]
) -> list[str]:
    """Return the options of a group below `roots` that fit a script.

    An option fits if its schema or the group's dataclass is the script's and accepts its values, and if the options of
    other groups that it selects fit.

    Args:
        group: the config group.
        roots: folders of config groups.
        schemas: group -> names of the script's schemas, for groups whose options name one.
        sections: group -> dataclasses of the script, for other groups; one of them must accept the option.
    """
    folders = [root / group for root in roots]
    files = {str(path.relative_to(at).with_suffix("")): path for at in folders for path in at.rglob("*.yaml")}
    defaults = {name: defaults_of(file) for name, file in files.items()}
    bases = {name: {option for other, option in pairs if not other} for name, pairs in defaults.items()}
    if group in schemas:
        fit: set[str] = set()
        while more := {name for name, of in bases.items() if of & (schemas[group] | fit)} - fit:
            fit |= more
        return sorted(fit)

    def with_bases(name: str) -> list[Path]:
        return [file for base in sorted(bases[name] & files.keys()) for file in with_bases(base)] + [files[name]]

    selected = {other for pairs in defaults.values() for other, _ in pairs if other}
    groups = [other for other in selected if any((root / other).is_dir() for root in roots)]
    valid = {other: fitting_options(other, roots, schemas, sections) for other in groups}
    unfit = {name for name, pairs in defaults.items() if any(one not in valid.get(of, [one]) for of, one in pairs)}
    if group in sections:
        unfit |= {name for name in files if not any(accepts(one, with_bases(name)) for one in sections[group])}
    while more := {name for name, of in bases.items() if of & unfit} - unfit:
        unfit |= more
    return sorted(files.keys() - unfit)


def accepts(section: type, files: Collection[Path]) -> bool:
    """Whether a dataclass has the keys of YAML files and accepts their values; later files take precedence."""
    contents: Any = [OmegaConf.load(file) for file in files if "@package _global_" not in file.read_text()]
    try:
        values = [OmegaConf.masked_copy(one, [key for key in one if key != "defaults"]) for one in contents]
        OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(section), *values))
    except (InterpolationResolutionError, MissingMandatoryValue):
        return True  # the command line or other groups determine the value
    except (OmegaConfBaseException, ValueError):  # an unknown key or wrong type; a value out of range
        return False
    return True


def defaults_of(file: Path) -> list[tuple[str, str]]:
    """Return the pairs (overridden group, option) of a YAML file's defaults list; "" is the file's own group."""
    content: Any = OmegaConf.to_container(OmegaConf.load(file))
    entries = content.get("defaults", []) if isinstance(content, dict) else []
    chosen = [next(iter(entry.items())) if isinstance(entry, dict) else ("", entry) for entry in entries]
    return [(key.removeprefix("override /"), option) for key, option in chosen]
