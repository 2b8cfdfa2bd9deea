"""`sample.py`: a set of samples is a function of seed and index, and its manifest says how it was made."""

import json
import os
import re
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from models import build_model
from tests.processes import ROOT, run_script
from tests.support import SMALL_DIT, one_line, start_and_kill
from vca.config import compose, read_protocol
from vca.generation import pipeline, sample_folder
from vca.generation.autoencoder import load_autoencoder
from vca.generation.pipeline import label_of
from vca.generation.sample_folder import SampleFolder
from vca.runtime.digest import image_sha256, images_sha256
from vca.runtime.errors import ConfigError, NonFiniteError
from vca.runtime.rundir import RunDirectory, to_dict
from vca.training.checkpoint import KEYS, save_checkpoint

pytestmark = pytest.mark.process

QUICK = ("sampler.steps=4", "device=cpu")


def random_weights(model):
    """Leave the start, where the output of the network is zero."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)


def draw(out, *overrides):
    """Samples drawn in this process; the result and the manifest."""
    result = sample.run(compose("sample", [f"out={out}", *QUICK, *overrides]))
    return result, json.loads((out / "manifest.json").read_text())


def pixels(out, count):
    return np.stack([drawn.pixels for drawn in SampleFolder(out).read_all(count)])


def test_sample_script_independent_of_ranks_batch_and_kill(generator_run, tmp_path):
    """64 samples by 1 rank x 8, by 2 ranks x 5, and by 2 ranks x 5 killed in the middle, then 1 rank x 8."""
    common = [f"run={generator_run}", "count=64", "sampler.steps=10", "sampler.cfg_scale=1.5", "device=cpu"]
    sets = {}
    for ranks, batch in ((1, 8), (2, 5)):
        out = tmp_path / str(ranks)
        done = run_script("sample.py", *common, f"out={out}", f"batch_size={batch}", ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        sets[ranks] = json.loads((out / "manifest.json").read_text())["result"]["sha256"]

    out = tmp_path / "killed"
    command = [*common, f"out={out}", "batch_size=5"]
    start_and_kill(lambda: len(list(out.glob("images/*.png"))) >= 12, "sample.py", *command, ranks=2)
    before = {path: path.stat().st_mtime_ns for path in (out / "images").glob("*.png")}
    assert 12 <= len(before) < 64
    assert "result" not in json.loads((out / "manifest.json").read_text())
    done = run_script("sample.py", *common, f"out={out}", "batch_size=8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(path.stat().st_mtime_ns == made for path, made in before.items()), "what was there was drawn again"
    sets["killed"] = json.loads((out / "manifest.json").read_text())["result"]["sha256"]
    assert len(set(sets.values())) == 1, sets
    assert sorted(path.name for path in (out / "images").iterdir()) == [f"{index:06d}.png" for index in range(64)]


def test_sample_script_independent_of_threads(generator_run, tmp_path, monkeypatch):
    """This network is too small to show what more threads round: each sample must be drawn alone and on one."""
    drawn, seen = pipeline.sample_latents, []

    def watched(*arguments):
        seen.append((torch.get_num_threads(), len(arguments[3])))
        return drawn(*arguments)

    monkeypatch.setattr(pipeline, "sample_latents", watched)
    torch.set_num_threads(3)
    draw(tmp_path, f"run={generator_run}", "count=4")
    assert seen == [(1, 1)] * 4
    assert torch.get_num_threads() == 3


def test_sample_script_writes_images_npz_and_grid(generator_run, tmp_path):
    result, manifest = draw(tmp_path, f"run={generator_run}", "count=12", "labels=balanced", "npz=true", "grid=true")
    images = pixels(tmp_path, 12)
    assert images.shape == (12, 8, 8, 1)
    assert len({image.tobytes() for image in images}) == 12
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], images)
    assert result["sha256"] == images_sha256(map(image_sha256, images))
    assert result["classes"] == {str(label): 2 if label < 2 else 1 for label in range(10)}
    assert result["nfe"] == {"mean": 4.0, "min": 4, "max": 4}
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (10 * 49 - 1, 2 * 61 - 1)  # ten columns of 48 px, each under a line for its label
    assert manifest["result"] == result
    assert manifest["origin"].keys() == {"run", "step", "weights", "training", "weights_sha256"}
    assert (manifest["origin"]["run"], manifest["origin"]["step"], manifest["origin"]["weights"]) == ("run", 2, "ema")
    assert (manifest["seed"], manifest["labels"], manifest["compute_batch_size"]) == (0, "balanced", 1)
    assert manifest["sampler"]["method"] == "ddpm"
    assert manifest["model"]["hidden_size"] == 16
    assert not list(tmp_path.glob("*.tmp"))


def test_sample_set_finish_reports_progress(generator_run, tmp_path, monkeypatch):
    """The last pass over a large set takes minutes, one image after the other."""
    bars = []

    class Bar(nullcontext):
        def __init__(self, total, unit, show):
            super().__init__(self)
            self.total, self.n, self.show = total, 0, show
            bars.append(self)

        def update(self, more=1):
            self.n += more

    monkeypatch.setattr(sample_folder, "progress_bar", Bar)
    draw(tmp_path, f"run={generator_run}", "count=5")
    assert [(bar.total, bar.n, bar.show) for bar in bars] == [(5, 5, True)]


def test_sample_script_set_extended_but_not_changed(generator_run, tmp_path):
    few, _ = draw(tmp_path / "a", f"run={generator_run}", "count=5")
    more, _ = draw(tmp_path / "a", f"run={generator_run}", "count=8")
    whole, _ = draw(tmp_path / "b", f"run={generator_run}", "count=8")
    assert more == whole
    assert few["sha256"] != more["sha256"]
    again, _ = draw(tmp_path / "a", f"run={generator_run}", "count=8")
    assert again == more
    for other, message in (
        ("seed=1", r"contains samples with other settings \(seed: 0 -> 1\); choose another folder"),
        ("sampler.cfg_scale=1.5", r"contains samples with other settings \(sampler.cfg_scale: 1.0 -> 1.5\)"),
        (
            "weights=raw",
            r"contains samples with other settings \(origin.weights: 'ema' -> 'raw'; origin.weights_sha256",
        ),
        ("step=1", r"contains samples with other settings \(origin.step: 2 -> 1; origin.weights_sha256"),
        ("labels=[1]", r"contains samples with other settings \(labels: 'random' -> \[1\]\)"),
        ("count=3", r"count must be >= 8 \(samples in .*\), got 3; or choose"),
    ):
        with pytest.raises(ConfigError, match=message):
            draw(tmp_path / "a", f"run={generator_run}", *(["count=8"] if "count" not in other else []), other)
    (tmp_path / "c" / "images").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"must be empty or a folder of sample\.py, but contains images"):
        draw(tmp_path / "c", f"run={generator_run}", "count=2")


@pytest.mark.parametrize("count", [4, 6], ids=["again", "extended"])
def test_sample_script_changed_image_refused(generator_run, tmp_path, count):
    """An image that was changed after its set was signed, here by one of its neighbours, is not signed again."""
    draw(tmp_path, f"run={generator_run}", "count=4")
    signed = (tmp_path / "manifest.json").read_text()
    whole = (tmp_path / "images" / "000002.png").read_bytes()
    shutil.copy(tmp_path / "images" / "000001.png", tmp_path / "images" / "000002.png")
    message = r"^\S+000002.png has changed since the folder was complete; delete it and rerun the command$"
    for _ in range(2):
        with pytest.raises(ConfigError, match=message):
            draw(tmp_path, f"run={generator_run}", f"count={count}", "npz=true", "grid=true")
    assert (tmp_path / "manifest.json").read_text() == signed
    assert not list(tmp_path.glob("*.npz")) + list(tmp_path.glob("*.png")) + list(tmp_path.glob("*.tmp"))
    (tmp_path / "images" / "000002.png").unlink()
    draw(tmp_path, f"run={generator_run}", f"count={count}")
    assert (tmp_path / "images" / "000002.png").read_bytes() == whole


def test_sample_script_writes_images_in_threads(generator_run, tmp_path, monkeypatch):
    """Without a sync of each, and with at most one block of images waiting."""
    write, fsync, writer_type = SampleFolder.write, os.fsync, sample_folder.ImageWriter.write
    threads, synced, waiting = set(), [], []

    def watched(folder, index, drawn):
        threads.add(threading.current_thread())
        write(folder, index, drawn)

    def queued(writer, samples):
        writer_type(writer, samples)
        waiting.append(len(writer.pending))

    monkeypatch.setattr(SampleFolder, "write", watched)
    monkeypatch.setattr(sample_folder.ImageWriter, "write", queued)
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(Path(f"/proc/self/fd/{file}").resolve()), fsync(file)))
    draw(tmp_path, f"run={generator_run}", "count=6")
    assert threading.main_thread() not in threads
    assert synced
    assert not [path for path in synced if "images" in path.parts]
    assert waiting == [1] * 6
    assert len(list((tmp_path / "images").iterdir())) == 6


def test_sample_script_image_that_cannot_be_written_stops_it(generator_run, tmp_path, monkeypatch):
    """At the next block, with the earlier images intact; the same command resumes."""
    write, seen = SampleFolder.write, []

    def fail(folder, index, drawn):
        seen.append(index)
        if index == 2:
            raise OSError(28, "No space left on device")
        write(folder, index, drawn)

    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "write", fail)
        with pytest.raises(OSError, match="No space left"):
            draw(tmp_path, f"run={generator_run}", "count=9")
        with pytest.raises(OSError, match="No space left"):  # in the last block
            draw(tmp_path, f"run={generator_run}", "count=3")
    assert seen == [0, 1, 2, 2]
    assert "result" not in json.loads((tmp_path / "manifest.json").read_text())
    draw(tmp_path, f"run={generator_run}", "count=3")


def test_sample_script_empty_image_is_missing(generator_run, tmp_path):
    """As after a power loss, since images are not synced."""
    draw(tmp_path, f"run={generator_run}", "count=4")
    image = tmp_path / "images" / "000002.png"
    whole = image.read_bytes()
    image.write_bytes(b"")
    draw(tmp_path, f"run={generator_run}", "count=4")
    assert image.read_bytes() == whole


def test_sample_script_compile_recorded(generator_run, tmp_path, monkeypatch):
    compiled, plain = [], torch.nn.Module.compile

    def compile_eagerly(module, **options):
        compiled.append(options)
        plain(module, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    guidance = ["sampler.cfg_scale=1.5", "sampler.cfg_interval=[0.2,0.6]", "count=2"]
    result, manifest = draw(tmp_path / "off", f"run={generator_run}", *guidance)
    assert "compile" not in manifest  # as in a folder of an earlier version
    assert not compiled
    same, manifest = draw(tmp_path / "on", f"run={generator_run}", *guidance, "compile=default")
    assert manifest["compile"] == "default"
    assert compiled == [{"dynamic": False}]
    assert same["sha256"] == result["sha256"]  # of this backend, which does not fuse
    with pytest.raises(ConfigError, match=r"with other settings \(compile: 'default' -> None"):
        draw(tmp_path / "on", f"run={generator_run}", *guidance)


def test_batch_size_default_depends_on_device(generator_run):
    assert compose("sample", ["out=x", f"run={generator_run}"]).batch_size is None
    assert [pipeline.default_batch_size(torch.device(name)) for name in ("cpu", "cuda")] == [32, 128]
    with pytest.raises(ConfigError, match="batch_size must be >= 1 or null, got 0"):
        compose("sample", ["out=x", f"run={generator_run}", "batch_size=0"])


def test_sample_script_changed_image_without_digests_refused(generator_run, tmp_path):
    """A set of an earlier version has no digests.txt: its manifest alone shows that an image was changed."""
    draw(tmp_path, f"run={generator_run}", "count=4")
    (tmp_path / "digests.txt").unlink()
    draw(tmp_path, f"run={generator_run}", "count=5")
    (tmp_path / "digests.txt").write_text("damaged")
    shutil.copy(tmp_path / "images" / "000001.png", tmp_path / "images" / "000002.png")
    with pytest.raises(
        ConfigError, match=r"images in \S+ have changed since the folder was complete; choose another folder"
    ):
        draw(tmp_path, f"run={generator_run}", "count=5")


def test_sample_script_seed_step_weights_change_images(generator_run, tmp_path):
    digests = set()
    for index, other in enumerate(("seed=0", "seed=1", "weights=raw", "step=1", "labels=[3,4]")):
        digests.add(draw(tmp_path / str(index), f"run={generator_run}", "count=2", other)[0]["sha256"])
    assert len(digests) == 5


def test_label_of_random_balanced_and_list():
    drawn = [label_of("random", index, 0, 10) for index in range(2000)]
    assert min(drawn.count(label) for label in range(10)) > 150
    assert drawn != [label_of("random", index, 1, 10) for index in range(2000)]
    assert [label_of("balanced", index, 0, 3) for index in range(5)] == [0, 1, 2, 0, 1]
    assert [label_of([7, 2], index, 0, 10) for index in range(3)] == [7, 2, 7]


@pytest.mark.parametrize("entry", ["ema", "model", None])
def test_sample_script_official_checkpoint(vaes, tmp_path, entry):
    """A file of the DiT repository's form, decoded by a VAE: the samples are those of the same network in a run."""
    size = ["model.input_size=8", "model.in_channels=4", "model.hidden_size=16", "model.num_heads=2", "model.depth=2"]
    chosen = ["model=dit_s_2", *size, "attention=softmax", "autoencoder=sd_vae", "autoencoder.factor=4"]
    overrides = [*chosen, "objective=diffusion", f"autoencoder.source={vaes / 'sd-vae-ft-mse'}", "count=3"]
    config = compose("sample", ["out=x", "checkpoint=x", *overrides])
    model = build_model(config.model, config.attention)
    random_weights(model)
    state = model.state_dict()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({None: state}.get(entry) or {"model": zeros, "ema": zeros, entry: state}, tmp_path / "DiT.pt")
    which = "raw" if entry == "model" else "ema"
    result, manifest = draw(tmp_path / "out", f"checkpoint={tmp_path / 'DiT.pt'}", *overrides, f"weights={which}")
    assert pixels(tmp_path / "out", 3).shape == (3, 32, 32, 3)
    assert manifest["origin"]["checkpoint"] == "DiT.pt"
    assert manifest["origin"]["weights"] == (entry or "the only ones")
    assert manifest["autoencoder"]["scale"] == 0.18215
    assert manifest["autoencoder"]["source"] == "sd-vae-ft-mse"
    if entry is None:  # as the published files are
        decoder = f"decoder={vaes / 'sd-vae-ft-mse'}"
        fixed = ["protocol=dit_table", decoder, f"out={tmp_path / 'protocol'}", "count=1", "device=cpu"]
        sample.run(compose("sample", [f"checkpoint={tmp_path / 'DiT.pt'}", *overrides, *fixed]))
    zero, _ = draw(tmp_path / "zero", f"checkpoint={tmp_path / 'DiT.pt'}", *overrides, "weights=ema")
    assert (zero["sha256"] == result["sha256"]) == (entry != "model")


