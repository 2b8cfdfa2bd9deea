"""Evaluation records: metrics with all settings that they depend on, as JSON.

`eval_fid.py` writes records of samples (`FORMAT`), `train_cls.py` records of accuracy (`ACCURACY_FORMAT`).
`read_record`, and therefore `scripts/table.py`, rejects a record with a missing field or a changed value.
`scripts/table.py` skips records with unknown sampling settings.
"""

import hashlib
import json
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vca.evaluation.compare import Metrics
from vca.evaluation.extractor import Extractor
from vca.evaluation.features import FeatureSet
from vca.generation.objective import SamplerConfig
from vca.runtime.devices import device_name, processor_name
from vca.runtime.digest import file_sha256
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError
from vca.runtime.files import write_text
from vca.runtime.provenance import provenance
from vca.runtime.rundir import RunDirectory

FORMAT = "vca-evaluation-1"
ACCURACY_FORMAT = "vca-accuracy-1"

# Fields by section, besides the sections themselves; a dot separates nested sections. Records of samples written by
# earlier versions have no `log`, `training`, `compute.command`, `compute.processor` and `compute.threads`.
FIELDS: dict[str, tuple[str, ...]] = {
    "": ("format", "count", "warnings", "sha256"),
    "metrics": tuple(f.name for f in fields(Metrics)),
    "settings": ("kid", "inception_score_split", "neighbours"),
    "samples": ("source", "sha256", "shape"),
    "samples.made": ("protocol", "seed", "labels", "precision", "tf32", "compute_batch_size", "device", "torch"),
    "samples.made.sampler": tuple(f.name for f in fields(SamplerConfig)),
    "samples.made.origin": ("step", "weights", "training", "weights_sha256"),
    "samples.made.model": ("family", "name"),
    "samples.made.attention": ("name",),
    "samples.made.objective": ("name",),
    "samples.made.autoencoder": ("source", "name", "sha256", "channels", "factor", "scale", "shift"),
    "samples.made.nfe": ("mean", "min", "max"),
    "reference": ("source", "sha256", "count", "features"),
    "extractor": ("name", "sha256", "published", "dtype", "tf32"),
    "compute": ("batch_size", "ranks", "device", "commit", "uncommitted"),
    "compute.versions": ("python", "torch", "torch_fidelity", "numpy"),
}
ACCURACY_FIELDS: dict[str, tuple[str, ...]] = {
    "": ("format", "count", "config", "training", "log", "sha256"),
    "metrics": ("top1", "top5", "loss"),
    "weights": ("name", "source", "step", "steps", "sha256"),
    "data": ("name", "sha256"),
    "compute": ("batch_size", "ranks", "device", "processor", "threads", "command", "commit", "uncommitted"),
    "compute.versions": ("python", "torch", "torchvision", "timm", "numpy"),
}
FIELDS_OF = {FORMAT: FIELDS, ACCURACY_FORMAT: ACCURACY_FIELDS}
# Where and with which software a record was computed; no influence on the metrics.
INCIDENTAL = ("samples.source", "reference.source", "compute", "log", "training")
# Keys of a launch that a record repeats, without the host's name and SLURM's numbers.
LAUNCH: tuple[str, ...] = ("time", "command", "first_step", "commit", "uncommitted", "torch")
LAUNCH += ("ranks", "device", "processor", "cores", "threads")
UNKNOWN_SETTINGS = "sampling settings unknown (not a sample.py folder): excluded from scripts/table.py"


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
    run: str | None = None,
) -> dict[str, Any]:
    """Build the record; `made` contains the sampling settings, None if unknown; `run` is the generator's run."""
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
        "log": log_identity(Path(run)) if run is not None else None,
        "training": training_section(Path(run)) if run is not None else None,
        "compute": compute_section(world, batch_size, ("torch-fidelity", "numpy")),
        "warnings": warnings,
    }
    return {**record, "sha256": seal(record)}


