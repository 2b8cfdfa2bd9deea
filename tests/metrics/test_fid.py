"""The Frechet distance against closed forms."""

import numpy as np
import pytest

from vca.metrics.fid import frechet_distance, matrix_root


def rotation(rng, size):
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


@pytest.mark.parametrize("rank", [24, 9, 1])
def test_frechet_distance_commuting_covariances_closed_form(rank):
    """Covariances with the same eigenvectors, of full rank or not: the sum of (sqrt(a) - sqrt(b))^2."""
    rng = np.random.default_rng(rank)
    axes, a, b = rotation(rng, 24), rng.uniform(0.1, 5, 24), rng.uniform(0.1, 5, 24)
    a[rank:] = b[:-rank] = 0
    mu = rng.standard_normal((2, 24))
    expected = np.square(mu[0] - mu[1]).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    distance = frechet_distance(mu[0], (axes * a) @ axes.T, mu[1], (axes * b) @ axes.T)
    assert distance == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_two_dimensions_closed_form():
    """tr (A B)^(1/2) of 2 x 2 matrices is sqrt(tr A B + 2 sqrt(det A B)), whether they commute or not."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        (a, b), mu = rng.standard_normal((2, 2, 2)), rng.standard_normal((2, 2))
        a, b = a @ a.T, b @ b.T
        trace = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
        expected = np.square(mu[0] - mu[1]).sum() + np.trace(a) + np.trace(b) - 2 * trace
        assert frechet_distance(mu[0], a, mu[1], b) == pytest.approx(expected, abs=1e-9)


def test_frechet_distance_identical_sets_zero_and_symmetric():
    rng = np.random.default_rng(1)
    few, other = rng.standard_normal((2, 40, 64))  # fewer images than features: a singular covariance
    mu, sigma = few.mean(0), np.cov(few, rowvar=False)
    assert abs(frechet_distance(mu, sigma, mu, sigma)) < 1e-6
    nu, tau = other.mean(0), np.cov(other, rowvar=False)
    assert frechet_distance(mu, sigma, nu, tau) == pytest.approx(frechet_distance(nu, tau, mu, sigma), rel=1e-12)
    root = matrix_root(sigma)
    np.testing.assert_allclose(root @ root, sigma, atol=1e-12)
