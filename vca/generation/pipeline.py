"""A trained generator and its samples: sample i depends only on the set's seed and i."""

import io
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vca.generation.autoencoder import Autoencoder
from vca.generation.diffusion import SamplingNet
from vca.generation.objective import Method, Objective, SamplerConfig
from vca.generation.samplers import SamplerOutput
from vca.runtime.compute import Precision, computing
from vca.runtime.errors import ConfigError, NonFiniteError, check
from vca.runtime.files import write_bytes
from vca.runtime.rundir import to_dict
from vca.runtime.seeding import derive_seed


class SamplingCompile(Enum):
    """Compilation of the network for sampling."""

    off = "off"
    default = "default"


@dataclass(frozen=True)
class GeneratedImage:
    """Pixels `(H, W, I)` uint8, the class label, and the NFE (network evaluations)."""

    pixels: np.ndarray
    label: int
    nfe: int


@dataclass
class DiffusionPipeline:
    """Network, objective and autoencoder: everything needed for sampling.

    Attributes:
        model, objective, autoencoder: on one device.
        configs: configs of model, attention, objective and autoencoder; empty during training.
        origin: run or file of the weights; empty during training.
        sampler: default sampler of `sample`; set by `vca.from_pretrained`.
    """

    model: Any
    objective: Objective
    autoencoder: Autoencoder
    configs: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    sampler: SamplerConfig | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape `(C, h, w)` of a latent."""
        return (self.autoencoder.channels, *self.model.config.size)

    def sample(
        self, count: int, labels: Any = "random", seed: int = 0, sampler: SamplerConfig | None = None
    ) -> "list[GeneratedImage]":
        """Return the first `count` images of `sample.py` with these settings, computed in float32.

        Args:
            labels: `random`, `balanced`, or a list of classes that is repeated.
            seed: image i depends only on it and i.
            sampler: replaces the pipeline's sampler.

        Raises:
            ConfigError: as `GeneratedImages`, or if there is no sampler.
        """
        sampler = sampler or self.sampler
        if sampler is None:
            raise ConfigError("sampler must be set, the pipeline has none")
        size = default_batch_size(self.autoencoder.device)
        images = GeneratedImages(self, sampler, labels, seed, Precision.fp32, count, size)
        blocks = (range(first, min(first + size, count)) for first in range(0, count, size))
        return [image for block in blocks for image in images.sample(block)]


class GeneratedImages:
    """Samples of a generator, addressed by number.

    Args:
        labels: `random`, `balanced`, or a list of classes that is repeated.
        precision: precision of the network; the autoencoder uses float32.
        batch_size: samples per batch on a GPU.
        compile: compile the pipeline's network in place.

    Raises:
        ConfigError: if the sampler does not fit the objective, or a label is not a class of the model.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        sampler: SamplerConfig,
        labels: Any,
        seed: int,
        precision: Precision,
        count: int,
        batch_size: int,
        compile: SamplingCompile = SamplingCompile.off,
    ) -> None:
        config, autoencoder = pipeline.model.config, pipeline.autoencoder
        check_sampler(pipeline.objective, sampler, config.class_dropout_prob)
        if isinstance(labels, list):
            fits = all(0 <= label < config.num_classes for label in labels)
            check(fits, "labels", f"from 0 to {config.num_classes - 1}", labels)
        self.compile = compile
        if compile is SamplingCompile.default:
            pipeline.model.compile(dynamic=False)  # with guidance the batch has one of two sizes
        self.pipeline, self.sampler, self.labels, self.seed = pipeline, sampler, labels, seed
        self.precision, self.device, self.count = precision, autoencoder.device, count
        self.compute_batch_size = 1 if self.device.type == "cpu" else batch_size
        height, width = (side * autoencoder.factor for side in config.size)
        in_pixels = autoencoder.name == "none"
        self.shape = (height, width, autoencoder.channels if in_pixels else 3)
        self.source = str(pipeline.origin.get("run") or pipeline.origin.get("checkpoint") or "the run")
        self.nfe: list[int] = []  # of each streamed sample

    def sample(self, numbers: Sequence[int]) -> list[GeneratedImage]:
        """Sample numbers from one block of `batch_size` (between two consecutive multiples of it).

        Rounding may depend on the batch size and on the number of threads. A GPU therefore always computes whole
        blocks, and a CPU computes samples one by one on one thread: a sample depends only on its number.

        Raises:
            NonFiniteError: if a sample is not finite.
        """
        if self.device.type == "cpu":
            with one_thread():
                return [sample for number in numbers for sample in self.sample_batch([number])]
        first = numbers[0] // self.compute_batch_size * self.compute_batch_size
        block = self.sample_batch(range(first, first + self.compute_batch_size))
        return [block[number - first] for number in numbers]

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """Sample the pixels `(len(numbers), H, W, C)` uint8 of numbers from one block."""
        return np.stack([one.pixels for one in self.sample(numbers)])

    def sample_batch(self, numbers: Sequence[int]) -> list[GeneratedImage]:
        """Sample one batch."""
        pipeline = self.pipeline
        classes = [label_of(self.labels, number, self.seed, pipeline.model.config.num_classes) for number in numbers]
        labels = torch.tensor(classes, device=self.device)
        with computing(self.precision, self.device):
            output = sample_latents(
                pipeline.model, pipeline.objective, self.sampler, labels, numbers, self.seed, pipeline.shape
            )
        try:
            pixels = to_uint8(pipeline.autoencoder.decode(output.x)).permute(0, 2, 3, 1).cpu().numpy()
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}: samples {numbers[0]} to {numbers[-1]} of {self.source}") from error
        return [GeneratedImage(image, label, output.nfe) for image, label in zip(pixels, classes, strict=True)]

    def stream(self, blocks: Iterable[Sequence[int]]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """Yield the blocks of sample numbers in order, with their pixels `(len(block), H, W, I)` uint8."""
        self.nfe = []
        for block in blocks:
            samples = self.sample(block)
            self.nfe += [sample.nfe for sample in samples]
            yield block, np.stack([sample.pixels for sample in samples])

    def settings(self) -> dict[str, Any]:
        """Return everything that the pixels depend on."""
        pipeline, cuda = self.pipeline, self.device.type == "cuda"
        source = pipeline.configs["autoencoder"].source
        return {
            "seed": self.seed,
            "labels": self.labels,
            "sampler": to_dict(self.sampler),
            "precision": self.precision.value,
            "tf32": self.precision is Precision.tf32,
            # Only if it is on: folders and records of earlier versions have no such key.
            **({"compile": self.compile.value} if self.compile is not SamplingCompile.off else {}),
            "compute_batch_size": self.compute_batch_size,
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "torch": torch.__version__,
            "origin": pipeline.origin,
            **{key: to_dict(pipeline.configs[key]) for key in ("model", "attention", "objective")},
            "autoencoder": {"source": source and Path(source).name, **pipeline.autoencoder.identity()},
        }


def default_batch_size(device: torch.device) -> int:
    """Return the number of samples, or of images of the extractor, per batch.

    On GPUs it is from a count, not measured: at 256 tokens and width 384 (DiT-S/2), 128 samples give a matrix product
    768 tiles of 128 x 128, six rounds on the 132 multiprocessors of an H100. 32 samples give 192 tiles: two rounds, and
    the second is half empty.
    """
    return 32 if device.type == "cpu" else 128


def nfe_stats(counts: Sequence[int]) -> dict[str, float]:
    """Return mean, minimum and maximum of NFE counts."""
    return {"mean": float(np.mean(counts)), "min": min(counts), "max": max(counts)}


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one CPU thread within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_sampler(objective: Objective, sampler: SamplerConfig, class_dropout: float) -> None:
    """Raise `ConfigError` if the sampler does not fit the objective, or the model was not trained for guidance.

    `class_dropout` is the probability of the null label during training.
    """
    supported = sampler.cfg_scale == 1 or class_dropout > 0
    check(supported, "sampler.cfg_scale", "1 for a model with class_dropout_prob=0", sampler.cfg_scale)
    names = ", ".join(method.value for method in objective.methods)
    files = "sampler=ddpm or ddim" if Method.ddpm in objective.methods else "sampler=ode_heun, ode_dopri5 or sde_euler"
    check(sampler.method in objective.methods, "sampler.method", f"one of {names} ({files})", sampler.method.value)
    limit = objective.max_steps
    if limit is not None and sampler.steps is not None:
        check(sampler.steps <= limit, "sampler.steps", f"<= objective.steps={limit}", sampler.steps)


@torch.inference_mode()
def sample_latents(
    model: Any,
    objective: Objective,
    sampler: SamplerConfig,
    labels: Tensor,
    indices: Sequence[int],
    seed: int,
    shape: tuple[int, int, int],
) -> SamplerOutput:
    """Sample latents of the classes `labels` `(B,)` for the sample numbers `indices`.

    Each sample has its own CPU generator, seeded by `(seed, index)`, for the initial noise and the noise of each step.
    `labels` and `model`, a `DiT` in evaluation mode, are on one device. `shape` is that of a latent, `(I, H, W)`.
    """
    generators = [torch.Generator().manual_seed(derive_seed(seed, "sample", index)) for index in indices]
    with StepNoise(generators, shape, labels.device) as noise:
        return objective.sample(guided(model, objective, sampler, labels), noise.initial(), sampler, noise)


class StepNoise:
    """Noise of a batch of samples: the initial noise, then that of each step in order, `(B, I, H, W)` on `device`.

    The noise of the next step is drawn in a thread while the network runs, from the second step on: a sampler that
    needs no noise draws none. A GPU copies it from pinned memory without waiting.
    """

    def __init__(self, generators: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device) -> None:
        self.generators, self.shape, self.device = generators, shape, device
        self.thread = ThreadPoolExecutor(1)
        self.next: Future[Tensor] | None = None

    def __enter__(self) -> "StepNoise":
        return self

    def __exit__(self, *error: object) -> None:
        self.thread.shutdown(wait=False)  # the noise after the last step is not used

    def initial(self) -> Tensor:
        return self.draw().to(self.device, non_blocking=True)

    def __call__(self, step: int) -> Tensor:
        noise = self.next.result() if self.next is not None else self.draw()
        self.next = self.thread.submit(self.draw)
        return noise.to(self.device, non_blocking=True)

    def draw(self) -> Tensor:
        """Draw on the CPU, each sample from its own generator."""
        noise = torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])
        return noise.pin_memory() if self.device.type == "cuda" else noise


