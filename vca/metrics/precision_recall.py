"""Precision and recall of generated images (arXiv 1904.06991): the fraction of generated images in the manifold of real
ones, and of real images in the manifold of generated ones.

A manifold is the union of balls around the features of its images, with the distance to the k-th neighbour as radius.

Shape letters: N generated and M real images, D features.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vca.metrics.common import check_features

BLOCK = 2**24  # entries of a distance matrix per chunk: 128 MiB


class PrecisionRecall(NamedTuple):
    """Fractions in [0, 1]."""

    precision: float
    recall: float


def precision_recall(
    generated: np.ndarray,
    real: np.ndarray,
    neighbours: int = 3,
    device: torch.device | str = "cpu",
    dtype: str = "float64",
) -> PrecisionRecall:
    """Compute precision and recall.

    Args:
        generated, real: features `(N, D)` and `(M, D)`.
        neighbours: k.
        device: device of the distances.
        dtype: dtype of the distances: `float64`, or `float16` as in ADM's evaluator.

    Raises:
        ValueError: if shapes do not match, a value is not finite, or a set has at most k images.
    """
    generated, real = check_features(generated, real)
    least = min(len(generated), len(real))
    if not 1 <= neighbours < least:
        raise ValueError(f"neighbours must be in [1, {least - 1}], below the size of the smaller set, got {neighbours}")
    if dtype == "float16":
        x, y = (torch.from_numpy(features).to(device, torch.float32) for features in (generated, real))
        distances = half_distances
    else:
        centre = real.mean(axis=0)  # centring keeps the differences and loses fewer digits
        x, y = (torch.from_numpy(features - centre).to(device) for features in (generated, real))
        distances = squared_distances
    return PrecisionRecall(fraction_within(x, y, neighbours, distances), fraction_within(y, x, neighbours, distances))


def fraction_within(
    points: Tensor, manifold: Tensor, neighbours: int, distances: Callable[[Tensor, Tensor], Tensor]
) -> float:
    """Compute the fraction of points `(N, D)` inside a ball of the manifold `(M, D)`."""
    rows = max(1, BLOCK // len(manifold))
    radii = torch.cat(  # the nearest neighbour of a point is the point itself
        [distances(part, manifold).kthvalue(neighbours + 1).values for part in manifold.split(rows)]
    )
    inside = [(distances(part, manifold) <= radii).any(dim=1) for part in points.split(rows)]
    return torch.cat(inside).double().mean().item()


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Compute squared distances `(N, M)` of `(N, D)` and `(M, D)`; values within rounding of zero are set to zero."""
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    distances = norms - 2 * x @ y.T
    return torch.where(distances > 1e-13 * norms, distances, 0.0)


def half_distances(x: Tensor, y: Tensor) -> Tensor:
    """Compute squared distances of `(N, D)` and `(M, D)` as in ADM's evaluator: each operation in float16.

    Products are summed in float32, as float16 matrix units do. A block that overflows float16 is computed in float32.

    Returns:
        `(N, M)` float32.
    """

    def of(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        x_norms, y_norms = (rows.square().to(dtype).float().sum(dim=1).to(dtype) for rows in (x, y))
        products = (x @ y.T).to(dtype)
        return (x_norms[:, None] - 2 * products + y_norms).clamp(min=0).float()

    half = of(x.half().float(), y.half().float(), torch.float16)
    return half if torch.isfinite(half).all() else of(x, y, torch.float32)
