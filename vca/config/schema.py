"""The whole config of each root script, made of the dataclasses that stand beside the code they configure."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from vca.data.augment import AugmentConfig
from vca.data.config import DataConfig
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
class DoctorConfig:
    """`scripts/doctor.py`."""

    data: DataConfig = field(default_factory=DataConfig)
