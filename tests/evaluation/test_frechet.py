"""The Frechet distance against closed forms, and the statistics under it over batches and ranks."""

import numpy as np
import pytest
import torch

from vca.evaluation.feature_stats import FeatureStatistics
from vca.metrics.fid import frechet_distance, matrix_root
from vca.runtime.distributed import World


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


def test_feature_statistics_independent_of_batch_and_ranks():
    rows = torch.randn(503, 30, generator=torch.Generator().manual_seed(0)) * 3 + 100
    mean, covariance = rows.double().mean(0).numpy(), np.cov(rows.double().numpy(), rowvar=False)
    for batch in (1, 7, 64):
        for ranks in (1, 2, 4):
            parts = [FeatureStatistics(30) for _ in range(ranks)]
            for index, part in enumerate(parts):
                for chunk in rows[index::ranks].split(batch):
                    part.update(chunk)
            whole = parts[0].reduce(World(0, 0, 1, torch.device("cpu")))
            for part in parts[1:]:  # what an all-reduce of real ranks adds up
                whole.count += part.count
                whole.total += part.total
                whole.outer += part.outer
            found = whole.mean_and_covariance()
            assert whole.count == 503
            np.testing.assert_allclose(found[0], mean, rtol=1e-9)
            np.testing.assert_allclose(found[1], covariance, rtol=1e-9, atol=1e-9)


def test_feature_statistics_wrong_features_refused():
    statistics = FeatureStatistics(3)
    for rows, message in (
        (torch.zeros(2, 4), r"features must be \(B, 3\), got \(2, 4\)"),
        (torch.tensor([[0.0, float("nan"), 0.0]]), "features are NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            statistics.update(rows)
    statistics.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="needs at least 2 images, got 1"):
        statistics.mean_and_covariance()
    zero, eye = np.zeros(3), np.eye(3)
    for arguments, message in (
        ((zero, eye, np.zeros(4), np.eye(4)), "different features: 3 and 4"),
        ((zero, np.eye(2), zero, eye), r"got \(3,\) and \(2, 2\)"),
        ((zero, eye, zero, np.full((3, 3), np.inf)), "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            frechet_distance(*arguments)
