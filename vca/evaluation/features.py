"""Extract features of a set of images in one pass: moments over all images, and the features of a subset.

Images are processed in blocks of fixed size, distributed round-robin over ranks. The world size therefore changes only
the order of float64 sums. Features are gathered on rank 0.

Shape letters: N images, n images with stored features, D features, S spatial features, K classes.
"""

import time
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vca.evaluation.extractor import Extractor, Features
from vca.evaluation.feature_stats import FeatureStatistics
from vca.evaluation.images import format_shape
from vca.runtime.digest import image_sha256, images_sha256
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError, NonFiniteError
from vca.runtime.metrics_log import progress_bar


class Moments(NamedTuple):
    """Mean `(D,)` and covariance `(D, D)`, float64."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclass
class FeatureSet:
    """Features of a set of images.

    Attributes:
        source: the set, as named by the user.
        count: number of images; None if a statistics file does not record it.
        shape: `(H, W, C)`; None if a statistics file does not record it.
        sha256: checksum of the images in order, or of the statistics file; None on ranks other than 0.
        pooled, spatial: moments of the pooled and spatial features.
        features: pooled features `(n, D)` float32 of randomly chosen images, for KID, precision and recall.
        logits: `(N, K)` float32, for the Inception Score; None unless stored for all images.
        neighbours_only: use `features` only for precision and recall, as with ADM's reference images.
    """

    source: str
    count: int | None
    shape: tuple[int, ...] | None
    sha256: str | None
    pooled: Moments
    spatial: Moments | None = None
    features: np.ndarray | None = None
    logits: np.ndarray | None = None
    neighbours_only: bool = False


def measure(
    images: Any, extractor: Extractor, world: World, batch_size: int, keep: int, verbose: bool = True
) -> FeatureSet:
    """Extract features of every image.

    Args:
        images: an `ImageSet` of `vca.evaluation.images`, or `GeneratedImages`.
        extractor: on `world.device`.
        world: rank and device of this process; collective, all ranks must call it.
        batch_size: images per block.
        keep: number of images whose features are stored; logits are stored only if this is all images.
        verbose: show a progress bar on rank 0, and print the time.

    Returns:
        The features; `features`, `logits` and `sha256` only on rank 0.

    Raises:
        ConfigError: if the extractor does not accept the images.
        NonFiniteError: if features are NaN or infinite.
    """
    sizes = feature_sizes(images, extractor)
    kept, wanted = set(subset_numbers(images.count, keep)), {"pooled"} | ({"logits"} if keep >= images.count else set())
    moments = {name: FeatureStatistics(sizes[name], world.device) for name in ("pooled", "spatial") if name in sizes}
    digests: dict[int, bytes] = {}
    rows: dict[int, dict[str, np.ndarray]] = {}  # first number of a block -> stored features
    blocks = [range(start, min(start + batch_size, images.count)) for start in range(0, images.count, batch_size)]
    start = time.monotonic()
    error: Exception | None = None
    try:
        with progress_bar(images.count, "img", verbose and world.is_main) as bar:
            for numbers, pixels in images.stream(blocks[world.rank :: world.size]):
                output = extract(extractor, pixels, batch_size)
                check_finite(output, numbers, images.source)
                for name, statistics in moments.items():
                    statistics.update(output[name])
                digests.update(zip(numbers, map(image_sha256, pixels), strict=True))
                chosen = [row for row, number in enumerate(numbers) if number in kept]
                rows[numbers[0]] = {name: output[name][chosen].cpu().numpy() for name in wanted & set(output)}
                bar.update(min(len(numbers) * world.size, images.count - bar.n))
    except (ConfigError, NonFiniteError) as caught:
        error = caught
    world.raise_first(error)  # on all ranks or none
    if verbose and world.is_main:
        seconds = time.monotonic() - start
        print(f"{images.source}: features of {images.count} images in {seconds:.1f} s", flush=True)
    reduced = {name: Moments(*part.reduce(world).mean_and_covariance()) for name, part in moments.items()}
    digests, rows = (dict(ChainMap(*world.gather(part))) for part in (digests, rows))
    in_order = [rows[number] for number in sorted(rows)]
    features = {name: np.concatenate([part[name] for part in in_order]) for name in wanted & set(sizes) if in_order}
    return FeatureSet(
        images.source,
        images.count,
        tuple(images.shape),
        images_sha256(digests[number] for number in sorted(digests)) if world.is_main else None,
        reduced["pooled"],
        reduced.get("spatial"),
        features.get("pooled"),
        features.get("logits"),
    )


def feature_sizes(images: Any, extractor: Extractor) -> dict[str, int]:
    """Return the number of features of each kind, or fail if the extractor does not accept images of this shape."""
    height, width, channels = images.shape
    if extractor.channels not in (None, channels):
        wanted = "RGB" if extractor.channels == 3 else "grey"
        raise ConfigError(
            f"{images.source}: images must be {wanted} for extractor={extractor.name}, got "
            f"{format_shape(images.shape)}; convert them, or choose another extractor"
        )
    try:
        features = extractor(torch.zeros(1, channels, height, width, dtype=torch.uint8))
    except (ValueError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{images.source}: extractor={extractor.name} must accept {format_shape(images.shape)} images ({reason})"
        ) from error
    return {name: rows.shape[1] for name, rows in as_dict(features).items()}


def extract(extractor: Extractor, pixels: np.ndarray, batch_size: int) -> dict[str, Tensor]:
    """Extract features of images `(b, H, W, C)`; a GPU pads partial blocks to use the same kernels."""
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (b, C, H, W)
    padding = batch_size - len(batch) if extractor.device.type == "cuda" else 0
    if padding:
        batch = torch.cat((batch, batch[:1].expand(padding, -1, -1, -1)))
    return {name: rows[: len(pixels)] for name, rows in as_dict(extractor(batch)).items()}


def as_dict(features: Features) -> dict[str, Tensor]:
    """Return the features that the network has, by name."""
    return {name: rows for name, rows in features._asdict().items() if rows is not None}


def check_finite(features: dict[str, Tensor], numbers: Sequence[int], source: str) -> None:
    """Raise `NonFiniteError` with the first image whose features are NaN or infinite."""
    for name, values in features.items():
        if not torch.isfinite(values).all():
            row = int((~torch.isfinite(values)).any(dim=1).nonzero()[0])
            raise NonFiniteError(f"{name} features of image {numbers[row]} of {source} are NaN or infinite")


def subset_numbers(count: int, keep: int) -> list[int]:
    """Return `keep` numbers below `count` (or all): a fixed random subset, so that balanced labels stay balanced."""
    if keep >= count:
        return list(range(count))
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(0))[:keep].tolist())
