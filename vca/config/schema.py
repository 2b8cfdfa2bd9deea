"""The whole config of each root script, made of the dataclasses that stand beside the code they configure."""

from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import MISSING

from vca.data.augment import AugmentConfig
from vca.data.config import DataConfig
from vca.generation.objective import SamplerConfig
from vca.runtime.errors import check
from vca.runtime.logging import WandbConfig
from vca.training.config import TrainerConfig
from vca.training.optim import OptimConfig


@dataclass
class TrainClsConfig:
    """`train_cls.py`.

    Attributes:
        name: of the run; its directory is `out_dir/name`.
        seed: of everything random.
        model, attention: dataclasses of `models.MODELS` and `vca.attention.ATTENTIONS`.
    """

    name: str = MISSING
    out_dir: str = "outputs"
    seed: int = 0
    model: Any = MISSING
    attention: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        check(self.name not in ("", ".", "..") and "/" not in self.name, "name", "a folder name", self.name)
        check(0 <= self.seed < 2**63, "seed", ">= 0 and below 2^63", self.seed)
        for key in ("num_classes", "in_chans"):
            ours, theirs = getattr(self.model, key), getattr(self.data, key)
            check(ours == theirs, f"model.{key}", f"data.{key}, {theirs}", ours)
        optim, trainer = self.optim, self.trainer
        if trainer.steps is None and optim.cooldown_epochs:
            length, rule = optim.warmup_epochs + optim.cooldown_epochs, "optim.warmup_epochs + optim.cooldown_epochs"
            check(trainer.epochs > length, "trainer.epochs", f"> {rule}, {length:g}", trainer.epochs)
        patience = 30 * trainer.timeout_minutes  # seconds; the other ranks wait for the one that checks
        rule = f"at most half of trainer.timeout_minutes, {patience:g} s"
        check(self.data.check_seconds <= patience, "data.check_seconds", rule, self.data.check_seconds)


@dataclass
class TrainGenConfig:
    """`train_gen.py`.

    Attributes:
        name: of the run; its directory is `out_dir/name`.
        seed: of everything random.
        model, attention, objective: dataclasses of `models.GENERATORS`, `vca.attention.ATTENTIONS` and
            `vca.generation.objective.OBJECTIVES`.
        data: `mean` and `std` are set here: the network sees pixels in [-1, 1].
        sampler: of the pictures that a run draws while it trains.
        samples_per_class: how many samples of each class these pictures show.
        sampled_classes: of how many classes, the first ones.
    """

    name: str = MISSING
    out_dir: str = "outputs"
    seed: int = 0
    model: Any = MISSING
    attention: Any = MISSING
    objective: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    samples_per_class: int = 8
    sampled_classes: int = 10
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        check(self.name not in ("", ".", "..") and "/" not in self.name, "name", "a folder name", self.name)
        check(0 <= self.seed < 2**63, "seed", ">= 0 and below 2^63", self.seed)
        self.data = replace(self.data, mean=[0.5] * self.data.in_chans, std=[0.5] * self.data.in_chans)
        for ours, theirs in (("num_classes", "num_classes"), ("in_channels", "in_chans")):
            value, wanted = getattr(self.model, ours), getattr(self.data, theirs)
            check(value == wanted, f"model.{ours}", f"data.{theirs}, {wanted}", value)
        for key in ("mixup", "cutmix"):
            check(getattr(self.augment, key) == 0, f"augment.{key}", "0 in generation", getattr(self.augment, key))
        check(self.samples_per_class >= 1, "samples_per_class", ">= 1", self.samples_per_class)
        classes = self.data.num_classes
        check(1 <= self.sampled_classes <= classes, "sampled_classes", f"from 1 to {classes}", self.sampled_classes)
        check(self.trainer.init_from is None, "trainer.init_from", "null in train_gen.py", self.trainer.init_from)
        check(not self.trainer.eval_only, "trainer.eval_only", "false in train_gen.py", self.trainer.eval_only)


@dataclass
class DoctorConfig:
    """`scripts/doctor.py`."""

    data: DataConfig = field(default_factory=DataConfig)
