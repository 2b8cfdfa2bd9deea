"""Converts errors of Hydra and OmegaConf to one line: key, value, remedy."""

import dataclasses
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import get_args, get_type_hints

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from yaml import MarkedYAMLError

from vca.config.help import fitting_options
from vca.runtime.renamed import RENAMED
from vca.training.config import ClassifierTrainerConfig, GeneratorTrainerConfig

CONFIGS = Path(__file__).parents[2] / "configs"


def config_dir() -> Path | None:
    """Return the absolute path of the command line's `--config-dir`."""
    given = get_args_parser().parse_known_args()[0].config_dir
    return None if given is None else Path(given).absolute()


# Usual names in other codebases -> keys of this one, of which a script may have one.
USUAL = {
    "batch_size": ("trainer.global_batch_size", "batch_size"),
    "bs": ("trainer.global_batch_size", "batch_size"),
    "lr": ("optim.lr",),
    "learning_rate": ("optim.lr",),
    "wd": ("optim.weight_decay",),
    "warmup": ("optim.warmup_epochs",),
    "max_epochs": ("trainer.epochs",),
    "max_steps": ("trainer.steps",),
    "num_steps": ("trainer.steps", "sampler.steps"),
    "num_workers": ("trainer.workers", "workers"),
    "amp": ("trainer.precision", "precision"),
    "pretrained": ("trainer.init_from", "checkpoint"),
    "finetune": ("trainer.init_from",),
    "drop_path": ("model.drop_path_rate",),
    "grad_clip": ("optim.clip_grad",),
    "data_path": ("data.root",),
    "data_dir": ("data.root",),
    "output_dir": ("out_dir", "out"),
    "guidance_scale": ("sampler.cfg_scale",),
}

TRAINERS = {"train_cls.py": ClassifierTrainerConfig, "train_gen.py": GeneratorTrainerConfig}


def keys_of(config: DictConfig, prefix: str = "") -> Iterable[str]:
    """Yield the full keys of the dataclasses behind `config`."""
    schema = OmegaConf.get_type(config)
    if not dataclasses.is_dataclass(schema):
        return
    for field in dataclasses.fields(schema):
        yield f"{prefix}{field.name}"
        child = config._get_node(field.name)
        if isinstance(child, DictConfig):
            yield from keys_of(child, f"{prefix}{field.name}.")


def all_known_keys() -> list[str]:
    """Return the keys of all registered schemas, the candidates for a misspelled key."""
    store = ConfigStore.instance().repo
    keys: set[str] = set()
    for name, entry in store.items():
        if isinstance(entry, dict):
            for member, node in entry.items():  # keys are prefixed with the group's name
                if member.endswith("_schema.yaml"):
                    keys.update(keys_of(node.node, f"{name}."))
        elif name.endswith("_schema.yaml"):
            keys.update(keys_of(entry.node))
    return sorted(keys)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean '...'?"`, or `""` without a close match."""
    if word in RENAMED:
        return f"; it was renamed to '{RENAMED[word]}'"
    for script, trainer in TRAINERS.items():
        if word.removeprefix("trainer.") in trainer.__annotations__:
            return f"; only {script} has it"
    known, tail = list(known), word.rsplit(".", 1)[-1]
    near = [key for key in USUAL.get(tail, ()) if key in known][:1]
    if not near and "." not in word:  # a key without its group
        groups = ("trainer", "optim", "data", "model", "augment", "attention")
        near = [f"{group}.{word}" for group in groups if f"{group}.{word}" in known][:1]
    near = near or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    near = near or [key for key in known if key.rsplit(".", 1)[-1] == tail][:1]  # the right key in the wrong group
    return f"; did you mean '{near[0]}'?" if near and near[0] != word else ""


def options(group: str) -> list[str]:
    """Return the options of a group that fit this script."""
    store = ConfigStore.instance().repo
    schemas = {
        group: {name.removesuffix(".yaml") for name in members}
        for group, members in store.items()
        if isinstance(members, dict) and group != "hydra"
    }
    sections: dict[str, list[type]] = {}
    for name, entry in store.items():
        if name.endswith("_schema.yaml"):
            for key, hint in get_type_hints(OmegaConf.get_type(entry.node)).items():
                kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)]
                kinds = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
                sections.setdefault(key, []).extend(kinds)
    sections = {key: kinds for key, kinds in sections.items() if kinds}
    return fitting_options(group, [CONFIGS, *filter(None, [config_dir()])], schemas, sections)


