"""Accuracy records: the accuracy of a classifier with all settings that it depends on, as JSON."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from vca.evaluation.record import ACCURACY_FORMAT, compute_section, log_identity, seal, training_section
from vca.runtime.distributed import World
from vca.runtime.rundir import RunDirectory, read_config

PACKAGES = ("torchvision", "timm", "numpy")
NOT_RECORDED = ("cluster", "logger", "wandb")  # sections of the config


def make_accuracy_record(
    result: Mapping[str, float],
    weights: Mapping[str, Any],
    data: Mapping[str, Any],
    run_dir: RunDirectory,
    batch_size: int,
    world: World,
) -> dict[str, Any]:
    """Build the record of one set of weights.

    Args:
        result: `top1` and, with more than five classes, `top5` in percent; `loss` in nats; `images`.
        weights: `name` (`raw` or that of the EMA), `source` (name of the run), `step`, `steps` of the whole run, and
            `sha256` of the tensors.
        data: `name` of the data set and what identifies its evaluation images, with a `sha256`.
        run_dir: directory of the run.
        batch_size: images per batch on each rank.
        world: ranks and device of the evaluation.
    """
    record = {
        "format": ACCURACY_FORMAT,
        "count": result["images"],
        "metrics": {key: result.get(key) for key in ("top1", "top5", "loss")},
        "weights": dict(weights),
        "data": dict(data),
        "config": {key: value for key, value in read_config(run_dir.path).items() if key not in NOT_RECORDED},
        "training": training_section(run_dir.path),
        "log": log_identity(run_dir.path),
        "compute": compute_section(world, batch_size, PACKAGES),
    }
    return {**record, "sha256": seal(record)}


def accuracy_record_name(record: Mapping[str, Any]) -> str:
    """Return a file name that is unique to the weights, the images, and the model and data of the config."""
    config = record["config"]
    content = [config["model"], config["attention"], {**config["data"], "root": None}]
    content += [record[key]["sha256"] for key in ("weights", "data")]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    return f"evaluation-accuracy-{record['weights']['name']}-{digest}.json"
