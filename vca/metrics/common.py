"""What the metrics share: checked arrays in, a mean with its spread out."""

from typing import NamedTuple

import numpy as np


class Score(NamedTuple):
    """Mean and standard deviation over subsets or splits."""

    mean: float
    std: float


def check_features(*sets: np.ndarray) -> list[np.ndarray]:
    """Sets of features in float64.

    Raises:
        ValueError: unless all are `(N, D)` with one D, and finite.
    """
    arrays = [np.asarray(values, dtype=np.float64) for values in sets]
    for values in arrays:
        if values.ndim != 2 or values.shape[1] != arrays[0].shape[-1]:
            shapes = " and ".join(str(a.shape) for a in arrays)
            raise ValueError(f"features must be (N, D) with one D, got {shapes}")
        if not np.isfinite(values).all():
            raise ValueError("features are NaN or infinite")
    return arrays
