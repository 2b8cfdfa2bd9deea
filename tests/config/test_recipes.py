"""Frozen recipes: a library's new default or an edit of a config group cannot change a recipe unnoticed.

`python -m tests.config.test_recipes` rewrites `tests/golden/recipes/*.json`.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from timm.scheduler import CosineLRScheduler

import train_cls
import train_gen
from models import build_model
from scripts.complexity import complexity_of
from tests.processes import ROOT, run_command
from tests.runtime.test_distributed import launch_script
from tests.support import GOLDEN
from vca.config import compose
from vca.data.augment import BatchMixer, eval_transform, train_transform
from vca.report import paper
from vca.runtime.distributed import World
from vca.training.optim import learning_rate
from vca.training.step import TrainState

# recipe -> its model
RECIPES = {
    "deit_original": "deit_tiny",
    "pvt": "pvt_tiny",
    "swin": "swin_tiny",
    "cswin": "cswin_tiny",
    "agent_deit_tiny": "deit_tiny",
    "agent_deit_small": "deit_small",
    "agent_pvt_tiny": "pvt_tiny",
    "agent_cswin_tiny": "cswin_tiny",
    "cifar10": "deit_tiny",
    "imagenette": "deit_tiny",
    "finetune_384": "deit_tiny",
    "finetune_small": "deit_tiny",
    "dit": "dit_s_2",
}
IMAGENET = 1_281_167
TABLE1 = sorted(path.stem for path in (ROOT / "configs" / "experiment" / "table1").glob("*.yaml"))


def composed(recipe: str, attention: str, *overrides: str):
    chosen = [f"model={RECIPES[recipe]}", f"attention={attention}", "data=imagefolder", f"recipe={recipe}", *overrides]
    if recipe == "dit":
        return compose("train_gen", [*chosen, "data.img_size=256", "autoencoder=sd_vae"])
    return compose("train_cls", chosen)


def groups_of(config, world=None):
    """Weight decay of each parameter in a run's optimizer: `{"0.05": {pattern of names: count}}`.

    Without a `world`, the network is on the meta device.
    """
    world = world or World(0, 0, 1, torch.device("meta"))
    with world.device:
        network = build_model(config.model, config.attention)
    state = TrainState(network, config.trainer, config.optim, world, 10)
    decay = {id(p): group["weight_decay"] for group in state.optimizer.param_groups for p in group["params"]}
    patterns: dict[str, Counter] = {}
    for name, parameter in network.named_parameters():
        patterns.setdefault(str(decay.pop(id(parameter), "not trained")), Counter())[
            re.sub(r"\.\d+\.", ".*.", name)
        ] += 1
    assert not decay, "the optimizer holds parameters that the model does not"
    return {value: dict(sorted(counts.items())) for value, counts in sorted(patterns.items())}


def shown(step) -> str:
    """A transform with its parameters, including RandAugment's fill color and interpolation."""
    return f"{step} {step.ops[0].kwargs}" if hasattr(step, "ops") else str(step)


