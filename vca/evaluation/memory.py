"""Count the memory of one step of a run on a device that need not be present.

The step runs on fake tensors, which have no data, and the bytes of the storages in use are summed.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vca.evaluation.complexity import example_inputs, in_plain_torch
from vca.generation.objective import build_objective
from vca.runtime.compute import Precision
from vca.training.classification import soft_cross_entropy

BATCHES = (1, 2)  # images of the counted steps; the bytes of others are linear in the images

Build = Callable[[Any, Any], Any]  # configs of model and attention -> network


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one step of a run uses on one device.

    Attributes:
        weights, gradients, optimizer, ema: of the network.
        activations: saved for the backward pass of a micro-batch.
        batch: input of a step, and on a GPU that of the next step.
        peak: the most that is in use at a time; gradients and activations may not be at the same time.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    batch: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators create and that are still in use: `now`, and their `most`.

    Args:
        existing: tensors whose storages are not counted; they must live as long as this.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.storages = {x.untyped_storage()._cdata for x in existing}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        out = function(*arguments, **(options or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def take_most(self) -> int:
        """Return the most since the last call."""
        most, self.most = self.most, self.now
        return most

    def free(self, storage: int, size: int) -> None:
        self.storages.discard(storage)
        self.now -= size


class FusedSdpa(TorchFunctionMode):
    """Uses the fused SDPA of GPUs, which torch does not choose for fake tensors without a GPU."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if function is not nn.functional.scaled_dot_product_attention:
            return function(*arguments, **options)
        q, k, v = arguments
        bias = options.get("attn_mask")
        bias = bias.expand(*q.shape[:3], k.shape[2]) if bias is not None else None
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]


@contextmanager
def fake_autocast(precision: Precision, device: str) -> Iterator[None]:
    """Autocast to a precision, also for a GPU that this machine lacks, for which `torch.autocast` is off."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, precision.autocast_dtype is not None)
    torch.set_autocast_dtype(device, precision.autocast_dtype or before[1])
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def fake_network(config: Any, build: Build, device: str) -> Any:
    """Build the network of a run with parameters without data on a device; call it inside `FakeTensorMode`."""
    attention = in_plain_torch(config.attention) if device == "cpu" else config.attention
    with unset_fake_temporarily(), torch.device("meta"):
        network = build(config.model, attention).train()
    network.set_grad_checkpointing(config.trainer.grad_checkpointing)
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in [(name, x) for name, x in tensors.items() if x is not None]:
                fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
                tensors[name] = nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
    return network


@dataclass
class Simulation:
    """Bytes of forward and backward without weights, inputs and gradients.

    Attributes:
        saved: saved activations.
        most: peaks until the gradient of each parameter, in their order; the first is also that of the forward pass.
        gradients: bytes of the gradients before each of them.
    """

    saved: int
    most: list[int]
    gradients: list[int]


def simulate(config: Any, build: Build, micro: int, device: str) -> Simulation:
    """Run forward and, on the CPU, backward on `micro` images without data."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = fake_network(config, build, device)
        inputs = tuple(x.to(device) for x in example_inputs(config.model, micro))
        noise, u = torch.empty_like(inputs[0]), torch.empty(micro, device=device)
        targets = torch.empty(micro, config.data.num_classes, device=device)
        existing = [*inputs, noise, u, targets, *network.buffers(), *network.parameters()]
        result = Simulation(0, [], [0])

        def mark(parameter: Tensor) -> None:
            result.most.append(live.take_most())
            result.gradients.append(result.gradients[-1] + parameter.nbytes)

        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                existing.append(parameter.grad)
                parameter.register_post_accumulate_grad_hook(mark)

        def loss() -> Tensor:
            if hasattr(config, "objective"):
                objective, labels = build_objective(config.objective, torch.device(device)), inputs[2]
                return objective.losses(lambda x, t: network(x, t, labels), inputs[0], noise, u)["loss"].mean()
            images = inputs[0].clone() if config.augment.mixes else inputs[0]
            return soft_cross_entropy(network(images), targets)

        with LiveBytes(existing) as live:
            with fake_autocast(config.trainer.precision, device), FusedSdpa() if device == "cuda" else nullcontext():
                value = loss()
            result.saved = live.now
            if device == "cpu":
                value.backward()
    return result


class MemoryPlan:
    """Counts the memory of one step of a run, for any micro-batch size.

    Args:
        config: config of `train_cls.py` or `train_gen.py`.
        build: builds its network.
        ranks: number of devices.
        device: `cpu` or `cuda`. For `cuda`, temporary tensors of the backward pass are those of CPU operators.
    """

    def __init__(self, config: Any, build: Build, ranks: int = 1, device: str = "cuda") -> None:
        self.config, self.ranks, self.device = config, ranks, device
        with torch.device("meta"):
            network = build(config.model, in_plain_torch(config.attention))
        self.weights = sum(x.nbytes for x in (*network.parameters(), *network.buffers()))
        self.gradients = sum(p.nbytes for p in network.parameters() if p.requires_grad)
        one, two = (simulate(config, build, batch, "cpu") for batch in BATCHES)
        self.order = one.gradients
        self.temporary = [(a - one.saved, b - two.saved) for a, b in zip(one.most, two.most, strict=True)]
        self.saved = one.saved, two.saved
        if device == "cuda":
            one, two = (simulate(config, build, batch, "cuda") for batch in BATCHES)
            self.saved = one.saved, two.saved

    def input_bytes(self) -> int:
        """Bytes of the input of one image on the device: float32, uint8 images before their normalisation, noise."""
        config, copies = self.config, 2 if self.device == "cuda" else 1
        pixels: int = config.data.image_bytes
        if not hasattr(config, "objective"):
            return 4 * pixels * copies + pixels
        noise = 4 * example_inputs(config.model)[0].numel() * (1 + (config.autoencoder.name != "none"))
        if config.data.name == "latents":  # mean and standard deviation have the size of their noise
            return 2 * noise * copies
        return (4 * pixels + noise) * copies + pixels

    def step(self, micro: int) -> StepMemory:
        """Return the memory of a step of micro-batches of `micro` images."""
        trainer = self.config.trainer
        of_rank = max(micro, trainer.global_batch_size // self.ranks)
        batch = of_rank * self.input_bytes()
        saved = extrapolate(self.saved, micro)
        ema = self.weights * len(trainer.ema_decays)
        # Gradients of earlier micro-batches and DDP's buckets are there during a forward pass.
        kept = of_rank > micro or self.ranks > 1
        most = max(
            saved + extrapolate(temporary, micro) + (self.gradients if kept else before)
            for temporary, before in zip(self.temporary, self.order, strict=False)
        )
        peak = self.weights + 2 * self.gradients + ema + batch + max(most, self.gradients)
        return StepMemory(self.weights, self.gradients, 2 * self.gradients, ema, saved, batch, peak)

    def largest(self, limit: float) -> int:
        """Return the largest micro-batch whose peak is at most `limit` bytes; 0 if there is none."""
        low, high = 0, 1
        while self.step(high).peak <= limit:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.step(middle).peak <= limit else (low, middle)
        return low


def extrapolate(counted: tuple[int, int], micro: int) -> int:
    """Return the bytes of `micro` images from those of `BATCHES`."""
    (first, second), (one, two) = BATCHES, counted
    return round(one + (two - one) / (second - first) * (micro - first))
