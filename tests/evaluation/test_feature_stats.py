"""Feature statistics do not depend on batches and ranks, and reject wrong features."""

import numpy as np
import pytest
import torch

from vca.evaluation.feature_stats import FeatureStatistics
from vca.metrics.fid import frechet_distance
from vca.runtime.distributed import World


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
        ((zero, eye, np.zeros(4), np.eye(4)), "same number of features, got 3 and 4"),
        ((zero, np.eye(2), zero, eye), r"got \(3,\) and \(2, 2\)"),
        ((zero, eye, zero, np.full((3, 3), np.inf)), "must be finite, got NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            frechet_distance(*arguments)
