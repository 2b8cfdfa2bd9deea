"""Accuracy records: the accuracy of a classifier with all settings that it depends on, as JSON."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vca.evaluation.record import ACCURACY_FORMAT, compute_section, log_identity, seal
from vca.runtime.distributed import World
from vca.runtime.rundir import RunDirectory

PACKAGES = ("torchvision", "timm", "numpy")
# Keys of a launch that a record repeats, besides the host's name and SLURM's numbers.
LAUNCH = ("time", "command", "first_step", "commit", "ranks", "device", "processor", "cores", "threads", "torch")
NOT_RECORDED = ("cluster", "logger", "wandb")  # sections of the config


def make_accuracy_record(
    config: Mapping[str, Any],
    result: Mapping[str, float],
    weights: Mapping[str, Any],
    data: Mapping[str, Any],
    run: Path | None,
    batch_size: int,
    world: World,
) -> dict[str, Any]:
    """Build the record of one set of weights.

    Args:
        config: the resolved config, as in the run's `config.json`.
        result: `top1` and, with more than five classes, `top5` in percent; `loss` in nats; `images`.
        weights: `name` (`raw`, `ema` or `file`), `source` (name of the run or file), `step` and `steps` (of the whole
            run; both None for a file), and `sha256` of the tensors.
        data: `name` of the data set and what identifies its evaluation images, with a `sha256`.
        run: directory of the run that trained the weights, None if they are from a file.
        batch_size: images per batch on each rank.
        world: ranks and device of the evaluation.
    """
    record = {
        "format": ACCURACY_FORMAT,
        "count": result["images"],
        "metrics": {key: result.get(key) for key in ("top1", "top5", "loss")},
        "weights": dict(weights),
        "data": dict(data),
        "config": {key: value for key, value in config.items() if key not in NOT_RECORDED},
        "training": None if run is None else training_section(run),
        "log": None if run is None else log_identity(run),
        "compute": compute_section(world, batch_size, PACKAGES),
    }
    return {**record, "sha256": seal(record)}


def training_section(run: Path) -> dict[str, Any]:
    """Return the starts of a run, and whether the last one had uncommitted changes."""
    launches, diff = RunDirectory(run).launches(), run / "uncommitted.diff"
    return {
        "launches": [{key: launch.get(key) for key in LAUNCH} for launch in launches],
        "uncommitted": diff.is_file() and bool(diff.read_bytes()),
    }


def accuracy_record_name(record: Mapping[str, Any]) -> str:
    """Return a file name that is unique to the weights, the images, and the model and data of the config."""
    config = record["config"]
    content = [config["model"], config["attention"], {**config["data"], "root": None}]
    content += [record[key]["sha256"] for key in ("weights", "data")]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    return f"evaluation-accuracy-{record['weights']['name']}-{digest}.json"
