"""One training step, shared by both trainers: accumulation, autocast, clipping, optimizer and EMA, and their state."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vca.runtime.compute import Precision, autocast
from vca.runtime.distributed import World
from vca.runtime.errors import NonFiniteError
from vca.runtime.seeding import seed_torch
from vca.training.config import TrainerConfig
from vca.training.ema import Ema
from vca.training.optim import OptimConfig, build_optimizer, learning_rate


@dataclass
class StepResult:
    """Result of one step.

    Attributes:
        loss: mean loss over this rank's images, `()`, on the device.
        grad_norm: norm of the gradient over all ranks, before clipping.
        lr: learning rate of the step.
        applied: False if the gradient was not finite and the weights are unchanged.
    """

    loss: Tensor
    grad_norm: float
    lr: float
    applied: bool


class TrainState:
    """Model, optimizer, EMA and gradient scaler: everything that a step changes and a checkpoint contains.

    `model` is the bare network, moved to `world.device`; `forward_model` is its DDP or compiled wrapper. Parameter
    names, parameter groups, EMA and checkpoints use the bare network.
    """

    def __init__(
        self, model: nn.Module, trainer: TrainerConfig, optim: OptimConfig, world: World, steps_per_epoch: int
    ) -> None:
        self.trainer, self.optim, self.world, self.steps_per_epoch = trainer, optim, world, steps_per_epoch
        self.total_steps = trainer.total_steps(steps_per_epoch)
        self.micro_batch_size, self.accumulation = trainer.micro_batch_on(world.size)
        self.model = model.to(world.device)
        self.peak_lr = optim.peak_lr(trainer.global_batch_size)
        self.optimizer = build_optimizer(optim, self.model, self.peak_lr)
        self.ema = Ema(self.model, trainer.ema_decay) if trainer.ema_decay is not None else None
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=trainer.precision is Precision.fp16)
        self.step = 0
        self.nonfinite_step: int | None = None
        self.buckets_settled = False

        self.forward_model: Any = self.model
        if world.size > 1:
            ids = [world.local_rank] if world.device.type == "cuda" else None
            self.forward_model = DistributedDataParallel(self.model, device_ids=ids)
        if trainer.compile:
            self.forward_model = torch.compile(self.forward_model)

    def autocast(self) -> Any:
        return autocast(self.trainer.precision, self.world.device)

    def train_step(
        self, batches: Sequence[Any], loss_of: Callable[[nn.Module, Any, int], Tensor], seed: int
    ) -> StepResult:
        """Run step number `self.step` on this rank's micro-batches.

        Dropout and stochastic depth are seeded by `(seed, step, micro-batch)`, with micro-batches counted over all
        ranks. With `trainer.micro_batch_size` set, the random numbers do not depend on the world size.

        Args:
            batches: `accumulation` micro-batches on the device.
            loss_of: maps network, micro-batch and step to the mean loss of the micro-batch.
            seed: seed of the run.

        Returns:
            The result. If the gradient is not finite, on every rank alike, `applied` is False and weights, optimizer
            and EMA are unchanged.

        Raises:
            NonFiniteError: if the gradient of the previous step was not finite and was no fp16 overflow.
        """
        if self.nonfinite_step is not None:
            raise NonFiniteError(f"the gradient of step {self.nonfinite_step} was not finite; load a checkpoint first")
        step = self.step
        lr = learning_rate(self.optim, step, self.total_steps, self.steps_per_epoch, self.peak_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not self.model.training:  # after an evaluation
            self.forward_model.train()
        if self.world.size > 1 and not self.buckets_settled:
            self.settle_buckets(batches[0], loss_of)
        total = torch.zeros((), device=self.world.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            seed_torch(seed, "forward", step, self.world.rank * len(batches) + index)
            with nullcontext() if last or self.world.size == 1 else self.forward_model.no_sync():
                with self.autocast():
                    loss = loss_of(self.forward_model, batch, step)
                self.scaler.scale(loss / len(batches)).backward()
            total += loss.detach().float() / len(batches)

        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        grad_norm = float(norm)
        finite = math.isfinite(grad_norm)
        if finite and self.optim.clip_grad is not None and grad_norm > self.optim.clip_grad:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.optim.clip_grad, norm)
        if finite:
            self.scaler.step(self.optimizer)
            if self.ema is not None:
                self.ema.update(self.model)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if not finite and not self.is_fp16_overflow():
            self.nonfinite_step = step
        self.step = step + 1
        return StepResult(total, grad_norm, lr, finite)

    def is_fp16_overflow(self) -> bool:
        """Whether a non-finite gradient may be an fp16 overflow, which lowers the loss scale until it is below 1."""
        return self.trainer.precision is Precision.fp16 and self.scaler.get_scale() >= 1

    def settle_buckets(self, batch: Any, loss_of: Callable[[nn.Module, Any, int], Tensor]) -> None:
        """Run one backward pass and discard its gradients.

        DDP rearranges its buckets after the first backward pass, and their arrangement decides how a sum over three or
        more ranks is rounded. After this pass, the first step after a resume rounds as in an uninterrupted run.
        """
        with self.autocast():
            loss = loss_of(self.forward_model, batch, self.step)
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        self.buckets_settled = True

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values, for `save_checkpoint`."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.nonfinite_step = state["step"], None
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
