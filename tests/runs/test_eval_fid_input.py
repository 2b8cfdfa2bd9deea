"""`eval_fid.py` on wrong input: every bad set, statistics file, command and extractor is one clear line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_fid
from models import rebuild
from tests.processes import run_script
from tests.support import DRAWN, EXTRACTOR, one_line, write_png16
from vca.config import compose
from vca.evaluation.extractor import FileConfig, load_extractor
from vca.evaluation.features import measure
from vca.evaluation.images import NpzImages
from vca.evaluation.stats_file import StatisticsFile
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError, NonFiniteError

pytestmark = pytest.mark.process

ONE = World(0, 0, 1, torch.device("cpu"))


def evaluate(*overrides):
    return eval_fid.run(compose("eval_fid", ["device=cpu", *overrides]))


def png(folder: Path, name: str, size=(8, 8), mode="L", kind="PNG") -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    Image.new(mode, size, 3).save(folder / name, format=kind)
    return folder


def some(folder: Path, count: int = DRAWN, **more) -> Path:
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


def sixteen_bits_rgb(folder: Path) -> Path:
    some(folder, mode="RGB")
    write_png16(folder / "000003.png")
    return folder


def damaged_zip(folder: Path) -> Path:
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (DRAWN, 8, 8, 1), dtype=np.uint8)
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


PIXELS = np.zeros((DRAWN, 8, 8, 1), np.uint8)
OTHER = {"extractor": {"name": "inception"}, "shape": [8, 8, 1], "count": 9, "source": "s", "sha256": "0"}
STATISTICS = {"mu": np.zeros(8), "sigma": np.eye(8)}
# what is made in a folder -> the message about it as `samples`
BAD_SAMPLES = {
    "truncated": (cut, r"samples: \S+000003.png cannot be decoded \(.*\); recreate it"),
    "no image": (lambda f: text(f, "000003.png"), r"000003.png is not an image; remove or recreate it"),
    "mixed sizes": (
        lambda f: png(some(f), "000007.png", (9, 8)),
        r"000007.png must be 8 x 8 grey like 000000.png, got 8 x 9 grey",
    ),
    "mixed modes": (
        lambda f: png(some(f), "000007.png", mode="RGB"),
        r"000007.png must be 8 x 8 grey like 000000.png, got 8 x 8 RGB",
    ),
    "another size": (
        lambda f: some(f, size=(16, 16)),
        r"must have the size of the reference .*, 8 x 8 grey, got 16 x 16 grey",
    ),
    "RGB": (lambda f: some(f, mode="RGB"), r"must have the size of the reference .*, 8 x 8 grey, got 8 x 8 RGB"),
    "alpha": (lambda f: some(f, mode="RGBA"), r"000000.png has an alpha channel; save it as RGB"),
    "palette": (lambda f: some(f, mode="P"), r"000000.png has a palette; save it as RGB"),
    "16 bits": (lambda f: some(f, mode="I;16"), r"000000.png has mode I;16\S*; save it as 8-bit RGB"),
    "16-bit RGB": (sixteen_bits_rgb, r"samples: \S+000003.png has 16 bits per channel; save it as 8-bit RGB"),
    "stray file": (lambda f: text(f, "readme.txt"), r"readme.txt is not a PNG file; .* move it away"),
    "stray folder": (lambda f: png(some(f) / "more", "1.png").parent, r"more is not a PNG file"),
    "stray image": (
        lambda f: png(some(f), "grid.png"),
        r"must be numbers or none, got 000000.png and grid.png; move one away",
    ),
    "missing": (lambda f: without(f, "000005.png"), r"contains 39 images up to number 39, but number 5 is missing"),
    "doubled": (lambda f: png(some(f), "5.png"), r"5.png and 0*5.png both have number 5; remove one"),
    "JPEG": (lambda f: png(some(f), "000040.jpg", kind="JPEG"), r"000040.jpg must be a PNG, got a JPEG"),
    "disguised JPEG": (
        lambda f: png(some(f), "000004.png", kind="JPEG"),
        r"000004.png must be a PNG file, got JPEG content",
    ),
    "empty": (lambda f: f.mkdir() or f, r"bad is empty; pass the folder with the PNG files"),
    "transparency": (transparent, r"000003.png has mode L with transparency; save it as 8-bit RGB"),
    "no number": (lambda f: png(some(f), "\u00b2.png"), r"must be numbers or none, got 000000.png and \u00b2.png"),
    "compressed": (lambda f: damaged_zip(f), r"cannot be read as an npz \(.*\); copy it again"),
    "nothing": (
        lambda f: f / "none",
        r"samples must be a folder or archive of PNG files, an .npz, data:train or data:test, got",
    ),
    "one": (lambda f: some(f, 1), r"must contain at least 2 images, got 1"),
    "too few": (lambda f: some(f, 5), r"5 images for 8 features bias the distance upwards.*allow_few=true"),
    "wrong key": (lambda f: npz(f, images=PIXELS, labels=PIXELS), r"must contain an array 'arr_0', got images, labels"),
    "float": (lambda f: npz(f, arr_0=PIXELS / 2), r"arr_0 of \S+ must be uint8, got float64; convert"),
    "NaN": (lambda f: npz(f, arr_0=PIXELS * np.nan), r"must be uint8, got float64, with NaN or infinite values"),
    "dimensions": (lambda f: npz(f, arr_0=PIXELS[..., 0]), r"must be images \(N, H, W, 1 or 3\), got \(40, 8, 8\)"),
    "NCHW": (lambda f: npz(f, arr_0=np.zeros((9, 3, 8, 8), np.uint8)), r"must be images .* got \(9, 3, 8, 8\)"),
    "no npz": (junk, r"cannot be read as an npz \(.*\); copy it again"),
}
BAD_REFERENCES = {
    "dimensions": (
        lambda f: npz(f, mu=np.zeros(9), sigma=np.eye(9)),
        r"file.npz must have 8 pooled features \(extractor=file\), got 9",
    ),
    "covariance": (lambda f: npz(f, mu=np.zeros(8), sigma=np.eye(7)), r"mu must be \(D,\) .* got \(8,\) and \(7, 7\)"),
    "NaN": (lambda f: npz(f, mu=np.zeros(8) * np.nan, sigma=np.eye(8)), r"mu or sigma must be finite"),
    "infinite": (
        lambda f: npz(f, mu=np.zeros(8), sigma=np.diag([np.inf] * 8)),
        r"file.npz: mu or sigma must be finite; recreate the file$",
    ),
    "not symmetric": (
        lambda f: npz(f, mu=np.zeros(8), sigma=np.eye(8) + 0.1 * np.eye(8, k=1)),
        r"file.npz: sigma must be symmetric, but entries \(0, 1\) and \(1, 0\) differ by 0.1; recreate the file$",
    ),
    "negative eigenvalue": (
        lambda f: npz(f, mu=np.zeros(8), sigma=np.diag([*range(1, 8), -0.01])),
        r"file.npz: sigma must have no negative eigenvalue, got -0.01 \(largest 7\); recreate the file$",
    ),
    "negative eigenvalue of spatial features": (
        lambda f: npz(f, mu_s=np.zeros(9), sigma_s=-np.eye(9), **STATISTICS),
        r"file.npz: sigma_s must have no negative eigenvalue, got -1 ",
    ),
    "features": (
        lambda f: npz(f, features=np.zeros((9, 7)), **STATISTICS),
        r"file.npz: features must be finite and \(n, 8\), got \(9, 7\); recreate the file$",
    ),
    "no sigma": (lambda f: npz(f, mu=np.zeros(8)), r"file.npz must contain an array 'sigma', got mu$"),
    "no mu": (lambda f: npz(f, sigma=np.eye(8)), r"file.npz must contain an array 'mu', got sigma$"),
    "spatial": (
        lambda f: npz(f, mu_s=np.zeros(7), sigma_s=np.eye(7), **STATISTICS),
        r"must have 9 spatial features \(extractor=file\), got 7",
    ),
    "flipped bit": (flipped, r"cannot be read as an npz \(Bad CRC-32 for file 'sigma.npy'\); copy it again"),
    "half of it": (lambda f: npz(f, about=np.array("{}"), **STATISTICS), r"file.npz is corrupt \('source'\)"),
    "nothing": (lambda f: npz(f, other=np.zeros(8)), r"reference: \S+ must contain an array 'arr_0', got other$"),
    "not there": (lambda f: f / "stats.npz", r"reference must be a folder or archive of PNG files, an .npz"),
    "damaged": (lambda f: npz(f, about=np.array("{"), **STATISTICS), r"file.npz is corrupt \(.*\); recreate it"),
    "another extractor": (
        lambda f: npz(f, about=np.array(json.dumps(OTHER)), **STATISTICS),
        r"was computed with another extractor \(extractor.name: 'inception' -> 'file'",
    ),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_eval_fid_bad_samples_refused(case, use, tmp_path, monkeypatch, capsys):
    make, message = BAD_SAMPLES[case]
    arguments = [f"samples={make(tmp_path / 'bad')}", "data=digits", "reference=data:test", *use, "device=cpu"]
    said = one_line("eval_fid", eval_fid.run, arguments, monkeypatch, capsys)
    assert re.search(message, said.strip()), said
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("case", BAD_REFERENCES)
def test_eval_fid_bad_reference_refused(case, use, samples, tmp_path, monkeypatch, capsys):
    make, message = BAD_REFERENCES[case]
    arguments = [f"samples={samples}", f"reference={make(tmp_path / 'bad')}", *use, "device=cpu"]
    said = one_line("eval_fid", eval_fid.run, arguments, monkeypatch, capsys)
    assert re.search(message, said.strip()), said


def test_statistics_file_rounded_covariance_accepted(tmp_path):
    """Of fewer images than features, and computed and stored in float32: eigenvalues below zero by rounding."""
    rows = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)
    sigma = np.cov(rows.T, dtype=np.float32)
    assert np.linalg.eigvalsh(sigma.astype(np.float64))[0] < 0
    file = npz(tmp_path / "f", mu=rows.mean(axis=0), sigma=sigma)
    assert np.array_equal(StatisticsFile(file, "reference").pooled.covariance, sigma.astype(np.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("reference=x", "samples, run or checkpoint must be set, exactly one of them, got None"),
        ("samples=a run=b reference=x", r"set, exactly one of them, got \['samples', 'run'\]"),
        ("samples=a", "reference has no value; set reference=..."),
        ("samples=SET reference=data:test", "data must be set for reference=data:test, such as data=cifar10"),
        ("samples=SET reference=data:test data=digits count=7", "count must be 40, the number of images in .*, got 7"),
        ("samples=SET reference=data:test data=digits protocol=dit_table", "protocol must be null with samples"),
        (
            "samples=SET reference=data:test data=digits sampler=ode_heun",
            "sampler must be omitted with samples, .* 'ode_heun'",
        ),
        ("samples=SET reference=data:test data=digits extractor=clip", "extractor=clip: no such option"),
        ("samples=SET reference=data:test data=digits extractor=classifier", "extractor.run must be a run directory"),
        ("samples=SET reference=data:test data=digits extractor=file", "extractor.source must be a Python file"),
        (
            "samples=SET reference=data:test data=digits extractor=classifier extractor.run=x",
            "extractor.run must be a run",
        ),
        (
            "samples=SET reference=data:test data=digits extractor=file extractor.source=x.py",
            "must be a Python file, got",
        ),
        (
            "samples=SET reference=data:test data=digits",
            "extractor.weights: cannot download weights-inception-2015-12-05-6726825d.pth",
        ),
        (
            "samples=SET reference=data:test data=digits precision_recall_dtype=half",
            "precision_recall_dtype must be float64 or float16, got 'half'",
        ),
        ("samples=SET reference=data:test data=digits feature=3", "unknown key 'feature'; did you mean 'features'"),
        (
            "samples=SET reference=STATISTICS picture=true USE",
            "picture must be false with statistics",
        ),
        ("samples=SET reference=data:test data=digits out=/proc/none/x.json USE", "out: cannot write to /proc/none"),
    ],
)
def test_eval_fid_wrong_command_refused(arguments, message, samples, use, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    np.savez(tmp_path / "statistics.npz", **STATISTICS)
    arguments = arguments.replace("STATISTICS", str(tmp_path / "statistics.npz"))
    replaced = arguments.replace("SET", str(samples)).replace("USE", " ".join(use)).split()
    assert re.search(message, one_line("eval_fid", eval_fid.run, [*replaced, "device=cpu"], monkeypatch, capsys))


def test_eval_fid_wrong_extractor_file_refused(samples, tmp_path, monkeypatch, capsys):
    for code, message in (
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x = 1", "AttributeError: .* has no attribute 'load_extractor'"),
        ("def load_extractor(weights): return 3", "TypeError: load_extractor must return a module"),
        (EXTRACTOR.replace("!= 8", "!= 9"), r"must accept 8 x 8 grey images \(wants 8 x 8 pixels, got 8\)"),
        (
            EXTRACTOR.replace(".flatten(1)[:, :8]", ""),
            r"pooled of 1 images must be \(1, features\), got \(1, 1, 4, 2\)",
        ),
    ):
        (tmp_path / "mine.py").write_text(code)
        arguments = [f"samples={samples}", "data=digits", "reference=data:test", "extractor=file"]
        arguments += [f"extractor.source={tmp_path / 'mine.py'}", "device=cpu"]
        assert re.search(message, one_line("eval_fid", eval_fid.run, arguments, monkeypatch, capsys))


def test_measure_nonfinite_features_refused(samples, tmp_path):
    (tmp_path / "mine.py").write_text(EXTRACTOR.replace("return {", "pool[:, 2] = pool[:, 2].log(); return {"))
    extractor = load_extractor(FileConfig(source=str(tmp_path / "mine.py")), ONE, rebuild)
    black = tmp_path / "black.npz"
    np.savez(black, arr_0=np.concatenate([PIXELS[:5] + 9, PIXELS]))
    with pytest.raises(NonFiniteError, match=rf"pooled features of image 5 of {black} are NaN or infinite"):
        measure(NpzImages(black, "samples"), extractor, ONE, 4, 0, verbose=False)


def test_eval_fid_error_on_one_rank_reported(use, tmp_path):
    """The second of two ranks reads a cut image: the line is there, and nobody waits."""
    folder = some(tmp_path / "bad")
    file = folder / "000035.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(file, compress_level=0)
    file.write_bytes(file.read_bytes()[:90])
    command = [f"samples={folder}", "data=digits", "reference=data:test", *use, "batch_size=20", "device=cpu"]
    done = run_script("eval_fid.py", *command, ranks=2)
    assert done.returncode == 1
    assert re.search(r"(?m)^config error: samples: \S+000035.png cannot be decoded", done.stderr), done.stderr[-3000:]


def test_eval_fid_changed_or_incomplete_set_refused(samples, use, tmp_path):
    reference = ("data=digits", "reference=data:test", *use)
    changed = shutil.copytree(samples, tmp_path / "changed")
    shutil.copy(changed / "images" / "000000.png", changed / "images" / "000001.png")
    with pytest.raises(ConfigError, match=r"have changed since sample\.py wrote them"):
        evaluate(f"samples={changed}", *reference)
    manifest = json.loads((changed / "manifest.json").read_text())
    del manifest["result"]
    (changed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"is not complete; rerun its sample\.py command"):
        evaluate(f"samples={changed}", *reference)
