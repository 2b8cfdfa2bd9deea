"""The content of an evaluation record for readers: metrics and settings of the measurement, by label."""

from pathlib import Path
from typing import Any, NamedTuple

from vca.evaluation.compare import Metrics, labelled_metrics
from vca.evaluation.record import ACCURACY_FORMAT


class RecordSummary(NamedTuple):
    """An evaluation record: its file, the sha256 of the weights (None if unknown), values by label, and notes."""

    file: Path
    weights_sha256: str | None
    metrics: dict[str, str]
    protocol: dict[str, str]
    notes: list[str]


def summarize_record(file: Path, record: dict[str, Any]) -> RecordSummary:
    """Summarize a record of accuracy or of samples, as `read_record` returns it from its file."""
    compute = record["compute"]
    where = f"{compute['ranks']} x {compute['device']}, torch {compute['versions']['torch']}"
    code = f"commit {str(compute['commit'])[:12]}{', uncommitted changes' if compute['uncommitted'] else ''}"
    computed = {"computed": f"{where}, {code}"}
    if record["format"] == ACCURACY_FORMAT:
        weights, data, values = record["weights"], record["config"]["data"], record["metrics"]
        metrics = {f"top-{k} (%)": f"{values[f'top{k}']:.2f}" for k in (1, 5) if values[f"top{k}"] is not None}
        protocol = {"weights": f"{weights['source']}, step {weights['step']}, {weights['name']}"}
        images = f"{record['count']:,} evaluation images of {record['data']['name']}"
        protocol["data"] = f"{images}, {data['img_size']} px, crop_pct {data['crop_pct']}"
        return RecordSummary(file, weights["sha256"], metrics, protocol | computed, [])
    extractor, reference, made = record["extractor"], record["reference"], record["samples"]["made"]
    settings = {"missing": {}, **record["settings"]}  # earlier records have no reasons
    labelled = labelled_metrics(Metrics(**record["metrics"]), settings, record["count"], extractor["published"])
    protocol = {} if made is None else sampling_of(made)
    protocol["samples"] = f"{record['count']:,} from {record['samples']['source']}"
    protocol["reference"] = f"{reference['source']} ({reference['count'] or 'unknown number of'} images)"
    protocol["extractor"] = f"{extractor['name']}{' (FID network)' if extractor['published'] else ''}"
    values = {label: text.replace("+-", "±") for label, text in labelled.items() if not text.startswith("not computed")}
    notes = [f"no {label}: {text}" for label, text in labelled.items() if label not in values]
    sha256 = None if made is None else made["origin"]["weights_sha256"]
    return RecordSummary(file, sha256, values, protocol | computed, [*record["warnings"], *notes])


def sampling_of(made: dict[str, Any]) -> dict[str, str]:
    """Return the sampling settings of a record by label."""
    origin, sampler = made["origin"], made["sampler"]
    return {
        "weights": f"{origin.get('run') or 'a checkpoint'}, step {origin['step']}, {origin['weights']}",
        "protocol": str(made["protocol"] or "none"),
        "sampler": f"{sampler['method']}, {sampler['steps']} steps, guidance scale {sampler['cfg_scale']}, "
        f"NFE {made['nfe']['mean']:g}",
        "labels": f"{made['labels']}, seed {made['seed']}, {made['precision']}",
    }