@pytest.fixture(scope="session")
def latent_run(vaes, artefact):
    """A run on latents that was never trained: its config, and a checkpoint of random weights."""

    def make(out, objective, sampler):
        vae = ["autoencoder=sd_vae", f"autoencoder.source={vaes / 'other'}", "autoencoder.factor=4"]
        config = compose(
            "train_gen",
            [*SMALL_DIT, *vae, "data=imagefolder", "data.img_size=32", f"objective={objective}", f"sampler={sampler}"],
        )
        model = build_model(config.model, config.attention)
        random_weights(model)
        folder = RunDirectory(out / "run")
        identity = load_autoencoder(config.autoencoder, torch.device("cpu")).identity()
        folder.create({**to_dict(config), "inputs": {"autoencoder": identity, "cache": None}})
        weights = {"model": model.state_dict(), "ema": model.state_dict()}
        save_checkpoint(folder.checkpoints, 5, {**dict.fromkeys(KEYS), "step": 5, **weights})

    objectives = {"diffusion": "ddpm", "interpolant": "sde_euler"}
    return {
        name: artefact(f"latent-{name}", lambda folder, name=name: make(folder, name, objectives[name])) / "run"
        for name in objectives
    }


PROTOCOLS = {"dit_table": 250, "dit_best": 250, "sit_sde250": 250, "sit_heun250": 250, "sit_dopri5": None}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocol_settings_applied_and_changes_refused(latent_run, vaes, tmp_path, name):
    """Each is drawn as it says, and refuses a field of its own that was changed."""
    fixed = read_protocol(name)
    assert sorted(path.stem for path in (ROOT / "configs" / "protocol").iterdir()) == sorted(PROTOCOLS)
    assert (fixed["protocol"], fixed["labels"], fixed["precision"], fixed["weights"]) == (name, "random", "fp32", "ema")
    run = latent_run["diffusion" if name.startswith("dit") else "interpolant"]
    decoder = tmp_path / Path(fixed["decoder"]).name
    shutil.copytree(vaes / "other", decoder)
    command = [
        f"run={run}",
        f"out={tmp_path / 'out'}",
        f"protocol={name}",
        f"decoder={decoder}",
        "count=1",
        "device=cpu",
    ]
    result = sample.run(compose("sample", command))
    nfe = result["nfe"]["mean"]
    assert nfe == PROTOCOLS[name] if PROTOCOLS[name] else 10 < nfe < 1000
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["protocol"] == name
    assert manifest["sampler"]["cfg_scale"] == (1.5 if name in ("dit_best", "sit_heun250") else 1.0)
    for change, message in (
        ("sampler.cfg_scale=4.0", rf"protocol {name} fixes other values \(sampler.cfg_scale: 1.\d -> 4.0\)"),
        ("precision=bf16", "precision: 'fp32' -> 'bf16'"),
        ("compile=default", "compile: 'off' -> 'default'"),
        (f"decoder={vaes / 'other'}", r"decoder: 'sd-vae-ft-\w+' -> 'other'"),
        ("weights=raw", "weights: 'ema' -> 'raw'"),
    ):
        with pytest.raises(ConfigError, match=message):
            sample.run(compose("sample", [*command, *change.split()]))


