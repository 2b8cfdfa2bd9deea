"""The plan of a run: memory beside a measured run, time, and the lines of scripts/plan.py."""

import re
import sys

import pytest
import torch

import train_cls
import train_gen
from benchmarks.timing import peak_bytes, saved_bytes
from models import build_model
from scripts import plan as script
from vca.attention.kernels import INSTALLED
from vca.config import compose
from vca.evaluation.complexity import example_inputs
from vca.evaluation.memory import MemoryPlan
from vca.report.plan import seconds_of_step
from vca.runtime.devices import GPUS

RUN = ("data=digits", "trainer.steps=2", "trainer.workers=0", "trainer.device=cpu", "trainer.ema_decay=0.99")
MODELS = {
    "train_cls": ["model=deit_tiny", "data.img_size=224", "model.depth=3", "trainer.precision=bf16"],
    "train_gen": ["model=dit_s_2", "data.img_size=32", "model.depth=3"],
}
COMMAND = ("experiment=table1/deit_small_vca", "--gpu", "h100", "--gpus", "8")


@pytest.fixture(autouse=True)
def schemas():
    train_cls.register_configs()
    train_gen.register_configs()


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("train_cls", ["trainer.global_batch_size=16", "augment.mixup=0.8"]),
        ("train_cls", ["trainer.global_batch_size=16", "trainer.grad_checkpointing=true", "attention=softmax"]),
        ("train_cls", ["trainer.global_batch_size=16", "trainer.micro_batch_size=8", "attention=softmax"]),
        ("train_gen", ["trainer.global_batch_size=8"]),
    ],
)
def test_memory_plan_within_ten_percent_of_a_run(tmp_path, monkeypatch, name, options):
    """The most that torch's allocator has during a whole run of two steps on a CPU, beside the plan."""
    monkeypatch.setattr(train_cls, "evaluate_weights", lambda *_: {"val/top1": 0.0, "val/images": 1})
    monkeypatch.setattr(train_gen, "save_samples", lambda *_: {})
    config = compose(name, [*RUN, *MODELS[name], f"out_dir={tmp_path}", "name=run", *options])
    planned = MemoryPlan(config, build_model, device="cpu").step(config.trainer.micro_batch_on(1)[0])
    run = {"train_cls": train_cls, "train_gen": train_gen}[name].run
    measured = peak_bytes(lambda: run(config), torch.device("cpu"))
    assert planned.peak == pytest.approx(measured, rel=0.1)
    if "trainer.grad_checkpointing=true" not in options:
        assert planned.activations > measured / 3


def test_memory_plan_counts_what_autograd_saves():
    """The saved activations of a batch that was not counted, beside those of a real forward pass."""
    small = ["model.depth=2", "augment.mixup=0", "augment.cutmix=0"]
    config = compose("train_cls", [*RUN, "model=deit_tiny", "data.img_size=64", *small])
    model = build_model(config.model, config.attention).train()
    saved = saved_bytes(lambda: model(*example_inputs(config.model, 6)), model)
    images = 4 * 6 * config.data.image_bytes  # saved by the patch embedding, but part of the input
    assert MemoryPlan(config, build_model, device="cpu").step(6).activations == pytest.approx(saved - images, rel=0.01)


def test_memory_plan_largest_micro_batch_is_the_last_that_fits():
    config = compose("train_cls", [*RUN, "model=deit_tiny", "data.img_size=64", "model.depth=2"])
    memory = MemoryPlan(config, build_model, device="cpu")
    largest = memory.largest(2**30)
    assert memory.step(largest).peak <= 2**30 < memory.step(largest + 1).peak
    assert memory.largest(memory.weights) == 0


@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
def test_memory_plan_uses_the_kernels_of_a_gpu():
    """On a GPU, VCA saves less than in plain PyTorch, and softmax attention no scores."""
    size = ["model=deit_tiny", "data.img_size=224", "model.depth=2", "trainer.precision=bf16"]
    saved = {
        (attention, device): MemoryPlan(
            compose("train_cls", [*RUN, *size, f"attention={attention}"]), build_model, device=device
        )
        .step(32)
        .activations
        for attention in ("vca", "softmax")
        for device in ("cpu", "cuda")
    }
    assert saved["vca", "cuda"] < 0.95 * saved["vca", "cpu"]
    assert saved["softmax", "cuda"] == pytest.approx(saved["softmax", "cpu"], rel=0.05)


