"""Schedule, parameter groups, EMA, training step: against closed forms, raw, under DDP and compiled."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models import build_model
from vca.config import compose
from vca.runtime.compute import Precision
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError
from vca.training.config import CompileMode, TrainerConfig
from vca.training.ema import Ema
from vca.training.optim import OptimConfig, learning_rate, parameter_groups
from vca.training.step import TrainState, length_warnings

WORLD = World(0, 0, 1, torch.device("cpu"))


def digits_model(*overrides):
    config = compose("train_cls", ["model.depth=2", "model.embed_dim=32", "model.num_heads=2", *overrides])
    torch.manual_seed(0)
    return build_model(config.model, config.attention)


def test_learning_rate_warmup_and_cosine():
    config = OptimConfig(lr=1.0, warmup_epochs=2, warmup_lr=0.1, min_lr=0.2)
    rates = [learning_rate(config, step, 100, 10, 1.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(0.55)
    assert rates[20] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * 0.2)))
    assert rates[50] == pytest.approx(0.6)
    assert rates[100] == pytest.approx(0.2)
    assert max(rates) <= 1.0


@pytest.mark.parametrize(("batch", "lr"), [(512, 5e-4), (1024, 1e-3), (4096, 4e-3)])
def test_learning_rate_scales_with_the_global_batch(batch, lr):
    assert OptimConfig().peak_lr(batch) == pytest.approx(lr)
    assert OptimConfig(lr=0.3).peak_lr(batch) == 0.3


def names_in(groups, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return [sorted(names[id(p)] for p in group["params"]) for group in groups]


def test_parameter_groups_split_by_weight_decay():
    model = digits_model()
    decayed, not_decayed = names_in(parameter_groups(model, 0.05), model)
    assert "blocks.0.attn.e_pos" in decayed
    assert "blocks.0.attn.local.weight" in decayed
    assert {"pos_embed", "cls_token", "blocks.1.attn.lambda1.q1", "blocks.0.attn.norm1_weight"} <= set(not_decayed)
    assert not [name for name in decayed if name.endswith("bias") or ".norm" in name or "lambda" in name]
    assert len(decayed) + len(not_decayed) == len(list(model.parameters()))


def test_train_state_step_takes_its_own_learning_rate():
    """The first of four warm-up steps runs at `warmup_lr`, also after a resume."""
    optim = OptimConfig(lr=5.0, warmup_epochs=1, warmup_lr=1.0, min_lr=0.0)
    state = TrainState(nn.Linear(2, 1), TrainerConfig(steps=8, global_batch_size=2), optim, WORLD, steps_per_epoch=4)
    seen = []
    for _ in range(4):
        result = state.train_step([torch.ones(2, 2)], lambda model, x, step: model(x).square().mean(), seed=0)
        seen.append((result.lr, *(group["lr"] for group in state.optimizer.param_groups)))
    assert seen == [(rate,) * len(seen[0]) for rate in (1.0, 2.0, 3.0, 4.0)]
    again = TrainState(nn.Linear(2, 1), TrainerConfig(steps=8, global_batch_size=2), optim, WORLD, steps_per_epoch=4)
    again.load_state_dict({**state.state_dict(), "step": 2})
    assert again.train_step([torch.ones(2, 2)], lambda model, x, step: model(x).square().mean(), seed=0).lr == 3.0


@pytest.mark.parametrize("wrap", ["ddp", "compile"])
def test_train_state_ddp_or_compile_keeps_groups_and_ema(wrap, process_group, monkeypatch):
    """Groups, EMA and checkpoints come from the bare model, whatever runs the forward pass."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # generates no code
    raw = digits_model("model.depth=1")
    mode = CompileMode["default" if wrap == "compile" else "off"]
    trainer = TrainerConfig(steps=4, global_batch_size=8, ema_decay=0.5, compile=mode)
    state = TrainState(copy.deepcopy(raw), trainer, OptimConfig(), WORLD, 1)
    if wrap == "ddp":
        state.forward_model = DistributedDataParallel(state.model)
    assert state.forward_model is not state.model
    wrapped = [
        {"params": group["params"], "weight_decay": group["weight_decay"]} for group in state.optimizer.param_groups
    ]
    assert names_in(wrapped, state.model) == names_in(parameter_groups(raw, 0.05), raw)
    assert [group["weight_decay"] for group in wrapped] == [0.05, 0.0]

    start = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    history = []
    for _ in range(3):
        result = state.train_step([torch.randn(8, 1, 8, 8)], lambda model, x, step: model(x).square().mean(), seed=0)
        assert result.applied
        history.append({name: p.detach().clone() for name, p in state.model.named_parameters()})
    average = dict(state.ema.module.named_parameters())
    assert average.keys() == start.keys() == set(state.state_dict()["model"]) == set(state.state_dict()["ema"])
    for name, first in start.items():
        expected = 0.125 * first + 0.125 * history[0][name] + 0.25 * history[1][name] + 0.5 * history[2][name]
        torch.testing.assert_close(average[name], expected)
    assert not torch.equal(history[2]["head.weight"], start["head.weight"])


