"""An evaluation from two sources of images or statistics to its figures: refuse what does not fit, look, compare."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from vca.evaluation.extractor import Extractor
from vca.evaluation.features import FeatureSet, measure, probe
from vca.evaluation.images import format_shape
from vca.evaluation.stats_file import StatisticsFile
from vca.metrics.fid import frechet_distance
from vca.metrics.inception_score import inception_score
from vca.metrics.kid import kernel_distance
from vca.metrics.precision_recall import precision_recall
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError, check


def check_comparable(samples: Any, reference: Any, extractor: Extractor, allow_few: bool) -> list[str]:
    """Warnings about two sources that can be compared, before anything is computed.

    Args:
        samples, reference: what `vca.evaluation.sources.open_source` found, or a `DrawnSet`.
        extractor: of both.
        allow_few: let sets pass that have fewer images than features.

    Raises:
        ConfigError: if their sizes differ, the extractor does not take them, or they are too few.
    """
    if samples.shape is not None and reference.shape is not None and tuple(samples.shape) != tuple(reference.shape):
        raise ConfigError(
            f"samples: {samples.source} holds images of {format_shape(samples.shape)}, the reference "
            f"{reference.source} of {format_shape(reference.shape)}; they must be alike"
        )
    sides = {"samples": samples, "reference": reference}
    warnings = [line for s in sides.values() if isinstance(s, StatisticsFile) for line in s.check_extractor(extractor)]
    sizes = {key: sizes_of(source, extractor) for key, source in sides.items()}
    for kind in ("pool", "spatial"):
        ours, theirs = sizes["samples"].get(kind), sizes["reference"].get(kind)
        if ours != theirs and None not in (ours, theirs):
            raise ConfigError(
                f"reference: {reference.source} has {theirs} {kind} features, {samples.source} with "
                f"extractor={extractor.name} {ours}; make the statistics again by scripts/reference_stats.py"
            )
    for key, source in sides.items():
        features = sizes[key]["pool"]
        if source.count is not None and source.count < 2:
            raise ConfigError(f"{key}: {source.source} holds {source.count} image, and a covariance needs two")
        if source.count is not None and source.count < features:
            few = f"{source.count} images are fewer than the {features} features, and the distance is biased upwards"
            if not allow_few:
                raise ConfigError(f"{key}: {source.source}: {few}; take more, or all the same: allow_few=true")
            warnings.append(f"{key}: {few}")
    check(samples.count is not None, "samples", "a set of a known number of images", samples.source)
    return warnings


def sizes_of(source: Any, extractor: Extractor) -> dict[str, int]:
    """How many features of each kind a source has."""
    if isinstance(source, StatisticsFile):
        return source.sizes
    return {name: rows.shape[1] for name, rows in probe(source, extractor).items()}


def read_features(
    source: Any, extractor: Extractor, world: World, batch_size: int, keep: int, talk: bool = True
) -> FeatureSet:
    """`measure` a set of images; or take the statistics of a file, and the features of ADM's images beside them."""
    if not isinstance(source, StatisticsFile):
        return measure(source, extractor, world, batch_size, keep, talk)
    found = source.read()
    if source.images is None or not keep:
        return found
    shown = measure(source.images, extractor, world, batch_size, keep, talk)
    return replace(found, features=shown.features, neighbours_only=True)


KID = {"subsets": 100, "subset_size": 1000, "seed": 2020}
SPLIT = 5000  # images of a split of the Inception Score
NEIGHBOURS = 3  # of precision and recall


