"""Trainer settings: length, batch sizes, precision, device, intervals of logging, evaluation and checkpoints."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from vca.runtime.compute import Device, Precision
from vca.runtime.errors import ConfigError, check
from vca.training.ema import list_decays
from vca.training.pretrained import InitWeights

# Mode of `torch.compile`; `off` does not compile.
CompileMode = Enum(
    "CompileMode",
    {"off": "off", "default": "default", "reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune"},
)


@dataclass
class TrainerConfig:
    """Length, batch sizes, precision, device, intervals.

    Attributes:
        epochs: length of the run; an epoch is `images // global_batch_size` steps.
        steps: length of the run in steps; overrides `epochs`.
        global_batch_size: images per step, over all ranks and accumulation steps.
        micro_batch_size: images per forward pass of a rank, which sets the accumulation steps; null is
            `global_batch_size / world size`, without accumulation.
        precision: `fp32`, `tf32` (float32 with TF32 matrix products), or autocast to `bf16` or `fp16`.
        device: `cpu` or `cuda`; `auto` is `cuda` if there is a GPU.
        compile: mode of `torch.compile` for the training step: `default`, `reduce-overhead` (CUDA graphs),
            `max-autotune` (CUDA graphs, and a choice of kernels by timing), or `off`.
        ema_decay: decay per step of the exponential moving average (EMA) of the weights, which averages over about
            1 / (1 - ema_decay) steps; null disables it. A list keeps an EMA for each decay. Evaluations report the
            first one as `ema/...`, the others as `ema_<decay>/...`.
        log_every: interval of reports in steps; may change on resume.
        checkpoint_every: interval of checkpoints in steps; may change on resume.
        snapshot_every: interval of snapshots in steps; 0 is never; may change on resume. A snapshot is written at the
            end too, and contains the EMA weights of a decay as `snapshots/step_<step>_ema_<decay>.safetensors`. It is
            never deleted.
        eval_every: interval of evaluations in steps; 0 evaluates only at the end; may change on resume.
        profile: step from which the profiler of PyTorch records three steps; null is never. The run directory gets the
            trace, which Perfetto opens.
        keep_checkpoints: number of newest checkpoints to keep.
        workers: loader workers per rank; 0 loads in the main process. Results do not depend on it.
        deterministic: use deterministic CUDA kernels: slower, required for bit-exact resume on a GPU. CUDA has none for
            a contrast grid that does not divide the token grid, which is an error.
        grad_checkpointing: save only the input of each block for backward: less memory, about a third slower.
        timeout_minutes: time limit of a collective, after which a lost rank ends the run.
    """

    epochs: int = 300
    steps: int | None = None
    global_batch_size: int = 1024
    micro_batch_size: int | None = None
    precision: Precision = Precision.fp32
    device: Device = Device.auto
    compile: CompileMode = CompileMode["off"]
    ema_decay: Any = None
    log_every: int = 50
    eval_every: int = 0
    checkpoint_every: int = 1000
    snapshot_every: int = 0
    profile: int | None = None
    keep_checkpoints: int = 2
    workers: int = 4
    deterministic: bool = False
    grad_checkpointing: bool = False
    timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        for key in ("epochs", "global_batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
            check(getattr(self, key) >= 1, f"trainer.{key}", ">= 1", getattr(self, key))
        for key in ("steps", "micro_batch_size"):
            value = getattr(self, key)
            check(value is None or value >= 1, f"trainer.{key}", ">= 1 or null", value)
        check(self.profile is None or self.profile >= 0, "trainer.profile", ">= 0 or null", self.profile)
        for key in ("eval_every", "snapshot_every", "workers"):
            check(getattr(self, key) >= 0, f"trainer.{key}", ">= 0", getattr(self, key))
        decays = list_decays(self.ema_decay)
        self.ema_decay = decays if len(decays) > 1 else decays[0] if decays else None  # one form for each meaning
        no_ema = "0 with trainer.ema_decay=null, as a snapshot contains EMA weights"
        check(bool(decays) or not self.snapshot_every, "trainer.snapshot_every", no_ema, self.snapshot_every)
        check(self.timeout_minutes > 0, "trainer.timeout_minutes", "> 0", self.timeout_minutes)

    @property
    def ema_decays(self) -> list[float]:
        """All decays; empty without an EMA."""
        return list_decays(self.ema_decay)

    def micro_batch_on(self, world_size: int) -> tuple[int, int]:
        """Return `(micro-batch size, accumulation steps)` of each rank.

        Raises:
            ConfigError: if the global batch size is not divisible; the message has the nearest valid sizes.
        """
        unit = world_size * (self.micro_batch_size or 1)
        if self.global_batch_size % unit:
            below, above = self.global_batch_size // unit * unit, -(-self.global_batch_size // unit) * unit
            valid = f"{below} or {above}" if below else f"{above}"
            times = f" x micro_batch_size {self.micro_batch_size}" if self.micro_batch_size else ""
            raise ConfigError(
                f"trainer.global_batch_size must be a multiple of {world_size} ranks{times}, "
                f"got {self.global_batch_size}; try {valid}"
            )
        micro = self.micro_batch_size or self.global_batch_size // world_size
        return micro, self.global_batch_size // (world_size * micro)

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.steps if self.steps is not None else self.epochs * steps_per_epoch


@dataclass
class ClassifierTrainerConfig(TrainerConfig):
    """Trainer settings of `train_cls.py`.

    Attributes:
        eval_batch_size: images per forward pass of a rank in an evaluation.
        init_from: file of initial weights, of this project or the original repositories; loads matching parameters.
        init_weights: `ema` or `raw`, for a file with both; `ema` falls back to `raw`.
        freeze_layers: number of layers, from the stem up, that are not trained; a negative number counts from the head:
            -1 is all but the head (linear probing). Null trains all. The layers are those of `optim.layer_decay`.
        eval_only: only evaluate the newest checkpoint of the run, or `init_from` if it has none.
        eval_snapshots: with `eval_only`, evaluate all snapshots of the run instead, and write `snapshots.json` and
            `snapshots.png`.
    """

    eval_batch_size: int = 250
    init_from: str | None = None
    init_weights: InitWeights = InitWeights.ema
    freeze_layers: int | None = None
    eval_only: bool = False
    eval_snapshots: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = self.eval_only or not self.eval_snapshots
        check(allowed, "trainer.eval_snapshots", "false without trainer.eval_only", self.eval_snapshots)
        check(self.eval_batch_size >= 1, "trainer.eval_batch_size", ">= 1", self.eval_batch_size)
        frozen = self.freeze_layers
        check(frozen != 0, "trainer.freeze_layers", "null or an integer other than 0", frozen)
        initialized = frozen is None or self.init_from is not None
        check(initialized, "trainer.freeze_layers", "null without trainer.init_from, which sets frozen weights", frozen)


@dataclass
class GeneratorTrainerConfig(TrainerConfig):
    """Trainer settings of `train_gen.py`.

    Attributes:
        fid_every: interval in steps of measuring the generator against `fid.reference`, 0 never.
    """

    fid_every: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.fid_every >= 0, "trainer.fid_every", ">= 0", self.fid_every)
