"""Every file in `configs/` composes and builds; every config error is one line, printed before data is read."""

import dataclasses
import re
import sys

import pytest

import train_cls
import train_gen
from tests.processes import ROOT, run_command, run_script, torchrun
from tests.support import one_line
from vca.cli import command_line
from vca.config import compose
from vca.runtime.errors import ConfigError
from vca.runtime.rundir import to_dict

GROUPS = sorted(path.name for path in (ROOT / "configs").iterdir() if path.is_dir())
OPTIONS = [
    f"{group}={path.relative_to(ROOT / 'configs' / group).with_suffix('')}"
    for group in GROUPS
    for path in sorted((ROOT / "configs" / group).rglob("*.yaml"))
]


@pytest.mark.parametrize("option", OPTIONS)
def test_config_every_option_composes(option):
    if option.startswith("protocol="):
        assert compose("sample", ["out=somewhere", "run=somewhere", option]).protocol == option.split("=")[1]
        return
    generation = (
        "objective=",
        "sampler=",
        "model=dit_",
        "autoencoder=",
        "data=latents",
        "trainer=generation",
        "recipe=dit",
        "experiment=table2",
        "extractor=",
    )
    generator = option.startswith((*generation, "experiment=cifar10_dit")) or "_dit_" in option
    script = "train_gen" if generator else "train_cls"
    more = ["data.img_size=256"] if script == "train_gen" else []
    more += ["autoencoder=sd_vae"] if option == "data=latents" else []
    more += ["autoencoder.source=somewhere.py"] if option == "autoencoder=file" else []
    more += ["extractor.source=somewhere.py"] if option == "extractor=file" else []
    more += ["extractor.run=somewhere"] if option == "extractor=classifier" else []
    config = compose(script, ["data=imagefolder", "data.root=somewhere", option, *more])
    assert dataclasses.is_dataclass(config.model)
    assert dataclasses.is_dataclass(config.attention)
    assert to_dict(config)["name"] == config.name


def test_config_defaults_and_overrides_applied():
    config = compose(
        "train_cls",
        ["model=deit_tiny", "model.patch_size=4", "trainer.steps=7", "optim.lr=3e-4", "trainer.precision=bf16"],
    )
    assert (config.model.embed_dim, config.model.num_classes, config.model.in_chans) == (192, 10, 1)
    assert (config.trainer.steps, config.optim.lr, config.trainer.precision.value) == (7, 3e-4, "bf16")
    assert config.name == "digits-deit_tiny-vca-seed0"


def test_config_experiment_files_have_header_comment():
    """The first lines of an experiment file describe it."""
    for path in (ROOT / "configs").glob("experiment/**/*.yaml"):
        lines = path.read_text().splitlines()
        assert lines[0] == "# @package _global_", path
        assert lines[1].startswith("# "), path


