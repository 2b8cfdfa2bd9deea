"""Each metric as a function on arrays: against torch-fidelity's own, and against what is known by hand."""

import math

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from tests.metrics.arrays import moments, random_features
from vca.metrics.fid import frechet_distance
from vca.metrics.inception_score import inception_score
from vca.metrics.kid import kernel_distance
from vca.metrics.precision_recall import precision_recall

QUIET = {"verbose": False}


@pytest.fixture(scope="module")
def features():
    return random_features()


def test_frechet_distance_equals_torch_fidelity(features):
    ours = frechet_distance(*moments(features[0]), *moments(features[1]))
    sides = [fid_features_to_statistics(torch.from_numpy(rows)) for rows in features]
    assert ours == pytest.approx(fid_statistics_to_metric(*sides, False)["frechet_inception_distance"], rel=1e-9)


def test_kernel_distance_equals_torch_fidelity(features):
    their = kid_features_to_metric(
        *map(torch.from_numpy, features), kid_subsets=20, kid_subset_size=100, rng_seed=5, **QUIET
    )
    mean, std = kernel_distance(*features, subsets=20, subset_size=100, seed=5)
    assert mean == pytest.approx(their["kernel_inception_distance_mean"], rel=1e-9)
    assert std == pytest.approx(their["kernel_inception_distance_std"], rel=1e-9)


def test_kernel_distance_is_unbiased():
    """Of two sets of one distribution it is zero on average, whatever their size; the biased one is not."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((2, 4000, 8))
    mean, std = kernel_distance(rows[0], rows[1], subsets=200, subset_size=20)
    assert abs(mean) < 4 * std / math.sqrt(200)


def test_inception_score_equals_torch_fidelity():
    """Theirs shuffles by default; with `shuffle=False` and splits of equal size it is the same figure."""
    logits = torch.randn(1000, 30, generator=torch.Generator().manual_seed(0)) * 3
    their = isc_features_to_metric(logits, splits=5, shuffle=False)
    mean, std = inception_score(logits, split_size=200)
    assert mean == pytest.approx(their["inception_score_mean"], rel=1e-12)
    assert std == pytest.approx(their["inception_score_std"], rel=1e-12)
    assert mean != pytest.approx(isc_features_to_metric(logits, splits=5)["inception_score_mean"], rel=1e-6)


def test_inception_score_equals_hand_calculation():
    """Sure and evenly spread over K classes: K. Never sure, or always of one class: 1. The last split may be short."""
    sure = 1000 * torch.eye(7).repeat(3, 1)
    assert inception_score(sure, 21) == (pytest.approx(7), 0)
    assert inception_score(torch.zeros(5, 7)).mean == pytest.approx(1)
    assert inception_score(sure[:1].expand(9, -1)).mean == pytest.approx(1)
    assert inception_score(sure[:10], 7).mean == pytest.approx((7 + 3) / 2)


def test_precision_recall_equals_torch_fidelity(features):
    x, y = (torch.from_numpy(rows) for rows in features)
    their = prc_features_to_metric(x, y, prc_neighborhood=3, **QUIET)
    precision, recall = precision_recall(*features)
    assert precision == pytest.approx(their["precision"], abs=1e-7)
    assert recall == pytest.approx(their["recall"], abs=1e-7)
    assert 0 < precision < 1
    assert precision != recall


def test_precision_recall_equals_hand_calculation():
    """On a line: real points 0, 1, 2, 10; with k = 1 their balls reach 1, 1, 1 and 8."""
    real, generated = np.array([[0.0], [1], [2], [10]]), np.array([[0.5], [2.9], [19.0], [100], [101]])
    precision, recall = precision_recall(generated, real, neighbours=1)
    assert precision == pytest.approx(2 / 5)  # 0.5 and 2.9; 19 is 9 from 10
    assert recall == pytest.approx(4 / 4)  # the balls of 0.5, 2.9 and 19 reach 2.4, 2.4 and 16.1
    assert precision_recall(real, real) == (1, 1)
    shifted = real + 1e6  # far from zero, where squares lose their digits
    assert precision_recall(generated + 1e6, shifted, neighbours=1) == (precision, recall)
    same = np.ones((6, 5)) / 3  # all equal: every radius is zero, and everything is inside
    assert precision_recall(same, same) == (1, 1)


def adm_precision_recall(generated, real, neighbours=3):
    """ADM's figures: every operation in float16 on features as they are, a product summed in float32."""

    def distances(x, y):
        x, y = x.astype(np.float16), y.astype(np.float16)
        norms = [np.square(rows).astype(np.float32).sum(axis=1).astype(np.float16) for rows in (x, y)]
        products = (x.astype(np.float32) @ y.astype(np.float32).T).astype(np.float16)
        found = norms[0][:, None] - np.float16(2) * products + norms[1][None]
        assert found.dtype == np.float16
        return np.maximum(found, 0).astype(np.float32)

    def share(points, manifold):
        radii = np.sort(distances(manifold, manifold), axis=1)[:, neighbours]
        return (distances(points, manifold) <= radii).any(axis=1).mean()

    return share(generated, real), share(real, generated)


def test_precision_recall_float16_equals_adm():
    """Features as large as Inception's: float16 keeps fewer distances apart, so that more points are inside."""
    rng = np.random.default_rng(0)
    scale = np.exp(rng.standard_normal(2048)) * 0.2
    generated, real = (np.abs(rng.standard_normal((n, 2048)) * scale).astype(np.float32) for n in (700, 600))
    exact, half = (precision_recall(generated, real, dtype=dtype) for dtype in ("float64", "float16"))
    assert half == pytest.approx(adm_precision_recall(generated, real), abs=0.002)
    assert half.precision > exact.precision
    assert half.recall > exact.recall
    large = 300 * generated  # whose squares overflow float16: ADM takes float32
    assert precision_recall(large, 300 * real, dtype="float16") == pytest.approx(exact, abs=0.002)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kernel_distance(np.zeros((5, 2)), np.zeros((5, 3)), subset_size=2),
            r"same D, got \(5, 2\) and \(5, 3\)",
        ),
        (lambda: kernel_distance(np.full((5, 2), np.nan), np.zeros((5, 2)), subset_size=2), "must be finite"),
        (lambda: kernel_distance(np.zeros((5, 2)), np.zeros((9, 2))), r"subset_size must be in \[2, 5\].*got 1000"),
        (lambda: inception_score(torch.zeros(3)), r"\(N, K\), got \(3,\)"),
        (lambda: inception_score(torch.full((3, 2), torch.inf)), "must be finite"),
        (lambda: inception_score(torch.zeros(3, 2), 0), "split_size must be >= 1, got 0"),
        (lambda: precision_recall(np.zeros((3, 2)), np.zeros((9, 2))), r"in \[1, 2\], .* smaller set, got 3"),
        (lambda: precision_recall(np.zeros((9, 2)), np.full((9, 2), np.inf)), "must be finite"),
    ],
)
def test_metrics_wrong_arrays_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
