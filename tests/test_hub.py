"""`vca.from_pretrained` and `scripts/export.py` for classifiers and generators, `--push` against a local hub."""

import json
import re
import shutil
import sys
import tomllib
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from setuptools import find_packages

import eval_fid
import sample
import vca
from models import build_model, rebuild
from scripts import export as script
from scripts.export import export
from tests.hub_stub import TOKEN, hub_stub
from tests.processes import ROOT, run_command
from tests.support import GOLDEN, SMALL_DIT
from vca.config import compose
from vca.data import load_dataset
from vca.data.augment import eval_transform
from vca.generation.autoencoder import load_autoencoder
from vca.generation.objective import Method, SamplerConfig
from vca.generation.sample_folder import SampleFolder
from vca.hub import push
from vca.runtime.digest import file_sha256
from vca.runtime.errors import ConfigError
from vca.runtime.rundir import RunDirectory, to_dict
from vca.training.checkpoint import KEYS, load_latest, save_checkpoint
from vca.training.snapshots import save_snapshots

pytestmark = pytest.mark.process


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A local hub that huggingface_hub uses in this process, with a token that may write and an empty cache."""
    with hub_stub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture(scope="session")
def exported_classifier(artefact, classifier_run):
    return artefact("exported-classifier", lambda folder: export(classifier_run, None, folder / "export")) / "export"


@pytest.fixture(scope="session")
def exported_generator(artefact, generator_run):
    return artefact("exported-generator", lambda folder: export(generator_run, None, folder / "export")) / "export"


def write_run(folder: Path, *overrides: str, **fields) -> dict[str, torch.Tensor]:
    """Write the run directory of a generator with random weights, without training; returns the weights."""
    config = compose("train_gen", overrides)
    torch.manual_seed(0)
    weights = build_model(config.model, config.attention).state_dict()
    for name, tensor in weights.items():
        if name != "pos_embed":
            tensor.normal_(std=0.1)
    run = RunDirectory(folder)
    run.create({**to_dict(config), "inputs": {"autoencoder": fields.get("identity"), "cache": None}})
    save_checkpoint(run.checkpoints, 5, {**dict.fromkeys(KEYS), "step": 5, "model": weights, "ema": weights})
    return weights


FRESH = """
import sys, numpy, torch, vca
folder, name, inputs, out = sys.argv[1:]
model = vca.from_pretrained(folder)
with torch.inference_mode():
    logits = model(torch.from_numpy(numpy.load(inputs)))
images = vca.from_pretrained(name).sample(3, labels="balanced", seed=7)
numpy.savez(out, logits=logits, pixels=[image.pixels for image in images], labels=[image.label for image in images])
"""


def test_export_fresh_process_bit_identical(exported_classifier, exported_generator, classifier_run, hub, tmp_path):
    """A new process loads the classifier from its folder and the generator from the hub: same logits, same samples."""
    push(exported_generator, "owner/digits-dit")
    batch = torch.randn(4, 1, 8, 8)
    np.save(tmp_path / "batch.npy", batch.numpy())
    arguments = (exported_classifier, "owner/digits-dit", tmp_path / "batch.npy", tmp_path / "out.npz")
    hub_variables = {"HF_ENDPOINT": huggingface_hub.constants.ENDPOINT, "HF_HOME": str(tmp_path / "home")}
    done = run_command(sys.executable, "-c", FRESH, *map(str, arguments), cwd=tmp_path, **hub_variables)
    assert done.returncode == 0, done.stderr[-3000:]

    network = rebuild(json.loads((classifier_run / "config.json").read_text())).eval()
    network.load_state_dict(load_latest(classifier_run / "checkpoints")["ema"])
    with torch.inference_mode():
        expected = network(batch)
    run = json.loads((exported_generator / "config.json").read_text())["run"]
    sampler = [f"sampler={run['config']['sampler']['method']}", f"sampler.steps={run['config']['sampler']['steps']}"]
    generator_run = classifier_run.parents[1] / "generator" / "run"
    options = [f"run={generator_run}", f"out={tmp_path / 'set'}", "labels=balanced", "seed=7", "count=3", "device=cpu"]
    sample.run(compose("sample", [*options, *sampler]))
    drawn = list(SampleFolder(tmp_path / "set").read_all(3))
    with np.load(tmp_path / "out.npz") as found:
        assert np.array_equal(found["logits"], expected.numpy())
        assert np.array_equal(found["pixels"], np.stack([image.pixels for image in drawn]))
        assert found["labels"].tolist() == [0, 1, 2]


def test_from_pretrained_classifier_transform(exported_classifier):
    """The transform is that of the run's evaluation; the model is in evaluation mode."""
    model = vca.from_pretrained(exported_classifier)
    data = compose("train_cls").data
    image = load_dataset(data, train=False)[0][0]
    assert torch.equal(model.transform(image), eval_transform(data)(image))
    assert not any(module.training for module in model.modules())