# command line -> regex of the error line
WRONG = {
    "cluster=slurm": r"cluster=slurm requires -m: python train_cls\.py -m cluster=slurm \.\.\.",
    "ablation=stages": r"ablation=stages requires -m: python train_cls\.py -m ablation=stages \.\.\.",
    "-m --cfg job": r"-m cannot be combined with --cfg",
    "ablation=null": r"a config group must not be null; omit it",
    "model.dpeth=3": r"unknown key 'model.dpeth'; did you mean 'model.depth'\?",
    "+model.dpeth=3": r"unknown key 'model.dpeth'; did you mean 'model.depth'\?",
    "+optim.lrr=1": r"unknown key 'optim.lrr'; did you mean 'optim.lr'\?",
    "++trainer.epoch=1": r"unknown key 'trainer.epoch'; did you mean 'trainer.epochs'\?",
    "steps=10": r"unknown key 'steps'; did you mean 'trainer.steps'\?",
    "batch_size=64": r"unknown key 'batch_size'; did you mean 'trainer.global_batch_size'\?",
    "trainer.batch_size=64": r"unknown key 'trainer.batch_size'; did you mean 'trainer.global_batch_size'\?",
    "lr=0.1": r"unknown key 'lr'; did you mean 'optim.lr'\?",
    "+learning_rate=0.1": r"unknown key 'learning_rate'; did you mean 'optim.lr'\?",
    "epochs=3": r"unknown key 'epochs'; did you mean 'trainer.epochs'\?",
    "num_workers=4": r"unknown key 'num_workers'; did you mean 'trainer.workers'\?",
    "weight_decay=0": r"unknown key 'weight_decay'; did you mean 'optim.weight_decay'\?",
    "warmup=5": r"unknown key 'warmup'; did you mean 'optim.warmup_epochs'\?",
    "name=a,b=c": r"name: invalid value a,b=c \(.*\); quote it for the shell and Hydra: \"name='a,b=c'\"",
    "data.mean=[1,2": r"data.mean: invalid value \[1,2 ",
    "optim.lr=1e-3,5e-4": r"optim.lr=1e-3,5e-4: several values; add -m to sweep, or write .*'optim.lr=\[1e-3,5e-4\]'",
    "name='lr${optim.lrr}'": r"name refers to 'optim.lrr', which does not exist",
    "optim.lr=${nosuch:1}": r"optim.lr uses the unknown resolver 'nosuch'",
    "optim.lr=abc": r"optim.lr must be a float, got 'abc'",
    "optim.clip_grad='None'": r"optim.clip_grad must be a float, got 'None' \(write null for no value\)",
    "optim.weight_decay=null": r"optim.weight_decay must not be null",
    "optim.lr=-1": r"optim.lr must be > 0 or null, got -1",
    "optim.betas=[0.9]": r"optim.betas must be two numbers in \[0, 1\), got \[0.9\]",
    "model=deit_tinny": r"model=deit_tinny: no such option; did you mean 'deit_tiny'\? \(options: .*deit_base",
    "attention=agnet": r"attention=agnet: no such option.*softmax, vca",
    "modle=deit_tiny": r"unknown key 'modle'|unknown group 'modle'; did you mean 'model'\?",
    "attention.contrast_grid=[7]": r"attention.contrast_grid must be two integers >= 1, or .* per layer, got \[7\]",
    "attention.contrast_grid=[[2,2]]": r"attention.contrast_grid must have a pair for each layer, got 1 and a layer 1",
    "attention.stage1=both": r"attention.stage1 must be one of contrast, plain, got 'both'",
    "attention.positive_stream=pooled": (
        r"attention.positive_stream must be one of pool, embedding, pool\+embedding, got "
        r"'pooled'"
    ),
    "attention=softmax attention.stage1=plain": r"unknown key 'attention.stage1'",
    "model.num_heads=5": r"model.num_heads must divide model.embed_dim 96, got 5",
    "model.patch_size=3": r"model.img_size must be a multiple of 3, such as 6 or 9, got 8",
    "model=pvt_tiny": r"model.img_size must be a multiple of 32, such as 32, got 8",
    "model=swin_tiny model.depths=[2,2]": r"model.num_heads must have 2 entries, one per stage, got \[3, 6, 12, 24\]",
    "model=cswin_tiny data.img_size=384": r"with model.split_size \[1, 2, 7, 7\], model.img_size must be .* 224, .*448",
    "model=pvt_tiny data.img_size=64 model.attention_stages=[5]": r"model.attention_stages must be stages from 1 to 4",
    "trainer.init_from=nowhere.pth": r"trainer.init_from must be a file, got 'nowhere.pth'",
    "recipe=dait": r"recipe=dait: no such option.*agent_deit_small",
    "optim.schedule=step": r"optim.schedule must be one of cosine, constant, got 'step'",
    "optim.cooldown_epochs=-1": r"optim.cooldown_epochs must be >= 0, got -1",
    "optim.cooldown_epochs=60": r"trainer.epochs must be > optim.warmup_epochs \+ optim.cooldown_epochs, 62, got 60",
    "data.check_seconds=400": r"data.check_seconds must be at most half of trainer.timeout_minutes, 300 s, got 400",
    "experiment=cifar10 recipe=null": r"omit it \(or use recipe=none\)",
    "data.check_seconds=-1": r"data.check_seconds must be >= 0, got -1",
    "model.depth=0": r"model.depth must be >= 1, got 0",
    "model.family=dait": r"model.family must be one of \['cswin', 'deit', 'dit', 'pvt', 'swin'\], got 'dait'",
    "model.drop_path_rate=1.5": r"model.drop_path_rate must be in \[0, 1\), got 1.5",
    "trainer.compile=fast": r"trainer.compile must be one of off, default, reduce-overhead, max-autotune, got 'fast'",
    "trainer.precision=fp8": r"trainer.precision must be one of fp32, tf32, bf16, fp16, got 'fp8'",
    "trainer.steps=0": r"trainer.steps must be >= 1 or null, got 0",
    "trainer.steps=1.5": r"trainer.steps must be an integer, got '1.5'",
    "trainer.global_batch_size=60 trainer.micro_batch_size=16": (
        r"global_batch_size must be a multiple of .* 16, got 60; try 48 or "
        r"64"
    ),
    "trainer.ema_decay=1": r"trainer.ema_decay must be in \[0, 1\) or null, got 1",
    "optim.layer_decay=0": r"optim.layer_decay must be in \(0, 1\] or null, got 0",
    "optim.layer_decay=1.5": r"optim.layer_decay must be in \(0, 1\] or null, got 1.5",
    "trainer.freeze_layers=0": r"trainer.freeze_layers must be null or an integer other than 0, got 0",
    "trainer.freeze_layers=-1": (
        r"trainer.freeze_layers must be null without trainer.init_from, which sets frozen weights, got -1"
    ),
    "trainer.freeze=1": r"unknown key 'trainer.freeze'; did you mean 'trainer.freeze_layers'\?",
    "finetune=model.pth": r"unknown key 'finetune'; did you mean 'trainer.init_from'\?",
    "trainer.checkpoint_every=0": r"trainer.checkpoint_every must be >= 1, got 0",
    "trainer.device=tpu": r"trainer.device must be one of auto, cpu, cuda, got 'tpu'",
    "augment.mixup=-1": r"augment.mixup must be >= 0, got -1",
    "augment.mixup=1 trainer.global_batch_size=63": (
        r"trainer.micro_batch_size .* must be even for Mixup and CutMix, .*, got "
        r"63"
    ),
    "augment.crop=center": r"augment.crop must be one of resized, padded, adm, none, got 'center'",
    "data.name=mnist": r"data.name must be one of \['cifar10', 'digits', 'imagefolder', 'latents'\], got 'mnist'",
    "data=cifar10 data.root=nowhere": r"data.root must be a folder with cifar-10-batches-py/, got 'nowhere'",
    "data=imagefolder data.root=nowhere": r"data.root must be a folder with train/ and val/.*got 'nowhere'",
    "data=imagefolder": r"data.root must be a folder with train/ and val/ class folders, got None",
    "data.std=[0.0]": r"data.std must be 1 numbers > 0, got \[0.0\]",
    "name=a/b": r"name must be a folder name, got 'a/b'",
    "seed=-1": r"seed must be >= 0 and below 2\^63, got -1",
    "seed=one": r"seed must be an integer, got 'one'",
    "trainer.eval_only=true": r"trainer.eval_only=true needs a checkpoint in .*checkpoints",
    "trainer.fid_every=10": r"unknown key 'trainer.fid_every'; only train_gen.py has it",
    "recipe=dit": r"trainer/generation.yaml, line 8: unknown key 'trainer.fid_every'; only train_gen.py has it",
    "data=latents": r"data must be images, got 'latents'",
    "experiment=tabel1": r"experiment=tabel1: no such option",
    "trainer.device=cuda": r"trainer.device=cuda needs a GPU for local rank 0, but 0 are visible",
    "optim.lr=": r"optim.lr must be a float, got ''",
    "nonsense": r"nonsense",
    "data.mean=0.5": r"data.mean must be a list such as \[1, 2\], got a float",
    "attention.local_branch=maybe": r"attention.local_branch must be true or false, got 'maybe'",
    "attention.name=softmax name=short": r"attention.name 'softmax' must have a SoftmaxConfig, got VCAConfig",
    "model.num_classes=5": r"model.num_classes must be data.num_classes, 10, got 5",
    "data.num_classes=20": r"data.num_classes must be 10 for digits, got 20",
    "data.in_chans=3 data.mean=[0,0,0] data.std=[1,1,1]": r"data.in_chans must be 1 for digits, got 3",
    "augment.auto_augment=foo": r"augment.auto_augment must be null or a policy of timm .*, got 'foo'",
    "model.patch_size=0": r"model.patch_size must be >= 1, got 0",
    "model.img_size=abc": r"model.img_size must be one or two integers >= 1, got 'abc'",
    "seed=99999999999999999999": r"seed must be >= 0 and below 2\^63",
    "optim.min_lr=1": r"optim.min_lr must be <= optim.lr 0.001, got 1",
    "+experiment=cifar10": r"experiment already has a value; write experiment=cifar10 without '\+'",
    "++model=deit_tiny": r"model already has a value; write model=deit_tiny without '\+\+'",
    "+optim.lr=1": r"optim.lr already has a value; write optim.lr=1 without '\+'",
    "hydra.run.dir=somewhere": r"hydra.run.dir has no effect; set out_dir and name instead",
    "++hydra.sweep.subdir=x": r"hydra.sweep.subdir has no effect; set out_dir and name instead",
    "--config-dir=/nowhere": r"--config-dir must be a folder, got '/nowhere'",
    "out_dir=/proc/nowhere": r"out_dir: /proc/nowhere/.* cannot be written .*No such file or directory",
}


