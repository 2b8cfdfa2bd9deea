"""Autoencoders and the latent cache: equality with the images, and errors of invalid caches."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_gen
from scripts import doctor, prepare_latents
from tests.processes import ROOT, run_script
from tests.support import SHARED, SMALL_DIT, assert_resume_exact, assert_same, start_and_kill
from vca.config import compose
from vca.data import load_dataset
from vca.data.augment import AdmCrop, train_transform
from vca.data.latents import LatentCache, read_manifest, save_array
from vca.data.loader import MicroBatches, TrainOrder, train_loader
from vca.generation.autoencoder import Autoencoder, AutoencoderConfig, load_autoencoder
from vca.generation.objective import build_objective
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError
from vca.training.generation import GenerationLoss, generation_inputs

pytestmark = pytest.mark.process

CPU = torch.device("cpu")
ALONE = World(0, 0, 1, CPU)
SIZES = [(40, 40), (70, 48), (48, 90), (140, 130), (33, 64)]  # wider, taller, and at least twice as large as 32 px
CLASSES = {"ape": 9, "bee": 12, "cat": 10}


@pytest.fixture(scope="session")
def photos(artefact):
    """31 cut-outs of two real photographs in three classes, as an image folder."""
    return artefact("photos", write_photos)


def write_photos(root):
    from sklearn.datasets import load_sample_images

    sources = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for name, count in CLASSES.items():
        for split in ("train", "val"):
            (root / split / name).mkdir(parents=True)
        for index in range(count):
            width, height = SIZES[index % len(SIZES)]
            left, top = rng.integers(0, 640 - width), rng.integers(0, 427 - height)
            cut = sources[index % 2].crop((left, top, left + width, top + height))
            cut.save(root / "train" / name / f"{index:02d}.png")
        cut.save(root / "val" / name / "0.png")


QUICK = """
import torch
from torch import nn
class Quick(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 4, 4), nn.ConvTranspose2d(4, 3, 4, 4)
        for number, parameter in enumerate(self.parameters()):
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(number))
    def encode(self, images):
        mean, log_std = self.down(images).chunk(2, dim=1)
        return torch.cat((mean, log_std.exp()), dim=1)
    def decode(self, latents):
        return self.up(latents)
def load_autoencoder(weights):
    return Quick()
"""


@pytest.fixture(scope="session")
def quick(artefact):
    """An autoencoder with a posterior that subprocesses load at once; diffusers takes seconds to import."""
    return artefact("quick", lambda folder: (folder / "quick.py").write_text(QUICK)) / "quick.py"


def options(source):
    """Overrides that `prepare_latents` and `train_gen` share."""
    kind = "file" if source.suffix == ".py" else "sd_vae"
    shape = ["autoencoder.factor=4", "data.img_size=32", "data.num_classes=3", "data.check_seconds=0"]
    return [f"autoencoder={kind}", f"autoencoder.source={source}", *shape]


def prepared(photos, source, out, *more):
    """Make a cache in this process."""
    config = compose("prepare_latents", [*options(source), f"data.root={photos}", f"out={out}", *CACHE, *more])
    return prepare_latents.run(config)


CACHE = ("shard_size=8", "batch_size=3", "workers=0", "device=cpu")
NETWORK = (*SMALL_DIT, "sampled_classes=3", "augment=adm_flip")


@pytest.fixture(scope="session")
def cache(photos, vaes, artefact):
    return artefact("cache", lambda folder: prepared(photos, vaes / "sd-vae-ft-mse", folder))


@pytest.fixture(scope="session")
def quick_cache(photos, quick, artefact):
    return artefact("quick-cache", lambda folder: prepared(photos, quick, folder))


def test_autoencoder_sd_vae_equals_diffusers(vaes):
    from diffusers.models import AutoencoderKL

    for name, shift in (("sd-vae-ft-mse", 0.0), ("other", 0.3)):
        config = AutoencoderConfig("diffusers", str(vaes / name), channels=4, factor=4)
        ours, theirs = load_autoencoder(config, CPU), AutoencoderKL.from_pretrained(vaes / name).eval()
        images, noise = torch.rand(2, 3, 16, 24) * 2 - 1, torch.randn(2, 4, 4, 6)
        with torch.no_grad():
            posterior = theirs.encode(images).latent_dist
            latents = (posterior.mean + posterior.std * noise - shift) * 0.18215
            decoded = theirs.decode(latents / 0.18215 + shift).sample
        moments = ours.encode(images)
        assert moments.shape == (2, 8, 4, 6)
        torch.testing.assert_close(ours.latents(moments, noise), latents)
        torch.testing.assert_close(ours.decode(latents), decoded)
        assert posterior.std.min() > 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(ours.encode(images), moments), "autocast reached the autoencoder"
    assert load_autoencoder(config, CPU).identity()["sha256"] == ours.sha256
    scaled = load_autoencoder(AutoencoderConfig("diffusers", str(vaes / name), channels=4, factor=4, scale=1.0), CPU)
    assert (scaled.scale, scaled.shift, scaled.sha256) == (1.0, 0.3, ours.sha256)


FROM_FILE = """
import torch
from torch import nn
class Halve(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(float(gain)))
    def encode(self, images):
        return self.gain * nn.functional.avg_pool2d(images, 2)
    def decode(self, latents):
        return latents.repeat_interleave(2, 2).repeat_interleave(2, 3) / self.gain
