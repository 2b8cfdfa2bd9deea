"""`eval_fid.py`: the same figures from every form of a set and on any number of ranks; nothing wrong is swallowed."""

import copy
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_fid
import sample
import train_gen
from models import rebuild
from scripts import reference_stats
from tests.conftest import ROOT, SMALL_DIT, metrics, one_line, train
from tests.inception import FEATURES, theirs, write_random_weights
from vca.config import compose
from vca.evaluation.evaluate import read_features
from vca.evaluation.extractor import ClassifierConfig, FileConfig, load_extractor
from vca.evaluation.features import chosen_numbers, measure
from vca.evaluation.frechet import frechet_distance
from vca.evaluation.images import NpzImages
from vca.evaluation.record import missing_fields, read_record, seal
from vca.evaluation.sources import open_source
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError, NonFiniteError

ONE = World(0, 0, 1, torch.device("cpu"))
COUNT = 40
DRAW = ("sampler=ddpm", "sampler.steps=4", "device=cpu")
SHARED = ROOT.parent / "shared" / "data"

# Twelve features of an image of 8 x 8 pixels, and logits and spatial features of their own.
EXTRACTOR = """
import torch

class Blocks(torch.nn.Module):
    def forward(self, images):
        x = images.float().mean(dim=1)
        if x.shape[-1] != 8:
            raise ValueError(f"wants 8 x 8 pixels, got {x.shape[-1]}")
        pool = torch.nn.functional.avg_pool2d(x[:, None], (2, 3)).flatten(1)[:, :8]
        return {"pool": pool, "logits": pool[:, :5] / 30, "spatial": x[:, ::3, ::3].flatten(1)}

def load_extractor(weights):
    return Blocks()
"""


@pytest.fixture(scope="session")
def extractor_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("extractor") / "blocks.py"
    path.write_text(EXTRACTOR)
    return path


@pytest.fixture(scope="session")
def use(extractor_file):
    """Overrides that choose the extractor."""
    return ("extractor=file", f"extractor.source={extractor_file}")


@pytest.fixture(scope="session")
def samples(generator_run, tmp_path_factory):
    """A set drawn by `sample.py`, also as npz."""
    out = tmp_path_factory.mktemp("drawn") / "set"
    sample.run(compose("sample", [f"out={out}", f"run={generator_run}", f"count={COUNT}", "npz=true", *DRAW]))
    return out


def evaluate(*overrides):
    return eval_fid.run(compose("eval_fid", ["device=cpu", *overrides]))


def test_every_form_of_a_set_gives_the_same_figures(samples, generator_run, use, tmp_path):
    reference = ("data=digits", "reference=data:test", *use, "batch_size=16")
    shutil.copytree(samples / "images", tmp_path / "foreign")
    forms = {
        "set": (f"samples={samples}",),
        "images": (f"samples={samples / 'images'}",),
        "npz": (f"samples={samples / 'samples.npz'}",),
        "run": (f"run={generator_run}", f"count={COUNT}", *DRAW),
        "foreign": (f"samples={tmp_path / 'foreign'}",),
    }
    records = {name: evaluate(*form, *reference, f"out={tmp_path / name}.json") for name, form in forms.items()}
    for name, record in records.items():
        assert record["metrics"] == records["set"]["metrics"], name
        assert record["samples"]["sha256"] == records["set"]["samples"]["sha256"], name
        assert all(value is not None for value in record["metrics"].values()) == (name != "none")
    made = records["run"]["samples"]["made"]
    assert made == records["set"]["samples"]["made"] == records["npz"]["samples"]["made"]
    assert made["evaluations"] == {"mean": 4.0, "min": 4, "max": 4}
    assert (made["origin"]["step"], made["origin"]["weights"], made["sampler"]["steps"]) == (2, "ema", 4)
    assert records["foreign"]["samples"]["made"] is None
    assert any("nothing says how" in line for line in records["foreign"]["warnings"])
    assert records["run"]["reference"]["count"] == 359


