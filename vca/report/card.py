"""The model card of an export: what the model is, data, recipe, figures with their records, and provenance."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vca.attention import variant_name
from vca.evaluation.compare import Metrics, labelled_metrics
from vca.evaluation.record import ACCURACY_FORMAT, FORMAT, read_record
from vca.report.accuracy import accuracy_at
from vca.runtime.rundir import RESUME_IGNORED_KEYS, RunDirectory, parse_json, read_config

PAPER = "2511.00833"  # on arXiv
RECIPE = ("seed", "model", "attention", "augment", "optim", "trainer", "objective", "autoencoder")


@dataclass(frozen=True)
class Figure:
    """A measured figure.

    Attributes:
        name, value: what was measured, such as `FID-50K`, and the result with its unit.
        protocol: settings of the measurement.
        file: name of the record in the run directory.
    """

    name: str
    value: str
    protocol: str
    file: str


def figures(run: Path, step: int, weights: str, weights_sha256: str) -> list[Figure]:
    """List the figures of one set of weights of a run.

    Args:
        step, weights: step of the checkpoint; `ema` or `raw`.
        weights_sha256: `tensors_sha256` of the weights; records of other weights are left out.

    Raises:
        ConfigError: if an evaluation record was changed or is incomplete.
    """
    recorded = [*evaluation_figures(run, weights_sha256)]
    measured = any(figure.name == "top-1" for figure in recorded)
    return recorded if measured else [*logged_accuracy(run, step, weights), *recorded]


def logged_accuracy(run: Path, step: int, weights: str) -> Iterator[Figure]:
    """Yield the accuracy in `metrics.jsonl` of an evaluation without a record, such as one before the run's end."""
    records = RunDirectory(run).records()
    top1 = accuracy_at(records, step)
    if weights not in top1:
        return
    data = read_config(run)["data"]
    evaluated = [record for record in records if record["step"] == step and "val/images" in record]
    images = f"{evaluated[-1]['val/images']} evaluation images of {data['name']}"
    protocol = f"{images}, {data['img_size']} px, crop_pct {data['crop_pct']}"
    yield Figure("top-1", f"{top1[weights]:.2f} %", protocol, "metrics.jsonl")


def evaluation_figures(run: Path, weights_sha256: str) -> Iterator[Figure]:
    """Yield the figures of the evaluation records in a run directory that are of these weights."""
    for file in sorted(run.glob("evaluation-*.json")):
        content = parse_json(file.read_bytes()) or {}
        if (figures_in := FIGURES_OF.get(content.get("format", FORMAT))) is not None:
            yield from figures_in(read_record(file), weights_sha256, file.name)


def sample_figures(record: Mapping[str, Any], weights_sha256: str, file: str) -> Iterator[Figure]:
    """Yield the metrics of a record of `eval_fid.py`."""
    made = record["samples"]["made"]
    if made is None or made["origin"]["weights_sha256"] != weights_sha256:
        return
    metrics, settings = Metrics(**record["metrics"]), {**record["settings"], "missing": {}}
    for name, value in labelled_metrics(metrics, settings, record["count"], record["extractor"]["published"]).items():
        yield Figure(name, value, evaluation_protocol(record), file)


def accuracy_figures(record: Mapping[str, Any], weights_sha256: str, file: str) -> Iterator[Figure]:
    """Yield the metrics of an accuracy record."""
    if record["weights"]["sha256"] != weights_sha256:
        return
    data = record["config"]["data"]
    images = f"{record['count']} evaluation images of {data['name']}"
    protocol = f"{images}, {data['img_size']} px, crop_pct {data['crop_pct']}"
    for name, key in (("top-1", "top1"), ("top-5", "top5")):
        if record["metrics"][key] is not None:
            yield Figure(name, f"{record['metrics'][key]:.2f} %", protocol, file)


# format of a record -> function that lists its figures; records of other formats are skipped
FIGURES_OF: dict[str, Callable[[Mapping[str, Any], str, str], Iterator[Figure]]] = {
    FORMAT: sample_figures,
    ACCURACY_FORMAT: accuracy_figures,
}


def evaluation_protocol(record: Mapping[str, Any]) -> str:
    """Describe how a record was measured."""
    made, reference = record["samples"]["made"], record["reference"]
    sampler = made["sampler"]
    steps = "" if sampler["steps"] is None else f", {sampler['steps']} steps"
    parts = [
        f"protocol {made['protocol']}" if made["protocol"] else "no published protocol",
        f"{sampler['method']}{steps}, guidance scale {sampler['cfg_scale']:g}, {made['precision']}",
        f"seed {made['seed']}, {record['extractor']['name']} features",
        f"reference {Path(reference['source']).name} ({reference['count']} images)",
    ]
    return "; ".join(parts)


def launches(run: Path) -> list[dict[str, Any]]:
    """Return the starts of a run from its `launches.jsonl`, oldest first."""
    file = run / "launches.jsonl"
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    return [record for line in lines if (record := parse_json(line)) is not None]


def flatten(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield `(key, value)` of each leaf of a config that can change results, as on the command line."""
    if key in RESUME_IGNORED_KEYS:
        return
    if isinstance(value, dict):
        for name, item in value.items():
            yield from flatten(item, f"{key}.{name}")
    else:
        yield key, value if isinstance(value, str) else json.dumps(value)


def front_matter(config: Mapping[str, Any]) -> str:
    """Return the YAML that the Hugging Face hub reads."""
    from huggingface_hub import ModelCardData

    generates = "objective" in config
    tags = [config["model"]["family"], config["attention"]["name"], f"arxiv:{PAPER}"]
    data: Any = ModelCardData(
        license="mit",
        library_name="visual-contrast-attention",
        pipeline_tag="unconditional-image-generation" if generates else "image-classification",
        tags=tags if generates else [*tags, "timm"],
    )
    return data.to_yaml()


def render_card(
    run: Path,
    export: Mapping[str, Any],
    parameters: int,
    shown: list[Figure],
    layout: Mapping[str, Any],
    source: str,
) -> str:
    """Render the model card.

    Args:
        export: content of the export's `config.json`.
        parameters: number of parameters.
        shown: figures of the exported weights.
        layout: of a generator, `file`, `code` and `arguments` of the file for the original code, or `reason` why there
            is none; empty for a classifier.
        source: folder or hub name in the example.
    """
    import jinja2

    config = export["run"]["config"]
    diff = run / "uncommitted.diff"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.j2").render(
        front_matter=front_matter(config),
        export=export,
        config=config,
        attention=variant_name(config["attention"]),
        parameters=parameters,
        data=[*flatten(config["data"], "data"), *flatten(config.get("inputs", {}), "inputs")],
        identities=config.get("data_files", {}),
        recipe=[pair for key in RECIPE if key in config for pair in flatten(config[key], key)],
        sampler=[pair for key, value in config.get("sampler", {}).items() for pair in flatten(value, f"sampler.{key}")],
        figures=shown,
        launches=launches(run),
        uncommitted=diff.exists() and diff.stat().st_size > 0,
        device_hours=RunDirectory(run).device_hours(),
        layout=layout,
        source=source,
        paper=PAPER,
    )