def load_autoencoder(weights):
    return Halve(weights)
"""


def test_autoencoder_from_python_file(tmp_path):
    file = tmp_path / "halve.py"
    file.write_text(FROM_FILE)
    config = AutoencoderConfig("file", str(file), weights="4", channels=3, factor=2, scale=0.5, shift=1.0)
    autoencoder = load_autoencoder(config, CPU)
    images = torch.full((1, 3, 8, 8), 0.25)
    moments = autoencoder.encode(images)
    assert torch.equal(moments, torch.ones(1, 3, 4, 4))
    latents = autoencoder.latents(moments, torch.randn(1, 3, 4, 4))  # without a posterior, noise changes nothing
    assert torch.equal(latents, torch.zeros(1, 3, 4, 4))
    assert torch.equal(autoencoder.decode(latents), images)
    file.write_text(FROM_FILE + "\n# another text\n")
    assert load_autoencoder(config, CPU).sha256 != autoencoder.sha256


def test_autoencoder_wrong_config_refused(vaes, tmp_path):
    (tmp_path / "broken.py").write_text("def load_autoencoder(weights):\n    return 1 / 0\n")
    (tmp_path / "halve.py").write_text(FROM_FILE)
    (tmp_path / "other.py").write_text("def load_autoencoder(weights):\n    return weights\n")
    half = shutil.copytree(vaes / "other", tmp_path / "half")
    weights = next(half.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:500])
    vae = str(vaes / "other")
    for fields, message in (
        ({"name": "difusers", "source": "x"}, "autoencoder.name must be one of"),
        ({"name": "diffusers"}, "autoencoder.source must be a path or a hub name, got None"),
        ({"name": "diffusers", "source": str(tmp_path)}, "must be a folder with diffusers' config.json"),
        ({"name": "diffusers", "source": str(half), "factor": 4}, "cannot be loaded"),
        ({"name": "diffusers", "source": vae, "factor": 8}, r"autoencoder.factor must be 4 for '.*', got 8"),
        ({"name": "diffusers", "source": vae, "factor": 4, "channels": 16}, "autoencoder.channels must be 4"),
        ({"name": "diffusers", "source": vae, "factor": 4, "scale": 0.0}, "autoencoder.scale must be > 0 or null"),
        ({"name": "file", "source": "nowhere.py"}, "autoencoder.source must be a Python file, got 'nowhere.py'"),
        ({"name": "file", "source": str(tmp_path / "broken.py")}, "ZeroDivisionError"),
        ({"name": "file", "source": str(tmp_path / "other.py")}, "must return a module with encode and decode"),
        (
            {"name": "file", "source": str(tmp_path / "halve.py"), "weights": "1", "factor": 2},
            r"must encode 16 x 16 px as 4 or 8 channels of 8 x 8, got .3, 8, 8.",
        ),
        ({"name": "none", "source": "x"}, "autoencoder.source must be null in pixel space"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            load_autoencoder(AutoencoderConfig(**{"channels": 4, **fields}), CPU)
        assert "\n" not in str(error.value)


def test_autoencoder_not_found_offline_refused(monkeypatch):
    """Without a network the error has the name and the download command."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = AutoencoderConfig("diffusers", "nobody/no-vae", channels=4, factor=8)
    with pytest.raises(ConfigError, match=r"'nobody/no-vae' cannot be loaded .* hf download nobody/no-vae --local-dir"):
        load_autoencoder(config, CPU)


