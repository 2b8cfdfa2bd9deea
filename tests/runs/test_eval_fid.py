"""`eval_fid.py`: the same figures from every form of a set and on any number of ranks; nothing wrong is swallowed."""

import copy
import json
import math
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import eval_fid
import train_gen
from models import rebuild
from scripts import reference_stats
from tests.evaluation.inception import FEATURES, theirs, write_random_weights
from tests.processes import ROOT, run_script
from tests.support import DRAWN, SHARED, SMALL_DIT, metrics
from vca.config import compose
from vca.evaluation.compare import read_features
from vca.evaluation.extractor import ClassifierConfig, FileConfig, load_extractor
from vca.evaluation.features import measure, subset_numbers
from vca.evaluation.images import NpzImages
from vca.evaluation.record import missing_fields, read_record, seal
from vca.evaluation.sources import open_source
from vca.metrics.fid import frechet_distance
from vca.runtime.digest import file_sha256
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError

pytestmark = pytest.mark.process

ONE = World(0, 0, 1, torch.device("cpu"))
DRAW = ("sampler=ddpm", "sampler.steps=4", "device=cpu")


def evaluate(*overrides):
    return eval_fid.run(compose("eval_fid", ["device=cpu", *overrides]))


def test_eval_fid_every_sample_form_same_metrics(samples, generator_run, use, tmp_path):
    reference = ("data=digits", "reference=data:test", *use, "batch_size=16")
    shutil.copytree(samples / "images", tmp_path / "foreign")
    forms = {
        "set": (f"samples={samples}",),
        "images": (f"samples={samples / 'images'}",),
        "npz": (f"samples={samples / 'samples.npz'}",),
        "run": (f"run={generator_run}", f"count={DRAWN}", *DRAW),
        "foreign": (f"samples={tmp_path / 'foreign'}",),
    }
    records = {name: evaluate(*form, *reference, f"out={tmp_path / name}.json") for name, form in forms.items()}
    for name, record in records.items():
        assert record["metrics"] == records["set"]["metrics"], name
        assert record["samples"]["sha256"] == records["set"]["samples"]["sha256"], name
        assert all(value is not None for value in record["metrics"].values()) == (name != "none")
    made = records["run"]["samples"]["made"]
    assert made == records["set"]["samples"]["made"] == records["npz"]["samples"]["made"]
    assert made["nfe"] == {"mean": 4.0, "min": 4, "max": 4}
    assert (made["origin"]["step"], made["origin"]["weights"], made["sampler"]["steps"]) == (2, "ema", 4)
    assert records["foreign"]["samples"]["made"] is None
    assert any("sampling settings unknown" in line for line in records["foreign"]["warnings"])
    assert records["run"]["reference"]["count"] == 359


def test_eval_fid_weights_file_record_complete(generator_run, samples, use, tmp_path):
    """Its record is complete too; nobody knows its step and its training."""
    saved = torch.load(generator_run / "checkpoints" / "step_00000002.pt", weights_only=True)["ema"]
    torch.save(saved, tmp_path / "weights.pt")
    network = ("model=dit_mini", "attention=vca", "objective=diffusion", *SMALL_DIT[:4])
    data = ("model.input_size=8", "model.in_channels=1", "model.num_classes=10")
    reference = ("data=digits", "reference=data:test", *use, f"out={tmp_path / 'evaluation-x.json'}")
    drawn = evaluate(f"checkpoint={tmp_path / 'weights.pt'}", *network, *data, f"count={DRAWN}", *DRAW, *reference)
    origin = read_record(tmp_path / "evaluation-x.json")["samples"]["made"]["origin"]
    assert (origin["checkpoint"], origin["step"], origin["training"]) == ("weights.pt", None, None)
    manifest = json.loads((samples / "manifest.json").read_text())
    assert origin["weights_sha256"] == manifest["origin"]["weights_sha256"]
    assert drawn["samples"]["sha256"] == manifest["result"]["sha256"]


def test_eval_fid_record_location(samples, use, tmp_path, capsys):
    """In the set that it is about, beside a folder that is none of ours; the same evaluation has the same name."""
    reference = ("data=digits", "reference=data:test", *use)
    folder = shutil.copytree(samples, tmp_path / "set")
    for batch in (7, 32):
        evaluate(f"samples={folder}", *reference, f"batch_size={batch}")
    evaluate(f"samples={folder}", "data=digits", "reference=data:train", *use)
    assert len(list(folder.glob(f"evaluation-file-{DRAWN}-*.json"))) == 2
    said = capsys.readouterr().out
    assert re.search(rf"Frechet distance \(N = {DRAWN}\) +\d", said)
    assert "record: " in said
    images = shutil.copytree(samples / "images", tmp_path / "mine")
    evaluate(f"samples={images}", *reference, "picture=true")
    assert len(list(tmp_path.glob("mine-evaluation-*.json"))) == 1
    (picture,) = tmp_path.glob("mine-evaluation-*.png")
    assert Image.open(picture).size == (10 * 49 - 1, 3 * 49 - 1)
    evaluate(f"samples={images}", *reference)  # the folder holds nothing but images still


