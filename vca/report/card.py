"""The model card of an export: what the model is, data, recipe, figures with their records, and provenance."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vca.attention import variant_name
from vca.evaluation.record import read_record
from vca.report.accuracy import accuracy_at
from vca.report.record_summary import summarize_record
from vca.runtime.rundir import RESUME_IGNORED_KEYS, RunDirectory, config_lines, read_config

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


def figures(run: Path, step: int, weights: str, weights_sha256: str, ema: str = "ema") -> list[Figure]:
    """List the figures of one set of weights of a run.

    Args:
        step, weights: step of the checkpoint; `ema` or `raw`.
        weights_sha256: `tensors_sha256` of the weights; records of other weights are left out.
        ema: prefix of the EMA's values in `metrics.jsonl`.

    Raises:
        ConfigError: if an evaluation record was changed or is incomplete.
    """
    recorded = [*evaluation_figures(run, weights_sha256)]
    return recorded or [*logged_accuracy(run, step, weights, ema)]


def logged_accuracy(run: Path, step: int, weights: str, ema: str) -> Iterator[Figure]:
    """Yield the accuracy in `metrics.jsonl` of an evaluation without a record, such as one before the run's end."""
    records = RunDirectory(run).records()
    top1 = accuracy_at(records, step, ema)
    if weights not in top1:
        return
    data = read_config(run)["data"]
    evaluated = [record for record in records if record["step"] == step and "val/images" in record]
    images = f"{evaluated[-1]['val/images']} evaluation images of {data['name']}"
    protocol = f"{images}, {data['img_size']} px, crop_pct {data['crop_pct']}"
    yield Figure("top-1 (%)", f"{top1[weights]:.2f}", f"data: {protocol}", "metrics.jsonl")


def evaluation_figures(run: Path, weights_sha256: str) -> Iterator[Figure]:
    """Yield the figures of the evaluation records in a run directory that are of these weights."""
    for file in sorted(run.glob("evaluation-*.json")):
        record = summarize_record(file, read_record(file))
        if record.weights_sha256 == weights_sha256:
            protocol = "; ".join(f"{label}: {text}" for label, text in record.protocol.items() if label != "weights")
            for name, value in record.metrics.items():
                yield Figure(name, value, protocol, file.name)


def front_matter(config: Mapping[str, Any], license: str | None) -> str:
    """Return the YAML that the Hugging Face hub reads.

    `license` is the hub's identifier; None is MIT, or `other` if the run was initialized from existing weights.
    """
    from huggingface_hub import ModelCardData

    generates = "objective" in config
    tags = [config["model"]["family"], config["attention"]["name"], f"arxiv:{PAPER}"]
    data: Any = ModelCardData(
        license=license or ("other" if initial_weights(config) else "mit"),
        library_name="visual-contrast-attention",
        pipeline_tag="unconditional-image-generation" if generates else "image-classification",
        tags=tags if generates else [*tags, "timm"],
    )
    return data.to_yaml()


def initial_weights(config: Mapping[str, Any]) -> str | None:
    """Return the name of the file of `trainer.init_from`, None without one."""
    file = config["trainer"].get("init_from")
    return Path(file).name if file else None


def render_card(
    run: Path,
    export: Mapping[str, Any],
    parameters: int,
    shown: list[Figure],
    layout: Mapping[str, Any],
    source: str,
    license: str | None = None,
) -> str:
    """Render the model card.

    Args:
        export: content of the export's `config.json`.
        parameters: number of parameters.
        shown: figures of the exported weights.
        layout: of a generator, `file`, `code` and `arguments` of the file for the original code, or `reason` why there
            is none; empty for a classifier.
        source: folder or hub name in the example.
        license: see `front_matter`.
    """
    import jinja2

    config = export["run"]["config"]

    def lines_of(*keys: str) -> list[tuple[str, str]]:
        return config_lines({key: config[key] for key in keys if key in config}, ignored=RESUME_IGNORED_KEYS)

    diff = run / "uncommitted.diff"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.j2").render(
        front_matter=front_matter(config, license),
        export=export,
        config=config,
        attention=variant_name(config["attention"]),
        parameters=parameters,
        data=lines_of("data", "inputs"),
        identities=config.get("data_files", {}),
        recipe=lines_of(*RECIPE),
        sampler=config_lines(config["sampler"], "sampler") if "sampler" in config else [],
        figures=shown,
        launches=RunDirectory(run).launches(),
        uncommitted=diff.exists() and diff.stat().st_size > 0,
        device_hours=RunDirectory(run).device_hours(),
        layout=layout,
        source=source,
        paper=PAPER,
        license=license,
        initial_weights=initial_weights(config),
    )
