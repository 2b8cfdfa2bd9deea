"""Compare two sets of images or statistics: check that they are comparable, extract features, compute metrics."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from vca.evaluation.extractor import Extractor
from vca.evaluation.features import FeatureSet, feature_sizes, measure
from vca.evaluation.images import format_shape
from vca.evaluation.stats_file import StatisticsFile
from vca.metrics.fid import frechet_distance
from vca.metrics.inception_score import inception_score
from vca.metrics.kid import kernel_distance
from vca.metrics.precision_recall import precision_recall
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError, check


def check_comparable(samples: Any, reference: Any, extractor: Extractor, allow_few: bool) -> list[str]:
    """Check that two sources are comparable, before any computation, and return warnings.

    Args:
        samples, reference: results of `vca.evaluation.sources.open_source`, or `GeneratedImages`.
        extractor: feature extractor of both.
        allow_few: accept sets with fewer images than features.

    Raises:
        ConfigError: if image sizes differ, the extractor does not accept the images, or there are too few.
    """
    if samples.shape is not None and reference.shape is not None and tuple(samples.shape) != tuple(reference.shape):
        raise ConfigError(
            f"samples: images of {samples.source} must have the size of the reference {reference.source}, "
            f"{format_shape(reference.shape)}, got {format_shape(samples.shape)}"
        )
    sides = {"samples": samples, "reference": reference}
    warnings = [line for s in sides.values() if isinstance(s, StatisticsFile) for line in s.check_extractor(extractor)]
    sizes = {
        key: source.sizes if isinstance(source, StatisticsFile) else feature_sizes(source, extractor)
        for key, source in sides.items()
    }
    for kind in ("pooled", "spatial"):
        ours, theirs = sizes["samples"].get(kind), sizes["reference"].get(kind)
        if ours != theirs and None not in (ours, theirs):
            raise ConfigError(
                f"reference: {reference.source} must have {ours} {kind} features (extractor={extractor.name}), got "
                f"{theirs}; recreate the statistics with scripts/reference_stats.py"
            )
    for key, source in sides.items():
        features = sizes[key]["pooled"]
        if source.count is not None and source.count < 2:
            raise ConfigError(f"{key}: {source.source} must contain at least 2 images, got {source.count}")
        if source.count is not None and source.count < features:
            few = f"{source.count} images for {features} features bias the distance upwards"
            if not allow_few:
                raise ConfigError(f"{key}: {source.source}: {few}; use more images, or set allow_few=true")
            warnings.append(f"{key}: {few}")
    check(samples.count is not None, "samples", "a set with a known number of images", samples.source)
    return warnings


def read_features(
    source: Any, extractor: Extractor, world: World, batch_size: int, keep: int, verbose: bool = True
) -> FeatureSet:
    """Measure a set of images, or read a statistics file and measure the images that ADM's files contain."""
    if not isinstance(source, StatisticsFile):
        return measure(source, extractor, world, batch_size, keep, verbose)
    statistics = source.read()
    if source.images is None or not keep:
        return statistics
    images = measure(source.images, extractor, world, batch_size, keep, verbose)
    return replace(statistics, features=images.features, neighbours_only=True)


KID = {"subsets": 100, "subset_size": 1000, "seed": 2020}
SPLIT = 5000  # images per split of the Inception Score
NEIGHBOURS = 3  # k of precision and recall


@dataclass
class Metrics:
    """Metric values; None if not computed.

    Attributes:
        frechet: Frechet distance of the pooled features; FID with Inception.
        spatial_frechet: Frechet distance of the spatial features; sFID.
        kernel, kernel_std: KID, mean and std over subsets; no std for a single subset.
        inception_score, inception_score_std: mean and std over splits.
        precision, recall: fractions in [0, 1].
    """

    frechet: float
    spatial_frechet: float | None = None
    kernel: float | None = None
    kernel_std: float | None = None
    inception_score: float | None = None
    inception_score_std: float | None = None
    precision: float | None = None
    recall: float | None = None