def described(recipe: str) -> dict:
    """Everything that the recipe determines, read from the objects of a run."""
    config = composed(recipe, "vca")
    trainer, optim = config.trainer, config.optim
    per_epoch = IMAGENET // trainer.global_batch_size
    total, peak = trainer.total_steps(per_epoch), optim.peak_lr(trainer.global_batch_size)
    mixup = BatchMixer(config.augment, config.data.num_classes, 0).mixup
    mixing = vars(mixup) if mixup is not None else {}
    return {
        "model": RECIPES[recipe],
        "drop_path_rate": getattr(config.model, "drop_path_rate", 0.0),
        "epochs": -(-total // per_epoch),
        "global_batch": trainer.global_batch_size,
        "optimizer": {"betas": optim.betas, "eps": optim.eps, "clip_grad": optim.clip_grad},
        "ema_decay": trainer.ema_decay,
        "repeated_augmentation": config.augment.aug_repeats,
        "parameter_groups": {name: groups_of(composed(recipe, name)) for name in ("softmax", "vca")},
        "training_transform": [shown(step) for step in train_transform(config.augment, config.data).transforms],
        "mixing": {k: v for k, v in sorted(mixing.items()) if type(v) in (bool, int, float, str, type(None))},
        "evaluation_transform": [shown(step) for step in eval_transform(config.data).transforms],
        "lr_of_epoch": [
            float(f"{learning_rate(optim, epoch * per_epoch, total, per_epoch, peak):.9g}")
            for epoch in range(-(-total // per_epoch))
        ],
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_frozen(recipe):
    golden = json.loads((GOLDEN / "recipes" / f"{recipe}.json").read_text())
    now = json.loads(json.dumps(described(recipe)))
    for key in golden.keys() | now.keys():
        assert now.get(key) == golden.get(key), f"{recipe}: {key}"


def test_recipe_every_file_has_golden():
    files = {path.stem for path in (ROOT / "configs" / "recipe").glob("*.yaml")}
    assert files - {"none"} == set(RECIPES) == {path.stem for path in (GOLDEN / "recipes").glob("*.json")}


@pytest.mark.parametrize("recipe", RECIPES)
def test_parameter_groups_compiled_model_matches_golden(recipe):
    config = composed(recipe, "vca", "trainer.compile=default")
    assert (
        groups_of(config) == json.loads((GOLDEN / "recipes" / f"{recipe}.json").read_text())["parameter_groups"]["vca"]
    )


@pytest.mark.process
def test_parameter_groups_under_ddp_match_golden(tmp_path):
    """With two ranks and DDP, both ranks have the same groups as one process."""
    ranks = launch_script(Path(__file__), tmp_path, ranks=2)
    for seen in ranks:
        assert seen.keys() == RECIPES.keys()
        for recipe, groups in seen.items():
            golden = json.loads((GOLDEN / "recipes" / f"{recipe}.json").read_text())
            assert groups == golden["parameter_groups"]["vca"], recipe


# recipe -> (warm-up epochs, warmup_lr, peak lr, min_lr, delay of the original schedule in epochs)
ORIGINAL = {
    "deit_original": (5, 1e-6, 1e-3, 1e-5, 1),
    "pvt": (5, 1e-6, 1e-3, 1e-5, 1),
    "swin": (20, 1e-6, 1e-3, 1e-5, 0),
    "cswin": (20, 1e-6, 2e-3, 1e-5, 0),
    "agent_deit_tiny": (20, 4e-6, 4e-3, 4e-5, 0),
    "agent_deit_small": (20, 1e-6, 1e-3, 1e-5, 0),
    "agent_pvt_tiny": (5, 2e-6, 1e-3, 2e-5, 0),
    "agent_cswin_tiny": (20, 2e-6, 1e-3, 2e-5, 0),
}


@pytest.mark.parametrize("recipe", ORIGINAL)
def test_learning_rate_equals_timm_scheduler(recipe):
    """Each epoch's learning rate equals that of timm's scheduler, stepped as in the original code."""
    warmup, start, peak, end, late = ORIGINAL[recipe]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = CosineLRScheduler(
        optimizer, t_initial=300, lr_min=end, warmup_t=warmup, warmup_lr_init=start, cycle_limit=1
    )
    rates = json.loads((GOLDEN / "recipes" / f"{recipe}.json").read_text())["lr_of_epoch"]
    for epoch, rate in enumerate(rates):
        schedule.step(max(epoch - late, 0))
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), epoch
    if late:
        assert rates[:4] == pytest.approx([1e-6, 1e-6, 2.008e-4, 4.006e-4], rel=1e-6)


def test_learning_rate_peak_below_min_lr():
    """With a small batch size, the scaled peak is below `min_lr`, and no learning rate exceeds the peak."""
    optim = composed("agent_deit_tiny", "vca").optim
    rates = [learning_rate(optim, step, 300, 10, optim.peak_lr(16)) for step in range(300)]
    assert max(rates) == rates[-1] == optim.peak_lr(16) == 5e-4 * 16 / 512


def test_parameter_groups_no_decay_equals_original_code():
    """The no-decay lists of the original code; all other matrices are decayed."""
    listed = {
        "deit_original": {"cls_token", "pos_embed"},
        "pvt": {"cls_token"},
        "swin": {"stages.*.blocks.*.attn.relative_position_bias_table"},
        "cswin": set(),
    }
    for recipe, names in listed.items():
        config = composed(recipe, "softmax")
        with torch.device("meta"):
            network = build_model(config.model, config.attention)
        matrices = {re.sub(r"\.\d+\.", ".*.", name) for name, p in network.named_parameters() if p.ndim > 1}
        groups = json.loads((GOLDEN / "recipes" / f"{recipe}.json").read_text())["parameter_groups"]["softmax"]
        assert set(groups["0.0"]) & matrices == names
        assert set(groups["0.05"]) == matrices - names


@pytest.mark.process
@pytest.mark.parametrize("row", TABLE1)
def test_table1_experiment_matches_paper_row(row):
    """Each experiment file states its row, the paper's accuracy and the cost, and composes to that row."""
    first, second = (ROOT / "configs" / "experiment" / "table1" / f"{row}.yaml").read_text().splitlines()[1:3]
    said = re.fullmatch(
        r"# Table 1, (.*), (VCA|softmax .*)\. Expected top-1: ([\d.]+) %\. About (\d+) GPU-hours\.", first
    )
    model, attention = row.rsplit("_", 1)
    assert said[1].lower().replace("-", "_") == model
    assert float(said[3]) == paper.PAPER[model, attention].value
    assert "estimate" in second
    config = compose("train_cls", [f"experiment=table1/{row}", "data.root=imagenet"])
    assert (config.model.name, config.attention.name, config.data.num_classes) == (model, attention, 1000)
    assert config.name == f"table1-{model}-{attention}-seed0"
    flops = 6 * complexity_of(model, attention).macs * IMAGENET * config.trainer.epochs
    assert int(said[4]) == pytest.approx(flops / 40e12 / 3600, abs=0.6)


def test_table1_has_every_paper_row():
    assert {f"{model}_{attention}" for (model, attention), row in paper.PAPER.items() if row.params} == set(TABLE1)


# Table 2 of the paper: FID-50K without guidance after 400,000 steps. The values of the other rows are unknown.
FID = {
    "dit_s_2": (67.2, 62.3),
    "dit_s_4": (97.9, 92.7),
    "dit_b_2": (42.9, 38.9),
    "sit_s_2": (57.3, 53.0),
    "sit_b_2": (35.3, 32.7),
}
TABLE2 = sorted(path.stem for path in (ROOT / "configs" / "experiment" / "table2").glob("*.yaml"))


@pytest.mark.process
@pytest.mark.parametrize("row", TABLE2)
def test_table2_experiment_matches_paper_row(row):
    """As for Table 1; also with images instead of cached latents."""
    first, second = (ROOT / "configs" / "experiment" / "table2" / f"{row}.yaml").read_text().splitlines()[1:3]
    expected = r"(?:Expected FID-50K: ([\d.]+)|The paper's FID is unknown)"
    said = re.fullmatch(rf"# Table 2, (.*), (VCA|softmax .*)\. {expected}\. About (\d+) GPU-hours\.", first)
    size, attention = row.rsplit("_", 1)
    family, width, patch, *large = size.split("_")
    assert said[1].lower() == f"{family}-{width}/{patch}" + " at 512 px" * bool(large)
    assert (float(said[3]) if said[3] else None) == FID.get(size, (None, None))[attention == "vca"]
    assert "estimate" in second
    config = compose("train_gen", [f"experiment=table2/{row}", "data.root=latents"])
    assert (config.model.name, config.attention.name) == (f"dit_{width}_{patch}", attention)
    assert config.objective.name == {"dit": "diffusion", "sit": "interpolant"}[family]
    assert config.name == f"table2-{row}-seed0"
    assert (config.trainer.steps, config.trainer.global_batch_size, config.data.num_classes) == (400_000, 256, 1000)
    side = 64 if large else 32
    assert (config.model.size, config.model.in_channels) == ((side, side), 4)
    assert config.model.contrast_grid == ([8, 8] if large else None)
    if not large:
        flops = 6 * complexity_of(config.model.name, attention).macs * 400_000 * 256
        assert int(said[4]) == pytest.approx(flops / 40e12 / 3600, abs=0.6)
    online = compose("train_gen", [f"experiment=table2/{row}", "data=imagefolder", f"data.img_size={8 * side}"])
    assert online.model == config.model
    assert online.augment == config.augment


def test_table2_has_expected_rows():
    rows = {*FID, "dit_s_8", "dit_b_4", "dit_b_8", "dit_s_2_512"}
    assert set(TABLE2) == {f"{row}_{attention}" for row in rows for attention in ("softmax", "vca")}


def reproduce(table: int, *arguments: str, **env: str):
    script = ROOT / "scripts" / f"reproduce_table{table}.sh"
    return run_command(str(script), *arguments, GPUS="1", PYTHON=sys.executable, **env)


@pytest.mark.process
def test_reproduce_table_scripts_commands_and_errors(tmp_path):
    vaes = tmp_path
    for name in ("sd-vae-ft-ema", "sd-vae-ft-mse"):
        (vaes / name).mkdir()
        (vaes / name / "config.json").write_text("{}")
    printed = reproduce(1, "--print", "data.root=x", ROWS="deit_*")
    assert printed.returncode == 0
    assert len(re.findall(r"train_cls.py experiment=table1/deit_\w+ data.root=x\n", printed.stdout)) == 4
    assert "estimates: 6 x multiply-adds" in printed.stdout
    unspecified = run_command(str(ROOT / "scripts" / "reproduce_table1.sh"), "--print", PYTHON=sys.executable).stdout
    assert "torchrun --standalone --nproc_per_node=8" in unspecified
    assert unspecified.count(" data.root=DATA\n") == 10
    printed = reproduce(2, "--print", ROWS="sit_s_2_vca dit_s_8_vca", SEED="3", VAES=str(vaes))
    own = f"data.root=DATA seed=3 out_dir=outputs autoencoder.source={vaes}/sd-vae-ft-ema"
    assert f"train_gen.py experiment=table2/sit_s_2_vca {own}\n" in printed.stdout
    folder = "outputs/table2-sit_s_2_vca-seed3"
    assert (
        f"sample.py run={folder} out={folder}/sit_sde250 protocol=sit_sde250 npz=true decoder={vaes}/sd-vae-ft-ema\n"
        in printed.stdout
    )
    assert f"dit_table protocol=dit_table npz=true decoder={vaes}/sd-vae-ft-mse" in printed.stdout
    assert "512" not in reproduce(2, "--print").stdout
    assert reproduce(2, "seed=3").returncode == 2
    assert "no config.json" in reproduce(2, "--print", VAES="nowhere").stderr
    failed = reproduce(2, "data.root=nowhere", ROWS="dit_s_8_vca")
    assert failed.returncode == 1
    assert "data.root must be a latent cache (a folder with manifest.json), got 'nowhere'" in failed.stderr
    assert "sample.py" not in failed.stdout
    assert reproduce(2).returncode == 2
    assert "prepare_latents.py" in reproduce(2).stderr
    assert "no row matches 'dit_z'" in reproduce(1, "--print", ROWS="dit_z").stderr


def write() -> None:
    """Write the golden files from the current recipes."""
    folder = GOLDEN / "recipes"
    folder.mkdir(exist_ok=True)
    for recipe in RECIPES:
        text = json.dumps(described(recipe), indent=1)
        rates = re.search(r'"lr_of_epoch": \[.*?\]', text, re.DOTALL)[0]
        (folder / f"{recipe}.json").write_text(text.replace(rates, re.sub(r"\s+", " ", rates)) + "\n")


def main(out: Path) -> None:
    """Body of a rank of `test_parameter_groups_under_ddp_match_golden`."""
    from vca.runtime import distributed

    with distributed.start("cpu") as world:
        torch.save({recipe: groups_of(composed(recipe, "vca"), world) for recipe in RECIPES}, out / f"{world.rank}.pt")


if __name__ == "__main__":
    train_cls.register_configs()
    train_gen.register_configs()
    main(Path(sys.argv[1])) if len(sys.argv) > 1 else write()