def test_adm_crop_sizes_and_pixels():
    """Sizes of every shape; a large image is halved by averaging before anything else."""
    rng = np.random.default_rng(0)
    for width, height in [*SIZES, (32, 32), (31, 500), (64, 64)]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        assert AdmCrop(32)(image).size == (32, 32)
    pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    halved = pixels.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(AdmCrop(32)(Image.fromarray(pixels))) - halved).max() <= 1
    wide = Image.fromarray(
        np.repeat(np.arange(100, dtype=np.uint8)[None], 40, axis=0)
    )  # 100 x 40, brighter to the right
    cut = np.asarray(AdmCrop(40)(wide))
    assert cut[0, 0] == 30
    assert cut[0, -1] == 69


def batches_of(config, steps):
    """What the loss makes of the first batches: latents, noise, times, labels."""
    images = load_dataset(config.data, train=True)
    cached = isinstance(images, LatentCache)
    autoencoder = load_autoencoder(config.autoencoder, CPU)
    inputs, cache = generation_inputs(images, config.data, config.augment, autoencoder, config.seed)
    assert (cache is not None) == cached
    order = TrainOrder(len(images), config.trainer.global_batch_size, config.seed)
    loss_of = GenerationLoss(build_objective(config.objective), autoencoder, cached, 0.1, 3)
    shares = MicroBatches(order, ALONE, config.trainer.global_batch_size, 1, 0, steps)
    for (batch,) in train_loader(images, inputs, config.seed, shares, 0):
        yield (*loss_of.prepare(batch), batch.fingerprints)


@pytest.mark.parametrize("hflip", [0.5, 0.0])
def test_latent_cache_batch_equals_online_batch(photos, vaes, cache, hflip):
    """Over more than an epoch: images recur, flipped or not, with another sample of their posterior."""
    chosen = [*options(vaes / "sd-vae-ft-mse"), *NETWORK, f"augment.hflip={hflip}", "trainer.global_batch_size=10"]
    online = compose("train_gen", [*chosen, "data=imagefolder", f"data.root={photos}"])
    cached = compose("train_gen", [*chosen, "data=latents", f"data.root={cache}"])
    seen = []
    for one, other in zip(batches_of(online, 5), batches_of(cached, 5), strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-6)
        assert_same(one[1:], other[1:])
        seen += one[0]
    assert len({latent.sum().item() for latent in seen}) == 50, "a latent came twice"
    other_seed = compose("train_gen", [*chosen, "data=latents", f"data.root={cache}", "seed=1"])
    assert not torch.equal(next(batches_of(other_seed, 1))[0], other[0])


def test_latent_cache_flips_are_encoded(cache):
    images = LatentCache(cache)
    assert len(images) == sum(CLASSES.values())
    versions, label = images[20]
    assert versions.shape == (2, 8, 8, 8)
    assert label == 1
    assert [images[index][1] for index in range(31)] == [0] * 9 + [1] * 12 + [2] * 10
    assert np.abs(versions[1] - versions[0][:, :, ::-1]).max() > 1e-3
    assert (versions[:, 4:] > 0).all()  # standard deviations