def test_eval_fid_independent_of_ranks(generator_run, use, tmp_path):
    """Drawn and measured by real ranks, of which one has no block at all; statistics by four."""
    command = [f"run={generator_run}", f"count={DRAWN}", *DRAW, *use, "data=digits", "batch_size=20"]
    one = evaluate(*command, "reference=data:test", f"out={tmp_path / '1.json'}")
    more = [*command, "reference=data:test", f"out={tmp_path / '3.json'}"]
    done = run_script("eval_fid.py", *more, ranks=3)
    assert done.returncode == 0, done.stderr[-3000:]
    three = read_record(tmp_path / "3.json")
    assert three["samples"] == one["samples"]
    assert three["compute"]["ranks"] == 3
    for name, value in one["metrics"].items():
        assert three["metrics"][name] == pytest.approx(value, rel=1e-9), name

    arguments = ["data=digits", "images=data:train", *use, "batch_size=64", "features=100", "device=cpu"]
    reference_stats.run(compose("reference_stats", [*arguments, f"out={tmp_path / '1.npz'}"]))
    done = run_script("scripts/reference_stats.py", *arguments, f"out={tmp_path / '4.npz'}", ranks=4)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(tmp_path / "1.npz") as alone, np.load(tmp_path / "4.npz") as shared:
        assert set(alone) == {"about", "mu", "sigma", "mu_s", "sigma_s", "features"}
        assert alone["features"].shape == (100, 8)
        for name in set(alone) - {"about"}:
            np.testing.assert_allclose(shared[name], alone[name], rtol=1e-9, atol=1e-9)
        assert alone["about"] == shared["about"]


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_measure_independent_of_batch_size(samples, extractor_file, batch):
    extractor = load_extractor(FileConfig(source=str(extractor_file)), ONE, rebuild)
    images = NpzImages(samples / "samples.npz", "samples")
    found, whole = (measure(images, extractor, ONE, size, DRAWN, verbose=False) for size in (batch, DRAWN))
    for one, other in (
        (found.pooled.mean, whole.pooled.mean),
        (found.pooled.covariance, whole.pooled.covariance),
        (found.spatial.covariance, whole.spatial.covariance),
        (found.features, whole.features),
        (found.logits, whole.logits),
    ):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
    assert found.sha256 == whole.sha256


def test_subset_numbers_deterministic_over_all_classes():
    """Always the same ones, and of all classes also where labels take turns."""
    assert subset_numbers(3, 5) == [0, 1, 2]
    assert subset_numbers(5, 0) == []
    chosen = subset_numbers(200, 50)
    assert chosen == sorted(set(chosen)) == subset_numbers(200, 50)
    assert {number % 10 for number in chosen} == set(range(10))