def test_ema_closed_form_and_buffers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = Ema(model, 0.9)
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        for step in range(5):
            model[0].weight += 1
            model[1].running_mean.fill_(step)
            ema.update(model, torch.tensor(True))
    shift = sum(0.1 * 0.9 ** (4 - step) * (step + 1) for step in range(5))
    torch.testing.assert_close(ema.module[0].weight, start + shift)
    assert torch.equal(ema.module[1].running_mean, model[1].running_mean)
    assert not any(p.requires_grad for p in ema.module.parameters())


@pytest.mark.parametrize("accumulation", [2, 4])
def test_train_state_accumulation_equals_larger_batch(accumulation):
    """Gradients and learning rate do not depend on how the global batch is cut."""
    images = torch.randn(16, 1, 8, 8)
    results = []
    for parts in (1, accumulation):
        trainer = TrainerConfig(steps=10, global_batch_size=16, micro_batch_size=16 // parts)
        state = TrainState(digits_model(), trainer, OptimConfig(clip_grad=1e9), WORLD, 5)
        assert state.accumulation == parts
        gradients = []
        state.optimizer.step = lambda *_, gradients=gradients, model=state.model: gradients.extend(
            p.grad.clone() for p in model.parameters()
        )
        result = state.train_step(list(images.chunk(parts)), lambda model, x, step: model(x).square().mean(), seed=0)
        results.append((result, gradients))
    (one, grads), (other, other_grads) = results
    assert one.lr == other.lr
    assert float(one.loss) == pytest.approx(float(other.loss), rel=1e-6)
    for a, b in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_train_state_accumulation_under_cuda_graphs_mode_equals_eager(monkeypatch):
    """Gradients are added to kept tensors there; this compiler generates no code and no graphs."""
    monkeypatch.setattr(torch, "compile", lambda model, *, dynamic, mode: model)
    weights = []
    for mode in ("off", "reduce-overhead"):
        trainer = TrainerConfig(steps=3, global_batch_size=8, micro_batch_size=4, compile=CompileMode[mode])
        state = TrainState(digits_model(), trainer, OptimConfig(lr=1e-2, warmup_epochs=0), WORLD, 1)
        for step in range(3):
            torch.manual_seed(step)
            batches = list(torch.randn(8, 1, 8, 8).chunk(2))
            state.train_step(batches, lambda model, x, step: model(x).square().mean(), seed=0)
        weights.append(list(state.model.state_dict().values()))
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    assert all(parameter.grad is not None for parameter in state.model.parameters())


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "says"),
    [(100, None, 3, "3 ranks, got 100; try 99 or 102"), (64, 24, 2, "48 or 96"), (2, None, 4, "got 2; try 4")],
)
def test_micro_batch_indivisible_suggests_valid_sizes(batch, micro, ranks, says):
    with pytest.raises(ConfigError, match=says):
        TrainerConfig(global_batch_size=batch, micro_batch_size=micro).micro_batch_on(ranks)


def test_train_state_clips_gradient_norm():
    state = TrainState(
        digits_model(), TrainerConfig(steps=2, global_batch_size=4), OptimConfig(clip_grad=1e-3), WORLD, 1
    )
    seen = []
    step = state.optimizer.step

    def spy(*args, **kwargs):
        seen.append(nn.utils.get_total_norm([p.grad for p in state.model.parameters()]).item())
        return step(*args, **kwargs)

    state.optimizer.step = spy
    result = state.train_step([torch.randn(4, 1, 8, 8)], lambda model, x, s: model(x).square().mean(), seed=0)
    assert result.grad_norm > 0.01
    assert seen[0] == pytest.approx(1e-3, rel=1e-3)