def test_plan_seconds_of_a_step():
    """Four GPUs at half of 312 TFLOP/s; the all-reduce overlaps with two thirds of the computing."""
    config = compose("train_cls", ["experiment=table1/deit_small_vca"])
    compute, reduce, total = seconds_of_step(config, 10**9, 25 * 10**6, GPUS["a100"], 4, 0.5, 100)
    assert compute == pytest.approx(6e9 * 1024 / 4 / 156e12)
    assert reduce == pytest.approx(1.5 * 1e8 / 1e11)
    assert total == compute
    slow = seconds_of_step(config, 10**9, 25 * 10**6, GPUS["a100"], 4, 0.5, 1)
    assert slow[2] == pytest.approx(compute + slow[1] - compute * 2 / 3)
    config.trainer.grad_checkpointing = True
    assert seconds_of_step(config, 10**9, 1, GPUS["a100"], 4, 0.5, 100)[0] == pytest.approx(compute * 8 / 6)


@pytest.mark.process
@pytest.mark.parametrize(
    ("command", "figures"),
    [
        (
            COMMAND,
            {
                "parameters": "22.556 M",
                "MACs per image": "4.561 G",
                "micro-batch per GPU": "128 x 1",
                "memory: weights": "0.08 GiB",
                "images of the run": "384.3 M",
                "GPU-hours": "8.44",
            },
        ),
        (
            (
                *("experiment=table2/dit_s_2_vca", "trainer.precision=tf32", "--gpu", "a100", "--mfu", "0.5"),
                *("trainer.snapshot_every=50000", "trainer.ema_decay=[0.9999,0.999]"),
            ),
            {
                "MACs per image": "5.991 G",
                "disk: latent cache": "84.0 GB",
                "disk: snapshots": "2.15 GB",
                "images of the run": "102.4 M",
            },
        ),
        (
            ("model=pvt_tiny", "attention=softmax", "data=imagenet", "recipe=pvt", "--images", "1024000"),
            {"images of the run": "307.2 M", "micro-batch per GPU": "1024 x 1"},
        ),
    ],
)
def test_plan_script_prints_each_figure_with_its_source(command, figures, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan.py", *command])
    script.main()
    lines = capsys.readouterr().out.splitlines()[1:]
    printed = {match[1]: (match[2], match[3]) for line in lines if (match := re.match(r"  (.*?)  +(.*?)   (.*)", line))}
    assert len(printed) == len(lines) >= 18
    assert {key: printed[key][0] for key in figures} == figures
    for what, (_, source) in printed.items():
        assert re.match("config|counted|measured|assumed", source), what


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--gpu", "h1000"], "--gpu must be one of v100-16, "),
        (["--gpus", "0"], "--gpus must be >= 1, got 0"),
        (["--mfu", "35"], "--mfu must be in (0, 1], got 35.0"),
        (["--images", "0"], "--images must be > 0, got 0"),
        (["trainer.micro_batch_size=100", "--gpus", "8"], "trainer.global_batch_size must be a multiple of 8 ranks x "),
        (["trainer.micro_batch_size=0"], "trainer.micro_batch_size must be >= 1 or null, got 0"),
        (["--gpu", "v100"], "trainer.precision must be one that --gpu supports, got 'bf16'"),
        (["trainer.micro_batchsize=8"], "unknown key 'trainer.micro_batchsize'"),
        (["experiment=table1/deit_smal_vca"], "experiment"),
        (["data=imagefolder", "data.num_classes=10"], "--images must be set for data.name=imagefolder, got None"),
    ],
    ids=str,
)
def test_plan_script_wrong_input_one_line(command, message, monkeypatch, capsys):
    base = ["experiment=table1/deit_small_vca"] if not command[0].startswith("experiment") else []
    small = ["model.depth=1"] if base else []
    monkeypatch.setattr(sys, "argv", ["plan.py", *base, *small, *command])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("config error: ")
    assert error.count("\n") == 1
    assert message in error
