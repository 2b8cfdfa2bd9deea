"""Stage 3: throughput and memory of whole models, time on the host, overhead of the trainer, sampling."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.attention import WIDTH, Shape, cores
from benchmarks.gpu.runner import Context, Row
from benchmarks.loop import ROWS, loop_row
from benchmarks.model import at_size, build
from benchmarks.timing import take_turns
from models import build_model
from scripts.complexity import config_of
from vca.evaluation.complexity import count_macs
from vca.generation.autoencoder import AutoencoderConfig, load_autoencoder
from vca.generation.objective import DiffusionConfig, Method, SamplerConfig, build_objective
from vca.generation.pipeline import DiffusionPipeline, GeneratedImages
from vca.runtime.compute import Precision, computing

MODEL = "deit_mini", 32  # of a rehearsal


def throughput(*pairs: tuple[str, int], precisions: tuple[str, ...] = ("bf16",), compiled: bool = False) -> Callable:
    """Return a measurement of images/s, memory and MACs of models at image sizes."""

    def measure(context: Context) -> Iterator[Row]:
        chosen = [MODEL] if context.tiny else pairs
        names = ("fp32",) if context.device.type == "cpu" else precisions
        todo = [(model, size, Precision(name)) for model, size in chosen for name in names]
        for place, (model, size, precision) in enumerate(todo):
            with computing(Precision.tf32 if precision is Precision.tf32 else Precision.fp32, context.device):
                budget = context.budget(1.0).share(1 / (len(todo) - place))
                rows = at_size(model, size, context.device, budget, 2 if context.tiny else None, precision, compiled)
            for row in rows:
                yield {**row, "precision": precision.value, "macs": macs(model, size, row["name"])}

    return measure


def macs(model: str, size: int, name: str) -> int | None:
    """Return the MACs of one image."""
    attention = "softmax" if name.startswith("softmax") else "vca"
    config = config_of(model, attention, "data=imagefolder", f"data.img_size={size}")
    return count_macs(build_model, config.model, config.attention)


def host(context: Context) -> Iterator[Row]:
    """Yield the time of calls that are too small to keep a GPU busy: a core, and a step of a model."""
    shape = Shape((4, 4), 1, (2, 2))
    x = torch.randn(1, shape.tokens, 3 * WIDTH, device=context.device, requires_grad=True)
    functions = cores(shape, context.device)

    def training(name: str) -> None:
        out = functions[name](x)
        out.backward(torch.ones_like(out))

    def inference(name: str) -> None:
        with torch.no_grad():
            functions[name](x)

    names = [name for name in functions if name in ("SDPA efficient", "SDPA math") or name.startswith("VCA")]
    for kind, run in (("core, forward", inference), ("core, forward + backward", training)):
        runs: dict[str, Callable[[], object]] = {name: partial(run, name) for name in names}
        for name, timing in take_turns(runs, None, context.budget(0.1), context.device, 3).items():
            yield {"host": kind, "name": name, "seconds": timing.seconds}
    model, size = MODEL if context.tiny else ("deit_tiny", 224)
    for row in at_size(model, size, context.device, context.budget(0.5), batch=2):
        yield {"host": f"{model}, forward + backward", "name": row["name"], "seconds": row["training"]["seconds"]}


def loop(context: Context) -> Iterator[Row]:
    """Yield the overhead of the trainer over a bare loop."""
    for name, config, batch in ROWS[:1] if context.tiny else ROWS:
        yield loop_row(context.device, context.budget(0.3), name, config, 2 if context.tiny else batch)


def sampling(context: Context) -> Iterator[Row]:
    """Yield the seconds of sampling 64 images with DiT-S/2 and 250 DDPM steps, of latents without a decoder."""
    model, size, steps, count = ("dit_mini", 32, 2, 1) if context.tiny else ("dit_s_2", 256, 250, 64)
    kinds: dict[str, Any] = {"softmax": ("softmax",), "VCA eager": ("vca", "attention.backend=eager")}
    if context.device.type == "cuda":
        kinds["VCA fused"] = ("vca", "attention.backend=triton")
    for name, kind in kinds.items():
        network: Any = build(model, size, *kind).to(context.device).eval()
        pixels = load_autoencoder(AutoencoderConfig(channels=network.config.in_channels), context.device)
        pipeline = DiffusionPipeline(network, build_objective(DiffusionConfig(), context.device), pixels)
        for precision in (Precision.fp32,) if context.device.type == "cpu" else (Precision.bf16, Precision.fp32):
            for length in (2, steps):  # the first call warms up
                sampler = SamplerConfig(method=Method.ddpm, steps=length)
                images = GeneratedImages(pipeline, sampler, "random", 0, precision, count, count)
                start = time.perf_counter()
                images.sample(range(count))  # copies the pixels to the host at its end
                seconds = time.perf_counter() - start
            row = {"model": model, "name": name, "precision": precision.value, "steps": steps, "images": count}
            yield {**row, "seconds": seconds}