def compare_sets(
    samples: FeatureSet, reference: FeatureSet, device: torch.device | str = "cpu", dtype: str = "float64"
) -> tuple[Metrics, dict[str, Any]]:
    """Compute the metrics, and return them with the settings that they depend on.

    `dtype` is that of the distances of precision and recall. The setting `missing` has the reason for each None.
    """
    metrics = Metrics(frechet_distance(*samples.pooled, *reference.pooled))
    settings: dict[str, Any] = {"kid": None, "inception_score_split": None, "neighbours": None}
    settings["missing"] = why_missing(samples, reference)
    if samples.spatial is not None and reference.spatial is not None:
        metrics.spatial_frechet = frechet_distance(*samples.spatial, *reference.spatial)
    if samples.logits is not None:
        metrics.inception_score, metrics.inception_score_std = inception_score(samples.logits, SPLIT)
        settings["inception_score_split"] = SPLIT
    if samples.features is not None and reference.features is not None:
        x, y = samples.features, reference.features
        least = min(len(x), len(y))
        if not reference.neighbours_only and least >= 2:
            size = min(KID["subset_size"], least)
            whole = size == len(x) == len(y)  # all subsets are identical
            options = {**KID, "subsets": 1 if whole else KID["subsets"], "subset_size": size}
            settings["kid"] = {**options, "of": [len(x), len(y)]}
            metrics.kernel, std = kernel_distance(x, y, **options)
            metrics.kernel_std = None if whole else std
        if least > NEIGHBOURS:
            settings["neighbours"] = {"k": NEIGHBOURS, "of": [len(x), len(y)], "dtype": dtype}
            metrics.precision, metrics.recall = precision_recall(x, y, NEIGHBOURS, device, dtype)
    return metrics, settings


def why_missing(samples: FeatureSet, reference: FeatureSet) -> dict[str, str]:
    """Return the reason for each metric that `compare_sets` cannot compute."""
    sides = {"samples": samples, "reference": reference}
    missing: dict[str, str] = {}
    for key, side in sides.items():
        if side.spatial is None:
            missing.setdefault("spatial_frechet", f"{key} {side.source} has no spatial features")
        kept = 0 if side.features is None else len(side.features)
        has = "no features of individual images" if side.features is None else f"features of {kept} images"
        for name, least in (("kernel", 2), ("precision", NEIGHBOURS + 1)):
            if kept < least:
                missing.setdefault(name, f"{key} {side.source} has {has}")
    if reference.neighbours_only:
        missing.setdefault("kernel", f"the images of {reference.source} are for precision and recall only")
    if samples.logits is None:
        missing["inception_score"] = f"samples {samples.source} does not have logits of every image"
    return missing


def frechet_label(count: int, published: bool) -> str:
    """Return the label of the Frechet distance, such as `FID-50K`; see `labelled_metrics`."""
    return f"{'FID' if published else 'Frechet distance'}{size_suffix(count)}"


def labelled_metrics(metrics: Metrics, settings: dict[str, Any], count: int, published: bool) -> dict[str, str]:
    """Return metric values by a label with the number of images: FID-50K is only for exactly 50,000 samples.

    The label is FID only if `published`: the extractor is FID's Inception network.
    """
    names = ("sFID", "KID", "Inception Score")
    if not published:
        names = ("spatial Frechet distance", "kernel distance", "classifier score")
    lines = {frechet_label(count, published): f"{metrics.frechet:.4g}"}
    if metrics.spatial_frechet is not None:
        lines[f"{names[0]}{size_suffix(count)}"] = f"{metrics.spatial_frechet:.4g}"
    if metrics.kernel is not None:
        std = "" if metrics.kernel_std is None else f" +- {metrics.kernel_std:.2g}"
        lines[f"{names[1]}{size_suffix(settings['kid']['of'][0])}"] = f"{metrics.kernel:.4g}{std}"
    if metrics.inception_score is not None:
        std = f" +- {metrics.inception_score_std:.2g}" if count > SPLIT else ""
        lines[f"{names[2]}{size_suffix(count)}"] = f"{metrics.inception_score:.4g}{std}"
    if metrics.precision is not None:
        sizes = " vs ".join(map(format_count, settings["neighbours"]["of"]))
        sizes += ", float16" if settings["neighbours"]["dtype"] == "float16" else ""
        lines[f"precision, {sizes}"], lines[f"recall, {sizes}"] = f"{metrics.precision:.4f}", f"{metrics.recall:.4f}"
    missing = {"spatial_frechet": names[0], "kernel": names[1], "inception_score": names[2]}
    for name, reason in settings["missing"].items():
        lines[missing.get(name, "precision, recall")] = f"not computed: {reason}"
    return lines


def size_suffix(count: int) -> str:
    """Format a count as `-50K` or ` (N = 49,999)`."""
    return f"-{format_count(count)}" if count % 1000 == 0 else f" (N = {format_count(count)})"


def format_count(count: int) -> str:
    """Format a count as `50K` or `49,999`."""
    return f"{count // 1000}K" if count % 1000 == 0 else f"{count:,}"