@dataclass
class Metrics:
    """Figures; None where they could not be had.

    Attributes:
        frechet: distance of the pooled features: of Inception's it is the FID.
        spatial_frechet: of the spatial ones: sFID.
        kernel, kernel_std: KID over its subsets; a single subset has no spread.
        inception_score, inception_score_std: over its splits.
        precision, recall: from 0 to 1.
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
    """The figures, and the settings that they depend on besides the two sets.

    `dtype` is that of the distances of precision and recall. The setting `missing` says why a figure is None.
    """
    metrics = Metrics(frechet_distance(*samples.pool, *reference.pool))
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
            whole = size == len(x) == len(y)  # every subset is the same
            of = {**KID, "subsets": 1 if whole else KID["subsets"], "subset_size": size}
            settings["kid"] = {**of, "of": [len(x), len(y)]}
            metrics.kernel, spread = kernel_distance(x, y, **of)
            metrics.kernel_std = None if whole else spread
        if least > NEIGHBOURS:
            settings["neighbours"] = {"k": NEIGHBOURS, "of": [len(x), len(y)], "dtype": dtype}
            metrics.precision, metrics.recall = precision_recall(x, y, NEIGHBOURS, device, dtype)
    return metrics, settings


def why_missing(samples: FeatureSet, reference: FeatureSet) -> dict[str, str]:
    """For each figure that `compare_sets` cannot compute, the reason."""
    sides = {"samples": samples, "reference": reference}
    missing: dict[str, str] = {}
    for key, side in sides.items():
        if side.spatial is None:
            missing.setdefault("spatial_frechet", f"{key} {side.source} has no spatial features")
        kept = 0 if side.features is None else len(side.features)
        has = "statistics only, no features of single images" if side.features is None else f"features of {kept} images"
        for name, least in (("kernel", 2), ("precision", NEIGHBOURS + 1)):
            if kept < least:
                missing.setdefault(name, f"{key} {side.source} has {has}")
    if reference.neighbours_only:
        missing.setdefault("kernel", f"the images of {reference.source} are the reference of precision and recall only")
    if samples.logits is None:
        missing["inception_score"] = f"samples {samples.source} has no logits of every image"
    return missing


def labelled(metrics: Metrics, settings: dict[str, Any], count: int, published: bool) -> dict[str, str]:
    """Names that say what was measured on how many images, and the figures: FID-50K is that of 50,000 images alone.

    Args:
        metrics, settings: as `compare_sets` returns them.
        count: samples.
        published: whether the extractor is the Inception network of FID; other features make no FID.
    """
    names = ("FID", "sFID", "KID", "Inception Score")
    if not published:
        names = ("Frechet distance", "spatial Frechet distance", "kernel distance", "score of the classifier")
    shown = {f"{names[0]}{size_of(count)}": f"{metrics.frechet:.4g}"}
    if metrics.spatial_frechet is not None:
        shown[f"{names[1]}{size_of(count)}"] = f"{metrics.spatial_frechet:.4g}"
    if metrics.kernel is not None:
        spread = "" if metrics.kernel_std is None else f" +- {metrics.kernel_std:.2g}"
        shown[f"{names[2]}{size_of(settings['kid']['of'][0])}"] = f"{metrics.kernel:.4g}{spread}"
    if metrics.inception_score is not None:
        spread = f" +- {metrics.inception_score_std:.2g}" if count > SPLIT else ""
        shown[f"{names[3]}{size_of(count)}"] = f"{metrics.inception_score:.4g}{spread}"
    if metrics.precision is not None:
        of = " vs ".join(map(short, settings["neighbours"]["of"]))
        of += ", float16" if settings["neighbours"]["dtype"] == "float16" else ""
        shown[f"precision, {of}"], shown[f"recall, {of}"] = f"{metrics.precision:.4f}", f"{metrics.recall:.4f}"
    absent = {"spatial_frechet": names[1], "kernel": names[2], "inception_score": names[3]}
    for figure, reason in settings["missing"].items():
        shown[absent.get(figure, "precision, recall")] = f"not computed: {reason}"
    return shown


def size_of(count: int) -> str:
    """`-50K`, or ` (N = 49,999)`."""
    return f"-{short(count)}" if count % 1000 == 0 else f" (N = {short(count)})"


def short(count: int) -> str:
    """`50K`, or `49,999`."""
    return f"{count // 1000}K" if count % 1000 == 0 else f"{count:,}"
