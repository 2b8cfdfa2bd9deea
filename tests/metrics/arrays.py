"""Random features and their moments, for the tests of metrics and comparisons."""

import numpy as np
import torch

from vca.evaluation.feature_stats import FeatureStatistics


def random_features():
    """Generated and real features of full rank, `(700, 48)` and `(600, 48)`, float64."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((48, 48))
    return rng.standard_normal((700, 48)) @ mix + 0.3, rng.standard_normal((600, 48)) @ mix.T


def moments(rows):
    statistics = FeatureStatistics(rows.shape[1])
    for part in torch.from_numpy(rows).split(64):
        statistics.update(part)
    return statistics.mean_and_covariance()