def test_a_file_of_weights(generator_run, samples, use, tmp_path):
    """Its record is complete too; nobody knows its step and its training."""
    saved = torch.load(generator_run / "checkpoints" / "step_00000002.pt", weights_only=True)["ema"]
    torch.save(saved, tmp_path / "weights.pt")
    network = ("model=dit_mini", "attention=vca", "objective=diffusion", *SMALL_DIT[:4])
    data = ("model.input_size=8", "model.in_channels=1", "model.num_classes=10")
    reference = ("data=digits", "reference=data:test", *use, f"out={tmp_path / 'evaluation-x.json'}")
    drawn = evaluate(f"checkpoint={tmp_path / 'weights.pt'}", *network, *data, f"count={COUNT}", *DRAW, *reference)
    origin = read_record(tmp_path / "evaluation-x.json")["samples"]["made"]["origin"]
    assert (origin["checkpoint"], origin["step"], origin["training"]) == ("weights.pt", None, None)
    manifest = json.loads((samples / "manifest.json").read_text())
    assert origin["weights_sha256"] == manifest["origin"]["weights_sha256"]
    assert drawn["samples"]["sha256"] == manifest["result"]["sha256"]


def test_where_the_record_goes(samples, use, tmp_path, capsys):
    """In the set that it is about, beside a folder that is none of ours; the same evaluation has the same name."""
    reference = ("data=digits", "reference=data:test", *use)
    folder = shutil.copytree(samples, tmp_path / "set")
    for batch in (7, 32):
        evaluate(f"samples={folder}", *reference, f"batch_size={batch}")
    evaluate(f"samples={folder}", "data=digits", "reference=data:train", *use)
    assert len(list(folder.glob(f"evaluation-file-{COUNT}-*.json"))) == 2
    said = capsys.readouterr().out
    assert re.search(rf"Frechet distance \(N = {COUNT}\) +\d", said)
    assert "record: " in said
    images = shutil.copytree(samples / "images", tmp_path / "mine")
    evaluate(f"samples={images}", *reference, "picture=true")
    assert len(list(tmp_path.glob("mine-evaluation-*.json"))) == 1
    (picture,) = tmp_path.glob("mine-evaluation-*.png")
    assert Image.open(picture).size == (10 * 49 - 1, 3 * 49 - 1)
    evaluate(f"samples={images}", *reference)  # the folder holds nothing but images still


def test_ranks_change_nothing(generator_run, use, tmp_path):
    """Drawn and measured by real ranks, of which one has no block at all; statistics by four."""
    command = [f"run={generator_run}", f"count={COUNT}", *DRAW, *use, "data=digits", "batch_size=20"]
    one = evaluate(*command, "reference=data:test", f"out={tmp_path / '1.json'}")
    more = [*command, "reference=data:test", f"out={tmp_path / '3.json'}"]
    done = train(*more, ranks=3, script="eval_fid.py")
    assert done.returncode == 0, done.stderr[-3000:]
    three = read_record(tmp_path / "3.json")
    assert three["samples"] == one["samples"]
    assert three["compute"]["ranks"] == 3
    for name, value in one["metrics"].items():
        assert three["metrics"][name] == pytest.approx(value, rel=1e-9), name

    arguments = ["data=digits", "images=data:train", *use, "batch_size=64", "features=100", "device=cpu"]
    reference_stats.run(compose("reference_stats", [*arguments, f"out={tmp_path / '1.npz'}"]))
    done = train(*arguments, f"out={tmp_path / '4.npz'}", ranks=4, script="scripts/reference_stats.py")
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(tmp_path / "1.npz") as alone, np.load(tmp_path / "4.npz") as shared:
        assert set(alone) == {"about", "mu", "sigma", "mu_s", "sigma_s", "features"}
        assert alone["features"].shape == (100, 8)
        for name in set(alone) - {"about"}:
            np.testing.assert_allclose(shared[name], alone[name], rtol=1e-9, atol=1e-9)
        assert alone["about"] == shared["about"]


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batches_change_nothing(samples, extractor_file, batch):
    extractor = load_extractor(FileConfig(source=str(extractor_file)), ONE, rebuild)
    images = NpzImages(samples / "samples.npz", "samples")
    found, whole = (measure(images, extractor, ONE, size, COUNT, talk=False) for size in (batch, COUNT))
    for one, other in (
        (found.pool.mean, whole.pool.mean),
        (found.pool.covariance, whole.pool.covariance),
        (found.spatial.covariance, whole.spatial.covariance),
        (found.features, whole.features),
        (found.logits, whole.logits),
    ):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
    assert found.sha256 == whole.sha256


