"""All figures of a set of samples against a reference, from what `features.measure` kept of both."""

from dataclasses import dataclass
from typing import Any

import torch

from vca.evaluation.features import FeatureSet
from vca.evaluation.frechet import frechet_distance
from vca.evaluation.inception_score import inception_score
from vca.evaluation.kernel import kernel_distance
from vca.evaluation.precision_recall import precision_recall

KID = {"subsets": 100, "subset_size": 1000, "seed": 2020}
SPLIT = 5000  # images of a split of the Inception Score
NEIGHBOURS = 3  # of precision and recall


@dataclass
class Metrics:
    """Figures; None where they could not be had.

    Attributes:
        frechet: distance of the pooled features: of Inception's it is the FID.
        spatial_frechet: of the spatial ones: sFID.
        kernel, kernel_std: KID over its subsets.
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
    samples: FeatureSet, reference: FeatureSet, device: torch.device | str = "cpu"
) -> tuple[Metrics, dict[str, Any]]:
    """The figures, and the settings that they depend on besides the two sets."""
    metrics = Metrics(frechet_distance(*samples.pool, *reference.pool))
    settings: dict[str, Any] = {"kid": None, "inception_score_split": None, "neighbours": None}
    if samples.spatial is not None and reference.spatial is not None:
        metrics.spatial_frechet = frechet_distance(*samples.spatial, *reference.spatial)
    if samples.logits is not None:
        metrics.inception_score, metrics.inception_score_std = inception_score(samples.logits, SPLIT)
        settings["inception_score_split"] = SPLIT
    if samples.features is not None and reference.features is not None:
        x, y = samples.features, reference.features
        least = min(len(x), len(y))
        if not reference.neighbours_only and least >= 2:
            settings["kid"] = {**KID, "subset_size": min(KID["subset_size"], least), "of": [len(x), len(y)]}
            of = {key: settings["kid"][key] for key in KID}
            metrics.kernel, metrics.kernel_std = kernel_distance(x, y, **of)
        if least > NEIGHBOURS:
            settings["neighbours"] = {"k": NEIGHBOURS, "of": [len(x), len(y)]}
            metrics.precision, metrics.recall = precision_recall(x, y, NEIGHBOURS, device)
    return metrics, settings


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
        kept = size_of(settings["kid"]["of"][0])
        shown[f"{names[2]}{kept}"] = f"{metrics.kernel:.4g} +- {metrics.kernel_std:.2g}"
    if metrics.inception_score is not None:
        spread = f" +- {metrics.inception_score_std:.2g}" if count > SPLIT else ""
        shown[f"{names[3]}{size_of(count)}"] = f"{metrics.inception_score:.4g}{spread}"
    if metrics.precision is not None:
        kept = size_of(settings["neighbours"]["of"][0])
        shown[f"precision{kept}"], shown[f"recall{kept}"] = f"{metrics.precision:.4f}", f"{metrics.recall:.4f}"
    return shown


def size_of(count: int) -> str:
    """`-50K`, or ` (N = 49,999)`."""
    return f"-{count // 1000}K" if count % 1000 == 0 else f" (N = {count:,})"