@pytest.mark.parametrize("line", WRONG)
def test_config_wrong_train_cls_input_one_line_error(line, tmp_path, monkeypatch, capsys):
    """Exit code 2 and one line with key, value and remedy; no image is read and no file is written."""
    if line == "trainer.device=cuda":
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)

    def no_data(*_, **__):
        raise AssertionError("data was read")

    monkeypatch.setattr("vca.data.digits.Digits.__getitem__", no_data)
    monkeypatch.setattr("torchvision.datasets.folder.default_loader", no_data)
    monkeypatch.chdir(tmp_path)
    out = [] if "out_dir" in line else [f"out_dir={tmp_path}/out"]
    said = one_line("train_cls", train_cls.run, [*out, *line.split()], monkeypatch, capsys)
    assert re.search(WRONG[line], said), said
    assert not list(tmp_path.iterdir()), "something was written"


LONG = "é" * 101  # 202 bytes
WRONG_PATHS = [
    ("train_cls", "name", "a\nb", r"name must be without control characters, got 'a\\nb'"),
    ("train_cls", "name", "a\0b", r"name must be without control characters, got 'a\\x00b'"),
    ("train_cls", "name", LONG, r"name must be a path of names of at most 200 bytes, got '202 bytes in é+'"),
    (
        "train_cls",
        "out_dir",
        f"runs/{LONG}/x",
        r"out_dir must be a path of names of at most 200 bytes, got '202 bytes in",
    ),
    ("train_gen", "name", LONG, r"name must be a path of names of at most 200 bytes, got '202 bytes in"),
    ("sample", "out", "a\rb", r"out must be without control characters, got 'a\\rb'"),
    ("prepare_latents", "out", LONG, r"out must be a path of names of at most 200 bytes, got '202 bytes in"),
    ("prepare_images", "out", LONG, r"out must be a path of names of at most 200 bytes, got '202 bytes in"),
    ("eval_fid", "out", LONG, r"out must be a path of names of at most 200 bytes, got '202 bytes in"),
    ("reference_stats", "out", "a\0.npz", r"out must be without control characters, got 'a\\x00.npz'"),
]


