"""Kernel Inception distance, KID (arXiv 1801.01401): squared maximum mean discrepancy of two sets of features with the
kernel `(x . y / D + 1)^3`, unbiased in the number of images, averaged over random subsets.

Shape letters: N generated and M real images, D features.
"""

import numpy as np

from vca.metrics.common import Score, check_features


def kernel_distance(
    generated: np.ndarray, real: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> Score:
    """Compute the KID of two sets of features, in float64.

    Args:
        generated, real: features `(N, D)` and `(M, D)`.
        subsets: number of random subsets.
        subset_size: images per subset.
        seed: seed of the subsets; the defaults are torch-fidelity's.

    Raises:
        ValueError: if shapes do not match, a value is not finite, or a set is smaller than a subset.
    """
    generated, real = check_features(generated, real)
    least = min(len(generated), len(real))
    if not 2 <= subset_size <= least:
        raise ValueError(f"subset_size must be in [2, {least}], the size of the smaller set, got {subset_size}")
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = generated[rng.choice(len(generated), subset_size, replace=False)]
        y = real[rng.choice(len(real), subset_size, replace=False)]
        values.append(squared_discrepancy(x, y))
    return Score(float(np.mean(values)), float(np.std(values)))


def squared_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """Compute the unbiased estimate from two sets of equal size `(m, D)`, without pairs of an image with itself."""
    pairs = len(x) * (len(x) - 1)
    within = sum((values.sum() - np.trace(values)) / pairs for values in (kernel(x, x), kernel(y, y)))
    return float(within - 2 * kernel(x, y).mean())


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Compute `(x . y / D + 1)^3` of all pairs."""
    return (x @ y.T / x.shape[1] + 1) ** 3
