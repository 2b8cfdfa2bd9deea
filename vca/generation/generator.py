"""A trained generator, and the set of samples that it draws: sample i of a set follows from its seed and i alone."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vca.generation.autoencoder import Autoencoder
from vca.generation.objective import Objective, SamplerConfig
from vca.generation.sampling import check_sampler, draw_samples, label_of, to_uint8
from vca.runtime.compute import Precision, computing
from vca.runtime.errors import NonFiniteError, check
from vca.runtime.rundir import plain


@dataclass(frozen=True)
class Sample:
    """Pixels `(H, W, I)` uint8, the class asked for, and how often the network was evaluated for it."""

    pixels: np.ndarray
    label: int
    evaluations: int


@dataclass
class Generator:
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


class DrawnSet:
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
        generator: Generator,
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
        self.together = 1 if self.device.type == "cpu" else batch_size
        height, width = (side * autoencoder.factor for side in config.size)
        in_pixels = autoencoder.name == "none"
        self.shape = (height, width, autoencoder.channels if in_pixels else 3)
        self.source = str(generator.origin.get("run") or generator.origin.get("checkpoint") or "the run")
        self.evaluations: list[int] = []  # of all that was streamed here

    def draw(self, numbers: Sequence[int]) -> list[Sample]:
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
        first = numbers[0] // self.together * self.together
        block = self.draw_at_once(range(first, first + self.together))
        return [block[number - first] for number in numbers]

    def draw_at_once(self, numbers: Sequence[int]) -> list[Sample]:
        """Samples of one batch."""
        generator = self.generator
        classes = [label_of(self.labels, number, self.seed, generator.model.config.num_classes) for number in numbers]
        labels = torch.tensor(classes, device=self.device)
        with computing(self.precision, self.device):
            drawn = draw_samples(
                generator.model, generator.objective, self.sampler, labels, numbers, self.seed, generator.shape
            )
        try:
            pixels = to_uint8(generator.autoencoder.decode(drawn.x)).permute(0, 2, 3, 1).cpu().numpy()
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}: number {numbers[0]} to {numbers[-1]} of {self.source}") from error
        return [Sample(image, label, drawn.evaluations) for image, label in zip(pixels, classes, strict=True)]

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """Pixels of samples, `(len(numbers), H, W, I)` uint8."""
        samples = self.draw(numbers)
        self.evaluations += [sample.evaluations for sample in samples]
        return np.stack([sample.pixels for sample in samples])

    def stream(self, blocks: Iterable[Sequence[int]]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """Blocks of samples one after the other."""
        self.evaluations = []
        for block in blocks:
            yield block, self.read(block)

    def describe(self) -> dict[str, Any]:
        """Everything that the pixels depend on."""
        generator, cuda = self.generator, self.device.type == "cuda"
        source = generator.configs["autoencoder"].source
        return {
            "seed": self.seed,
            "labels": self.labels,
            "sampler": plain(self.sampler),
            "precision": self.precision.value,
            "tf32": self.precision is Precision.tf32,
            "computed_together": self.together,
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "torch": torch.__version__,
            "origin": generator.origin,
            **{key: plain(generator.configs[key]) for key in ("model", "attention", "objective")},
            "autoencoder": {"source": source and Path(source).name, **generator.autoencoder.identity()},
        }


def spread(counts: Sequence[int]) -> dict[str, float]:
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