def guided(model: Any, objective: Objective, sampler: SamplerConfig, labels: Tensor) -> SamplingNet:
    """Return `net(x, t)` for these labels, with classifier-free guidance if the sampler has it."""
    low, high = sampler.cfg_interval

    def net(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), t, device=x.device)  # int64 or float32
        if sampler.cfg_scale == 1 or not low <= objective.noise_time(t) <= high:
            return model(x, times, labels)
        return model.forward_with_cfg(x, times, labels, sampler.cfg_scale, sampler.cfg_channels)

    return net


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to 8-bit pixels: `127.5 x + 128`, clamped and truncated.

    Raises:
        NonFiniteError: if a value is NaN or infinite; the conversion would hide it as a black pixel.
    """
    if not torch.isfinite(images).all():
        raise NonFiniteError("samples are NaN or infinite")
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


def label_of(scheme: str | Sequence[int], index: int, seed: int, num_classes: int) -> int:
    """Return the class of sample `index`: `random`, `balanced` (0, 1, 2, ... in turn), or from a repeated list."""
    if scheme == "random":
        return derive_seed(seed, "label", index) % num_classes
    if scheme == "balanced":
        return index % num_classes
    return int(scheme[index % len(scheme)])


def save_image_grid(
    images: Tensor, path: Path, columns: int, labels: Sequence[object] | None = None, zoom: int = 1
) -> None:
    """Write images `(B, I, H, W)` uint8 as one PNG with `columns` per row, one pixel apart; grey or RGB.

    `labels` are printed above the images; `zoom` enlarges each image by an integer factor.
    """
    from PIL import Image, ImageDraw

    pixels = images.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3).permute(0, 2, 3, 1).cpu().numpy()
    count, height, width, channels = pixels.shape
    head = 12 if labels is not None else 0  # the default font is 11 pixels high
    rows, step = -(-count // columns), head + height + 1
    sheet = np.full((rows * step - 1, columns * (width + 1) - 1, channels), 255, dtype=np.uint8)
    corners = [(index // columns * step, index % columns * (width + 1)) for index in range(count)]
    for image, (top, left) in zip(pixels, corners, strict=True):
        sheet[top + head : top + head + height, left : left + width] = image
    picture = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    for label, (top, left) in zip(labels or (), corners, strict=False):
        ImageDraw.Draw(picture).text((left + width // 2, top), str(label), fill=0, anchor="ma")
    content = io.BytesIO()
    picture.save(content, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content.getbuffer())
