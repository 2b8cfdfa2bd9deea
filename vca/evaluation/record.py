"""The record of an evaluation: its figures and everything that they depend on, as JSON.

A figure without its protocol is no result: a record that lacks a field, or was changed after it was written, is refused
by `read_record`, and so by `scripts/table.py`; one that says that nobody knows how its samples were made is left out.
"""

import hashlib
import json
import platform
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from vca.evaluation.compare import Metrics
from vca.evaluation.extractor import Extractor
from vca.evaluation.features import FeatureSet
from vca.generation.objective import SamplerConfig
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError
from vca.runtime.files import write_text
from vca.runtime.provenance import provenance

FORMAT = "vca-evaluation-1"
SAMPLER = tuple(f.name for f in fields(SamplerConfig))

# Fields by section; a dot leads into a section of a section.
FIELDS: dict[str, tuple[str, ...]] = {
    "": (
        "format",
        "count",
        "metrics",
        "settings",
        "samples",
        "reference",
        "extractor",
        "compute",
        "warnings",
        "sha256",
    ),
    "metrics": tuple(f.name for f in fields(Metrics)),
    "settings": ("kid", "inception_score_split", "neighbours"),
    "samples": ("source", "sha256", "shape", "made"),
    "samples.made": (
        "protocol",
        "seed",
        "labels",
        "sampler",
        "precision",
        "tf32",
        "compute_batch_size",
        "device",
        "torch",
        "origin",
        "model",
        "attention",
        "objective",
        "autoencoder",
        "nfe",
    ),
    "samples.made.sampler": SAMPLER,
    "samples.made.origin": ("step", "weights", "training", "weights_sha256"),
    "samples.made.model": ("family", "name"),
    "samples.made.attention": ("name",),
    "samples.made.objective": ("name",),
    "samples.made.autoencoder": ("source", "name", "sha256", "channels", "factor", "scale", "shift"),
    "samples.made.nfe": ("mean", "min", "max"),
    "reference": ("source", "sha256", "count", "features"),
    "extractor": ("name", "sha256", "published", "dtype", "tf32"),
    "compute": ("batch_size", "ranks", "device", "versions", "commit", "uncommitted"),
    "compute.versions": ("python", "torch", "torch_fidelity", "numpy"),
}
# What says who computed a record and where it lies, not what it says.
INCIDENTAL = ("samples.source", "reference.source", "compute")


def make_record(
    metrics: Metrics,
    settings: dict[str, Any],
    samples: FeatureSet,
    reference: FeatureSet,
    extractor: Extractor,
    made: dict[str, Any] | None,
    warnings: list[str],
    batch_size: int,
    world: World,
) -> dict[str, Any]:
    """The record; `made` says how the samples were drawn, None if nobody knows."""
    from importlib.metadata import version

    import numpy as np

    commit, diff = provenance()
    record = {
        "format": FORMAT,
        "count": samples.count,
        "metrics": asdict(metrics),
        "settings": settings,
        "samples": {
            "source": samples.source,
            "sha256": samples.sha256,
            "shape": list(samples.shape or ()),
            "made": made,
        },
        "reference": {
            "source": reference.source,
            "sha256": reference.sha256,
            "count": reference.count,
            "features": 0 if reference.features is None else len(reference.features),
        },
        "extractor": {**extractor.identity(), "dtype": "float32", "tf32": False},
        "compute": {
            "batch_size": batch_size,
            "ranks": world.size,
            "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torch_fidelity": version("torch-fidelity"),
                "numpy": np.__version__,
            },
            "commit": commit,
            "uncommitted": bool(diff),
        },
        "warnings": warnings,
    }
    return {**record, "sha256": seal(record)}


def seal(record: dict[str, Any]) -> str:
    """sha256 of all of a record but this."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def record_path(folder: Path, prefix: str, record: dict[str, Any]) -> Path:
    """A name that only the same evaluation has: of the same samples, reference, extractor and settings."""
    content = {key: record[key] for key in ("count", "settings", "extractor")}
    content |= {key: record[key]["sha256"] for key in ("samples", "reference")}
    content["protocol"] = (record["samples"]["made"] or {}).get("protocol")
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"{prefix}evaluation-{record['extractor']['name']}-{record['count']}-{digest}.json"


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record as a whole.

    Raises:
        ConfigError: if the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"out: {path} cannot be written: {error.strerror}") from error


def check_writable(file: Path) -> None:
    """Raise `ConfigError` before the work is done unless a file can be written beside this name."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise ConfigError(f"out: {file.parent} cannot be written: {error.strerror}; choose another out=FILE") from error


def read_record(path: Path) -> dict[str, Any]:
    """A record, complete and unchanged.

    Raises:
        ConfigError: names the field that is missing, or says that the record was changed.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from error
    if missing := missing_fields(record):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"{path} does not name {missing[0]}{more}; evaluate again")
    if record["format"] != FORMAT:
        raise ConfigError(f"{path} has format {record['format']}, not {FORMAT}; evaluate again")
    if record["sha256"] != seal(record):
        raise ConfigError(f"{path} was changed after it was written; evaluate again")
    return record


def missing_fields(record: dict[str, Any]) -> list[str]:
    """Full names of the fields that a record lacks."""
    missing: list[str] = []
    if not isinstance(record, dict):
        return ["format"]
    unknown = isinstance(record.get("samples"), dict) and record["samples"].get("made", "") is None
    for section, names in FIELDS.items():
        if unknown and section.startswith("samples.made"):
            continue  # nobody knows how the samples were made, and the record says so
        part: Any = record
        for step in filter(None, section.split(".")):
            part = part.get(step) if isinstance(part, dict) else None
        if isinstance(part, dict):
            missing += [f"{section}.{name}".lstrip(".") for name in names if name not in part]
        elif section not in missing:
            missing.append(section)
    return missing