def test_from_pretrained_pipeline_sampler_replaced(exported_generator):
    pipeline = vca.from_pretrained(str(exported_generator))
    assert pipeline.sampler.method is Method.ddim
    assert {image.nfe for image in pipeline.sample(2, labels=[3])} == {pipeline.sampler.steps}
    other = SamplerConfig(Method.ddpm, steps=3)
    assert {(image.label, image.nfe) for image in pipeline.sample(2, labels=[3], sampler=other)} == {(3, 3)}
    assert pipeline.origin.keys() == {"run", "step", "weights", "training", "weights_sha256"}
    assert (pipeline.origin["run"], pipeline.origin["step"], pipeline.origin["weights"]) == ("run", 2, "ema")
    pipeline.sampler = None
    with pytest.raises(ConfigError, match="sampler must be set"):
        pipeline.sample(1)


def test_from_pretrained_changed_weights_refused(exported_classifier, exported_generator, tmp_path):
    for number, folder in enumerate((exported_classifier, exported_generator)):
        copy = shutil.copytree(folder, tmp_path / str(number))
        content = bytearray((copy / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (copy / "model.safetensors").write_bytes(content)
        message = r"model.safetensors must have the sha256 of config.json, \w{12}, got \w{12}: the weights have changed"
        for use in (lambda copy=copy: vca.from_pretrained(copy), lambda copy=copy: push(copy, "owner/name")):
            with pytest.raises(ConfigError, match=message):
                use()


def test_from_pretrained_invalid_source_one_line(exported_classifier, tmp_path, monkeypatch):
    incomplete = shutil.copytree(exported_classifier, tmp_path / "incomplete")
    (incomplete / "model.safetensors").unlink()
    old = shutil.copytree(exported_classifier, tmp_path / "old")
    (old / "config.json").write_text(json.dumps({"architecture": "vca_deit_tiny_patch16_224"}))
    (tmp_path / "empty").mkdir()
    sources = {
        "nowhere": "source must be an export folder or a hub name OWNER/NAME, got 'nowhere'",
        "../a/b": "source must be an export folder or a hub name OWNER/NAME, got '../a/b'",
        tmp_path / "empty": "is not a complete export (FileNotFoundError:",
        incomplete: "is not a complete export (FileNotFoundError:",
        old: "must have format vca-export-1, got None; export the run with scripts/export.py",
    }
    for source, message in sources.items():
        with pytest.raises(ConfigError, match=re.escape(message)) as error:
            vca.from_pretrained(source)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="autoencoder must be None for a classifier, got 'sd_vae'"):
        vca.from_pretrained(exported_classifier, autoencoder="sd_vae")
    monkeypatch.setitem(sys.modules, "models", types.SimpleNamespace(__file__="models/__init__.py"))
    with pytest.raises(ConfigError, match=r"models must be this project's package for from_pretrained, got 'models/"):
        vca.from_pretrained(exported_classifier)


def test_from_pretrained_hub_errors_one_line(exported_classifier, hub, monkeypatch):
    def refused(use) -> str:
        with pytest.raises(ConfigError) as error:
            use()
        assert "\n" not in str(error.value)
        return str(error.value)

    address = huggingface_hub.constants.ENDPOINT
    unknown = f"owner/unknown is not a folder and cannot be downloaded from {address}: the repository does not exist"
    assert unknown in refused(lambda: vca.from_pretrained("owner/unknown"))
    assert "--push must be a hub name OWNER/NAME, got 'name'" in refused(lambda: push(exported_classifier, "name"))
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    token = f"--push: owner/name cannot be uploaded to {address}: the token is missing, invalid or has no write access"
    assert token in refused(lambda: push(exported_classifier, "owner/name"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    for use, remedy in (
        (lambda: vca.from_pretrained("owner/name"), "hf download owner/name --local-dir DIR, then from_pretrained("),
        (lambda: push(exported_classifier, "owner/name"), "rerun the command with network access"),
    ):
        message = refused(use)
        assert "http://127.0.0.1:9" in message
        assert "Connection refused" in message
        assert remedy in message


def test_push_uploads_export_only(exported_generator, hub, tmp_path, monkeypatch, capsys):
    """`--push` through the script: the card names the repository, other files of the folder stay."""
    run, out = exported_generator.parents[1] / "generator" / "run", tmp_path / "out"
    out.mkdir()
    (out / "private.txt").touch()
    monkeypatch.setattr(
        sys, "argv", ["export.py", str(run), "--out", str(out), "--push", "owner/dit", "--weights", "raw"]
    )
    script.main()
    assert f"uploaded to {huggingface_hub.constants.ENDPOINT}/owner/dit\n" in capsys.readouterr().out
    files = hub.repos["owner/dit"]
    assert files.keys() == {"README.md", "config.json", "model.safetensors"}
    assert all((out / name).read_bytes() == content for name, content in files.items())
    assert b'vca.from_pretrained("owner/dit")' in files["README.md"]
    monkeypatch.setattr(sys, "argv", ["export.py", str(run), "--out", str(tmp_path / "other"), "--push", "dit"])
    with pytest.raises(SystemExit):
        script.main()
    assert capsys.readouterr().err == "error: --push must be a hub name OWNER/NAME, got 'dit'\n"
    assert not (tmp_path / "other").exists()


def test_push_verifies_every_file_and_deletes_stale_ones(exported_classifier, hub, tmp_path):
    """A file that the re-export does not have is deleted, one of another name stays; an edited record is refused."""
    folder = shutil.copytree(exported_classifier, tmp_path / "export")
    stale = ("dit.pt", "sit.pt", "metrics.jsonl", "evaluation-old-1-1.json")
    hub.repos["owner/name"] = dict.fromkeys((*stale, "notes.txt"), b"old")
    push(folder, "owner/name")
    digests = json.loads((folder / "config.json").read_text())["sha256"]
    assert hub.repos["owner/name"].keys() == {"README.md", "config.json", "notes.txt", *digests}
    (record,) = folder.glob("evaluation-*.json")
    record.write_text(record.read_text().replace("top1", "top2"))
    vca.from_pretrained(folder)  # uses the weights only
    with pytest.raises(
        ConfigError, match=rf"{record.name} must have the sha256 of config.json, .*: the file has changed"
    ):
        push(folder, "owner/name")
    record.unlink()
    with pytest.raises(ConfigError, match="is not a complete export"):
        push(folder, "owner/name")


def test_export_step_and_decay(tmp_path):
    """Checkpoints and snapshots, each decay: the weights, `config.json`, card and summary are of the chosen ones."""
    run, out, decays = tmp_path / "run", tmp_path / "out", [0.9, 0.99]
    weights = write_run(run, *SMALL_DIT, "trainer.ema_decay=[0.9,0.99]")
    emas = {decay: {name: tensor + decay for name, tensor in weights.items()} for decay in decays}
    state = {**dict.fromkeys(KEYS), "step": 400_000, "model": weights, "ema": emas[0.9]}
    save_checkpoint(run / "checkpoints", 400_000, {**state, "further_emas": {"0.99": emas[0.99]}})
    snapshots = {decay: {name: -tensor for name, tensor in emas[decay].items()} for decay in decays}
    save_snapshots(run / "snapshots", 7, snapshots)
    cases = (
        ({}, emas[0.9], "EMA weights with decay 0.9 of step 400,000"),
        ({"ema": 0.99}, emas[0.99], "EMA weights with decay 0.99 of step 400,000"),
        ({"step": 5, "ema": 0.9}, weights, "EMA weights with decay 0.9 of step 5."),
        (
            {"step": 7, "ema": 0.99},
            snapshots[0.99],
            "EMA weights with decay 0.99 of step 7.",
        ),
        ({"weights": "raw", "step": 5}, weights, "raw weights of step 5."),
    )
    for chosen, expected, text in cases:
        chosen = {"weights": None, **chosen}
        said = export(run, out=out, **chosen)
        described = json.loads((out / "config.json").read_text())["run"]
        assert described["step"] == chosen.get("step", 400_000)
        assert described["ema_decay"] == (None if chosen["weights"] else chosen.get("ema", 0.9))
        assert f"of step {described['step']}," in said
        assert f"The file contains the {text}" in (out / "README.md").read_text()
        found = load_file(out / "model.safetensors")
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    for chosen, message in (
        ({"step": 6}, "has no checkpoint of step 6; available: 5, 400000; snapshots of EMA weights: 7"),
        ({"ema": 0.5}, r"ema must be a decay of .*, one of \[0.9, 0.99\], got 0.5"),
        ({"ema": 0.9, "weights": "raw"}, "--ema must be unset with --weights raw, got 0.9"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(run, **{"weights": None, **chosen}, out=out)


def test_export_second_decay_has_its_own_accuracy(classifier_run, tmp_path):
    """Not that of the first decay, which has the same step and kind."""
    run = shutil.copytree(classifier_run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["trainer"]["ema_decay"] = [config["trainer"]["ema_decay"], 0.123]
    (run / "config.json").write_text(json.dumps(config))
    saved = load_latest(run / "checkpoints")
    other = {name: tensor + 1 for name, tensor in saved["ema"].items()}
    save_checkpoint(run / "checkpoints", saved["step"], {**saved, "further_emas": {"0.123": other}})
    assert "not evaluated at this step" in export(run, None, tmp_path / "out", ema=0.123)
    evaluated = [record for record in RunDirectory(run).records() if "ema/top1" in record][-1]
    RunDirectory(run).append({**evaluated, "ema_0.123/top1": 12.34})
    assert "top-1 12.34 %" in export(run, None, tmp_path / "out", ema=0.123)
    assert "| top-1 (%) | 12.34 |" in (tmp_path / "out" / "README.md").read_text()


def test_card_license_of_initial_weights(classifier_run, tmp_path):
    shutil.copytree(classifier_run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["trainer"]["init_from"] = "folder/initial.pth"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    for chosen, license, text in (
        (None, "other", "started from the weights in `initial.pth`, whose license applies."),
        ("apache-2.0", "apache-2.0", "Weights: `apache-2.0`."),
    ):
        export(tmp_path / "run", None, tmp_path / "out", license=chosen)
        card = (tmp_path / "out" / "README.md").read_text()
        assert huggingface_hub.ModelCard(card).data.to_dict()["license"] == license
        assert text in card.partition("## License")[2]


@pytest.mark.parametrize(
    ("experiment", "file", "code"),
    [("table2/dit_s_2_softmax", "dit.pt", "DiT"), ("table2/sit_s_2_softmax", "sit.pt", "SiT")],
)
def test_export_layout_of_original_code(experiment, file, code, tmp_path):
    """Names and shapes of the published DiT-S/2, here with one block; the card has the call that loads it."""
    weights = write_run(tmp_path / "run", f"experiment={experiment}", "data.root=latents", "model.depth=1")
    out = tmp_path / "out"
    assert "no evaluation record of these weights" in export(tmp_path / "run", None, out)
    found = torch.load(out / file, weights_only=True)
    contract = json.loads((GOLDEN / "state_dict_contracts.json").read_text())["DiT-S/2 (official)"]
    contract = {name: shape for name, shape in contract.items() if not re.match(r"blocks\.[1-9]", name)}
    assert {name: list(tensor.shape) for name, tensor in found.items()} == contract
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.items())
    constructor = re.search(r"with `(\w+)\((.*)\)\.load_state_dict", (out / "README.md").read_text())
    assert constructor[1] == code
    arguments = "input_size=32, patch_size=2, in_channels=4, hidden_size=384, depth=1, num_heads=6, mlp_ratio=4.0"
    assert constructor[2] == f"{arguments}, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True"
    digests = json.loads((out / "config.json").read_text())["sha256"]
    assert digests == {name: file_sha256(out / name) for name in ("model.safetensors", file)}


def test_export_other_architecture_has_no_original_layout(exported_generator):
    text = (exported_generator / "README.md").read_text()
    assert "no file in the layout of the original DiT or SiT code: that code has no attention=vca.\n" in text
    assert not list(exported_generator.glob("*.pt"))


def test_from_pretrained_latent_generator(vaes, tmp_path):
    """The autoencoder of training may be elsewhere, but not another one."""
    folder = shutil.copytree(vaes / "sd-vae-ft-mse", tmp_path / "vae")
    options = ["autoencoder.name=diffusers", f"autoencoder.source={folder}"]
    options += ["autoencoder.channels=4", "autoencoder.factor=4", "data=imagefolder", "data.img_size=32"]
    config = compose("train_gen", [*SMALL_DIT, *options])
    identity = load_autoencoder(config.autoencoder, torch.device("cpu")).identity()
    write_run(tmp_path / "run", *SMALL_DIT, *options, identity=identity)
    export(tmp_path / "run", None, tmp_path / "out")
    expected = vca.from_pretrained(tmp_path / "out").sample(1)[0].pixels
    assert expected.shape == (32, 32, 3)
    folder.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"autoencoder\.source must be a folder with diffusers' config.json"):
        vca.from_pretrained(tmp_path / "out")
    pipeline = vca.from_pretrained(tmp_path / "out", autoencoder=str(tmp_path / "moved"))
    assert np.array_equal(pipeline.sample(1)[0].pixels, expected)
    with pytest.raises(ConfigError, match="its autoencoder has changed"):
        vca.from_pretrained(tmp_path / "out", autoencoder=str(vaes / "other"))


def test_from_pretrained_runs_no_file_that_the_export_names(exported_generator, tmp_path):
    """An autoencoder's Python file is run only if the caller names it."""
    folder = shutil.copytree(exported_generator, tmp_path / "export")
    (tmp_path / "evil.py").write_text("raise SystemExit('was run')\n")
    described = json.loads((folder / "config.json").read_text())
    described["run"]["config"]["autoencoder"] |= {"name": "file", "source": str(tmp_path / "evil.py")}
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(
        ConfigError, match=r"autoencoder must be the Python file with load_autoencoder, such as '.*evil"
    ):
        vca.from_pretrained(folder)


def test_from_pretrained_downloads_no_repository_that_the_export_names(exported_generator, tmp_path, monkeypatch):
    """An autoencoder on the hub is Stable Diffusion's or named by the caller, and loaded without pickles."""
    asked = []

    def from_pretrained(source, **options):
        asked.append((source, options["use_safetensors"]))
        raise OSError("no network")

    monkeypatch.setattr("diffusers.models.AutoencoderKL.from_pretrained", from_pretrained)
    folder = shutil.copytree(exported_generator, tmp_path / "export")
    described = json.loads((folder / "config.json").read_text())
    shipped = yaml.safe_load((ROOT / "configs" / "autoencoder" / "sd_vae.yaml").read_text())["source"]
    for source, message in (
        (
            "evil/vae",
            "autoencoder must be a folder or one of .* if it is not passed to from_pretrained, got 'evil/vae'",
        ),
        (shipped, "cannot be loaded"),
    ):
        described["run"]["config"]["autoencoder"] |= {"name": "diffusers", "source": source}
        (folder / "config.json").write_text(json.dumps(described))
        with pytest.raises(ConfigError, match=message):
            vca.from_pretrained(folder)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        vca.from_pretrained(folder, autoencoder="own/vae")
    assert asked == [(shipped, True), ("own/vae", True)]


def test_figures_of_exported_weights_only(generator_run, use, tmp_path):
    """The card has the record of the exported weights and not that of others; a changed record is an error."""
    run = shutil.copytree(generator_run, tmp_path / "run")
    common = ["device=cpu", "data=digits", "reference=data:test", *use, "sampler=ddim", "sampler.steps=2", "count=20"]
    for weights in ("ema", "raw"):
        eval_fid.run(compose("eval_fid", [f"run={run}", f"weights={weights}", *common]))
    assert len(list(run.glob("evaluation-*.json"))) == 2
    said = export(run, "raw", tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    (name,) = {figure["file"] for figure in described["figures"]}
    record = json.loads((tmp_path / "out" / name).read_text())
    assert record["samples"]["made"]["origin"]["weights"] == "raw"
    frechet = described["figures"][0]
    assert frechet["name"] == "Frechet distance (N = 20)"
    assert frechet["value"] == f"{record['metrics']['frechet']:.4g}"
    assert (
        "protocol: none; sampler: ddim, 2 steps, guidance scale 1.0, NFE 2; labels: random, seed 0"
        in frechet["protocol"]
    )
    assert f"{frechet['name']} {frechet['value']}" in said
    row = f"| {frechet['name']} | {frechet['value']} | {frechet['protocol']} | `{name}` |"
    assert row in (tmp_path / "out" / "README.md").read_text()

    (run / name).write_text(json.dumps({**record, "count": 50_000}))
    with pytest.raises(ConfigError, match="has changed since it was written"):
        export(run, "raw", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_card_front_matter_recipe_and_provenance(exported_classifier, classifier_run):
    text = (exported_classifier / "README.md").read_text()
    data = huggingface_hub.ModelCard(text).data.to_dict()
    assert (data["license"], data["pipeline_tag"]) == ("mit", "image-classification")
    assert data["library_name"] == "visual-contrast-attention"
    assert data["tags"] == ["deit", "vca", "arxiv:2511.00833", "timm"]
    described = json.loads((exported_classifier / "config.json").read_text())
    figure = described["figures"][0]
    assert figure["name"] == "top-1 (%)"
    assert figure["protocol"].startswith("data: 359 evaluation images of digits, 8 px, crop_pct 1.0; computed: ")
    assert figure["file"].startswith("evaluation-accuracy-ema-")
    assert [figure["name"] for figure in described["figures"]] == ["top-1 (%)", "top-5 (%)"]
    (launch,) = [json.loads(line) for line in (classifier_run / "launches.jsonl").read_text().splitlines()]
    for expected in (
        f"| top-1 (%) | {figure['value']} | {figure['protocol']} | `{figure['file']}` |",
        "optim.lr=0.001\n",
        "trainer.global_batch_size=120\n",
        f"```\n{launch['command']}\n```",
        f"| {launch['commit'] or 'unknown'} | 1 x {launch['device']} |",
        file_sha256(exported_classifier / "model.safetensors"),
    ):
        assert expected in text
    assert "trainer.workers" not in text  # it cannot change the result
    assert (exported_classifier / figure["file"]).read_bytes() == (classifier_run / figure["file"]).read_bytes()


def test_export_into_run_directory_refused(generator_run):
    before = (generator_run / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"--out must not be the run directory, whose config\.json"):
        export(generator_run, None, generator_run)
    assert (generator_run / "config.json").read_bytes() == before


def test_package_contains_models_and_template():
    """`pip install` installs what `from_pretrained` and the card need."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = find_packages(str(ROOT), include=tools["packages"]["find"]["include"])
    assert {"vca", "vca.report", "models"} <= set(found)
    data = {
        path.relative_to(ROOT).as_posix()
        for package, patterns in tools["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    assert {"vca/report/templates/card.md.j2", "vca/attention/kernels/tiles.json"} <= data
