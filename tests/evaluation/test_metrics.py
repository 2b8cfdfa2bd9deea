"""Each metric as a function on arrays: against torch-fidelity's own, and against what is known by hand."""

import math

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from tests.evaluation.inception import theirs, write_random_weights
from vca.evaluation.compare import Metrics, compare_sets, labelled
from vca.evaluation.extractor import INCEPTION_SHA256, InceptionConfig, load_extractor
from vca.evaluation.feature_stats import FeatureStatistics
from vca.evaluation.features import FeatureSet, Moments
from vca.metrics import kid
from vca.metrics.fid import frechet_distance
from vca.metrics.inception_score import inception_score
from vca.metrics.kid import kernel_distance
from vca.metrics.precision_recall import precision_recall
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError

ONE = World(0, 0, 1, torch.device("cpu"))
QUIET = {"verbose": False}


@pytest.fixture(scope="module")
def features():
    """Generated and real features of full rank, `(700, 48)` and `(600, 48)`, float64: what neither side rounds."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((48, 48))
    return rng.standard_normal((700, 48)) @ mix + 0.3, rng.standard_normal((600, 48)) @ mix.T


def moments(rows):
    found = FeatureStatistics(rows.shape[1])
    for part in torch.from_numpy(rows).split(64):
        found.update(part)
    return found.mean_and_covariance()


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
            r"one D, got \(5, 2\) and \(5, 3\)",
        ),
        (lambda: kernel_distance(np.full((5, 2), np.nan), np.zeros((5, 2)), subset_size=2), "NaN or infinite"),
        (lambda: kernel_distance(np.zeros((5, 2)), np.zeros((9, 2))), "subset_size must be from 2 to 5.*got 1000"),
        (lambda: inception_score(torch.zeros(3)), r"\(N, K\), got \(3,\)"),
        (lambda: inception_score(torch.full((3, 2), torch.inf)), "NaN or infinite"),
        (lambda: inception_score(torch.zeros(3, 2), 0), "split_size must be >= 1, got 0"),
        (lambda: precision_recall(np.zeros((3, 2)), np.zeros((9, 2))), "from 1 to 2, .* smaller set: 3"),
        (lambda: precision_recall(np.zeros((9, 2)), np.full((9, 2), np.inf)), "NaN or infinite"),
    ],
)
def test_metrics_wrong_arrays_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


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
        "kernel": "samples a set has statistics only, no features of single images",
        "precision": "samples a set has statistics only, no features of single images",
        "inception_score": "samples a set has no logits of every image",
    }
    shown = labelled(metrics, {**settings, "missing": missing}, 700, True)
    assert shown["sFID"] == "not computed: samples a set has no spatial features"
    assert shown["precision, recall"] == "not computed: " + missing["precision"]
    assert set(shown) == {"FID (N = 700)", "sFID", "KID", "Inception Score", "precision, recall"}
    sides = [feature_set(rows, features=rows.astype(np.float32)) for rows in features]
    sides[1].neighbours_only = True
    metrics, settings = compare_sets(*sides)
    assert metrics.kernel is None
    assert metrics.precision is not None
    assert settings["neighbours"] == {"k": 3, "of": [700, 600], "dtype": "float64"}
    assert settings["missing"]["kernel"] == "the images of a set are the reference of precision and recall only"
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
    assert labelled(metrics, settings, 600, True)["KID (N = 600)"] == f"{metrics.kernel:.4g}"


def test_metrics_labels_state_reference_count():
    neighbours = {"k": 3, "of": [50_000, 10_000], "dtype": "float64"}
    metrics = Metrics(1.0, precision=0.5, recall=0.25)
    shown = labelled(metrics, {"neighbours": neighbours, "missing": {}}, 50_000, True)
    assert (shown["precision, 50K vs 10K"], shown["recall, 50K vs 10K"]) == ("0.5000", "0.2500")
    neighbours = {"k": 3, "of": [49_999, 10_000], "dtype": "float16"}
    shown = labelled(metrics, {"neighbours": neighbours, "missing": {}}, 50_000, True)
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
    assert next(iter(labelled(Metrics(12.345), {"missing": {}}, count, published).items())) == (name, "12.35")


@pytest.fixture(scope="session")
def weights(artefact):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return artefact("inception", lambda folder: write_random_weights(folder / "random.pth", images)) / "random.pth"


def test_inception_extractor_equals_torch_fidelity(weights):
    """The same features to the bit; the spatial ones are 7 channels of a branch, position by position."""
    images = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    config = InceptionConfig(weights=str(weights), sha256=None)
    found = load_extractor(config, ONE, None)(images)
    network, seen = theirs(weights), []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    pool, logits = network(images)
    assert torch.equal(found.pool, pool)
    assert torch.equal(found.logits, logits)
    assert found.spatial.shape == (3, 2023)
    for channel, row, column in ((0, 0, 0), (6, 3, 11), (2, 16, 16)):
        flat = (row * 17 + column) * 7 + channel
        assert torch.equal(found.spatial[:, flat], seen[0][:, channel, row, column])


def test_inception_extractor_wrong_weights_refused(weights, tmp_path, monkeypatch):
    def message(**config):
        with pytest.raises(ConfigError) as raised:
            load_extractor(InceptionConfig(**config), ONE, None)
        return str(raised.value)

    said = message(weights=str(weights))
    assert "extractor.sha256=null" in said
    assert INCEPTION_SHA256[:12] in said
    assert "extractor.weights must be a file: weights-inception" in message(weights=str(tmp_path / "none.pth"))
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    assert "does not hold the Inception network" in message(weights=str(tmp_path / "text.pth"), sha256=None)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    assert "does not hold the Inception network" in message(weights=str(tmp_path / "other.pth"), sha256=None)

    def no_network(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    said = message()
    for part in (
        "weights-inception-2015-12-05-6726825d.pth",
        INCEPTION_SHA256,
        str(tmp_path / "hub"),
        "no route to host",
    ):
        assert part in said