def test_protocol_with_sampler_group_refused(latent_run, vaes):
    command = ["out=x", f"run={latent_run['diffusion']}", "protocol=dit_table", f"decoder={vaes / 'sd-vae-ft-mse'}"]
    with pytest.raises(ConfigError, match=r"sampler.method: 'ddpm' -> 'ddim'"):
        sample.run(compose("sample", [*command, "sampler=ddim", "device=cpu"]))


def test_sample_script_other_decoder_keeps_latent_scale(latent_run, vaes, tmp_path):
    """The training's VAE has a shift of 0.3, the decoder's own config none."""
    common = [f"run={latent_run['diffusion']}", "count=1"]
    _, own = draw(tmp_path / "own", *common)
    _, other = draw(tmp_path / "other", *common, f"decoder={vaes / 'sd-vae-ft-mse'}")
    for manifest in (own, other):
        assert (manifest["autoencoder"]["scale"], manifest["autoencoder"]["shift"]) == (0.18215, 0.3)
    assert own["autoencoder"]["sha256"] != other["autoencoder"]["sha256"]


def test_sample_script_replaced_autoencoder_refused(latent_run, tmp_path):
    run = shutil.copytree(latent_run["diffusion"], tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["inputs"]["autoencoder"]["sha256"] = "0"
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"its autoencoder has changed \(autoencoder.sha256: '0' -> "):
        draw(tmp_path / "out", f"run={run}", "count=1")