def test_prepare_latents_resume_on_two_ranks_is_exact(photos, quick, quick_cache, tmp_path):
    """Killed after the first file and resumed on two ranks: every byte equals an uninterrupted run."""
    command = [*options(quick), f"data.root={photos}", f"out={tmp_path / 'broken'}", *CACHE, "shard_size=1"]
    broken = tmp_path / "broken"
    start_and_kill(lambda: any(broken.glob("shard_*.npy")), "scripts/prepare_latents.py", *command)
    made = sorted((tmp_path / "broken").glob("shard_*.npy"))
    assert 1 <= len(made) < 31
    with pytest.raises(ConfigError, match=r"is not complete: \d+ of 31 files are missing or cut short"):
        LatentCache(tmp_path / "broken")
    before = {path: path.stat().st_mtime_ns for path in made}
    done = run_script("scripts/prepare_latents.py", *command, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in made} == before, "what was there was made again"
    prepared(photos, quick, tmp_path / "whole", "shard_size=1")
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == ["labels.npy", "manifest.json", *(f"shard_{shard:05d}.npy" for shard in range(31))]
    for name in files:
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    images, other = LatentCache(tmp_path / "whole"), LatentCache(quick_cache)
    assert all(np.allclose(images[index][0], other[index][0], atol=1e-6) for index in range(31))


def changed(cache, tmp_path, name="changed", **fields):
    """Copy a cache with other values in its manifest."""
    folder = shutil.copytree(cache, tmp_path / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **fields}))
    return folder


def test_latent_cache_mismatched_or_truncated_refused(photos, vaes, cache, tmp_path):
    """Each is a one-line error, and nothing is written."""
    there = json.loads((cache / "manifest.json").read_text())
    scaled = changed(cache, tmp_path, autoencoder={**there["autoencoder"], "scale": 0.13})
    short = shutil.copytree(cache, tmp_path / "short")
    file = short / "shard_00002.npy"
    file.write_bytes(file.read_bytes()[:-4])
    fewer = changed(cache, tmp_path, "fewer", images=40)
    labels = changed(cache, tmp_path, "labels")
    np.save(labels / "labels.npy", np.zeros(30, dtype=np.int64))
    plain = tmp_path / "plain"
    prepared(photos, vaes / "sd-vae-ft-mse", plain, "flips=false")
    for root, more, message in (
        (scaled, "", r"encoded by another autoencoder \(autoencoder.scale: 0.13 -> 0.18215\)"),
        (
            cache,
            f"autoencoder.source={vaes / 'other'}",
            r"autoencoder.sha256: '\w+' -> .*autoencoder.shift: 0.0 -> ",
        ),
        (cache, "autoencoder.scale=1.0", r"autoencoder.scale: 0.18215 -> 1.0"),
        (short, "", "is not complete: 1 of 4 files are missing or cut short, such as shard_00002.npy"),
        (fewer, "", "is not complete: 2 of 5 files"),
        (
            labels,
            "",
            "1 of 5 files do not match their sha256 in the manifest, such as labels.npy; rerun scripts/prepare_latents",
        ),
        (changed(cache, tmp_path, "crop", crop="adm-0"), "", "crop must be 'adm-1', got 'adm-0'"),
        (photos, "", "data.root must be a latent cache .a folder with manifest.json."),
        (cache, "data.img_size=64", "data.img_size must be 32, as in"),
        (cache, "data.img_size=34", "data.img_size must be a multiple of autoencoder.factor, 4, got 34"),
        (cache, "data.num_classes=4", "data.num_classes must be 3, as in"),
        (cache, "augment.crop=none", "augment.crop must be adm, as the crop of the latents, got 'none'"),
        (cache, "augment.re_prob=0.5", "augment.re_prob must be off with data=latents"),
        (plain, "augment.hflip=0.5", r"augment.hflip must be 0: .* has no flipped images, got 0.5"),
    ):
        chosen = [*options(vaes / "sd-vae-ft-mse"), *NETWORK, "data=latents", f"data.root={root}", *more.split()]
        with pytest.raises(ConfigError, match=message) as error:
            list(batches_of(compose("train_gen", chosen), 1))
        assert "\n" not in str(error.value)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def lengthen(folder):
    path = folder / "shard_00003.npy"
    path.write_bytes(path.read_bytes() + b"0")


