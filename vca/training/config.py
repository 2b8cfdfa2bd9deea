"""How a training goes: length, batch, precision, device, how often what."""

from dataclasses import dataclass

from vca.runtime.compute import Device, Precision
from vca.runtime.errors import ConfigError, check
from vca.training.pretrained import InitWeights


@dataclass
class TrainerConfig:
    """How long, how large, how often.

    Attributes:
        epochs: length of the training; an epoch is `images // global_batch_size` updates.
        steps: length in updates; overrides `epochs`.
        global_batch_size: images an update, over all ranks and accumulation steps.
        micro_batch_size: images a rank takes at once; accumulation follows from it. Null: `global_batch_size / ranks`, none.
        ema_decay: null keeps no average.
        log_every, eval_every, checkpoint_every: in updates; `eval_every=0` evaluates at the end only.
        fid_every: in updates: how often a generator is measured against `fid.reference`; 0 never.
        keep_checkpoints: how many of the newest to keep.
        workers: loader processes a rank; 0 loads in the training process. Results do not depend on it.
        deterministic: ask CUDA for deterministic kernels (exact resume there needs it; slower). CUDA has none for a
            contrast grid that does not divide the token grid, and stops with an error there.
        grad_checkpointing: keep only the input of each block for the backward pass: less memory, about a third slower.
        init_from: file of weights to start from, of this project or of the original repositories; what fits is taken.
        init_weights: of a file that holds several: `ema`, the average where there is one, or `raw`.
        eval_only: evaluate the newest checkpoint of the run directory, or else the weights of `init_from`, and stop.
        timeout_minutes: how long the ranks wait for a lost one.
    """

    epochs: int = 300
    steps: int | None = None
    global_batch_size: int = 1024
    micro_batch_size: int | None = None
    eval_batch_size: int = 250
    precision: Precision = Precision.fp32
    device: Device = Device.auto
    compile: bool = False
    ema_decay: float | None = None
    log_every: int = 50
    eval_every: int = 0
    fid_every: int = 0
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    workers: int = 4
    deterministic: bool = False
    grad_checkpointing: bool = False
    init_from: str | None = None
    init_weights: InitWeights = InitWeights.ema
    eval_only: bool = False
    timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        for key in (
            "epochs",
            "global_batch_size",
            "eval_batch_size",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            check(getattr(self, key) >= 1, f"trainer.{key}", ">= 1", getattr(self, key))
        for key in ("steps", "micro_batch_size"):
            value = getattr(self, key)
            check(value is None or value >= 1, f"trainer.{key}", ">= 1 or null", value)
        for key in ("eval_every", "fid_every", "workers"):
            check(getattr(self, key) >= 0, f"trainer.{key}", ">= 0", getattr(self, key))
        decay_ok = self.ema_decay is None or 0 <= self.ema_decay < 1
        check(decay_ok, "trainer.ema_decay", "in [0, 1) or null", self.ema_decay)
        check(self.timeout_minutes > 0, "trainer.timeout_minutes", "> 0", self.timeout_minutes)

    def micro_batch_on(self, world_size: int) -> tuple[int, int]:
        """`(images a rank takes at once, accumulation steps)` for that many ranks.

        Raises:
            ConfigError: if the global batch cannot be cut that way; names the nearest sizes that can.
        """
        unit = world_size * (self.micro_batch_size or 1)
        if self.global_batch_size % unit:
            below, above = self.global_batch_size // unit * unit, -(-self.global_batch_size // unit) * unit
            valid = f"{below} or {above}" if below else f"{above}"
            times = f" x micro_batch_size {self.micro_batch_size}" if self.micro_batch_size else ""
            raise ConfigError(
                f"trainer.global_batch_size must be a multiple of {world_size} ranks{times}, got {self.global_batch_size}; "
                f"try {valid}"
            )
        micro = self.micro_batch_size or self.global_batch_size // world_size
        return micro, self.global_batch_size // (world_size * micro)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Length of the training in updates."""
        return self.steps if self.steps is not None else self.epochs * steps_per_epoch