def test_kept_features_are_chosen_at_random():
    """Always the same ones, and of all classes also where labels take turns."""
    assert chosen_numbers(3, 5) == [0, 1, 2]
    assert chosen_numbers(5, 0) == []
    chosen = chosen_numbers(200, 50)
    assert chosen == sorted(set(chosen)) == chosen_numbers(200, 50)
    assert {number % 10 for number in chosen} == set(range(10))


def test_figures_name_the_images_that_they_are_of(samples, use, tmp_path, capsys):
    """With fewer features kept, only the distance is of all samples; the score, which needs all, is left out."""
    record = evaluate(
        f"samples={samples}", "data=digits", "reference=data:test", *use, "features=20", f"out={tmp_path}/a.json"
    )
    said = capsys.readouterr().out
    assert f"Frechet distance (N = {COUNT})" in said
    assert "kernel distance (N = 20)" in said
    assert "precision (N = 20)" in said
    assert record["settings"]["neighbours"]["of"] == [20, 20]
    assert record["metrics"]["inception_score"] is None


def test_an_error_on_one_rank_is_told(use, tmp_path):
    """The second of two ranks reads a cut image: the line is there, and nobody waits."""
    folder = some(tmp_path / "bad")
    file = folder / "000035.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(file, compress_level=0)
    file.write_bytes(file.read_bytes()[:90])
    command = [f"samples={folder}", "data=digits", "reference=data:test", *use, "batch_size=20", "device=cpu"]
    done = train(*command, ranks=2, script="eval_fid.py")
    assert done.returncode == 1
    assert re.search(r"(?m)^config error: samples: \S+000035.png cannot be decoded", done.stderr), done.stderr[-3000:]


def test_saved_statistics_are_those_of_the_images(samples, use, tmp_path):
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


def test_adms_file(samples, use, tmp_path):
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
    figures = records[0]["metrics"]
    extractor = load_extractor(FileConfig(source=use[1].split("=", 1)[1]), ONE, rebuild)
    mine = measure(NpzImages(samples / "samples.npz", "samples"), extractor, ONE, 32, COUNT, talk=False)
    mean = mine.pool.mean - file["mu"].astype(np.float64)
    assert figures["frechet"] > np.square(mean).sum()
    assert figures["spatial_frechet"] is not None
    assert figures["kernel"] is None
    assert figures["precision"] is not None
    assert (records[0]["reference"]["count"], records[0]["reference"]["features"]) == (None, 30)
    arguments = ["images=" + str(tmp_path / "stored.npz"), f"out={tmp_path / 'new.npz'}", *use]
    with pytest.raises(ConfigError, match="holds statistics already, of all the images that it stands for"):
        reference_stats.run(compose("reference_stats", arguments))
    assert any("nothing says that stored.npz was made with this extractor" in w for w in records[0]["warnings"])


def png(folder: Path, name: str, size=(8, 8), mode="L", kind="PNG") -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    Image.new(mode, size, 3).save(folder / name, format=kind)
    return folder


def some(folder: Path, count: int = COUNT, **more) -> Path:
    for number in range(count):
        png(folder, f"{number:06d}.png", **more)
    return folder


def cut(folder: Path) -> Path:
    some(folder)
    file = folder / "000003.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:70])
    return folder


def text(folder: Path, name: str, content: str = "hello") -> Path:
    some(folder)
    (folder / name).write_text(content)
    return folder


def without(folder: Path, name: str) -> Path:
    some(folder)
    (folder / name).unlink()
    return folder


def npz(folder: Path, **arrays) -> Path:
    folder.mkdir()
    np.savez(folder / "file.npz", **arrays)
    return folder / "file.npz"


def transparent(folder: Path) -> Path:
    some(folder)
    Image.new("L", (8, 8), 3).save(folder / "000003.png", transparency=0)
    return folder


