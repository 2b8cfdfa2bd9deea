"""Results of accepted records: one per run and metric, and their groups over seeds."""

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vca.evaluation.record import ACCURACY_FORMAT, read_record
from vca.report.acceptable import check_acceptable
from vca.report.sweep_table import flatten_config
from vca.runtime.errors import ConfigError

COMPARED = ("model", "attention", "objective", "data", "augment", "optim", "trainer")  # with a row's experiment
REFERENCE = "VIRTUAL_imagenet256_labeled.npz"  # ADM's file; its name is checked


@dataclass
class Result:
    """What the records of one run measured.

    Attributes:
        config: the flattened config, without keys that cannot change results.
        seed: seed of the run.
        metric: such as `top-1 (%)`.
        values: weights (`ema`, `raw`) -> value.
        records: weights -> record and its path.
    """

    config: dict[str, Any]
    seed: int
    metric: str
    values: dict[str, float] = field(default_factory=dict)
    records: dict[str, tuple[Path, dict[str, Any]]] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """Value of the EMA if the run has one, else of the raw weights."""
        return self.values["ema"] if "ema" in self.values else next(iter(self.values.values()))

    def any_record(self) -> dict[str, Any]:
        return next(iter(self.records.values()))[1]


def read_results(folder: Path) -> list[Result]:
    """Read and check all records in a folder; records of one run and metric are one result.

    Raises:
        ConfigError: if a record cannot be accepted, or two runs have the same config and seed.
    """
    results: dict[str, Result] = {}
    for path in sorted(folder.rglob("*.json")):
        record = read_record(path)
        check_acceptable(path, record)
        if record["format"] == ACCURACY_FORMAT:
            metric, config, weights = "top-1 (%)", record["config"], record["weights"]["name"]
            value = record["metrics"]["top1"]
            measured = {"data": record["data"]["sha256"][:8], "images": record["count"]}
        else:
            made, count = record["samples"]["made"], record["count"]
            fid = record["extractor"]["published"] and count == 50_000
            metric = "FID-50K" if fid else f"Frechet distance, {count:,} samples, {record['extractor']['name']}"
            parts = {key: made[key] for key in ("model", "attention", "objective")}
            sampling = {key: made[key] for key in ("sampler", "protocol", "labels")}
            config = {**parts, **made["origin"]["training"], "sampling": sampling}
            weights = made["origin"]["weights"]
            value = record["metrics"]["frechet"]
            measured = {key: record[key]["sha256"][:8] for key in ("reference", "extractor")}
        flat = flatten_config({**config, "measured": measured})  # other images or networks are another row
        key = json.dumps([flat, config["seed"], metric], sort_keys=True)
        result = results.setdefault(key, Result(flat, config["seed"], metric))
        if weights in result.records:
            other = result.records[weights][0]
            raise ConfigError(f"{other} and {path} have the same config, seed and weights; remove one of them")
        result.values[weights], result.records[weights] = value, (path, record)
    return list(results.values())


def by_config(results: Iterable[Result], without: str = "") -> list[list[Result]]:
    """Group results that differ only in the seed (and in the key `without`), ordered by seed."""
    groups: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda one: one.seed):
        config = {key: value for key, value in result.config.items() if key != without}
        groups.setdefault(json.dumps([config, result.metric], sort_keys=True), []).append(result)
    return list(groups.values())


def label_of(result: Result, results: Iterable[Result], attention: bool = True) -> str:
    """Return data, model, attention and length of a run, and the options in which runs equal in these differ."""
    config = result.config
    names = ["data.name", "model.name", *(["attention"] if attention else [])]
    length = ("trainer.steps", "steps") if config["trainer.steps"] is not None else ("trainer.epochs", "epochs")
    alike = [one for one in results if all(one.config.get(key) == config.get(key) for key in [*names, length[0]])]
    keys = sorted({key for one in alike for key in one.config} - {"attention"})
    differing = [key for key in keys if len({json.dumps(one.config.get(key)) for one in alike}) > 1]
    options = [f"{key.removeprefix('trainer.')}={config.get(key)}" for key in differing]
    return ", ".join([*(str(config[name]) for name in names), f"{config[length[0]]} {length[1]}", *options])


def mean_std(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def with_seeds(values: list[float]) -> str:
    """Format `98.50 ± 0.71 (2 seeds)`."""
    return f"{mean_std(values)} ({len(values)} seed{'s' if len(values) > 1 else ''})"


def different_options(wanted: Mapping[str, Any], got: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which a flattened config differs from an experiment's, with both values.

    Only the groups of `COMPARED` that the experiment's config `wanted` has are compared.
    """
    groups = [key for key in COMPARED if key in wanted]
    flat = flatten_config({key: wanted[key] for key in groups})
    keys = sorted({*flat, *(key for key in got if key.partition(".")[0] in groups)})
    return {key: (flat.get(key), got.get(key)) for key in keys if flat.get(key) != got.get(key)}