def compute_section(world: World, batch_size: int, packages: Iterable[str]) -> dict[str, Any]:
    """Return where, by which command and with which software this process computes."""
    commit, diff = provenance()
    return {
        "batch_size": batch_size,
        "ranks": world.size,
        "device": device_name(world.device),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "command": shlex.join(sys.argv),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package.replace("-", "_"): version(package) for package in packages},
        },
        "commit": commit,
        "uncommitted": bool(diff),
    }


def log_identity(run: Path) -> dict[str, str] | None:
    """Return name and sha256 of a run's `metrics.jsonl`, None if it has none."""
    file = run / "metrics.jsonl"
    return {"file": file.name, "sha256": file_sha256(file)} if file.is_file() else None


def training_section(run: Path) -> dict[str, Any]:
    """Return the starts of a run, and whether the last one had uncommitted changes."""
    diff = run / "uncommitted.diff"
    return {
        "launches": [{key: launch.get(key) for key in LAUNCH} for launch in RunDirectory(run).launches()],
        "uncommitted": diff.is_file() and bool(diff.read_bytes()),
    }


def run_of_samples(samples: str, made: dict[str, Any] | None) -> str | None:
    """Return the run that generated a set of samples, if the set is in its directory; else None."""
    name = ((made or {}).get("origin") or {}).get("run")
    folders = Path(samples).expanduser().resolve().parents[:2]  # of a sample folder, or of `images/` in it
    return next((str(folder) for folder in folders if name and folder.name == name), None)


def seal(record: dict[str, Any]) -> str:
    """Return the sha256 of a record without its `sha256`."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def record_location(run: str | None, samples: str) -> tuple[Path, str]:
    """Return the default folder of a record and the prefix of its name: in the run or sample folder, or beside it."""
    if run is not None:
        return Path(run), ""
    if samples.startswith("data:"):
        return Path(), ""
    path = Path(samples).expanduser().resolve()
    return (path, "") if (path / "manifest.json").is_file() else (path.parent, f"{path.stem}-")


def record_name(record: dict[str, Any]) -> str:
    """Return a file name that is unique to samples, weights, reference, extractor and settings."""
    content = {key: record[key] for key in ("count", "settings", "extractor")}
    content |= {key: record[key]["sha256"] for key in ("samples", "reference")}
    made = record["samples"]["made"] or {}
    content["protocol"] = made.get("protocol")
    content["weights"] = (made.get("origin") or {}).get("weights_sha256")
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    return f"evaluation-{record['extractor']['name']}-{record['count']}-{digest}.json"


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record atomically.

    Raises:
        ConfigError: if the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, record_text(record))
    except OSError as error:
        raise ConfigError(f"out: cannot write {path}: {error.strerror}") from error


def record_text(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2) + "\n"


def check_writable(file: Path) -> None:
    """Raise `ConfigError` unless the folder of a file is writable; called before the computation."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise ConfigError(f"out: cannot write to {file.parent}: {error.strerror}; choose another out=FILE") from error


def read_record(path: Path) -> dict[str, Any]:
    """Read a record and verify that it is complete and unchanged.

    Raises:
        ConfigError: if the file cannot be read, a field is missing, or the record has changed.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from error
    if missing := missing_fields(record):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"{path} has no field {missing[0]}{more}; evaluate again")
    if record["format"] not in FIELDS_OF:
        formats = " or ".join(FIELDS_OF)
        raise ConfigError(f"{path} must have format {formats}, got {record['format']}; evaluate again")
    if record["sha256"] != seal(record):
        raise ConfigError(f"{path} has changed since it was written; evaluate again")
    return record


def missing_fields(record: dict[str, Any]) -> list[str]:
    """Return the full names of missing fields."""
    if not isinstance(record, dict):
        return ["format"]
    missing: list[str] = []
    unknown = isinstance(record.get("samples"), dict) and record["samples"].get("made", "") is None
    for section, names in FIELDS_OF.get(str(record.get("format")), FIELDS).items():
        if unknown and section.startswith("samples.made"):
            continue  # sampling settings unknown
        part: Any = record
        for step in filter(None, section.split(".")):
            part = part.get(step) if isinstance(part, dict) else None
        if isinstance(part, dict):
            missing += [f"{section}.{name}".lstrip(".") for name in names if name not in part]
        else:
            missing.append(section)
    return missing