def swap(folder, one=0, other=1):
    paths = [folder / f"shard_{shard:05d}.npy" for shard in (one, other)]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)


def move_labels(folder):
    """Invalid labels in a file with a valid sha256."""
    save_array(folder / "labels.npy", np.arange(31))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["labels.npy"] = json.loads((folder / "labels.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rewrite(**fields):
    def change(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        for key, value in fields.items():
            manifest.pop(key)
            if value is not None:
                manifest[key] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


NOT_OF_MANIFEST = (
    "{}: {} of 5 files do not match their sha256 in the manifest, such as {}; rerun scripts/prepare_latents.py"
)
DAMAGED_CACHES = {
    "swapped": (swap, NOT_OF_MANIFEST.format(".*", 2, "shard_00000.npy")),
    "flipped": (
        lambda folder: flip(folder / "shard_00002.npy", 200),
        NOT_OF_MANIFEST.format(".*", 1, "shard_00002.npy"),
    ),
    "flipped label": (lambda folder: flip(folder / "labels.npy", -8), NOT_OF_MANIFEST.format(".*", 1, "labels.npy")),
    "longer": (lengthen, "1 of 4 files are missing or cut short"),
    "labels out of range": (move_labels, r"labels.npy: labels must be from 0 to 2, got \(0, 30\)"),
    "no files": (
        rewrite(files={}),
        "is not complete: its manifest lacks the sha256 of some files; rerun scripts/prepare",
    ),
    "older": (
        rewrite(files=None),
        r"has no sha256 of the files \(written by an older version\); write a new cache",
    ),
    "no images": (
        rewrite(images=0),
        "manifest.json is corrupt: images is 0; restore it, or rerun scripts/prepare_latents",
    ),
    "no shape": (rewrite(shape=[2, 8]), r"manifest.json is corrupt: shape is \[2, 8\]"),
    "no digest": (rewrite(files={"labels.npy": "0"}), r"manifest.json is corrupt: files is"),
    "no json": (
        lambda folder: (folder / "manifest.json").write_bytes(b"\0" * 64),
        "is not the manifest of a latent cache",
    ),
    "a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "is not the manifest of a latent cache"),
}


@pytest.mark.parametrize("damage", DAMAGED_CACHES)
def test_latent_cache_damaged_refused_at_start(cache, tmp_path, damage):
    """A one-line error at the start of a run and in `doctor.py`, without reading all files."""
    folder = shutil.copytree(cache, tmp_path / "cache")
    change, message = DAMAGED_CACHES[damage]
    change(folder)
    with pytest.raises(ConfigError, match=message) as error:
        LatentCache(folder)
    assert "\n" not in str(error.value)
    options = ["data=latents", f"data.root={folder}", "data.img_size=32", "data.num_classes=3", "data.check_seconds=0"]
    with pytest.raises(ConfigError, match=r"1 error"):
        doctor.run(compose("doctor", options))


def test_latent_cache_flipped_bit_found_by_full_check(photos, quick, tmp_path, monkeypatch, capsys):
    """Beyond the first bytes of a file: found within `data.check_seconds`, repaired by the next prepare."""
    monkeypatch.setattr("vca.data.latents.START", 200)
    folder = tmp_path / "cache"
    prepared(photos, quick, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    data = ["data=latents", f"data.root={folder}", "data.img_size=32", "data.num_classes=3"]
    doctor.run(compose("doctor", data))
    assert "read all 4 files of latents" in capsys.readouterr().out
    flip(folder / "shard_00001.npy", -1)
    LatentCache(folder)
    line = f"{folder}/shard_00001.npy: does not match its sha256 in the manifest; rerun scripts/prepare_latents.py"
    with pytest.raises(ConfigError, match="1 error"):
        doctor.run(compose("doctor", data))
    assert f"error: {line}" in capsys.readouterr().out
    run = [*options(quick), *NETWORK, *data, f"out_dir={tmp_path}", "trainer.steps=1", "trainer.global_batch_size=4"]
    with pytest.raises(ConfigError, match=re.escape(line)):
        train_gen.run(compose("train_gen", [*run, "data.check_seconds=5"]))
    prepared(photos, quick, folder)
    assert "1 of 4 files to encode" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("whole", [True, False])
def test_prepare_latents_changed_images_refused(photos, quick, tmp_path, whole):
    """For a finished and an unfinished cache."""
    mine = shutil.copytree(photos, tmp_path / "photos")
    folder = tmp_path / "cache"
    prepared(mine, quick, folder)
    if not whole:
        (folder / "shard_00001.npy").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    Image.new("RGB", (40, 40)).save(mine / "train" / "bee" / "03.png")
    with pytest.raises(ConfigError, match=r"^data.root: the images changed since .*cache was started \(files_sha256"):
        prepared(mine, quick, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_prepare_latents_wrong_options_refused(photos, vaes, cache, tmp_path):
    for more, message in (
        ((f"autoencoder.source={vaes / 'other'}", f"out={cache}"), r"has another cache \(autoencoder.sha256"),
        (("shard_size=16", f"out={cache}"), r"has another cache \(shard_size: 8 -> 16\)"),
        (("data.img_size=64", f"out={cache}"), r"has another cache \(img_size: 32 -> 64"),
        (("data=digits",), "data.in_chans must be 3 for an autoencoder, got 1"),
        (("shard_size=0",), "shard_size must be >= 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepared(photos, vaes / "sd-vae-ft-mse", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()
    assert read_manifest(cache).shard_size == 8


def test_latent_cache_open_files_bounded(photos, quick, tmp_path, monkeypatch):
    """ImageNet's cache has more files than a process may open."""
    prepared(photos, quick, tmp_path, "shard_size=1")
    monkeypatch.setattr("vca.data.latents.OPEN_FILES", 3)
    images, again = LatentCache(tmp_path), LatentCache(tmp_path)
    for index in (*range(31), *range(31)):
        assert np.array_equal(images[index][0], again[index][0])
        assert len(images.files) <= 3


def test_autoencoder_missing_weights_refused(vaes, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(vaes / "other", tmp_path / "broken")
    file = next(broken.glob("*.safetensors"))
    state = load_file(file)
    del state["encoder.conv_in.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"do not match its config.json \(missing_keys encoder.conv_in.weight\)"):
        load_autoencoder(AutoencoderConfig("diffusers", str(broken), channels=4, factor=4), CPU)


def test_autoencoder_identity_includes_config(vaes, tmp_path):
    changed = shutil.copytree(vaes / "other", tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "act_fn": "relu"}))
    one, other = (
        load_autoencoder(AutoencoderConfig("diffusers", str(path), channels=4, factor=4), CPU)
        for path in (vaes / "other", changed)
    )
    assert one.sha256 != other.sha256


def test_autoencoder_runs_in_float32_despite_tf32(vaes):
    """TF32 too: on a GPU the convolutions of a VAE would take it."""
    seen = []

    class Spy(torch.nn.Module):
        def encode(self, images):
            seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
            return images

        decode = encode

    autoencoder = Autoencoder(AutoencoderConfig("file", "x.py", channels=3), Spy())
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
        autoencoder.encode(torch.zeros(1, 3, 8, 8))
        autoencoder.decode(torch.zeros(1, 3, 8, 8))
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (True, "high")
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
    assert seen == [(False, "highest")] * 2


def test_resume_with_other_latents_refused(photos, quick, quick_cache, tmp_path):
    """Another cache or autoencoder is an error; the same ones may move."""
    moved = shutil.copytree(quick_cache, tmp_path / "moved")
    elsewhere = shutil.copy(quick, tmp_path / "elsewhere.py")
    other = tmp_path / "other"
    prepared(photos, quick, other, "shard_size=4")
    length = ["trainer.global_batch_size=12", "trainer.steps=2", f"out_dir={tmp_path}", "name=run", "data=latents"]

    def go(root, source=quick):
        return train_gen.run(compose("train_gen", [*options(source), *NETWORK, *length, f"data.root={root}"]))

    first = go(quick_cache)
    assert go(moved, Path(elsewhere)) == first
    with pytest.raises(ConfigError, match=r"another config \(inputs.cache.files: '\w+' -> .*shard_size: 8 -> "):
        go(other)
    Path(elsewhere).write_text(QUICK + "# changed\n")
    with pytest.raises(ConfigError, match=r"encoded by another autoencoder \(autoencoder.sha256"):
        go(moved, Path(elsewhere))


def test_latent_cache_float16_close_to_float32(photos, vaes, cache, tmp_path):
    """Half the size, equal to three digits."""
    prepared(photos, vaes / "sd-vae-ft-mse", tmp_path / "half", "dtype=float16")
    one, other = LatentCache(cache)[5][0], LatentCache(tmp_path / "half")[5][0]
    assert (one.dtype, other.dtype) == (np.float32, np.float16)
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_on_latents_after_kill_is_exact(quick, quick_cache, tmp_path, ranks):
    length = ["trainer.global_batch_size=12", "trainer.steps=28", "trainer.checkpoint_every=5", "trainer.log_every=2"]
    latents = ["data=latents", f"data.root={quick_cache}"]
    assert_resume_exact(tmp_path, [12], "train_gen.py", *options(quick), *NETWORK, *length, *latents, ranks=ranks)
    with Image.open(tmp_path / "whole" / "samples" / "step_00000028.png") as picture:
        assert picture.mode == "RGB"
        assert picture.size == (3 * 33 - 1, 32)


@pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason="the weights of TAEF2 are not part of the project")
def test_taef2_reconstructs_and_trains_from_cache(photos, tmp_path):
    """A real autoencoder of 32 channels from a file: reconstruction, cache, equality with online, training."""
    autoencoder = [
        "autoencoder=file",
        f"autoencoder.source={ROOT / 'examples' / 'taef2.py'}",
        f"autoencoder.weights={SHARED / 'weights'}",
        "autoencoder.channels=32",
        "data.num_classes=3",
        "data.img_size=64",
        "data.check_seconds=0",
    ]
    prepare_latents.run(compose("prepare_latents", [*autoencoder, f"data.root={photos}", f"out={tmp_path}/c", *CACHE]))
    chosen = [*autoencoder, *NETWORK, "trainer.global_batch_size=8", f"out_dir={tmp_path}", "trainer.steps=4"]
    online = compose("train_gen", [*chosen, "data=imagefolder", f"data.root={photos}"])
    cached = compose("train_gen", [*chosen, "data=latents", f"data.root={tmp_path}/c"])
    for one, other in zip(batches_of(online, 5), batches_of(cached, 5), strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)
        assert_same(one[1:], other[1:])
    network = load_autoencoder(cached.autoencoder, CPU)
    images = torch.stack(
        [train_transform(online.augment, online.data)(picture) for picture, _ in [load_dataset(online.data, True)[8]]]
    )
    assert (network.decode(network.latents(network.encode(images), images)) - images).square().mean() < 0.02
    assert np.isfinite(train_gen.run(cached)["loss"])