def test_sample_script_damaged_set_or_checkpoint(generator_run, tmp_path):
    draw(tmp_path / "a", f"run={generator_run}", "count=3")
    image = tmp_path / "a" / "images" / "000001.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(ConfigError, match=r"000001.png is corrupt; delete it and rerun the command"):
        draw(tmp_path / "a", f"run={generator_run}", "count=3")
    image.unlink()
    draw(tmp_path / "a", f"run={generator_run}", "count=3")
    (tmp_path / "a" / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"manifest.json is corrupt"):
        draw(tmp_path / "a", f"run={generator_run}", "count=3")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out: cannot write .*file: "):
        draw(tmp_path / "file", f"run={generator_run}", "count=1")
    run = shutil.copytree(generator_run, tmp_path / "run")
    newest = run / "checkpoints" / "step_00000002.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"step_00000002.pt is corrupt .*; choose another step"):
        draw(tmp_path / "b", f"run={run}", "count=1", "step=2")
    with pytest.warns(UserWarning, match="is corrupt"):
        _, manifest = draw(tmp_path / "b", f"run={run}", "count=1")
    assert manifest["origin"]["step"] == 1
    assert newest.exists(), "a reader moved a file of the run"


WRONG = {
    "count=1": "run or checkpoint must be set, but not both",
    "run=RUN checkpoint=x": "run or checkpoint must be set, but not both",
    "run=nowhere": "run must be a run directory with a config.json, got 'nowhere'",
    "run=RUN model=dit_s_2": "model must be omitted with run, which determines it, got 'dit_s_2'",
    "checkpoint=x model=dit_s_2": "attention must be set with checkpoint, got None",
    "checkpoint=x model=dit_s_2 attention=vca objective=diffusion": (
        "autoencoder must be set for a model with 4 channels"
    ),
    "checkpoint=nowhere.pt model=dit_mini model.in_channels=1 attention=vca objective=diffusion": (
        "checkpoint must be a file, got 'nowhere.pt'"
    ),
    "checkpoint=RUN/checkpoints/step_00000002.pt model=dit_mini model.hidden_size=16 model.num_heads=2 "
    "model.patch_size=2 model.in_channels=1 attention=vca objective=diffusion": (
        r"checkpoint must be a file with exactly this model; \d+ parameters differ, such as"
    ),
    "run=RUN step=7": "has no checkpoint of step 7; available: 1, 2",
    "run=RUN step=0": "has no checkpoint of step 0",
    "run=RUN count=0": "count must be >= 1, got 0",
    "run=RUN labels=some": r"labels must be random, balanced or a list of classes such as \[207, 360\], got 'some'",
    "run=RUN labels=[3,10]": r"labels must be from 0 to 9, got \[3, 10\]",
    "run=RUN sampler=ode_heun": "sampler.method must be one of ddpm, ddim .sampler=ddpm or ddim., got 'ode_heun'",
    "run=RUN protocol=dit_table": "protocol must be null for a pixel-space model, got 'dit_table'",
    "run=RUN protocol=dit_tabel": "protocol=dit_tabel: no such option; did you mean 'dit_table'",
    "run=RUN decoder=x": "decoder must be null for a pixel-space model, got 'x'",
    "run=RUN cuont=3": "unknown key 'cuont'; did you mean 'count'",
}


@pytest.mark.parametrize("line", WRONG)
def test_sample_script_wrong_input_refused(generator_run, line, tmp_path, monkeypatch, capsys):
    arguments = [f"out={tmp_path}/out", "device=cpu", *line.replace("RUN", str(generator_run)).split()]
    monkeypatch.chdir(tmp_path)
    said = one_line("sample", sample.run, arguments, monkeypatch, capsys)
    assert re.search(WRONG[line], said), said
    assert not list(tmp_path.iterdir()), "something was written"


def test_sample_script_nonfinite_samples_refused(generator_run, tmp_path):
    broken = shutil.copytree(generator_run, tmp_path / "broken")
    path = broken / "checkpoints" / "step_00000002.pt"
    saved = torch.load(path, weights_only=True)
    saved["ema"]["final_layer.linear.bias"].fill_(float("nan"))
    torch.save(saved, path)
    with pytest.raises(NonFiniteError, match="NaN or infinite: samples 0 to 0 of broken"):
        draw(tmp_path / "out", f"run={broken}", "count=2")
    assert not list((tmp_path / "out" / "images").iterdir())
