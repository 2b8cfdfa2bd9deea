"""Shared by the metrics: checks of the input arrays, and mean ± std."""

from typing import NamedTuple

import numpy as np


class Score(NamedTuple):
    """Mean and standard deviation over subsets or splits."""

    mean: float
    std: float


def check_features(*sets: np.ndarray) -> list[np.ndarray]:
    """Convert sets of features to float64.

    Raises:
        ValueError: unless all are `(N, D)` with the same D, and finite.
    """
    arrays = [np.asarray(values, dtype=np.float64) for values in sets]
    for values in arrays:
        if values.ndim != 2 or values.shape[1] != arrays[0].shape[-1]:
            shapes = " and ".join(str(a.shape) for a in arrays)
            raise ValueError(f"features must be (N, D) with the same D, got {shapes}")
        if not np.isfinite(values).all():
            raise ValueError("features must be finite, got NaN or infinity")
    return arrays