def test_train_state_nonfinite_gradient_skips_step():
    state = TrainState(
        digits_model(), TrainerConfig(steps=2, global_batch_size=4, ema_decay=0.9), OptimConfig(), WORLD, 1
    )
    before = copy.deepcopy(state.state_dict())
    result = state.train_step([torch.randn(4, 1, 8, 8)], lambda model, x, s: model(x).mean() * float("nan"), seed=0)
    assert result.failed
    assert not result.applied
    after = state.state_dict()
    for part in ("model", "ema"):
        assert all(torch.equal(before[part][name], after[part][name]) for name in before[part])

    def finite(model, x, step):
        return model(x).square().mean()

    assert not state.train_step([torch.randn(4, 1, 8, 8)], finite, seed=0).applied  # nor any later step
    for part in ("model", "ema"):
        assert all(torch.equal(before[part][name], state.state_dict()[part][name]) for name in before[part])
    state.load_state_dict(before)
    assert state.train_step([torch.randn(4, 1, 8, 8)], finite, seed=0).applied


@pytest.mark.parametrize(("steps", "warnings"), [(19, 2), (20, 2), (21, 1), (100, 0)])
def test_length_warnings_of_short_run(steps, warnings):
    """A warm-up of 20 steps and an EMA over 100 steps."""
    trainer = TrainerConfig(steps=steps, global_batch_size=4, ema_decay=0.99)
    state = TrainState(nn.Linear(2, 1), trainer, OptimConfig(warmup_epochs=2), WORLD, steps_per_epoch=10)
    messages = list(length_warnings(state))
    assert len(messages) == warnings
    if warnings:
        assert messages[-1].startswith("trainer.ema_decay=0.99 averages over about 100 steps, but the run has")
    if warnings == 2:
        expected = f"optim.warmup_epochs=2 is 20 steps, but the run has {steps}: the learning rate never"
        assert messages[0].startswith(expected)


@pytest.mark.parametrize("precision", list(Precision))
def test_train_state_every_precision_trains(precision):
    """Parameters and EMA stay float32; the loss goes down in each."""
    trainer = TrainerConfig(steps=30, global_batch_size=32, precision=precision, ema_decay=0.5)
    state = TrainState(digits_model(), trainer, OptimConfig(lr=1e-3, warmup_epochs=0), WORLD, 1)
    torch.manual_seed(1)
    images, labels = torch.randn(32, 1, 8, 8), torch.arange(32) % 10

    def loss_of(model, batch, step):
        return nn.functional.cross_entropy(model(batch), labels)

    losses = [float(state.train_step([images], loss_of, seed=0).loss) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.2
    assert {p.dtype for p in [*state.model.parameters(), *state.ema.module.parameters()]} == {torch.float32}


def test_train_state_fp16_overflow_lowers_scale():
    state = TrainState(
        digits_model(), TrainerConfig(steps=9, global_batch_size=4, precision=Precision.fp16), OptimConfig(), WORLD, 1
    )
    images = torch.randn(4, 1, 8, 8)
    state.train_step([images], lambda model, x, s: model(x).float().square().mean(), seed=0)
    scale = state.scaler.get_scale()
    overflowed = state.train_step([images], lambda model, x, s: model(x).float().mean() * 1e38, seed=0)
    assert not overflowed.applied
    assert not overflowed.failed
    assert state.scaler.get_scale() < scale
    assert state.train_step([images], lambda model, x, s: model(x).float().square().mean(), seed=0).applied


def test_train_state_dropout_depends_on_step_only():
    model = digits_model("model.drop_rate=0.3", "model.drop_path_rate=0.3")
    state = TrainState(model, TrainerConfig(steps=9, global_batch_size=4), OptimConfig(), WORLD, 1)
    images = torch.randn(4, 1, 8, 8)
    losses = []

    def loss_of(model, x, step):
        loss = model(x).square().mean()
        losses.append(loss.item())
        return loss

    saved = copy.deepcopy(state.state_dict())
    for _ in range(2):
        torch.rand(17)  # whatever else draws random numbers
        state.load_state_dict(copy.deepcopy(saved))
        state.train_step([images], loss_of, seed=0)
        state.train_step([images], loss_of, seed=0)
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]