def damaged_zip(folder: Path) -> Path:
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 1), dtype=np.uint8)
    np.savez_compressed(folder / "file.npz", arr_0=noise)
    content = bytearray((folder / "file.npz").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 99] = bytes(99)
    (folder / "file.npz").write_bytes(content)
    return folder / "file.npz"


def junk(folder: Path) -> Path:
    folder.mkdir()
    (folder / "file.npz").write_bytes(b"PK but not a zip")
    return folder / "file.npz"


def flipped(folder: Path) -> Path:
    """One bit of sigma."""
    file = npz(folder, **STATISTICS)
    content = bytearray(file.read_bytes())
    content[content.index(b"sigma.npy") + 300] ^= 1
    file.write_bytes(content)
    return file


PIXELS = np.zeros((COUNT, 8, 8, 1), np.uint8)
OTHER = {"extractor": {"name": "inception"}, "shape": [8, 8, 1], "count": 9, "source": "s", "sha256": "0"}
STATISTICS = {"mu": np.zeros(8), "sigma": np.eye(8)}
# what is made in a folder -> the message about it as `samples`
BAD_SAMPLES = {
    "truncated": (cut, r"samples: \S+000003.png cannot be decoded \(.*\); make it again"),
    "no image": (lambda f: text(f, "000003.png"), r"000003.png is not an image; remove it, or make it again"),
    "mixed sizes": (
        lambda f: png(some(f), "000007.png", (9, 8)),
        r"000007.png is 8 x 9 grey, but 000000.png is 8 x 8 grey",
    ),
    "mixed modes": (
        lambda f: png(some(f), "000007.png", mode="RGB"),
        r"000007.png is 8 x 8 RGB, but 000000.png is 8 x 8",
    ),
    "another size": (lambda f: some(f, size=(16, 16)), r"images of 16 x 16 grey, the reference .* of 8 x 8 grey"),
    "RGB": (lambda f: some(f, mode="RGB"), r"images of 8 x 8 RGB, the reference .* of 8 x 8 grey; they must be alike"),
    "alpha": (lambda f: some(f, mode="RGBA"), r"000000.png has an alpha channel; save it as RGB"),
    "palette": (lambda f: some(f, mode="P"), r"000000.png has a palette; save it as RGB"),
    "16 bits": (lambda f: some(f, mode="I;16"), r"000000.png has mode I;16\S*; save it as 8-bit RGB"),
    "stray file": (lambda f: text(f, "readme.txt"), r"readme.txt is no PNG file; .* move it away"),
    "stray folder": (lambda f: png(some(f) / "more", "1.png").parent, r"more is no PNG file"),
    "stray image": (lambda f: png(some(f), "grid.png"), r"grid.png has no number, but 000000.png has"),
    "missing": (lambda f: without(f, "000005.png"), r"holds 39 images up to number 39, but none of number 5"),
    "doubled": (lambda f: png(some(f), "5.png"), r"5.png and 0*5.png are both number 5; remove one"),
    "JPEG": (lambda f: png(some(f), "000040.jpg", kind="JPEG"), r"000040.jpg is a JPEG, whose compression moves"),
    "disguised JPEG": (lambda f: png(some(f), "000004.png", kind="JPEG"), r"000004.png is a JPEG by its content"),
    "empty": (lambda f: f.mkdir() or f, r"bad is empty; name the folder that holds the PNG files"),
    "transparency": (transparent, r"000003.png has mode L with transparency; save it as 8-bit RGB"),
    "no number": (lambda f: png(some(f), "\u00b2.png"), r"has no number, but 000000.png has"),
    "compressed": (lambda f: damaged_zip(f), r"cannot be read as an npz \(.*\); copy it again"),
    "nothing": (lambda f: f / "none", r"samples must be a folder of PNG files, an .npz, data:train or data:test, got"),
    "one": (lambda f: some(f, 1), r"holds 1 image, and a covariance needs two"),
    "too few": (lambda f: some(f, 5), r"5 images are fewer than the 8 features.*allow_few=true"),
    "wrong key": (lambda f: npz(f, images=PIXELS, labels=PIXELS), r"has no array 'arr_0', but images, labels"),
    "float": (lambda f: npz(f, arr_0=PIXELS / 2), r"arr_0 of \S+ must be uint8; .* got float64$"),
    "NaN": (lambda f: npz(f, arr_0=PIXELS * np.nan), r"must be uint8.* got float64, with NaN or infinite numbers"),
    "dimensions": (lambda f: npz(f, arr_0=PIXELS[..., 0]), r"must be images \(N, H, W, 1 or 3\), got \(40, 8, 8\)"),
    "NCHW": (lambda f: npz(f, arr_0=np.zeros((9, 3, 8, 8), np.uint8)), r"must be images .* got \(9, 3, 8, 8\)"),
    "no npz": (junk, r"cannot be read as an npz \(.*\); copy it again"),
}
BAD_REFERENCES = {
    "dimensions": (
        lambda f: npz(f, mu=np.zeros(9), sigma=np.eye(9)),
        r"file.npz has 9 pool features, \S+ with extractor=file 8",
    ),
    "covariance": (lambda f: npz(f, mu=np.zeros(8), sigma=np.eye(7)), r"mu must be \(D,\) .* got \(8,\) and \(7, 7\)"),
    "NaN": (lambda f: npz(f, mu=np.zeros(8) * np.nan, sigma=np.eye(8)), r"mu or sigma is NaN or infinite"),
    "no sigma": (lambda f: npz(f, mu=np.zeros(8)), r"file.npz has no array 'sigma', but mu$"),
    "no mu": (lambda f: npz(f, sigma=np.eye(8)), r"file.npz has no array 'mu', but sigma$"),
    "spatial": (
        lambda f: npz(f, mu_s=np.zeros(7), sigma_s=np.eye(7), **STATISTICS),
        r"has 7 spatial features, \S+ with extractor=file 9",
    ),
    "flipped bit": (flipped, r"cannot be read as an npz \(Bad CRC-32 for file 'sigma.npy'\); copy it again"),
    "half of it": (lambda f: npz(f, about=np.array("{}"), **STATISTICS), r"file.npz is damaged \('source'\)"),
    "nothing": (lambda f: npz(f, other=np.zeros(8)), r"reference: \S+ has no array 'arr_0', but other$"),
    "not there": (lambda f: f / "stats.npz", r"reference must be a folder of PNG files, an .npz"),
    "damaged": (lambda f: npz(f, about=np.array("{"), **STATISTICS), r"file.npz is damaged \(.*\); make it again"),
    "another extractor": (
        lambda f: npz(f, about=np.array(json.dumps(OTHER)), **STATISTICS),
        r"was made with another extractor \(extractor.name: 'inception' there, 'file' here",
    ),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_bad_samples(case, use, tmp_path, monkeypatch, capsys):
    make, message = BAD_SAMPLES[case]
    arguments = [f"samples={make(tmp_path / 'bad')}", "data=digits", "reference=data:test", *use, "device=cpu"]
    said = one_line("eval_fid", eval_fid.run, arguments, monkeypatch, capsys)
    assert re.search(message, said.strip()), said
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("case", BAD_REFERENCES)
def test_bad_references(case, use, samples, tmp_path, monkeypatch, capsys):
    make, message = BAD_REFERENCES[case]
    arguments = [f"samples={samples}", f"reference={make(tmp_path / 'bad')}", *use, "device=cpu"]
    said = one_line("eval_fid", eval_fid.run, arguments, monkeypatch, capsys)
    assert re.search(message, said.strip()), said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("reference=x", "samples, run or checkpoint must be given, one of them, got None"),
        ("samples=a run=b reference=x", r"given, one of them, got \['samples', 'run'\]"),
        ("samples=a", "reference has no value; give it one: reference=..."),
        ("samples=SET reference=data:test", "data must be given for reference=data:test, such as data=cifar10"),
        ("samples=SET reference=data:test data=digits count=7", "count must be 40, which .* holds, got 7"),
        ("samples=SET reference=data:test data=digits protocol=dit_table", "protocol must be null with samples"),
        (
            "samples=SET reference=data:test data=digits sampler=ode",
            "sampler must be left out with samples, .* 'ode_heun'",
        ),
        ("samples=SET reference=data:test data=digits extractor=clip", "extractor=clip: no such option"),
        ("samples=SET reference=data:test data=digits extractor=classifier", "extractor.run must be given"),
        ("samples=SET reference=data:test data=digits extractor=file", "extractor.source must be given: a Python file"),
        (
            "samples=SET reference=data:test data=digits extractor=classifier extractor.run=x",
            "extractor.run must be a run",
        ),
        (
            "samples=SET reference=data:test data=digits extractor=file extractor.source=x.py",
            "must be a Python file, got",
        ),
        ("samples=SET reference=data:test data=digits", "extractor.weights: weights-inception-2015-12-05-6726825d.pth"),
        ("samples=SET reference=data:test data=digits feature=3", "unknown key 'feature'; did you mean 'features'"),
        (
            "samples=SET reference=STATISTICS picture=true USE",
            "picture must be false where statistics",
        ),
        ("samples=SET reference=data:test data=digits out=/proc/none/x.json USE", "out: /proc/none cannot be written"),
    ],
)
def test_wrong_commands(arguments, message, samples, use, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    np.savez(tmp_path / "statistics.npz", **STATISTICS)
    arguments = arguments.replace("STATISTICS", str(tmp_path / "statistics.npz"))
    replaced = arguments.replace("SET", str(samples)).replace("USE", " ".join(use)).split()
    assert re.search(message, one_line("eval_fid", eval_fid.run, [*replaced, "device=cpu"], monkeypatch, capsys))


def test_wrong_extractor_files(samples, tmp_path, monkeypatch, capsys):
    for code, message in (
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x = 1", "AttributeError: .* has no attribute 'load_extractor'"),
        ("def load_extractor(weights): return 3", "TypeError: load_extractor must return a module"),
        (EXTRACTOR.replace("!= 8", "!= 9"), r"does not take images of 8 x 8 grey \(wants 8 x 8 pixels, got 8\)"),
        (EXTRACTOR.replace(".flatten(1)[:, :8]", ""), r"pool of 1 images must be \(1, features\), got \(1, 1, 4, 2\)"),
    ):
        (tmp_path / "mine.py").write_text(code)
        arguments = [f"samples={samples}", "data=digits", "reference=data:test", "extractor=file"]
        arguments += [f"extractor.source={tmp_path / 'mine.py'}", "device=cpu"]
        assert re.search(message, one_line("eval_fid", eval_fid.run, arguments, monkeypatch, capsys))


def test_features_that_are_not_finite(samples, tmp_path):
    (tmp_path / "mine.py").write_text(EXTRACTOR.replace("return {", "pool[:, 2] = pool[:, 2].log(); return {"))
    extractor = load_extractor(FileConfig(source=str(tmp_path / "mine.py")), ONE, rebuild)
    black = tmp_path / "black.npz"
    np.savez(black, arr_0=np.concatenate([PIXELS[:5] + 9, PIXELS]))
    with pytest.raises(NonFiniteError, match=rf"pool features of number 5 of {black} are not finite"):
        measure(NpzImages(black, "samples"), extractor, ONE, 4, 0, talk=False)


def test_a_set_that_was_changed_or_is_not_complete(samples, use, tmp_path):
    reference = ("data=digits", "reference=data:test", *use)
    changed = shutil.copytree(samples, tmp_path / "changed")
    shutil.copy(changed / "images" / "000000.png", changed / "images" / "000001.png")
    with pytest.raises(ConfigError, match=r"holds other images than sample\.py wrote"):
        evaluate(f"samples={changed}", *reference)
    manifest = json.loads((changed / "manifest.json").read_text())
    del manifest["result"]
    (changed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"is not complete; run its sample\.py command again"):
        evaluate(f"samples={changed}", *reference)


def test_a_classifier_as_extractor(samples, classifier_run, tmp_path):
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
        assert torch.equal(found.logits, model.head(found.pool))
    use = ("extractor=classifier", f"extractor.run={classifier_run}", "data=digits", "reference=data:test")
    record = evaluate(f"samples={samples}", *use, f"out={tmp_path / 'a.json'}")
    assert record["metrics"]["frechet"] > 0


def test_a_run_measures_itself_as_eval_fid_does(use, tmp_path):
    """On two ranks while it trains, and then on one from its checkpoint."""
    common = [*SMALL_DIT, f"out_dir={tmp_path}", "name=run", "trainer.steps=4", "trainer.checkpoint_every=2"]
    fid = ["trainer.fid_every=2", "fid.reference=data:test", f"fid.count={COUNT}", *use]
    done = train(*common, *fid, "trainer.eval_every=0", ranks=2, script="train_gen.py")
    assert done.returncode == 0, done.stderr[-3000:]
    told = {line["step"]: line for line in metrics(tmp_path / "run") if "frechet" in line}
    assert set(told) == {2, 4}
    for step in (2, 4):
        arguments = [f"run={tmp_path / 'run'}", f"step={step}", f"count={COUNT}", "sampler=ddim", "sampler.steps=4"]
        record = evaluate(*arguments, "data=digits", "reference=data:test", *use, f"out={tmp_path / 'a.json'}")
        assert record["metrics"]["frechet"] == pytest.approx(told[step]["frechet"], rel=1e-9)
        assert told[step]["frechet_samples"] == COUNT
    assert told[2]["frechet"] != told[4]["frechet"]


def test_a_run_takes_the_statistics_of_adms_file(use, generator_run, tmp_path):
    """And not those of the images beside them."""
    file = npz(tmp_path / "adm", arr_0=PIXELS, mu=np.full(8, 1e3), sigma=np.eye(8))
    common = [*SMALL_DIT, f"out_dir={tmp_path}", "name=run", "trainer.steps=1", "trainer.eval_every=0"]
    train_gen.run(compose("train_gen", [*common, "trainer.fid_every=1", f"fid.reference={file}", "fid.count=9", *use]))
    (told,) = (line["frechet"] for line in metrics(tmp_path / "run") if "frechet" in line)
    arguments = [f"run={tmp_path / 'run'}", "count=9", "sampler=ddim", "sampler.steps=4", f"out={tmp_path / 'a.json'}"]
    assert evaluate(*arguments, f"reference={file}", *use)["metrics"]["frechet"] == pytest.approx(told, rel=1e-9)
    assert told > 1e6


def test_measuring_changes_no_training(use, tmp_path):
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


def test_a_record_without_any_one_field_is_refused(record, tmp_path):
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
        with pytest.raises(
            ConfigError, match=r"does not name \S+( and \d+ more)?; evaluate again|was changed after it was written"
        ):
            read_record(path)
    assert missing_fields({**record, "samples": {}})[:2] == ["samples.source", "samples.sha256"]
    changed = {**record, "metrics": {**record["metrics"], "frechet": 1.0}}
    path.write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match="was changed after"):
        read_record(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="does not name format"):
        read_record(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_record(path)
    assert seal(changed) != record["sha256"]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real CIFAR-10")
def test_parity_with_torch_fidelity_on_cifar(cifar, tmp_path):
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
def test_known_distances_of_cifar(cifar, tmp_path):
    """Training against test images, and against test images with noise, in the features of a ResNet-56."""
    test = cifar(False)
    extractor = load_extractor(
        FileConfig(
            source=str(ROOT / "tests" / "resnet56.py"), weights=str(SHARED / "weights" / "resnet56-4bfd9763.th")
        ),
        ONE,
        rebuild,
    )
    torch.set_num_threads(4)
    np.savez(tmp_path / "train.npz", arr_0=cifar(True))
    reference = measure(NpzImages(tmp_path / "train.npz", "reference"), extractor, ONE, 250, 0, talk=False)
    for sigma, expected in ((0, 0.050), (8, 4.65), (16, 18.7)):
        noise = np.random.default_rng(0).normal(0, sigma, test.shape) if sigma else 0
        np.savez(tmp_path / "test.npz", arr_0=np.clip(np.rint(test + noise), 0, 255).astype(np.uint8))
        source = NpzImages(tmp_path / "test.npz", "samples")
        found = read_features(source, extractor, ONE, 250, 0, talk=False)

        distance = frechet_distance(*found.pool, *reference.pool)
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
