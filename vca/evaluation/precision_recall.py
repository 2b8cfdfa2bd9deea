"""Precision and recall of a set of images (arXiv 1904.06991): the share of generated images within the manifold of real
ones, and of real ones within that of the generated.

A manifold is the union of balls around the features of its images, each reaching to the k-th nearest neighbour.

Shape letters: N generated and M real images, D features.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vca.evaluation.statistics import check_features

BLOCK = 2**24  # entries of a distance matrix at a time: 128 MiB


class PrecisionRecall(NamedTuple):
    """Shares from 0 to 1."""

    precision: float
    recall: float


def precision_recall(
    generated: np.ndarray, real: np.ndarray, neighbours: int = 3, device: torch.device | str = "cpu"
) -> PrecisionRecall:
    """Precision and recall, with distances in float64.

    Args:
        generated, real: features `(N, D)` and `(M, D)`.
        neighbours: k.
        device: where the distances are computed.

    Raises:
        ValueError: if shapes do not agree, something is not finite, or a set has no k neighbours.
    """
    generated, real = check_features(generated, real)
    least = min(len(generated), len(real))
    if not 1 <= neighbours < least:
        raise ValueError(f"neighbours must be from 1 to {least - 1}, below the images of the smaller set: {neighbours}")
    centre = real.mean(axis=0)  # differences do not change, and lose fewer digits
    x, y = (torch.from_numpy(features - centre).to(device) for features in (generated, real))
    return PrecisionRecall(share_within(x, y, neighbours), share_within(y, x, neighbours))


def share_within(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    """Share of the points `(N, D)` that lie in a ball of the manifold `(M, D)`."""
    rows = max(1, BLOCK // len(manifold))
    radii = torch.cat(  # the nearest neighbour of a point is the point itself
        [squared_distances(part, manifold).kthvalue(neighbours + 1).values for part in manifold.split(rows)]
    )
    inside = [(squared_distances(part, manifold) <= radii).any(dim=1) for part in points.split(rows)]
    return torch.cat(inside).double().mean().item()


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """`(N, D)` and `(M, D)` to `(N, M)`; what is within rounding of zero is zero."""
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    distances = norms - 2 * x @ y.T
    return torch.where(distances > 1e-13 * norms, distances, 0.0)