@pytest.mark.parametrize(("script", "key", "path", "message"), WRONG_PATHS)
def test_config_name_that_no_file_can_have_refused(script, key, path, message):
    """The error is raised on composition, before any file is written."""
    more = {"sample": ["run=r"], "eval_fid": ["run=r", "reference=data:test"]}.get(script, [])
    with pytest.raises(ConfigError, match=message) as error:
        compose(script, [f"{key}='{path}'", *more])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a" * 200, "é" * 100, "lr=0.1 seed 0"])
def test_config_name_that_a_file_can_have_accepted(name):
    assert compose("train_cls", [f"name='{name}'"]).name == name


# The same for train_gen.py.
WRONG_GEN = {
    "sampler=ode_heun": r"sampler.method must be one of ddpm, ddim .sampler=ddpm or ddim., got 'ode_heun'",
    "sampler=ode_dopri5 sampler.steps=5": r"sampler.steps must be null for ode_dopri5 \(adaptive step size\), got 5",
    "model.class_dropout_prob=0 sampler.cfg_scale=2": r"sampler.cfg_scale must be 1 for a model with class",
    "sampler.steps=2000": r"sampler.steps must be <= objective.steps=1000, got 2000",
    "sampler.cfg_interval=[0.5,0.1]": r"sampler.cfg_interval must be two numbers, 0 <= low <= high <= 1",
    "objective=difusion": r"objective=difusion: no such option; did you mean 'diffusion'",
    "objective.path=linear": r"unknown key 'objective.path'",
    "model.num_classes=5": r"model.num_classes must be data.num_classes, 10, got 5",
    "model.in_channels=3": r"model.in_channels must be autoencoder.channels, 1, got 3",
    "model.input_size=16": r"model.input_size must be data.img_size / autoencoder.factor, 8, got 16",
    "autoencoder=sd_vae": r"data.in_chans must be 3 for an autoencoder, got 1",
    "autoencoder=sdvae": r"autoencoder=sdvae: no such option; did you mean 'sd_vae'",
    "autoencoder.factor=2": r"autoencoder.factor must be 1 in pixel space, got 2",
    "data=latents data.root=x": (
        r"autoencoder must be the autoencoder of the latent cache for data=latents, such as sd_vae, "
        r"got 'none'"
    ),
    "model.depht=3": r"unknown key 'model.depht'; did you mean 'model.depth'",
    "augment.mixup=0.8": r"augment.mixup must be 0 in generation, got 0.8",
    "sampled_classes=11": r"sampled_classes must be from 1 to 10, got 11",
    "trainer.eval_only=true": r"unknown key 'trainer.eval_only'; only train_cls.py has it",
    "trainer.init_from=weights.pth": r"unknown key 'trainer.init_from'; only train_cls.py has it",
    "recipe=deit_original": r"augment.mixup must be 0 in generation, got 0.8",
    "optim.layer_decay=0.75": r"optim.layer_decay must be null for DiT, which has no layers, got 0.75",
    "trainer.freeze_layers=1": r"unknown key 'trainer.freeze_layers'; only train_cls.py has it",
}