def location(text: str, key: str) -> str:
    """Return `"FILE, line N: "` of the YAML file with an error, without N if several lines match; `""` if in none."""
    option = re.search(r"In '([^']+)': \w+ raised while composing", text)
    pattern = rf"\s*{re.escape(key.rpartition('.')[2])}\s*:"
    files = [root / f"{option[1]}.yaml" for root in (config_dir(), CONFIGS) if root is not None] if option else []
    for file in filter(Path.is_file, files):
        lines = [n for n, line in enumerate(file.read_text().splitlines(), start=1) if re.match(pattern, line)]
        return f"{file}, line {lines[0]}: " if len(lines) == 1 else f"{file}: "
    return ""


def explain(error: BaseException) -> str:
    """Explain an exception of Hydra or OmegaConf in one line: key, value, remedy."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    text = "\n".join(str(link) for link in chain)

    for link in chain:
        if isinstance(link, MarkedYAMLError) and (mark := link.problem_mark or link.context_mark) is not None:
            return f"{mark.name}, line {mark.line + 1}: invalid YAML ({link.problem}); quote strings with ': ' or '#'"
        if isinstance(link, OverrideParseException):
            key, _, value = link.override.partition("=")
            reason = str(link).splitlines()[0]
            return f"{key}: invalid value {value} ({reason}); quote it for the shell and Hydra: \"{key}='{value}'\""
    if match := re.search(r"Ambiguous value for argument '([^=']+)=(.*)'\n", text):
        return f"{match[1]}={match[2]}: several values; add -m to sweep, or write a list: '{match[1]}=[{match[2]}]'"
    if match := re.search(r"Unsupported interpolation type (\S+)\s+full_key: (\S+)", text):
        return f"{match[2]} uses the unknown resolver '{match[1]}'; such as ${{oc.env:NAME}}"
    if match := re.search(r"In '([^']+)/([^']+)': Could not load '[^']+_schema'", text):
        return f"{match[1]}={match[2]}: not for this script (options: {', '.join(options(match[1]))})"
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match[1].rpartition("/")
        if (new := RENAMED.get(f"{group}={option}")) is not None:
            return f"{group}={option} was renamed to {new}"
        valid = options(group) if group else []
        choices = f" (options: {', '.join(valid)})" if valid else ""
        return f"{group or 'config'}={option}: no such option" + did_you_mean(option, valid) + choices
    if match := re.search(r"In '([^']+)/([^']+)': Could not override '[^']+'\.\s*No match in the defaults list", text):
        return f"{match[1].replace('/', '=', 1)}/{match[2]}: not for this script"
    if match := re.search(r"Could not override '([^']+)'\.\s*No match in the defaults list", text):
        return f"unknown group '{match[1]}'" + did_you_mean(match[1], all_known_keys())
    if match := (
        re.search(r"Multiple values for (?P<key>\S+)\. To override a value use 'override \S+: (?P<value>.*)'", text)
        or re.search(r"force-add of config groups is not supported: '(?P<plus>\+\+)(?P<key>[^=]+)=(?P<value>.*)'", text)
        or re.search(r"already at '(?P<key>[^']+)'.*\nEither remove \+ prefix: '[^=]+=(?P<value>.*)'", text)
    ):
        plus = match.groupdict().get("plus", "+")
        return f"{match['key']} already has a value; write {match['key']}={match['value']} without '{plus}'"
    full_key = re.search(r"full_key: (\S+)", text)
    place = full_key[1] if full_key else "a value"
    if re.search(r"Key '[^']*' (is not in struct|not in '\w+')", text):
        unknown = re.search(r"Could not override '([^']+)'", text) or full_key
        if unknown is not None:
            known = did_you_mean(unknown[1], all_known_keys())
            return f"{location(text, unknown[1])}unknown key '{unknown[1]}'{known}"
    if match := re.search(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", text):
        null = " (write null for no value)" if match[1].lower() == "none" else ""
        kind = {"Integer": "an integer"}.get(match[2], f"a {match[2].lower()}")
        return f"{place} must be {kind}, got '{match[1]}'{null}"
    if match := re.search(r"Value '(.*)' is not a valid bool", text):
        return f"{place} must be true or false, got '{match[1]}'"
    if match := re.search(r"Invalid value assigned: (\w+) is not a ListConfig, list or tuple", text):
        return f"{place} must be a list such as [1, 2], got a {match[1]}"
    if match := re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", text):
        value = match[1].lower() if match[1] in ("True", "False") else match[1]
        if full_key and (new := RENAMED.get(f"{full_key[1]}={value}")):
            return f"{full_key[1]}={value} was renamed to {new}"
        return f"{place} must be one of {match[2]}, got '{match[1]}'"
    if match := re.search(
        r"field '([\w.]+)' is not Optional|Incompatible value 'None' for field of type '(\w+)'", text
    ):
        return f"{full_key[1] if full_key else match[1]} must not be null"
    if match := re.search(r"Interpolation key '([^']+)' not found", text):
        return f"{place} refers to '{match[1]}', which does not exist"
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
