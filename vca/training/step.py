"""One training step, shared by both trainers: accumulation, autocast, clipping, optimizer and EMA, and their state."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vca.runtime.compute import Precision, autocast
from vca.runtime.distributed import World
from vca.runtime.seeding import seed_torch
from vca.training.checkpoint import ema_weights
from vca.training.config import CompileMode, TrainerConfig
from vca.training.ema import Ema
from vca.training.optim import OptimConfig, build_optimizer, learning_rate

CUDA_GRAPHS = (CompileMode["reduce-overhead"], CompileMode["max-autotune"])


@dataclass
class StepResult:
    """Result of one step. The tensors are `()` and on the device: reading one waits for the step.

    Attributes:
        loss: mean loss over this rank's images.
        grad_norm: norm of the gradient over all ranks, before clipping.
        applied: False if the step left weights, optimizer and EMA unchanged.
        failed: whether the gradient was not finite and this was no fp16 overflow.
        lr: learning rate of the step; with `optim.layer_decay`, that of the head.
    """

    loss: Tensor
    grad_norm: Tensor
    applied: Tensor
    failed: Tensor
    lr: float


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
        self.emas = [Ema(self.model, decay) for decay in trainer.ema_decays]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=trainer.precision is Precision.fp16)
        self.step = 0
        self.failed = torch.zeros((), dtype=torch.bool, device=world.device)  # a step since the last load has failed
        self.one = torch.ones((), device=world.device)
        self.warm = world.size == 1  # whether `warm_up` has run

        self.forward_model: Any = self.model
        if world.size > 1:
            ids = [world.local_rank] if world.device.type == "cuda" else None
            # Not static_graph: all parameters are used in each pass, and it fails if the first pass is under no_sync.
            self.forward_model = DistributedDataParallel(self.model, device_ids=ids, gradient_as_bucket_view=True)
        if trainer.compile is not CompileMode["off"]:
            self.forward_model = torch.compile(self.forward_model, dynamic=False, mode=trainer.compile.value)
        # A CUDA graph overwrites the gradients that it returned before, so they are added to other tensors.
        self.keep_gradients = self.accumulation > 1 and trainer.compile in CUDA_GRAPHS
        if self.keep_gradients:
            for parameter in filter(lambda p: p.requires_grad, self.model.parameters()):
                parameter.grad = torch.zeros_like(parameter)

    @property
    def ema(self) -> Ema | None:
        """The EMA of the first decay."""
        return self.emas[0] if self.emas else None

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
            The result. If the gradient is not finite, on every rank alike, the step is not applied. Unless this was an
            fp16 overflow, no later step is applied either, until `load_state_dict`.
        """
        step = self.step
        lr = self.set_learning_rates()
        if not self.model.training:  # after an evaluation
            self.forward_model.train()
        if not self.warm:
            self.warm_up(batches[0], loss_of)
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
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        finite = norm.isfinite()
        applied = finite & ~self.failed
        if self.optim.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.optim.clip_grad, norm)
        # Fused AdamW skips the step where this is 1, as it does for GradScaler.
        self.optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        for ema in self.emas:
            ema.update(self.model, applied)
        self.scaler.update()
        self.clear_gradients()
        failed = ~finite
        if self.scaler.is_enabled():  # an overflow halves the loss scale; below 1 the gradient itself is not finite
            failed = failed & (self.scaler.scale(self.one) < 1)
        self.failed = self.failed | failed
        self.step = step + 1
        return StepResult(total, norm, applied, failed, lr)

    def set_learning_rates(self) -> float:
        """Set the learning rate of each parameter group for the current step, and return that of the head."""
        lr = learning_rate(self.optim, self.step, self.total_steps, self.steps_per_epoch, self.peak_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)

    def warm_up(self, batch: Any, loss_of: Callable[[nn.Module, Any, int], Tensor]) -> None:
        """Compile the model on every rank and settle DDP's buckets, by backward passes whose gradients are discarded.

        No gradient is exchanged while the ranks compile, so a slow one does not exceed the time limit of collectives.

        DDP rearranges its buckets after the first exchange of gradients, and their arrangement decides how a sum over
        three or more ranks is rounded. After this pass, the first step after a resume rounds as in an uninterrupted
        run.
        """

        def discarded_pass() -> None:
            with self.autocast():
                loss = loss_of(self.forward_model, batch, self.step)
            loss.backward()
            self.clear_gradients()

        if self.trainer.compile is not CompileMode["off"]:
            with self.world.wait_for_slowest(), self.forward_model.no_sync():
                discarded_pass()
        discarded_pass()
        self.warm = True

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values, for `save_checkpoint`.

        `ema` is that of the first decay, for checkpoints of any version; `further_emas` exists only with more decays.
        """
        further = {str(ema.decay): ema.module.state_dict() for ema in self.emas[1:]}
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            **({"further_emas": further} if further else {}),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.failed = state["step"], torch.zeros_like(self.failed)
        self.model.load_state_dict(state["model"])
        for ema in self.emas:
            ema.module.load_state_dict(ema_weights(state, ema.decay, self.trainer.ema_decays))
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def length_warnings(state: TrainState) -> Iterator[str]:
    """Yield a warning for each schedule that is longer than the run."""
    warmup = state.optim.warmup_epochs * state.steps_per_epoch
    if warmup >= state.total_steps:
        yield (
            f"optim.warmup_epochs={state.optim.warmup_epochs:g} is {warmup:.0f} steps, but the run has "
            f"{state.total_steps}: the learning rate never reaches its peak"
        )
    profile = state.trainer.profile
    if profile is not None and profile >= state.total_steps:
        yield f"trainer.profile={profile}, but the run has {state.total_steps} steps: no step is profiled"
    for decay in state.trainer.ema_decays:
        if 1 / (1 - decay) > state.total_steps:
            yield (
                f"trainer.ema_decay={decay:g} averages over about {1 / (1 - decay):.0f} steps, but the run has "
                f"{state.total_steps}: the EMA stays close to the initial weights"
            )