@pytest.mark.parametrize("line", WRONG_GEN)
def test_config_wrong_train_gen_input_one_line_error(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = [f"out_dir={tmp_path}/out"]
    said = one_line("train_gen", train_gen.run, [*out, *line.split()], monkeypatch, capsys)
    assert re.search(WRONG_GEN[line], said), said
    assert not list(tmp_path.iterdir()), "something was written"


def test_config_typo_in_experiment_file_refused(tmp_path, monkeypatch):
    """A misspelled key in a file is an error, as on the command line."""
    monkeypatch.setattr("vca.config.composition.CONFIGS", tmp_path)
    for path in (ROOT / "configs").rglob("*.yaml"):
        target = tmp_path / path.relative_to(ROOT / "configs")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    (tmp_path / "experiment" / "typo.yaml").write_text("# @package _global_\nmodel:\n  dpeth: 3\n")
    with pytest.raises(ConfigError, match=r"unknown key 'model.dpeth'; did you mean 'model.depth'\?"):
        compose("train_cls", ["experiment=typo"])
    (tmp_path / "experiment" / "broken.yaml").write_text("# @package _global_\nname: a: b\n")
    with pytest.raises(ConfigError, match=r"broken.yaml, line 2: invalid YAML \(mapping values are not allowed here\)"):
        compose("train_cls", ["experiment=broken"])


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("model:\n  dpeth: 3\n", ", line 3: unknown key 'model.dpeth'; did you mean 'model.depth'?"),
        ("augment:\n  dpeth: 3\nmodel:\n  dpeth: 3\n", ": unknown key 'augment.dpeth'"),
        ("model: {dpeth: 3}\n", ": unknown key 'model.dpeth'; did you mean 'model.depth'?"),
    ],
    ids=["one line", "two lines", "no line"],
)
def test_config_typo_in_own_file_names_file_and_line(tmp_path, monkeypatch, capsys, text, place):
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(f"# @package _global_\n{text}")
    arguments = ["--config-dir", str(tmp_path), "experiment=mine"]
    said = one_line("train_cls", train_cls.run, arguments, monkeypatch, capsys)
    assert said.startswith(f"config error: {file}{place}")


@pytest.mark.process
def test_config_model_of_other_script_refused():
    for script, option, fit in (
        ("train_gen.py", "deit_tiny", "dit_b_2, "),
        ("train_cls.py", "dit_s_2", "cswin_base, "),
    ):
        done = run_script(script, f"model={option}")
        assert done.returncode == 2
        assert done.stderr.startswith(f"config error: model={option}: not for this script (options: {fit}")
        assert done.stderr.count("\n") == 1


