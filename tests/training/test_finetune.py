"""Fine-tuning: learning rate of each layer, frozen layers.

`python -m tests.training.test_finetune` rewrites `tests/golden/finetune_384_lr.json`.
"""

import json
import re

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

import train_cls
from models import build_model
from tests.config.test_recipes import IMAGENET, composed
from tests.support import GOLDEN, assert_same, metrics
from vca.config import compose
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError
from vca.training.checkpoint import load_latest
from vca.training.config import TrainerConfig
from vca.training.freeze import format_frozen, freeze_layers
from vca.training.optim import OptimConfig, parameter_groups
from vca.training.pretrained import init_from
from vca.training.step import TrainState

WORLD = World(0, 0, 1, torch.device("cpu"))
SMALL = ["model.depth=3", "model.embed_dim=32", "model.num_heads=2", "trainer.device=cpu", "trainer.workers=0"]
SHORT = [*SMALL, "trainer.steps=4", "trainer.global_batch_size=16", "trainer.ema_decay=0.5", "trainer.log_every=1"]
SHORT += ["trainer.checkpoint_every=2"]
EPOCHS = (0, 1, 2, 5, 6, 15, 29)


def network(*overrides):
    config = compose("train_cls", [*SMALL, *overrides])
    torch.manual_seed(0)
    return build_model(config.model, config.attention)


def by_name(groups, model):
    """`{name: (lr_scale, weight_decay)}` of the parameters in some groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("decay", [0.65, 1.0])
def test_layer_decay_groups_equal_timm_own_model(decay):
    """Learning rate scale and weight decay of each parameter of `attention=softmax` are those of timm's DeiT."""
    config = compose("train_cls", ["model=deit_tiny", "attention=softmax", "data=imagefolder"])
    with torch.device("meta"):
        ours, theirs = build_model(config.model, config.attention), timm.create_model("deit_tiny_patch16_224")
    expected = param_groups_layer_decay(theirs, 0.05, theirs.no_weight_decay(), layer_decay=decay)
    found = by_name(parameter_groups(ours, 0.05, decay), ours)
    assert found == by_name(expected, theirs)
    for layer, name in enumerate(["pos_embed", "blocks.0.attn.qkv.bias", *["blocks.1.norm1.weight"], "head.bias"]):
        assert found[name] == (decay ** (13 - layer if layer < 3 else 0), 0.0)


def test_layer_decay_vca_parts_have_learning_rate_of_their_block():
    model = network()
    found = by_name(parameter_groups(model, 0.05, 0.5), model)
    assert found["blocks.0.attn.e_pos"] == (0.5**3, 0.05)
    assert found["blocks.2.attn.lambda1.q1"] == (0.5, 0.0)
    assert found["head.weight"] == (1.0, 0.05)


def square(model, images, step):
    return model(images).square().mean()


