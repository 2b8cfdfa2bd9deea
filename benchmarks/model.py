"""Throughput of whole models with VCA and softmax: training (forward and backward) and inference."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.timing import Budget, Timing, peak_bytes, take_turns
from models import build_model
from models.timm_registry import load_sizes
from scripts.complexity import config_of
from vca.evaluation.complexity import example_inputs
from vca.runtime.compute import Precision, autocast

# Image sizes in pixels. Swin and CSwin need multiples of 224 for whole windows.
SIZES = {
    "deit": (224, 384, 512, 1024),
    "pvt": (224, 448, 896),
    "swin": (224, 448, 896),
    "cswin": (224, 448, 896),
    "dit": (256, 512, 1024),
}
MODELS = ("deit_tiny", "deit_small", "pvt_tiny", "swin_tiny", "cswin_tiny", "dit_s_2", "dit_b_2")  # default of --models
PIXELS = {"cpu": 4 * 224 * 224, "cuda": 128 * 224 * 224}  # per batch


def benchmark_model(device: torch.device, budget: Budget, largest: int, models: list[str]) -> list[dict]:
    """Measure softmax and VCA for every model and size up to `largest`; prints a Markdown table."""
    print("| model | px | batch | attention | training images/s | ratio | inference images/s | ratio | peak GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    families = {name: model["family"] for name, model in load_sizes().items()}
    pairs = [(model, size) for model in models or MODELS for size in SIZES[families[model]] if size <= largest]
    rows = []
    for index, (model, size) in enumerate(pairs):
        rows += at_size(model, size, device, budget.share(1 / (len(pairs) - index)))
    return rows


def build(model: str, size: int, attention: str, *overrides: str) -> nn.Module:
    """Build a model for an image size; generators use latents of an eighth of it."""
    config = config_of(model, attention, "data=imagefolder", f"data.img_size={size}", *overrides)
    return build_model(config.model, config.attention)


def at_size(
    model: str,
    size: int,
    device: torch.device,
    budget: Budget,
    batch: int | None = None,
    precision: Precision | None = None,
    compiled: bool = False,
) -> list[dict]:
    """Measure softmax and VCA at one size; on a GPU, VCA in plain PyTorch and with the Triton kernels.

    Args:
        batch: images per batch; None is as many as `PIXELS` has.
        precision: None is bf16 on a GPU, fp32 on a CPU.
        compiled: also measure networks of softmax and VCA that `torch.compile` compiled.
    """
    batch = batch or max(1, PIXELS[device.type] // (size * size))
    precision = precision or (Precision.bf16 if device.type == "cuda" else Precision.fp32)
    kinds: dict[str, tuple[str, ...]] = {"softmax": ("softmax",), "VCA eager": ("vca", "attention.backend=eager")}
    if device.type == "cuda":
        kinds["VCA fused"] = ("vca", "attention.backend=triton")
    networks = {name: build(model, size, *kind).to(device) for name, kind in kinds.items()}
    inputs = example_inputs(networks["softmax"].config, batch, device)
    if compiled:
        torch._dynamo.reset()
        for name in ("softmax", list(kinds)[-1]):
            networks[f"{name} compiled"] = torch.compile(networks[name], dynamic=False)  # type: ignore[assignment]

    def training(network: nn.Module) -> None:
        with autocast(precision, device):
            out = network(*inputs)
        out.float().square().mean().backward()
        network.zero_grad(set_to_none=True)

    def inference(network: nn.Module) -> None:
        with torch.no_grad(), autocast(precision, device):
            network(*inputs)

    def times(run: Callable[[nn.Module], None], share: float) -> dict[str, Timing]:
        runs = {name: partial(run, network) for name, network in networks.items()}
        return take_turns(runs, "softmax", budget.share(share), device)

    timings = {"training": times(training, 0.7), "inference": times(inference, 1.0)}
    rows = []
    for name, network in networks.items():
        peak = peak_bytes(partial(training, network), device)
        row = {"model": model, "size": size, "batch": batch, "name": name, "peak_bytes": peak}
        row |= {kind: timing[name]._asdict() for kind, timing in timings.items()}
        rows.append(row)
        print(table_row(row), flush=True)
    return rows


def table_row(row: dict[str, Any]) -> str:
    cells = [row["model"], str(row["size"]), str(row["batch"]), row["name"]]
    for kind in ("training", "inference"):
        time = row[kind]
        cells.append(f"{row['batch'] / time['seconds']:.2f}")  # images/s
        # ratio of throughputs, the inverse of the ratio of times
        cells.append(f"{1 / time['ratio']:.2f} ({1 / time['high']:.2f} to {1 / time['low']:.2f})")
    return "| " + " | ".join([*cells, f"{row['peak_bytes'] / 2**30:.2f}"]) + " |"