@pytest.mark.process
def test_command_line_error_printed_once_under_torchrun():
    """A real process prints one line, also under torchrun."""
    for ranks in (1, 2):
        if ranks == 1:
            done = run_command(sys.executable, "train_cls.py", "model.dpeth=3")
        else:
            done = run_script(*torchrun(ranks)[1:], "train_cls.py", "model.dpeth=3")
        assert done.returncode != 0
        said = [line for line in done.stderr.splitlines() if line.startswith("config error:")]
        assert said == ["config error: unknown key 'model.dpeth'; did you mean 'model.depth'?"], done.stderr
        assert ranks > 1 or done.returncode == 2


@pytest.mark.parametrize("script", ["train_cls", "train_gen", "sample"])
def test_command_line_help_lists_keys_and_groups(script, monkeypatch, capsys):
    """Help contains the keys' docstrings and the groups' options, but no schemas."""
    monkeypatch.setattr("sys.argv", [f"{script}.py", "--help"])
    command_line(script, lambda config: pytest.fail("ran"))
    said = capsys.readouterr().out
    assert "seed: seed of" in said
    assert "attention: agent, circulant, differential, " in said
    assert ", vca, vca_embedding_streams, " in said  # gets its schema from vca.yaml
    assert "_schema" not in said
    assert ("epochs: length of the run" in said) == (script != "sample")


@pytest.mark.process
def test_command_line_help_lists_only_options_that_fit(tmp_path):
    """Help includes the options of `--config-dir`; it omits those that use another script's options."""
    (tmp_path / "experiment").mkdir()
    for name, model in (("mine", "deit_tiny"), ("other", "dit_mini")):
        (tmp_path / "experiment" / f"{name}.yaml").write_text(f"defaults:\n  - override /model: {model}\n")
    for script, fit, unfit in (
        ("train_cls.py", ("deit_tiny", "cifar10_ablation", "mine", "table1/deit_tiny_vca"), ("other", "cifar10_dit")),
        ("train_gen.py", ("dit_mini", "cifar10_dit", "other", "table2/sit_s_2_vca"), ("mine", "cifar10_ablation")),
    ):
        done = run_script(script, "--config-dir", str(tmp_path), "--help")
        listed = set(re.findall(r"[\w/]+", done.stdout.partition("\nmodel: ")[2]))
        assert listed >= set(fit)
        assert not listed & {*unfit, "table2/sit_s_2_vca" if "cls" in script else "table1/deit_tiny_vca"}


@pytest.mark.process
def test_command_line_help_lists_only_values_and_keys_that_fit(tmp_path):
    """Data, trainer and augmentation options that a script rejects are omitted, also those of `--config-dir`.

    Recipes that select one of them are omitted too. A key that one trainer uses is not listed for the other.
    """
    own = {
        "data/mine": "name: imagefolder\nroot: ${out_dir}/images\nimg_size: ???\n",
        "data/derived": "defaults:\n  - latents\n  - _self_\nimg_size: 512\n",
        "optim/typo": "learning_rate: 1\n",
        "recipe/mixing": "# @package _global_\ndefaults:\n  - override /augment: imagenet\n",
        "recipe/typo": "# @package _global_\ndefaults:\n  - override /optim: typo\n",
    }
    for name, text in own.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(text)
    both = "none", "cifar10", "imagenette"
    expected = {
        "train_cls.py": {
            "data": {"cifar10", "digits", "imagefolder", "imagenet", "mine"},
            "trainer": {"imagenet", "small"},
            "optim": {"adamw", "constant", "small"},
            "recipe": {path.stem for path in (ROOT / "configs" / "recipe").glob("*.yaml")} - {"dit"} | {"mixing"},
        },
        "train_gen.py": {
            "data": {"cifar10", "digits", "imagefolder", "imagenet", "latents", "mine", "derived"},
            "augment": {"adm_flip", "cifar", "crop_flip", "digits", "none"},
            "trainer": {"generation", "imagenet", "small"},
            "recipe": {*both, "dit"},
        },
    }
    for script, groups in expected.items():
        text = run_script(script, "--config-dir", str(tmp_path), "--help").stdout
        for group, options in groups.items():
            listed = re.search(rf"^{group}: (.*) \(", text, re.MULTILINE)
            assert listed is not None
            assert set(listed[1].split(", ")) == options, (script, group)
        keys = {key for key in ("fid_every", "init_from", "init_weights", "eval_only") if f"\n{key}: " in text}
        assert keys == ({"fid_every"} if "gen" in script else {"init_from", "init_weights", "eval_only"})