def test_layer_decay_scales_every_step():
    """Through the warm-up and after a resume; AdamW's first step moves a weight by its learning rate."""
    trainer = TrainerConfig(steps=8, global_batch_size=4)
    optim = OptimConfig(lr=1e-2, warmup_epochs=1, warmup_lr=1e-3, min_lr=0.0, weight_decay=0.0, layer_decay=0.5)
    model = network()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = TrainState(model, trainer, optim, WORLD, steps_per_epoch=4)
    for step in range(3):
        result = state.train_step([torch.randn(4, 1, 8, 8)], square, seed=0)
        if step == 0:
            moved = {name: (p.detach() - start[name]).abs().max().item() for name, p in model.named_parameters()}
    assert result.lr == pytest.approx(1e-3 + 9e-3 * 2 / 4)
    assert {group["lr"] / group["lr_scale"] for group in state.optimizer.param_groups} == {result.lr}
    assert moved["head.weight"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["blocks.2.mlp.fc1.weight"] == pytest.approx(1e-3 / 2, rel=1e-2)
    assert moved["blocks.0.mlp.fc1.weight"] == pytest.approx(1e-3 / 8, rel=1e-2)
    again = TrainState(network(), trainer, optim, WORLD, steps_per_epoch=4)
    again.load_state_dict(state.state_dict())
    again.set_learning_rates()
    rates = [group["lr"] for group in again.optimizer.param_groups]
    state.set_learning_rates()
    assert rates == [group["lr"] for group in state.optimizer.param_groups]


def test_layer_decay_model_without_layers_refused():
    with pytest.raises(ConfigError, match=r"optim.layer_decay must be null for Linear, which has no layers, got 0.5"):
        parameter_groups(nn.Linear(2, 2), 0.05, 0.5)


def learning_rates(*overrides: str) -> dict[str, dict[str, float]]:
    """Learning rate of each layer at the start of some epochs of `recipe=finetune_384`: `{epoch: {layer: lr}}`."""
    config = composed("finetune_384", "vca", *overrides)
    world = World(0, 0, 1, torch.device("meta"))
    with world.device:
        model = build_model(config.model, config.attention)
    per_epoch = IMAGENET // config.trainer.global_batch_size
    state = TrainState(model, config.trainer, config.optim, world, per_epoch)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    table: dict[str, dict[str, float]] = {}
    for epoch in EPOCHS:
        state.step = epoch * per_epoch
        state.set_learning_rates()
        rates = table[f"epoch {epoch}"] = {}
        for group in state.optimizer.param_groups:
            for parameter in group["params"]:
                layer = re.match(r"blocks\.\d+|\w+", names[id(parameter)])[0]
                rate = float(f"{group['lr']:.9g}")
                assert rates.setdefault(layer, rate) == rate, layer
    return {epoch: dict(sorted(rates.items(), key=layer_order)) for epoch, rates in table.items()}


def layer_order(item: tuple[str, float]) -> tuple[bool, list[int], str]:
    """Stem, blocks in order, norm, head."""
    number = [int(digits) for digits in re.findall(r"\d+", item[0])]
    return item[0] in ("norm", "head"), number, {"norm": "0", "head": "1"}.get(item[0], item[0])


def golden() -> dict:
    return {
        "recipe=finetune_384": learning_rates(),
        "recipe=finetune_384 optim.layer_decay=0.75": learning_rates("optim.layer_decay=0.75"),
    }


def test_finetune_384_learning_rate_of_each_layer_is_frozen():
    saved = json.loads((GOLDEN / "finetune_384_lr.json").read_text())
    assert golden() == saved
    plain, decayed = saved.values()
    assert {*plain["epoch 0"].values()} == {1e-6}  # as in DeiT's main.py, also in epoch 1
    assert {*plain["epoch 29"].values()} == {5e-6}
    assert decayed["epoch 29"]["head"] == 5e-6
    assert decayed["epoch 29"]["norm"] == decayed["epoch 29"]["blocks.11"] == 3.75e-6
    assert decayed["epoch 29"]["pos_embed"] == pytest.approx(5e-6 * 0.75**13, rel=1e-8)


@pytest.mark.parametrize(
    ("count", "first"), [(1, "blocks.0."), (2, "blocks.1."), (-1, "head."), (4, "head."), (-2, "blocks.2.")]
)
def test_freeze_layers_slice_of_layers(count, first):
    """The first layer that is trained; the final norm is in the last block."""
    model = network()
    frozen = freeze_layers(model, count)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained[0].startswith(first)
    assert frozen == {name for name, _ in model.named_parameters()} - set(trained)
    assert ("norm.weight" in frozen) == (first == "head.")
    assert by_name(parameter_groups(model, 0.05, 0.75), model).keys() == set(trained)
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.05)) == len(trained)


@pytest.mark.parametrize("family", ["pvt_tiny", "swin_tiny", "cswin_tiny"])
def test_freeze_layers_every_family(family):
    config = compose("train_cls", [f"model={family}", "data=imagefolder"])
    with torch.device("meta"):
        model = build_model(config.model, config.attention)
    freeze_layers(model, -1)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


