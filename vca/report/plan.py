"""Plan a run without its GPU: memory of a step, largest micro-batch, time, data, disk, GPU-hours."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from vca.evaluation.complexity import count, example_inputs, in_plain_torch
from vca.evaluation.memory import Build, MemoryPlan
from vca.runtime.devices import Gpu
from vca.runtime.errors import ConfigError
from vca.training.config import TrainerConfig

NODE = 8  # GPUs of a machine
NETWORK = 25  # GB/s of a GPU between machines, in one direction
USABLE = 0.9  # of the memory of a GPU; the rest is for CUDA, the libraries and fragmentation
PHOTOS, LATENTS = 356, 10_000  # images/s of one core of an AMD EPYC: ImageNet transform of 500 x 375 photos; latents
IMAGES = {"digits": 1438, "cifar10": 50_000}
IMAGENET = 1_281_167
GIB = 2**30


class Line(NamedTuple):
    """A figure of the plan, and how it is known: from the config, counted, measured or assumed."""

    what: str
    value: str
    source: str


SOURCES = {
    "gradients": "counted: float32",
    "optimizer": "counted: two moments of AdamW, float32",
    "activations": "counted: fake tensors under autocast, fused attention",
    "batch": "counted: this step's and the next one's",
    "peak": "counted; temporaries of the backward pass are those of CPU operators",
}


def training_images(config: Any) -> int:
    """Return the number of training images of a data set whose size is known without its files."""
    known = IMAGES.get(config.data.name, IMAGENET if config.data.num_classes == 1000 else None)
    if known is None:
        raise ConfigError(f"--images must be set for data.name={config.data.name}, got None")
    return known


def seconds_of_step(
    config: Any, macs: int, parameters: int, gpu: Gpu, gpus: int, mfu: float, bandwidth: float
) -> tuple[float, float, float]:
    """Return the seconds of computing, of the all-reduce and of a whole step.

    A ring sends 2 (n - 1) / n of the gradients; DDP overlaps it with the backward pass, two thirds of the computing.
    """
    peak = gpu.peak(config.trainer.precision)
    assert peak is not None
    flops = (8 if config.trainer.grad_checkpointing else 6) * macs * config.trainer.global_batch_size / gpus
    compute = flops / (mfu * peak)
    reduce = 2 * (gpus - 1) / gpus * 4 * parameters / (1e9 * bandwidth)
    return compute, reduce, compute + max(0.0, reduce - compute * 2 / 3)


def plan(
    config: Any,
    build: Build,
    gpu: Gpu,
    gpus: int,
    mfu: float,
    images: int | None = None,
    per_core: float | None = None,
) -> Iterator[Line]:
    """Yield the figures of a run on GPUs.

    Args:
        config: config of `train_cls.py` or `train_gen.py`.
        build: builds a network from its configs of model and attention.
        gpu, gpus: kind and number of GPUs.
        mfu: share of the peak FLOP/s, without recomputation.
        images: training images; None takes those of known data sets.
        per_core: images/s that a CPU core loads; None takes measured ones.
    """
    trainer: TrainerConfig = config.trainer
    micro, accumulation = trainer.micro_batch_on(gpus)
    if (peak := gpu.peak(trainer.precision)) is None:
        raise ConfigError(f"trainer.precision must be one that --gpu supports, got {trainer.precision.value!r}")
    counts = count(lambda: build(config.model, in_plain_torch(config.attention)), lambda: example_inputs(config.model))
    yield Line("parameters", f"{counts.params / 1e6:.3f} M", "counted")
    encodes = hasattr(config, "objective") and config.autoencoder.name != "none" and config.data.name != "latents"
    without = "without the autoencoder, whose time and memory are not planned" if encodes else "forward"
    macs = f"{counts.macs / 1e9:.3f} G"
    yield Line("MACs per image", macs, f"counted: matrix products and convolutions, {without}")

    memory = MemoryPlan(config, build, gpus)
    step = memory.step(micro)
    yield Line("micro-batch per GPU", f"{micro} x {accumulation}", "config: images x accumulation steps")
    for part in ("weights", "gradients", "optimizer", "ema", "activations", "batch", "peak"):
        name = {"activations": "saved activations", "batch": "input batch", "peak": "peak of a step"}.get(part, part)
        yield Line(f"memory: {name}", f"{getattr(step, part) / GIB:.2f} GiB", SOURCES.get(part, "counted"))
    largest = memory.largest(USABLE * gpu.memory * GIB)
    verdict = "the micro-batch fits" if largest >= micro else "the micro-batch does not fit"
    yield Line(
        "largest micro-batch", str(largest), f"counted; {verdict}; assumed: {USABLE:.0%} of {gpu.memory} GiB usable"
    )

    bandwidth = gpu.link if gpus <= NODE else min(gpu.link, NETWORK)
    compute, reduce, seconds = seconds_of_step(config, counts.macs, counts.params, gpu, gpus, mfu, bandwidth)
    rate = trainer.global_batch_size / seconds
    yield Line(
        "computing per step", f"{1000 * compute:.1f} ms", f"assumed: {mfu:.0%} of {peak / 1e12:g} TFLOP/s (data sheet)"
    )
    yield Line(
        "all-reduce per step", f"{1000 * reduce:.1f} ms", f"assumed: ring at {bandwidth} GB/s, float32 gradients"
    )
    yield Line("images per second", f"{rate:.0f}", "assumed: the all-reduce overlaps with the backward pass")
    cached = config.data.name == "latents"
    source = "given" if per_core else "measured" if cached or config.data.img_size >= 224 else "assumed"
    per_core = per_core or (LATENTS if cached else PHOTOS)
    yield Line("CPU cores for the data", f"{rate / per_core:.1f}", f"{source}: {per_core:g} images/s per core")

    saved = step.weights + step.optimizer + step.ema
    disk = saved * (trainer.keep_checkpoints + 1)  # one more while it is written
    files = f"counted: {trainer.keep_checkpoints} + 1 of {saved / 1e9:.2f} GB"
    yield Line("disk: checkpoints", f"{disk / 1e9:.2f} GB", files)
    images = images or (training_images(config) if cached or trainer.steps is None else None)
    if cached and images:
        size = 2 * 2 * 4 * example_inputs(config.model)[0].numel() * images
        yield Line("disk: latent cache", f"{size / 1e9:.1f} GB", "counted: float32 mean and std, image and flip")
    steps = trainer.total_steps(max(1, (images or 0) // trainer.global_batch_size))
    if trainer.snapshot_every:
        snapshots = -(-steps // trainer.snapshot_every) * len(trainer.ema_decays)
        files = f"counted: {snapshots} of {step.weights / 1e9:.2f} GB, never deleted"
        yield Line("disk: snapshots", f"{snapshots * step.weights / 1e9:.2f} GB", files)
    total = steps * trainer.global_batch_size
    yield Line("images of the run", f"{total / 1e6:.1f} M", f"config: {steps} steps of {trainer.global_batch_size}")
    hours = steps * seconds * gpus / 3600
    yield Line("GPU-hours", f"{hours:.3g}", "assumed: speed as above, without evaluations")
