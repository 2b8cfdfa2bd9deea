"""An evaluation from two sources of images or statistics to its figures: refuse what does not fit, look, compare."""

from dataclasses import replace
from typing import Any

from vca.evaluation.extractor import Extractor
from vca.evaluation.features import FeatureSet, measure, probe
from vca.evaluation.images import describe
from vca.evaluation.statistics_file import StatisticsFile
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
            f"samples: {samples.source} holds images of {describe(samples.shape)}, the reference "
            f"{reference.source} of {describe(reference.shape)}; they must be alike"
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
