"""What is kept of a set of images: moments of its features over all of it, and the features of some, in one pass.

Images are cut into blocks of fixed size, of which each rank takes every K-th: nothing but the order of a float64 sum
depends on how many ranks share the work. Only features travel, and only to rank 0.

Shape letters: N images, n of which features are kept, D features, S spatial features, K classes.
"""

import time
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
    """A set of images in the eyes of an extractor.

    Attributes:
        source: what the user calls the set.
        count: images; None where a file of statistics does not say.
        shape: `(H, W, C)`; None likewise.
        sha256: of the images in order, or of the file of statistics; None on other ranks than 0.
        pool, spatial: moments.
        features: pooled features `(n, D)` float32 of images chosen at random, for KID, precision and recall.
        logits: `(N, K)` float32, for the Inception Score; None where not all were kept.
        neighbours_only: the features serve precision and recall alone, as those of ADM's reference images.
    """

    source: str
    count: int | None
    shape: tuple[int, ...] | None
    sha256: str | None
    pool: Moments
    spatial: Moments | None = None
    features: np.ndarray | None = None
    logits: np.ndarray | None = None
    neighbours_only: bool = False


def measure(
    images: Any, extractor: Extractor, world: World, batch_size: int, keep: int, talk: bool = True
) -> FeatureSet:
    """Look at every image once.

    Args:
        images: one of `vca.evaluation.images`, or the `DrawnSet` of a generator.
        extractor: on `world.device`.
        world: this process; all ranks call this alike.
        batch_size: images of a block.
        keep: of how many images features are kept; logits are kept only of all.
        talk: show a progress bar on rank 0, and print how long it took.

    Returns:
        The set. `features`, `logits` and `sha256` are there on rank 0 alone.

    Raises:
        ConfigError: if the images do not fit the extractor.
        NonFiniteError: if features are NaN or infinite.
    """
    sizes = {name: rows.shape[1] for name, rows in probe(images, extractor).items()}
    kept, wanted = set(chosen_numbers(images.count, keep)), {"pool"} | ({"logits"} if keep >= images.count else set())
    moments = {name: FeatureStatistics(sizes[name], world.device) for name in ("pool", "spatial") if name in sizes}
    digests: dict[int, bytes] = {}
    rows: dict[int, dict[str, np.ndarray]] = {}  # of each block, by its first number
    blocks = [range(start, min(start + batch_size, images.count)) for start in range(0, images.count, batch_size)]
    start = time.monotonic()
    error: Exception | None = None
    try:
        with progress_bar(images.count, "img", talk and world.is_main) as bar:
            for numbers, pixels in images.stream(blocks[world.rank :: world.size]):
                found = extract(extractor, pixels, batch_size)
                check_finite(found, numbers, images.source)
                for name, part in moments.items():
                    part.update(found[name])
                digests.update(zip(numbers, map(image_sha256, pixels), strict=True))
                chosen = [row for row, number in enumerate(numbers) if number in kept]
                rows[numbers[0]] = {name: found[name][chosen].cpu().numpy() for name in wanted & set(found)}
                bar.update(min(len(numbers) * world.size, images.count - bar.n))
    except (ConfigError, NonFiniteError) as caught:
        error = caught
    world.raise_first(error)  # the ranks part here together or not at all
    if talk and world.is_main:
        took = time.monotonic() - start
        print(f"{images.source}: features of {images.count} images in {took:.1f} s", flush=True)
    found_moments = {name: Moments(*part.reduce(world).mean_and_covariance()) for name, part in moments.items()}
    digests, rows = (merge(world.gather(part)) for part in (digests, rows))
    in_order = [rows[number] for number in sorted(rows)]
    features = {name: np.concatenate([part[name] for part in in_order]) for name in wanted & set(sizes) if in_order}
    return FeatureSet(
        images.source,
        images.count,
        tuple(images.shape),
        images_sha256(digests[number] for number in sorted(digests)) if world.is_main else None,
        found_moments["pool"],
        found_moments.get("spatial"),
        features.get("pool"),
        features.get("logits"),
    )


def probe(images: Any, extractor: Extractor) -> dict[str, Tensor]:
    """Features of one black image: how many there are, and whether the extractor takes such images at all."""
    height, width, channels = images.shape
    if extractor.channels not in (None, channels):
        wanted = "RGB" if extractor.channels == 3 else "grey"
        raise ConfigError(
            f"{images.source}: its images are {format_shape(images.shape)}, but extractor={extractor.name} takes {wanted} "
            f"ones; convert them, or choose another extractor"
        )
    try:
        return named(extractor(torch.zeros(1, channels, height, width, dtype=torch.uint8)))
    except (ValueError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{images.source}: extractor={extractor.name} does not take images of {format_shape(images.shape)} ({reason})"
        ) from error


def extract(extractor: Extractor, pixels: np.ndarray, batch_size: int) -> dict[str, Tensor]:
    """Features of images `(b, H, W, C)`. On a GPU a block that is not full is padded: its kernels are then the same."""
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (b, C, H, W)
    short = batch_size - len(batch) if extractor.device.type == "cuda" else 0
    if short:
        batch = torch.cat((batch, batch[:1].expand(short, -1, -1, -1)))
    return {name: rows[: len(pixels)] for name, rows in named(extractor(batch)).items()}


def named(features: Features) -> dict[str, Tensor]:
    """Those that the network has."""
    return {name: rows for name, rows in features._asdict().items() if rows is not None}


def check_finite(found: dict[str, Tensor], numbers: Sequence[int], source: str) -> None:
    """Raise `NonFiniteError` with the first image whose features are NaN or infinite."""
    for name, values in found.items():
        if not torch.isfinite(values).all():
            row = int((~torch.isfinite(values)).any(dim=1).nonzero()[0])
            raise NonFiniteError(f"{name} features of number {numbers[row]} of {source} are not finite")


def chosen_numbers(count: int, keep: int) -> list[int]:
    """`keep` numbers below `count`, or all of them: always the same, and in no step with labels that take turns."""
    if keep >= count:
        return list(range(count))
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(0))[:keep].tolist())


def merge(parts: list[dict[int, Any]]) -> dict[int, Any]:
    """One dict of the dicts of all ranks."""
    return {number: value for part in parts for number, value in part.items()}
