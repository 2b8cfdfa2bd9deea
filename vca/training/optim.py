"""AdamW, its parameter groups, and the learning rate as a pure function of the step."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn

from vca.runtime.errors import check


class Schedule(Enum):
    """Learning rate after the warm-up: cosine decay to `min_lr`, or constant as in DiT and SiT."""

    cosine = "cosine"
    constant = "constant"


class ScheduleUnit(Enum):
    """When the learning rate changes.

    `step`: every step, as in Swin. `epoch`: at the start of each epoch, as in timm's training script and CSWin.
    `epoch_late`: one epoch later, as in DeiT and PVT, which pass the index of the finished epoch to the scheduler, so
    that epochs 0 and 1 both use `warmup_lr`.
    """

    step = "step"
    epoch = "epoch"
    epoch_late = "epoch_late"


@dataclass
class OptimConfig:
    """AdamW with linear warm-up and cosine decay.

    Attributes:
        lr: peak learning rate; null is `base_lr * trainer.global_batch_size / 512`.
        base_lr: peak learning rate of 512 images per step; used if `lr` is null.
        weight_decay: weight decay of parameters with two or more dimensions; a model can exclude more.
        betas: decay rates of AdamW's averages of the gradient and of its square.
        eps: constant in the denominator of AdamW.
        schedule: learning rate after the warm-up: `cosine` (decay to `min_lr`) or `constant`.
        schedule_unit: the learning rate changes every `step`, every `epoch`, or one epoch late (`epoch_late`, DeiT).
        warmup_epochs: length of the linear warm-up from `warmup_lr`; fractions are allowed.
        cooldown_epochs: epochs at `min_lr` at the end of the run, included in its length.
        warmup_lr: learning rate at the first step of the warm-up.
        min_lr: final learning rate of the cosine.
        clip_grad: maximum norm of the gradient; null disables clipping.
        layer_decay: factor of the learning rate per layer below the head, for fine-tuning, as in BEiT and timm. The
            layers are the stem, each block (PVT: each stage) and the head. Null is one learning rate for all.
    """

    lr: float | None = None
    base_lr: float = 5e-4
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    schedule: Schedule = Schedule.cosine
    schedule_unit: ScheduleUnit = ScheduleUnit.step
    warmup_epochs: float = 5.0
    cooldown_epochs: float = 0.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    clip_grad: float | None = None
    layer_decay: float | None = None

    def __post_init__(self) -> None:
        check(self.lr is None or self.lr > 0, "optim.lr", "> 0 or null", self.lr)
        check(self.base_lr > 0, "optim.base_lr", "> 0", self.base_lr)
        check(self.weight_decay >= 0, "optim.weight_decay", ">= 0", self.weight_decay)
        two = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        check(two, "optim.betas", "two numbers in [0, 1)", list(self.betas))
        check(self.eps > 0, "optim.eps", "> 0", self.eps)
        for key in ("warmup_epochs", "cooldown_epochs", "warmup_lr", "min_lr"):
            check(getattr(self, key) >= 0, f"optim.{key}", ">= 0", getattr(self, key))
        check(self.lr is None or self.min_lr <= self.lr, "optim.min_lr", f"<= optim.lr {self.lr}", self.min_lr)
        check(self.clip_grad is None or self.clip_grad > 0, "optim.clip_grad", "> 0 or null", self.clip_grad)
        decay_ok = self.layer_decay is None or 0 < self.layer_decay <= 1
        check(decay_ok, "optim.layer_decay", "in (0, 1] or null", self.layer_decay)

    def peak_lr(self, global_batch_size: int) -> float:
        """Return `lr`, or `base_lr` by the linear scaling rule."""
        return self.lr if self.lr is not None else self.base_lr * global_batch_size / 512


def learning_rate(config: OptimConfig, step: int, total_steps: int, steps_per_epoch: int, peak: float) -> float:
    """Return the learning rate of step number `step`, from 0.

    Linear warm-up, then a half cosine over the whole run without cooldown, then `min_lr` (or the peak if it is lower).
    """
    end = min(config.min_lr, peak)
    epoch = step / steps_per_epoch
    if config.schedule_unit is not ScheduleUnit.step:
        epoch = step // steps_per_epoch
    if config.schedule_unit is ScheduleUnit.epoch_late:
        epoch = max(epoch - 1, 0)
    length = total_steps / steps_per_epoch - config.cooldown_epochs
    if epoch < config.warmup_epochs:
        return config.warmup_lr + (peak - config.warmup_lr) * epoch / config.warmup_epochs
    if config.schedule is Schedule.constant:
        return peak
    if epoch >= length:
        return end
    return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * epoch / length))


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float | None = None) -> list[dict]:
    """Split the trainable parameters into two groups, with and without weight decay; with `layer_decay`, per layer.

    Without: every 1-D parameter (biases, norm weights, lambda vectors) and the names in `model.no_weight_decay()`.
    `model` must be the bare model: DDP and `torch.compile` add a prefix to the names.

    Returns:
        Groups with `params` and `weight_decay`; with `layer_decay` also `lr_scale`, the factor of the learning rate:
        `layer_decay` to the power of the number of layers above, 1 for the head.

    Raises:
        ConfigError: with `layer_decay`, if the model has no `group_matcher`, which names its layers.
    """
    listed: Any = getattr(model, "no_weight_decay", set)
    no_decay: set[str] = listed()
    if layer_decay is not None:
        from timm.optim import param_groups_layer_decay

        has_layers = hasattr(model, "group_matcher")
        check(has_layers, "optim.layer_decay", f"null for {type(model).__name__}, which has no layers", layer_decay)
        return param_groups_layer_decay(model, weight_decay, no_decay, layer_decay=layer_decay)
    groups: tuple[list, list] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim <= 1 or name in no_decay].append(parameter)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


def build_optimizer(config: OptimConfig, model: nn.Module, peak: float) -> torch.optim.AdamW:
    """Build a fused AdamW over `parameter_groups`."""
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    return torch.optim.AdamW(groups, lr=peak, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)