@pytest.mark.parametrize("count", [5, -5])
def test_freeze_layers_all_or_none_refused(count):
    message = rf"trainer.freeze_layers must be from -4 to 4 for DeiT with 5 layers \(stem to head\), got {count}"
    with pytest.raises(ConfigError, match=message):
        freeze_layers(network(), count)


@pytest.mark.parametrize("attention", ["vca", "softmax"])
def test_freeze_layers_gradient_checkpointing_and_ddp_change_nothing(attention, process_group):
    """DDP needs no `find_unused_parameters`; the gradients of the trained layers are those without freezing."""
    images = torch.randn(8, 1, 8, 8)
    whole = network(f"attention={attention}")
    square(whole, images, 0).backward()
    for checkpointing in (False, True):
        model = network(f"attention={attention}")
        frozen = freeze_layers(model, 3)
        model.set_grad_checkpointing(checkpointing)
        square(nn.parallel.DistributedDataParallel(model), images, 0).backward()
        for (name, one), other in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert (one.grad is None) == (name in frozen), name
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-8)


def run(folder, name, *overrides):
    options = [f"out_dir={folder}", f"name={name}", *SHORT, *overrides]
    return train_cls.run(compose("train_cls", options))


def test_linear_probe_trains_the_head_alone_and_resumes(tmp_path, capsys, monkeypatch):
    """Only the head moves, also in the EMA; a resume is bit-exact."""
    weights = network("attention=softmax").state_dict()
    torch.save(weights, tmp_path / "model.pth")
    probe = ["attention=softmax", f"trainer.init_from={tmp_path}/model.pth", "trainer.freeze_layers=-1"]
    run(tmp_path, "whole", *probe)
    assert "trained: 330 of 39,242 parameters, the others are frozen\n" in capsys.readouterr().out
    whole = load_latest(tmp_path / "whole" / "checkpoints")
    for name, tensor in weights.items():
        for part in ("model", "ema"):
            assert torch.equal(whole[part][name], tensor) == (not name.startswith("head.")), name
    assert len(whole["optimizer"]["state"]) == 2
    assert metrics(tmp_path / "whole")[0]["flops_per_second"] is None

    step = TrainState.train_step

    def interrupted(state, *arguments):
        if state.step == 3:
            raise KeyboardInterrupt
        return step(state, *arguments)

    monkeypatch.setattr(TrainState, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "broken", *probe)
    monkeypatch.setattr(TrainState, "train_step", step)
    capsys.readouterr()
    run(tmp_path, "broken", *probe)
    assert "resumed from step 2, 2 steps left" in capsys.readouterr().out
    assert_same(whole, load_latest(tmp_path / "broken" / "checkpoints"))
    with pytest.raises(ConfigError, match=r"trainer.freeze_layers: -1 -> 2"):
        run(tmp_path, "broken", *probe, "trainer.freeze_layers=2")


def test_frozen_parameters_not_loaded_warning(tmp_path):
    """VCA swapped into frozen layers keeps its initial parts there; those of the last block are trained."""
    torch.save(network("attention=softmax").state_dict(), tmp_path / "model.pth")
    model = network()
    report = init_from(model, tmp_path / "model.pth")
    lines = format_frozen(model, freeze_layers(model, 3), report.missing).splitlines()
    assert len(report.missing) == 3 * 14
    assert re.fullmatch(r"trained: [\d,]+ of [\d,]+ parameters, the others are frozen", lines[0])
    first = "blocks.0.attn.norm1_weight"
    assert lines[1:] == [f"warning: 28 frozen parameters were not loaded and stay random, such as {first}"]


if __name__ == "__main__":
    train_cls.register_configs()
    text = json.dumps(golden(), indent=1)
    (GOLDEN / "finetune_384_lr.json").write_text(text + "\n")
