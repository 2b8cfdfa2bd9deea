"""One update, shared by both trainers: accumulation, autocast, clipping, the optimizer, EMA, and their state."""

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
from vca.runtime.seeding import seed_torch
from vca.training.config import TrainerConfig
from vca.training.ema import Ema
from vca.training.optim import OptimConfig, build_optimizer, learning_rate


@dataclass
class StepResult:
    """What one update tells: mean loss over this rank's images `()`, norm of the global gradient, learning rate."""

    loss: Tensor
    grad_norm: float
    lr: float
    applied: bool


class TrainState:
    """Model, optimizer, EMA and gradient scaler: everything that an update changes and a checkpoint holds.

    `model` stays the bare network; `forward_model` is its DDP or compiled wrapper. Names, parameter groups, EMA and
    checkpoints come from the bare one.

    Args:
        model: the network, on any device; it is moved to `world.device`.
        trainer, optim: configs.
        world: this process.
        steps_per_epoch: for the schedule, whose warm-up is given in epochs.
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
        self.settled = False

        self.forward_model: Any = self.model
        if world.size > 1:
            ids = [world.local_rank] if world.device.type == "cuda" else None
            self.forward_model = DistributedDataParallel(self.model, device_ids=ids)
        if trainer.compile:
            self.forward_model = torch.compile(self.forward_model)

    def autocast(self) -> Any:
        """Autocast in the configured precision."""
        return autocast(self.trainer.precision, self.world.device)

    def train_step(
        self, batches: Sequence[Any], loss_of: Callable[[nn.Module, Any, int], Tensor], seed: int
    ) -> StepResult:
        """Make update number `self.step` from this rank's micro-batches.

        Dropout and stochastic depth are seeded by `(seed, step, micro-batch)`, where micro-batches are counted over
        all ranks: with `trainer.micro_batch_size` set, the numbers do not depend on how many ranks share the work.

        Args:
            batches: `accumulation` micro-batches, on the device.
            loss_of: maps the network, a micro-batch and the step to the mean loss of the micro-batch.
            seed: the run's seed.

        Returns:
            The result; on a gradient that is not finite `applied` is False, and parameters, optimizer and EMA are as
            they were. The gradient is the same on every rank, so all ranks see it at once.
        """
        step = self.step
        lr = learning_rate(self.optim, step, self.total_steps, self.steps_per_epoch, self.peak_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not self.model.training:  # after an evaluation
            self.forward_model.train()
        if self.world.size > 1 and not self.settled:
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
        self.step = step + 1
        return StepResult(total, grad_norm, lr, finite)

    def settle_buckets(self, batch: Any, loss_of: Callable[[nn.Module, Any, int], Tensor]) -> None:
        """Make one backward pass for nothing.

        DDP rearranges its buckets after the first backward pass, and the arrangement decides how a sum over three or
        more ranks rounds. With that pass out of the way, the first update after a resume is arranged, and so rounds,
        as the same update of an unbroken run.
        """
        with self.autocast():
            loss = loss_of(self.forward_model, batch, self.step)
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        self.settled = True

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, for `save_checkpoint`."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
