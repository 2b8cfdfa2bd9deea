"""The kernel Inception distance, KID (arXiv 1801.01401): the squared maximum mean discrepancy of two sets of features
under the kernel `(x . y / D + 1)^3`, unbiased in the number of images, averaged over random subsets.

Shape letters: N generated and M real images, D features.
"""

import numpy as np

from vca.metrics.common import Score, check_features


def kernel_distance(
    generated: np.ndarray, real: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> Score:
    """KID of two sets of features, computed in float64.

    Args:
        generated, real: features `(N, D)` and `(M, D)`.
        subsets: how often a subset of each is drawn.
        subset_size: how large these are.
        seed: of the drawing. The defaults are those of the usual implementations.

    Raises:
        ValueError: if shapes do not agree, something is not finite, or a set is smaller than a subset.
    """
    generated, real = check_features(generated, real)
    least = min(len(generated), len(real))
    if not 2 <= subset_size <= least:
        raise ValueError(f"subset_size must be from 2 to {least}, the images of the smaller set, got {subset_size}")
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = generated[rng.choice(len(generated), subset_size, replace=False)]
        y = real[rng.choice(len(real), subset_size, replace=False)]
        values.append(squared_discrepancy(x, y))
    return Score(float(np.mean(values)), float(np.std(values)))


def squared_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate from two sets of equal size `(m, D)`: pairs of an image with itself do not count."""
    pairs = len(x) * (len(x) - 1)
    within = sum((values.sum() - np.trace(values)) / pairs for values in (kernel(x, x), kernel(y, y)))
    return float(within - 2 * kernel(x, y).mean())


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`(x . y / D + 1)^3` of all pairs."""
    return (x @ y.T / x.shape[1] + 1) ** 3
