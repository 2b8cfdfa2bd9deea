"""Frechet distance between two Gaussians; on Inception features it is the FID (arXiv 1706.08500).

    d^2 = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2)

The last trace is the sum of the singular values of S1^(1/2) S2^(1/2); the roots come from symmetric eigenvalue problems
in float64. This is accurate for singular covariances too, where `scipy.linalg.sqrtm` and the eigenvalues of S1 S2 lose
half of the digits.

Shape letters: D features.
"""

import numpy as np


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Compute the squared Frechet distance of N(mu1, sigma1) and N(mu2, sigma2), the FID convention.

    Args:
        mu1, mu2: means `(D,)` of any float type; computed in float64.
        sigma1, sigma2: covariances `(D, D)`.

    Raises:
        ValueError: if shapes do not match, or a value is NaN or infinite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(value, dtype=np.float64) for value in (mu1, sigma1, mu2, sigma2))
    for mu, sigma in ((mu1, sigma1), (mu2, sigma2)):
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ValueError(f"a mean must be (D,) and its covariance (D, D), got {mu.shape} and {sigma.shape}")
    if mu1.shape != mu2.shape:
        raise ValueError(f"both sets must have the same number of features, got {len(mu1)} and {len(mu2)}")
    if not all(np.isfinite(value).all() for value in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("means and covariances must be finite, got NaN or infinity")
    overlap = np.linalg.svd(matrix_root(sigma1) @ matrix_root(sigma2), compute_uv=False).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap)


def matrix_root(sigma: np.ndarray) -> np.ndarray:
    """Compute the symmetric root of a covariance `(D, D)`.

    Eigenvalues within rounding of zero are set to zero: the root of a rounding error of 1e-16 is 1e-8.
    """
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    noise = len(values) * np.finfo(np.float64).eps * np.abs(values).max(initial=0)
    return (vectors * np.sqrt(np.where(values > noise, values, 0))) @ vectors.T
