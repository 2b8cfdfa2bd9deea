"""Loading, evaluating and exporting weights: official files and this project's, complete and partial."""

import argparse
import json
import os
import pickle
import shutil
from fractions import Fraction

import pytest
import timm
import torch
from safetensors.torch import save_file

import train_cls
from models import CLASSIFIERS
from scripts.export import export
from tests.data.test_loader import write_image_folder
from tests.models.test_classifiers import CONTRACT_OF, CONTRACTS
from tests.processes import run_script
from tests.support import TINY
from vca.attention import SoftmaxConfig, VCAConfig
from vca.config import compose
from vca.data import load_dataset
from vca.data.augment import eval_transform
from vca.runtime.errors import ConfigError
from vca.runtime.rundir import RunDirectory
from vca.training.pretrained import InitWeights, init_from, read_weights, strip_wrappers

SHORT = (*TINY, "trainer.steps=3", "trainer.log_every=3")


def state_of(family: str) -> dict[str, torch.Tensor]:
    """A published file of a family: its names and shapes, with random values."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in CONTRACTS[CONTRACT_OF[family]].items()}


def network(family: str, attention, **fields):
    """The model of `CONTRACT_OF`, whose CSWin is the original one."""
    config_class, module = CLASSIFIERS[family]
    if family == "cswin":
        fields = {"depths": [1, 2, 21, 1], **fields}
    return module(config_class(**fields), attention)


@pytest.mark.parametrize("family", CONTRACT_OF)
def test_init_from_official_weights_fill_baseline(family, tmp_path):
    """Every parameter is loaded."""
    torch.save({"model": state_of(family)}, tmp_path / "official.pth")
    model = network(family, SoftmaxConfig())
    report = init_from(model, tmp_path / "official.pth")
    assert report.complete
    assert report.source == "model"
    assert len(report.loaded) == len(model.state_dict())


# Parameters that only the VCA variant has, and parameters of the file that it does not have.
VCA_PARTS = ("e_pos", "e_neg", "lambda1", "lambda2", "norm1_weight", "norm2_weight", "local")
UNEXPECTED = {
    "deit": (),
    "pvt": ("cls_token", "attn.sr.", "attn.norm."),
    "swin": ("relative_position_bias_table",),
    "cswin": (),
}


@pytest.mark.parametrize("family", CONTRACT_OF)
def test_init_from_official_weights_into_vca_variant(family, tmp_path):
    """Loads projections, MLPs, norms and embeddings, including PVT's split q and kv and CSWin's LePE."""
    torch.save(state_of(family), tmp_path / "official.pth")
    model = network(family, VCAConfig())
    report = init_from(model, tmp_path / "official.pth")
    assert all(any(part in name for part in VCA_PARTS) for name in report.missing), report.missing
    assert all(any(part in name for part in UNEXPECTED[family]) for name in report.unexpected), report.unexpected
    assert set(report.unexpected.values()) <= {"not in the model"}
    if family == "pvt":  # the class token's position is dropped
        assert report.resized == {"pos_embeds.3": "1 x 50 x 512 in the file, 1 x 49 x 512 in the model"}
        assert torch.equal(model.pos_embeds[3], state_of(family)["pos_embed4"][:, 1:])
    if family == "cswin":
        assert not any(".local." in name for name in report.missing)  # LePE is the local branch
    taken = dict(model.state_dict())
    official = state_of(family)
    first = {
        "deit": ("blocks.0.attn.qkv.weight", official.get("blocks.0.attn.qkv.weight")),
        "swin": ("stages.0.blocks.0.attn.qkv.weight", official.get("layers.0.blocks.0.attn.qkv.weight")),
        "cswin": ("stages.0.blocks.0.attn.qkv.weight", official.get("stage1.0.qkv.weight")),
        "pvt": (
            "stages.0.blocks.0.attn.qkv.weight",
            torch.cat([official[f"block1.0.attn.{part}.weight"] for part in ("q", "kv")]) if family == "pvt" else None,
        ),
    }
    name, expected = first[family]
    assert torch.equal(taken[name], expected)


def test_init_from_other_num_classes_skips_head(tmp_path):
    """Fine-tuning on ten classes: all but the head is loaded, and the report gives the reason."""
    torch.save(state_of("deit"), tmp_path / "official.pth")
    report = init_from(network("deit", SoftmaxConfig(), num_classes=10), tmp_path / "official.pth")
    assert report.unexpected == {
        "head.weight": "1000 x 192 in the file, 10 x 192 in the model",
        "head.bias": "1000 in the file, 10 in the model",
    }
    assert report.missing == ["head.weight", "head.bias"]
    assert str(report).splitlines() == [
        "loaded: 150 parameters",
        "unexpected: head.weight (1000 x 192 in the file, 10 x 192 in the model)",
        "unexpected: head.bias (1000 in the file, 10 in the model)",
        "missing: head.weight",
        "missing: head.bias",
    ]


def test_init_from_pvt_without_class_token_leaves_positions(tmp_path):
    """Positions of a VCA PVT, which has no class token, do not fit the softmax PVT."""
    torch.save(network("pvt", VCAConfig()).state_dict(), tmp_path / "vca.pth")
    report = init_from(network("pvt", SoftmaxConfig()), tmp_path / "vca.pth")
    assert "pos_embeds.3" in report.missing
    assert "pos_embeds.3" in report.unexpected
    assert "pos_embeds.2" not in report.missing


@pytest.mark.parametrize(
    ("family", "fields", "adapted"),
    [
        ("deit", {"img_size": 384}, {"pos_embed"}),
        ("pvt", {"img_size": 256}, {f"pos_embeds.{stage}" for stage in range(4)}),
        ("swin", {"window_size": 8, "img_size": 256}, None),
    ],
)
def test_init_from_other_image_size_interpolates(family, fields, adapted, tmp_path):
    """Positions are interpolated, not left at their random initial values."""
    torch.save(state_of(family), tmp_path / "official.pth")
    model = network(family, SoftmaxConfig(), **fields)
    report = init_from(model, tmp_path / "official.pth")
    assert (report.unexpected, report.missing) == ({}, [])
    assert not report.complete
    if adapted is not None:
        assert set(report.resized) == adapted
    assert all("pos" in name for name in report.resized)
    shapes = "1 x 197 x 192 in the file, 1 x 577 x 192 in the model"
    assert family != "deit" or f"resized: pos_embed ({shapes})" in str(report).splitlines()
    if family == "deit":  # the class token's is copied, a constant field stays constant
        position = torch.ones(1, 197, 192)
        assert torch.equal(model.pos_embed[:, 0], state_of(family)["pos_embed"][:, 0])
        torch.testing.assert_close(model.adapt("pos_embed", position), torch.ones(1, 577, 192))
        assert model.adapt("pos_embed", torch.ones(1, 198, 192)) is None  # a distilled DeiT's


def test_read_weights_every_file_format(tmp_path):
    """Plain, wrapped, with EMA, from DDP, with the command line of the original trainers, safetensors."""
    raw, average = {"head.bias": torch.zeros(2)}, {"head.bias": torch.ones(2)}
    files = {
        "plain.pth": (raw, 0, 0),
        "wrapped.pth": ({"state_dict": {f"module._orig_mod.{name}": value for name, value in raw.items()}}, 0, 0),
        "ema.pth": ({"model": raw, "ema": average, "step": 3}, 1, 0),
        "no_ema.pth": ({"model": raw, "ema": None}, 0, 0),
        "cswin.pth": ({"state_dict": raw, "state_dict_ema": average}, 1, 0),
        "deit.pth": ({"model": raw, "model_ema": average, "args": argparse.Namespace(lr=1e-3)}, 1, 0),
    }
    for name, (content, ema, plain) in files.items():
        torch.save(content, tmp_path / name)
        assert read_weights(tmp_path / name)[0]["head.bias"].tolist() == [ema, ema], name
        assert read_weights(tmp_path / name, InitWeights.raw)[0]["head.bias"].tolist() == [plain, plain], name
    save_file(average, tmp_path / "model.safetensors")
    assert read_weights(tmp_path / "model.safetensors")[0]["head.bias"].tolist() == [1, 1]
    assert strip_wrappers("submodule.weight") == "submodule.weight"


class Harmful:
    """A pickle that runs code."""

    def __reduce__(self):
        return os.system, ("true",)


def test_read_weights_unusable_file_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer.init_from must be a file, got '.*nowhere.pth'"):
        read_weights(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ConfigError, match=r"text.pth' is not a readable checkpoint"):
        read_weights(tmp_path / "text.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ConfigError, match=r"text.safetensors' is not a readable checkpoint"):
        read_weights(tmp_path / "text.safetensors")
    torch.save({"model": {}, "config": Fraction(1, 2)}, tmp_path / "object.pth")
    with pytest.raises(
        ConfigError, match=r"checkpoint: it contains a fractions.Fraction, which weights_only=True rejects.*torch.save"
    ):
        read_weights(tmp_path / "object.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pth")
    torch.save({"model": Harmful()}, tmp_path / "harmful.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"model": 1}, protocol=4))
    for name, reason in (
        ("text", "it is truncated, corrupt, or not a torch.save file"),
        ("pickle", "it is truncated, corrupt, or not a torch.save file"),
        ("script", r"it is a TorchScript archive; save its state_dict\(\) instead"),
        ("harmful", "loading it would run .*system; do not use it"),
    ):
        with pytest.raises(
            ConfigError, match=f"trainer.init_from: '.*{name}.pth' is not a readable .*: {reason}$"
        ) as e:
            read_weights(tmp_path / f"{name}.pth")
        assert "weights_only" not in str(e.value)
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ConfigError, match="must contain a state dict"):
        read_weights(tmp_path / "empty.pth")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"none of the 1 parameters in '.*other.pth' matches the model"):
        init_from(network("deit", SoftmaxConfig(), depth=1), tmp_path / "other.pth")


def run(folder, *overrides):
    return train_cls.run(compose("train_cls", [f"out_dir={folder}", *SHORT, *overrides]))


def test_eval_only_official_checkpoint_equals_timm(tmp_path):
    """`trainer.eval_only=true` on timm's weights gives the loss and accuracy of timm's model, and writes nothing."""
    write_image_folder(tmp_path / "data", images=6)
    torch.manual_seed(0)
    theirs = timm.create_model("deit_tiny_patch16_224", num_classes=2, depth=2).eval()
    with torch.no_grad():
        theirs.head.weight.normal_()
    torch.save({"model": theirs.state_dict()}, tmp_path / "deit.pth")
    options = ["model=deit_tiny", "model.depth=2", "attention=softmax", "data=imagefolder", "data.num_classes=2"]
    options += [f"data.root={tmp_path / 'data'}", f"out_dir={tmp_path / 'out'}", "trainer.device=cpu"]
    options += [f"trainer.init_from={tmp_path / 'deit.pth'}", "trainer.eval_only=true", "trainer.workers=0"]
    config = compose("train_cls", options)
    result = train_cls.run(config)
    images = load_dataset(config.data, train=False)
    transform = eval_transform(config.data)
    batch = torch.stack([transform(image) for image, _ in images])
    labels = torch.tensor([label for _, label in images])
    with torch.no_grad():
        logits = theirs(batch)
    assert result["val/loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result["val/top1"] == 100 * (logits.argmax(1) == labels).float().mean().item()
    assert not (tmp_path / "out").exists()

    for other in ("attention=vca", "model.depth=1"):  # missing and unexpected parameters
        with pytest.raises(ConfigError, match=r"init_from with exactly this model; \d+ parameters differ"):
            train_cls.run(compose("train_cls", [*options, other]))


def test_init_from_run_takes_ema(tmp_path, capsys):
    """A run starts from the EMA weights of another one; a resume does not load them again."""
    finished = run(tmp_path, "name=first", "trainer.ema_decay=0.5")
    file = tmp_path / "first" / "checkpoints" / "step_00000003.pt"
    capsys.readouterr()
    again = ["name=second", f"trainer.init_from={file}", "optim.lr=1e-12", "optim.warmup_lr=0", "optim.min_lr=0"]
    run(tmp_path, *again, "trainer.ema_decay=null")
    said = capsys.readouterr().out
    assert f"initialized from {file}\nloaded: " in said
    assert "parameters from 'ema'\nunexpected: none\nmissing: none" in said
    first, second = (
        torch.load(tmp_path / n / "checkpoints" / file.name, weights_only=True) for n in ("first", "second")
    )
    for name, value in first["ema"].items():
        torch.testing.assert_close(second["model"][name], value)

    one, other = (f"name=evaluated-{which}" for which in ("raw", "ema"))
    options = ["trainer.eval_only=true", f"trainer.init_from={file}", "trainer.ema_decay=0.5"]
    raw = run(tmp_path, one, *options, "trainer.init_weights=raw")
    ema = run(tmp_path, other, *options)
    assert {f"val/{key.split('/')[1]}": value for key, value in finished.items() if key[:3] == "ema"} == ema
    assert {key: value for key, value in finished.items() if key[:3] == "val"} == raw

    file.unlink()  # a run with its own checkpoint does not need it
    capsys.readouterr()
    run(tmp_path, *again, "trainer.ema_decay=null")
    assert "initialized from" not in capsys.readouterr().out


@pytest.mark.parametrize("attention", ["vca", "softmax"])
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_export_loads_in_timm(tmp_path, attention, weights):
    """timm loads the exported weights in both ways."""
    run(tmp_path, "name=run", f"attention={attention}", "trainer.ema_decay=0.5")
    out = tmp_path / "exported"
    said = export(tmp_path / "run", weights, out)
    assert said.startswith(f"{out}: vca_deit_mini_patch2_8, {weights} weights of step 3, top-1 ")
    described = json.loads((out / "config.json").read_text())
    assert described["model_args"]["depth"] == 2
    assert not {"img_size", "patch_size"} & set(described["model_args"])
    assert ("attention" in described["model_args"]) == (attention == "softmax")
    one = timm.create_model(
        described["architecture"], checkpoint_path=str(out / "model.safetensors"), **described["model_args"]
    )
    two = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=5).head.out_features == 5
    saved = torch.load(tmp_path / "run" / "checkpoints" / "step_00000003.pt", weights_only=True)
    expected = saved["ema" if weights == "ema" else "model"]
    for model in (one, two):
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    report = init_from(one, out / "model.safetensors")
    assert (report.unexpected, report.missing) == ({}, [])


def test_export_other_sizes_in_message(tmp_path):
    """Without a timm model of these sizes, the name of another one and the sizes are printed."""
    run(tmp_path, "name=run", "model.patch_size=4", "model.contrast_grid=[1,1]")
    said = export(tmp_path / "run", "raw", tmp_path / "exported")
    name = "vca_deit_mini_patch2_8 with patch_size=4"
    assert said.startswith(f"{tmp_path}/exported: {name}, raw weights of step 3, top-1 ")
    assert timm.create_model(f"local-dir:{tmp_path}/exported", pretrained=True).config.patch_size == 4


@pytest.mark.process
def test_written_files_have_mode_of_umask(tmp_path):
    """A group that shares a folder can read a run and its export."""
    before = os.umask(0o027)
    try:
        run(tmp_path / "out", "name=run", "trainer.ema_decay=0.5")
        export(tmp_path / "out" / "run", None, tmp_path / "out" / "exported")
    finally:
        os.umask(before)
    paths = list((tmp_path / "out").rglob("*"))
    modes = {str(path.name): oct(path.stat().st_mode & 0o777) for path in paths}
    assert "model.safetensors" in modes
    assert modes == {path.name: "0o750" if path.is_dir() else "0o640" for path in paths}


@pytest.mark.process
def test_export_script_messages_and_errors(tmp_path):
    def command(*arguments):
        return run_script("scripts/export.py", *map(str, arguments))

    run(tmp_path, "name=run", "trainer.ema_decay=null")
    done = command(tmp_path / "run")
    top1 = [r["val/top1"] for r in RunDirectory(tmp_path / "run").records() if "val/top1" in r][-1]
    summary = f"vca_deit_mini_patch2_8, raw weights of step 3, top-1 {top1:.2f} %"
    assert done.stdout == f"{tmp_path}/run/export: {summary}\n"
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    done = command(tmp_path / "run", "--weights", "ema")
    assert (done.returncode, done.stderr) == (2, f"error: --weights must be raw for {tmp_path}/run, which has no EMA\n")

    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out: cannot create .*file: File exists"):
        export(tmp_path / "run", None, tmp_path / "file")
    with pytest.raises(ConfigError, match=r"RUN must be a run directory with a config.json, got '.*nowhere'"):
        export(tmp_path / "nowhere", None, tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match="contains no checkpoint"):
        export(tmp_path / "run", None, tmp_path)