def test_eval_fid_reports_progress(samples, use, tmp_path):
    """What it does and how long each part took, on one rank, before the figures."""
    command = [f"samples={samples}", "data=digits", "reference=data:test", *use, "device=cpu", f"out={tmp_path}/a.json"]
    done = run_script("eval_fid.py", *command, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    seconds = r"in \d+\.\d s"
    stages = [
        rf"opening samples {re.escape(str(samples))} and reference data:test",
        rf"opened {DRAWN} samples and 359 reference images {seconds}",
        rf"\S+: features of {DRAWN} images {seconds}",
        rf"digits \(data:test\): features of 359 images {seconds}",
        "computing the metrics",
    ]
    lines = done.stdout.splitlines()
    for line, pattern in zip(lines, stages, strict=False):
        assert re.fullmatch(pattern, line), (pattern, lines)
    assert lines[len(stages)].startswith("Frechet distance")


def test_eval_fid_fewer_features_reports_sample_counts(samples, use, tmp_path, capsys):
    """With fewer features kept, only the distance is of all samples; the score, which needs all, is left out."""
    record = evaluate(
        f"samples={samples}", "data=digits", "reference=data:test", *use, "features=20", f"out={tmp_path}/a.json"
    )
    said = capsys.readouterr().out
    assert f"Frechet distance (N = {DRAWN})" in said
    assert "kernel distance (N = 20)" in said
    assert "precision, 20 vs 20" in said
    assert "classifier score not computed: samples" in " ".join(said.split())
    assert record["settings"]["neighbours"]["of"] == [20, 20]
    assert record["metrics"]["inception_score"] is None


def test_reference_stats_equal_image_reference(samples, use, tmp_path):
    out = tmp_path / "digits.npz"
    arguments = ["data=digits", "images=data:test", f"out={out}", *use, "device=cpu"]
    reference_stats.run(compose("reference_stats", arguments))
    saved = evaluate(f"samples={samples}", f"reference={out}", *use, f"out={tmp_path / 'a.json'}")
    direct = evaluate(f"samples={samples}", "data=digits", "reference=data:test", *use, f"out={tmp_path / 'b.json'}")
    assert saved["metrics"] == pytest.approx(direct["metrics"], rel=1e-12)
    assert (saved["reference"]["count"], saved["reference"]["features"]) == (359, 359)
    itself = evaluate(f"samples={out}", f"reference={out}", *use, f"out={tmp_path / 'c.json'}")
    assert abs(itself["metrics"]["frechet"]) < 1e-6
    assert itself["metrics"]["precision"] == itself["metrics"]["recall"] == 1


def test_eval_fid_adm_file_uses_stored_statistics(samples, use, tmp_path):
    """The distances come from its statistics, never from `arr_0`, which serves precision and recall alone."""
    rng = np.random.default_rng(0)
    root, spatial = rng.standard_normal((8, 8)), rng.standard_normal((9, 9))
    file = {
        "arr_0": rng.integers(0, 256, (30, 8, 8, 1), dtype=np.uint8),
        "mu": rng.standard_normal(8).astype(np.float32),
        "sigma": root @ root.T,
        "mu_s": rng.standard_normal(9).astype(np.float32),
        "sigma_s": spatial @ spatial.T,
    }
    for name, save in (("stored", np.savez), ("compressed", np.savez_compressed)):
        save(tmp_path / f"{name}.npz", **file)
    records = [
        evaluate(f"samples={samples}", f"reference={tmp_path / name}.npz", *use, f"out={tmp_path / name}.json")
        for name in ("stored", "compressed")
    ]
    assert records[0]["metrics"] == records[1]["metrics"]
    assert "kernel" in records[0]["settings"]["missing"]
    figures = records[0]["metrics"]
    extractor = load_extractor(FileConfig(source=use[1].split("=", 1)[1]), ONE, rebuild)
    mine = measure(NpzImages(samples / "samples.npz", "samples"), extractor, ONE, 32, DRAWN, verbose=False)
    mean = mine.pooled.mean - file["mu"].astype(np.float64)
    assert figures["frechet"] > np.square(mean).sum()
    assert figures["spatial_frechet"] is not None
    assert figures["kernel"] is None
    assert figures["precision"] is not None
    assert (records[0]["reference"]["count"], records[0]["reference"]["features"]) == (None, 30)
    arguments = ["images=" + str(tmp_path / "stored.npz"), f"out={tmp_path / 'new.npz'}", *use]
    with pytest.raises(ConfigError, match="images must be a set of images, got a file of statistics"):
        reference_stats.run(compose("reference_stats", arguments))
    assert any("stored.npz does not record its extractor" in w for w in records[0]["warnings"])


def test_extractor_classifier_features_before_head(samples, classifier_run, tmp_path):
    """Features are those before its head, of images normalised as in its training."""
    extractor = load_extractor(ClassifierConfig(run=str(classifier_run)), ONE, rebuild)
    data = compose("train_cls").data
    images = open_source("data:test", "samples", data)
    pixels = torch.from_numpy(images.read(range(5))).permute(0, 3, 1, 2)
    found = extractor(pixels)
    saved = json.loads((classifier_run / "config.json").read_text())
    model = rebuild(saved).eval()
    model.load_state_dict(torch.load(next((classifier_run / "checkpoints").glob("*.pt")), weights_only=True)["ema"])
    with torch.no_grad():
        normal = (pixels / 255 - saved["data"]["mean"][0]) / saved["data"]["std"][0]
        assert torch.equal(found.logits, model(normal))
        assert torch.equal(found.logits, model.head(found.pooled))
    use = ("extractor=classifier", f"extractor.run={classifier_run}", "data=digits", "reference=data:test")
    record = evaluate(f"samples={samples}", *use, f"out={tmp_path / 'a.json'}")
    assert record["metrics"]["frechet"] > 0


def test_fid_every_on_two_ranks_equals_eval_fid(use, tmp_path):
    """On two ranks while it trains, and then on one from its checkpoint."""
    common = [*SMALL_DIT, f"out_dir={tmp_path}", "name=run", "trainer.steps=4", "trainer.checkpoint_every=2"]
    fid = ["trainer.fid_every=2", "fid.reference=data:test", f"fid.count={DRAWN}", *use]
    done = run_script("train_gen.py", *common, *fid, "trainer.eval_every=0", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    told = {line["step"]: line for line in metrics(tmp_path / "run") if "frechet" in line}
    assert set(told) == {2, 4}
    for step in (2, 4):
        arguments = [
            f"run={tmp_path / 'run'}",
            f"step={step}",
            f"count={DRAWN}",
            "sampler=ddim",
            "sampler.steps=4",
        ]
        record = evaluate(*arguments, "data=digits", "reference=data:test", *use, f"out={tmp_path / 'a.json'}")
        assert record["metrics"]["frechet"] == pytest.approx(told[step]["frechet"], rel=1e-9)
        assert told[step]["frechet_samples"] == DRAWN
    assert told[2]["frechet"] != told[4]["frechet"]


def test_fid_every_adm_file_uses_stored_statistics(use, generator_run, tmp_path):
    """And not those of the images beside them."""
    file = tmp_path / "adm.npz"
    np.savez(file, arr_0=np.zeros((DRAWN, 8, 8, 1), np.uint8), mu=np.full(8, 1e3), sigma=np.eye(8))
    common = [*SMALL_DIT, f"out_dir={tmp_path}", "name=run", "trainer.steps=1", "trainer.eval_every=0"]
    train_gen.run(compose("train_gen", [*common, "trainer.fid_every=1", f"fid.reference={file}", "fid.count=9", *use]))
    (told,) = (line["frechet"] for line in metrics(tmp_path / "run") if "frechet" in line)
    arguments = [f"run={tmp_path / 'run'}", "count=9", "sampler=ddim", "sampler.steps=4", f"out={tmp_path / 'a.json'}"]
    assert evaluate(*arguments, f"reference={file}", *use)["metrics"]["frechet"] == pytest.approx(told, rel=1e-9)
    assert told > 1e6


def test_fid_every_leaves_weights_unchanged(use, tmp_path):
    """The same weights, whether a run measures itself or not."""
    weights = []
    for name, more in (
        ("plain", []),
        ("measured", ["trainer.fid_every=1", "fid.reference=data:test", "fid.count=8", *use]),
    ):
        arguments = [
            *SMALL_DIT,
            f"out_dir={tmp_path}",
            f"name={name}",
            "trainer.steps=3",
            "trainer.eval_every=0",
            *more,
        ]
        train_gen.run(compose("train_gen", arguments))
        weights.append(torch.load(tmp_path / name / "checkpoints" / "step_00000003.pt", weights_only=True)["model"])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.fixture(scope="session")
def record(samples, use, tmp_path_factory):
    return evaluate(
        f"samples={samples}",
        "data=digits",
        "reference=data:test",
        *use,
        f"out={tmp_path_factory.mktemp('r') / 'r.json'}",
    )


def leaves(value, path=()):
    """Every key of every dict in it."""
    for key, child in value.items():
        yield (*path, key)
        if isinstance(child, dict):
            yield from leaves(child, (*path, key))


def test_eval_fid_record_log_and_command(samples, generator_run, use, tmp_path, record):
    """The log of `run=...`, and of a sample folder inside of the run; none of samples elsewhere."""
    log = {"file": "metrics.jsonl", "sha256": file_sha256(generator_run / "metrics.jsonl")}
    reference = ("data=digits", "reference=data:test", *use, f"out={tmp_path / 'r.json'}")
    of_run = evaluate(f"run={generator_run}", f"count={DRAWN}", *DRAW, *reference)
    inside = shutil.copytree(generator_run, tmp_path / "run") / "set"
    shutil.copytree(samples, inside)
    assert [of_run["log"], record["log"]] == [log, None]
    for folder in (inside, inside / "images"):
        assert evaluate(f"samples={folder}", *reference)["log"] == log
    compute = of_run["compute"]
    assert (compute["command"], compute["device"]) == (shlex.join(sys.argv), "cpu")
    assert compute["threads"] == torch.get_num_threads()
    assert compute["processor"]


def test_read_record_missing_field_refused(record, tmp_path):
    """Also one that was sealed again names what it lacks, but for options of model and attention, which differ."""
    path = tmp_path / "evaluation-x.json"
    path.write_text(json.dumps(record))
    assert read_record(path) == record
    fields = list(leaves(record))
    assert len(fields) > 100
    for field in fields:
        less = copy.deepcopy(record)
        part = less
        for key in field[:-1]:
            part = part[key]
        del part[field[-1]]
        path.write_text(json.dumps(less))
        with pytest.raises(ConfigError, match=r"has no field \S+( and \d+ more)?; evaluate again|has changed since"):
            read_record(path)
    assert missing_fields({**record, "samples": {}})[:2] == ["samples.source", "samples.sha256"]
    changed = {**record, "metrics": {**record["metrics"], "frechet": 1.0}}
    path.write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match="has changed since"):
        read_record(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="has no field format"):
        read_record(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_record(path)
    assert seal(changed) != record["sha256"]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real CIFAR-10")
def test_eval_fid_equals_torch_fidelity_on_cifar10(cifar, tmp_path):
    """2,100 test images against 2,100 training ones, by the whole path and by torch-fidelity's own functions."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    torch.set_num_threads(4)
    sets = {name: cifar(train)[:2100] for name, train in (("samples", False), ("reference", True))}
    for name, pixels in sets.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=pixels)
    weights = tmp_path / "random.pth"
    write_random_weights(weights, torch.from_numpy(sets["samples"][:64]).permute(0, 3, 1, 2))
    record = evaluate(
        f"samples={tmp_path / 'samples.npz'}",
        f"reference={tmp_path / 'reference.npz'}",
        "extractor=inception",
        f"extractor.weights={weights}",
        "extractor.sha256=null",
        f"out={tmp_path / 'record.json'}",
    )
    network = theirs(weights)
    features = {
        name: [
            torch.cat(part)
            for part in zip(*map(network, torch.from_numpy(pixels).permute(0, 3, 1, 2).split(50)), strict=True)
        ]
        for name, pixels in sets.items()
    }
    pools = [features[name][FEATURES.index("2048")] for name in ("samples", "reference")]
    fid = fid_statistics_to_metric(*map(fid_features_to_statistics, pools), False)["frechet_inception_distance"]
    kid = kid_features_to_metric(*(pool.double() for pool in pools), kid_subset_size=1000, verbose=False)
    isc = isc_features_to_metric(features["samples"][1], splits=1, shuffle=False)
    found = record["metrics"]
    print({"fid": (found["frechet"], fid), "kid": (found["kernel"], kid), "is": (found["inception_score"], isc)})
    assert found["frechet"] == pytest.approx(fid, rel=1e-6)
    assert found["kernel"] == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-5)
    assert found["inception_score"] == pytest.approx(isc["inception_score_mean"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real CIFAR-10 and its ResNet-56")
def test_frechet_distance_known_values_on_cifar10(cifar, tmp_path):
    """Training against test images, and against test images with noise, in the features of a ResNet-56."""
    test = cifar(False)
    extractor = load_extractor(
        FileConfig(
            source=str(ROOT / "examples" / "resnet56.py"), weights=str(SHARED / "weights" / "resnet56-4bfd9763.th")
        ),
        ONE,
        rebuild,
    )
    torch.set_num_threads(4)
    np.savez(tmp_path / "train.npz", arr_0=cifar(True))
    reference = measure(NpzImages(tmp_path / "train.npz", "reference"), extractor, ONE, 250, 0, verbose=False)
    for sigma, expected in ((0, 0.050), (8, 4.65), (16, 18.7)):
        noise = np.random.default_rng(0).normal(0, sigma, test.shape) if sigma else 0
        np.savez(tmp_path / "test.npz", arr_0=np.clip(np.rint(test + noise), 0, 255).astype(np.uint8))
        source = NpzImages(tmp_path / "test.npz", "samples")
        found = read_features(source, extractor, ONE, 250, 0, verbose=False)

        distance = frechet_distance(*found.pooled, *reference.pooled)
        print(sigma, distance)
        assert distance == pytest.approx(expected, rel=0.01)
    assert math.isfinite(distance)


@pytest.fixture(scope="session")
def cifar(tmp_path_factory):
    """The images of a split, `(N, 32, 32, 3)`."""
    import subprocess
    import sys

    from torchvision.datasets import CIFAR10

    folder = tmp_path_factory.mktemp("cifar")
    subprocess.run([sys.executable, str(SHARED / "cifar10" / "unpack.py"), str(folder)], check=True)
    return lambda train: CIFAR10(str(folder), train=train).data
