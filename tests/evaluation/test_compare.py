"""Comparison of two sets: metrics, reasons for missing ones, and labels."""

import numpy as np
import pytest

from tests.metrics.arrays import moments, random_features
from vca.evaluation.compare import Metrics, compare_sets, labelled_metrics
from vca.evaluation.features import FeatureSet, Moments
from vca.metrics import kid


@pytest.fixture(scope="module")
def features():
    return random_features()


def feature_set(rows, **more):
    return FeatureSet("a set", len(rows), (8, 8, 3), "0", Moments(*moments(rows)), **more)


def test_compare_sets_missing_features_not_reported(features):
    """Statistics alone give the distance alone, and each other figure has its reason; ADM's reference images serve
    precision and recall, and no KID."""
    metrics, settings = compare_sets(feature_set(features[0]), feature_set(features[1]))
    assert metrics == Metrics(metrics.frechet)
    missing = settings.pop("missing")
    assert settings == {"kid": None, "inception_score_split": None, "neighbours": None}
    assert missing == {
        "spatial_frechet": "samples a set has no spatial features",
        "kernel": "samples a set has no features of individual images",
        "precision": "samples a set has no features of individual images",
        "inception_score": "samples a set does not have logits of every image",
    }
    shown = labelled_metrics(metrics, {**settings, "missing": missing}, 700, True)
    assert shown["sFID"] == "not computed: samples a set has no spatial features"
    assert shown["precision, recall"] == "not computed: " + missing["precision"]
    assert set(shown) == {"FID (N = 700)", "sFID", "KID", "Inception Score", "precision, recall"}
    sides = [feature_set(rows, features=rows.astype(np.float32)) for rows in features]
    sides[1].neighbours_only = True
    metrics, settings = compare_sets(*sides)
    assert metrics.kernel is None
    assert metrics.precision is not None
    assert settings["neighbours"] == {"k": 3, "of": [700, 600], "dtype": "float64"}
    assert settings["missing"]["kernel"] == "the images of a set are for precision and recall only"
    assert "precision" not in settings["missing"]
    few = feature_set(features[1], features=features[1][:3])
    metrics, settings = compare_sets(sides[0], few)
    assert metrics.precision is None
    assert settings["missing"]["precision"] == "reference a set has features of 3 images"


def test_compare_sets_kid_of_whole_set_has_no_spread(features, monkeypatch):
    """100 subsets that are all the set are one."""
    computed = []
    once = kid.squared_discrepancy
    monkeypatch.setattr(kid, "squared_discrepancy", lambda x, y: computed.append(len(x)) or once(x, y))
    sides = [feature_set(rows, features=rows[:600]) for rows in features]
    metrics, settings = compare_sets(*sides)
    assert computed == [600]
    assert metrics.kernel == pytest.approx(once(features[0][:600], features[1]), rel=1e-9)
    assert metrics.kernel_std is None
    assert settings["kid"] == {"subsets": 1, "subset_size": 600, "seed": 2020, "of": [600, 600]}
    assert labelled_metrics(metrics, settings, 600, True)["KID (N = 600)"] == f"{metrics.kernel:.4g}"


def test_metrics_labels_state_reference_count():
    neighbours = {"k": 3, "of": [50_000, 10_000], "dtype": "float64"}
    metrics = Metrics(1.0, precision=0.5, recall=0.25)
    shown = labelled_metrics(metrics, {"neighbours": neighbours, "missing": {}}, 50_000, True)
    assert (shown["precision, 50K vs 10K"], shown["recall, 50K vs 10K"]) == ("0.5000", "0.2500")
    neighbours = {"k": 3, "of": [49_999, 10_000], "dtype": "float16"}
    shown = labelled_metrics(metrics, {"neighbours": neighbours, "missing": {}}, 50_000, True)
    assert "precision, 49,999 vs 10K, float16" in shown


@pytest.mark.parametrize(
    ("count", "published", "name"),
    [
        (50_000, True, "FID-50K"),
        (10_000, True, "FID-10K"),
        (49_999, True, "FID (N = 49,999)"),
        (50_000, False, "Frechet distance-50K"),
    ],
)
def test_metrics_labels_state_sample_count(count, published, name):
    assert next(iter(labelled_metrics(Metrics(12.345), {"missing": {}}, count, published).items())) == (name, "12.35")
