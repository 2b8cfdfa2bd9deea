"""A trained generator, and the set of samples that it draws: sample i of a set follows from its seed and i alone."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vca.generation.autoencoder import Autoencoder
from vca.generation.objective import Method, Objective, SamplerConfig
from vca.generation.samplers import SamplerOutput
from vca.runtime.compute import Precision, computing
from vca.runtime.errors import NonFiniteError, check
from vca.runtime.files import write_bytes
from vca.runtime.rundir import to_dict
from vca.runtime.seeding import derive_seed


@dataclass(frozen=True)
class GeneratedImage:
    """Pixels `(H, W, I)` uint8, the class asked for, and how often the network was evaluated for it."""

    pixels: np.ndarray
    label: int
    nfe: int


@dataclass
class DiffusionPipeline:
    """A trained network with all that makes samples of it.

    Attributes:
        model, objective, autoencoder: on one device.
        configs: of the model, the attention, the objective and the autoencoder; empty while it is trained.
        origin: where the weights are from; likewise.
    """

    model: Any
    objective: Objective
    autoencoder: Autoencoder
    configs: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, h, w)` of what the network makes."""
        return (self.autoencoder.channels, *self.model.config.size)


class GeneratedImages:
    """The samples of a generator by number.

    Args:
        generator: what draws.
        sampler: how.
        labels: `random`, `balanced`, or a list of classes that is repeated.
        seed: of the set.
        precision: of the network; the autoencoder stays in float32.
        count: how many.
        batch_size: samples computed at once on a GPU.

    Raises:
        ConfigError: if the sampler does not belong to the generator, or it has no such class.
    """

    def __init__(
        self,
        generator: DiffusionPipeline,
        sampler: SamplerConfig,
        labels: Any,
        seed: int,
        precision: Precision,
        count: int,
        batch_size: int,
    ) -> None:
        config, autoencoder = generator.model.config, generator.autoencoder
        check_sampler(generator.objective, sampler, config.class_dropout_prob)
        if isinstance(labels, list):
            fits = all(0 <= label < config.num_classes for label in labels)
            check(fits, "labels", f"from 0 to {config.num_classes - 1}", labels)
        self.generator, self.sampler, self.labels, self.seed = generator, sampler, labels, seed
        self.precision, self.device, self.count = precision, autoencoder.device, count
        self.compute_batch_size = 1 if self.device.type == "cpu" else batch_size
        height, width = (side * autoencoder.factor for side in config.size)
        in_pixels = autoencoder.name == "none"
        self.shape = (height, width, autoencoder.channels if in_pixels else 3)
        self.source = str(generator.origin.get("run") or generator.origin.get("checkpoint") or "the run")
        self.nfe: list[int] = []  # of all that was streamed here

    def draw(self, numbers: Sequence[int]) -> list[GeneratedImage]:
        """Samples of some numbers that lie between two multiples of `batch_size`.

        On a GPU all `batch_size` from one multiple to the next are computed at once, since how a product rounds may
        depend on how many they are. On CPUs they are computed one by one and on one thread. So nothing but its number
        decides about a sample.

        Raises:
            NonFiniteError: if a sample is not finite.
        """
        if self.device.type == "cpu":
            with one_thread():
                return [sample for number in numbers for sample in self.draw_at_once([number])]
        first = numbers[0] // self.compute_batch_size * self.compute_batch_size
        block = self.draw_at_once(range(first, first + self.compute_batch_size))
        return [block[number - first] for number in numbers]

    def draw_at_once(self, numbers: Sequence[int]) -> list[GeneratedImage]:
        """Samples of one batch."""
        generator = self.generator
        classes = [label_of(self.labels, number, self.seed, generator.model.config.num_classes) for number in numbers]
        labels = torch.tensor(classes, device=self.device)
        with computing(self.precision, self.device):
            drawn = sample_latents(
                generator.model, generator.objective, self.sampler, labels, numbers, self.seed, generator.shape
            )
        try:
            pixels = to_uint8(generator.autoencoder.decode(drawn.x)).permute(0, 2, 3, 1).cpu().numpy()
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}: number {numbers[0]} to {numbers[-1]} of {self.source}") from error
        return [GeneratedImage(image, label, drawn.nfe) for image, label in zip(pixels, classes, strict=True)]

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """Pixels of samples, `(len(numbers), H, W, I)` uint8."""
        samples = self.draw(numbers)
        self.nfe += [sample.nfe for sample in samples]
        return np.stack([sample.pixels for sample in samples])

    def stream(self, blocks: Iterable[Sequence[int]]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """Blocks of samples one after the other."""
        self.nfe = []
        for block in blocks:
            yield block, self.read(block)

    def describe(self) -> dict[str, Any]:
        """Everything that the pixels depend on."""
        generator, cuda = self.generator, self.device.type == "cuda"
        source = generator.configs["autoencoder"].source
        return {
            "seed": self.seed,
            "labels": self.labels,
            "sampler": to_dict(self.sampler),
            "precision": self.precision.value,
            "tf32": self.precision is Precision.tf32,
            "compute_batch_size": self.compute_batch_size,
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "torch": torch.__version__,
            "origin": generator.origin,
            **{key: to_dict(generator.configs[key]) for key in ("model", "attention", "objective")},
            "autoencoder": {"source": source and Path(source).name, **generator.autoencoder.identity()},
        }


def nfe_stats(counts: Sequence[int]) -> dict[str, float]:
    """Mean, least and most of some counts."""
    return {"mean": float(np.mean(counts)), "min": min(counts), "max": max(counts)}


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_sampler(objective: Objective, sampler: SamplerConfig, class_dropout: float) -> None:
    """Raise `ConfigError` if the sampler does not belong to the objective, or asks a model for guidance that has none.

    `class_dropout` is how often the model's training replaced a label by the null label.
    """
    guidable = sampler.cfg_scale == 1 or class_dropout > 0
    check(guidable, "sampler.cfg_scale", "1 for a model with class_dropout_prob=0", sampler.cfg_scale)
    names = ", ".join(method.value for method in objective.methods)
    files = "sampler=ddpm or ddim" if Method.ddpm in objective.methods else "sampler=ode_heun, dopri5 or sde"
    check(sampler.method in objective.methods, "sampler.method", f"one of {names} ({files})", sampler.method.value)
    most = objective.most_steps
    if most is not None and sampler.steps is not None:
        rule = f"at most {most}, the steps of the objective"
        check(sampler.steps <= most, "sampler.steps", rule, sampler.steps)


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
    """Samples of the classes `labels` `(B,)`, for the sample numbers `indices`.

    All noise of a sample comes from a CPU generator of its own, seeded by `(seed, index)`: first the start, then that
    of each step.

    Args:
        model: a `DiT`, in evaluation mode.
        objective, sampler: what it was trained for, and how to read it.
        labels: on the model's device.
        indices: B of them.
        seed: of the set of samples.
        shape: `(I, H, W)` of one.

    Returns:
        `(B, I, H, W)`.
    """
    generators = [torch.Generator().manual_seed(derive_seed(seed, "sample", index)) for index in indices]

    def draw(step: int = 0) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(labels.device)

    return objective.sample(guided(model, objective, sampler, labels), draw(), sampler, draw)


def guided(model: Any, objective: Objective, sampler: SamplerConfig, labels: Tensor) -> Callable[..., Tensor]:
    """`net(x, t)` for these labels, under guidance where the sampler asks for it."""
    low, high = sampler.cfg_interval

    def net(x: Tensor, t: Tensor) -> Tensor:
        inside = low <= float(objective.noise_time(t[:1])) <= high  # one time for the whole batch
        if sampler.cfg_scale == 1 or not inside:
            return model(x, t, labels)
        return model.forward_with_cfg(x, t, labels, sampler.cfg_scale, sampler.cfg_channels)

    return net


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as 8-bit pixels: `127.5 x + 128`, cut off at both ends and truncated.

    Raises:
        NonFiniteError: if there is a NaN or an infinity, which would become a black pixel unseen.
    """
    if not torch.isfinite(images).all():
        raise NonFiniteError("samples are NaN or infinite")
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


def label_of(scheme: str | Sequence[int], index: int, seed: int, num_classes: int) -> int:
    """The class of sample number `index`: `random`, `balanced` (0, 1, 2, ... in turn), or a list that is repeated."""
    if scheme == "random":
        return derive_seed(seed, "label", index) % num_classes
    if scheme == "balanced":
        return index % num_classes
    return int(scheme[index % len(scheme)])


def save_image_grid(
    images: Tensor, path: Path, columns: int, labels: Sequence[object] | None = None, zoom: int = 1
) -> None:
    """Write images `(B, I, H, W)`, uint8, as one PNG, `columns` in a row, a pixel apart; grey or RGB.

    Each may carry a label above it, and be enlarged by a whole factor.
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
