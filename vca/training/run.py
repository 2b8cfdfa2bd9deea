"""A training run around its steps, the same for both trainers: resume, reports, checkpoints, stopping."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vca.runtime.distributed import World
from vca.runtime.errors import NonFiniteError, PreemptedError
from vca.runtime.files import write_text
from vca.runtime.metrics_log import Reporter, WandbConfig, WandbMirror, WandbMode
from vca.runtime.rundir import RunDirectory
from vca.runtime.signals import StopRequest, catch_stop_signals
from vca.training.checkpoint import checkpoint_path, load_latest_for_all, must_fit, save_checkpoint
from vca.training.config import TrainerConfig
from vca.training.curves import plot_curves
from vca.training.step import StepResult, TrainState

MASK = 2**63 - 1


def log_on_main(world: World, line: str) -> None:
    """Print a line on rank 0, before the run directory and its reporter are open."""
    if world.is_main:
        print(line, flush=True)


class TrainingRun:
    """Reports the steps of a `TrainState`, writes and loads its checkpoints, and handles stop signals.

    Attributes:
        data_checksum: sum of the fingerprints of all images used so far, over all ranks, modulo 2^63; equal for two
            runs that used the same images the same number of times.
    """

    def __init__(self, run_dir: RunDirectory, state: TrainState, trainer: TrainerConfig, world: World) -> None:
        self.run_dir, self.state, self.trainer, self.world = run_dir, state, trainer, world
        self.data_checksum = 0
        self.local_checksum = 0  # of this rank, not yet summed over the ranks

        # Since the last report:
        self.loss = torch.zeros((), device=world.device)  # sum over this rank's applied steps
        self.applied = 0  # steps
        self.overflows = 0  # steps that fp16 skipped
        self.timed = 0  # steps of this process, which took `seconds`, `waited` of them for data; without pauses
        self.seconds = 0.0
        self.waited = 0.0
        self.clock = time.perf_counter()

        self.unsaved = 0  # applied steps since the newest checkpoint
        self.saved_step = -1  # step of the newest checkpoint
        self.reported: set[str] = set()  # keys of the records of the step at which the run was resumed
        self.reporter = Reporter()
        self.stop = StopRequest()

    @property
    def finished(self) -> bool:
        return self.state.step >= self.state.total_steps

    def resume(self) -> bool:
        """Load the newest intact checkpoint; return False if there is none.

        Raises:
            ConfigError: if all checkpoints are corrupt, or the newest one is of another model.
        """
        saved = load_latest_for_all(self.run_dir.checkpoints, self.world)
        if saved is None:
            return False
        with must_fit(checkpoint_path(self.run_dir.checkpoints, saved["step"])):
            self.state.load_state_dict(saved)
        step = self.saved_step = self.state.step
        self.reported = self.world.from_main(
            lambda: {key for record in self.run_dir.records() if record["step"] == step for key in record}
        )
        self.data_checksum = saved["consumed"]
        report = saved["report"]
        self.loss = report["loss"].to(self.world.device)  # mean over the ranks, the same on each
        self.applied, self.overflows = report["updates"], report.get("overflows", 0)
        return True

    @contextmanager
    def open(self, name: str, config: dict[str, Any], wandb: WandbConfig) -> Iterator[None]:
        """Open the run directory for writing, drop the records after the current step, and close it at the end.

        Inside, a stop signal takes effect at the next `exit_if_signalled`.
        """
        step, total = self.state.step, self.state.total_steps
        self.world.from_main(lambda: self.run_dir.begin(config, self.world, step))
        if self.world.is_main:
            self.reporter = Reporter(self.run_dir, step, total, self.trainer.global_batch_size)
            if wandb.mode is not WandbMode.off:
                self.reporter.wandb = WandbMirror(wandb, self.run_dir.path, name, config)
        self.clock = time.perf_counter()
        with catch_stop_signals() as self.stop:
            try:
                yield
            finally:
                self.reporter.close()

    def log_setup(self, name: str, model: str, data: str) -> None:
        """Log model and data, the steps to run, the batch size, and settings that may be mistakes."""
        state, trainer = self.state, self.trainer
        parameters = sum(p.numel() for p in state.model.parameters())
        left = state.total_steps - state.step
        start = f"resumed from step {state.step}, {left} steps left" if state.step else f"starting, {left} steps"
        self.reporter.log(
            f"{name}: {model}, {parameters / 1e6:.3f} M parameters\n"
            f"{data}\n"
            f"global batch size {trainer.global_batch_size} ({self.world.size} rank(s) x {state.accumulation} x "
            f"{state.micro_batch_size}), peak lr {state.peak_lr:.3g}, {trainer.precision.value} on "
            f"{self.world.device.type} ({torch.get_num_threads()} threads)\n"
            f"{start}{'; the first step compiles the model' if trainer.compile else ''}"
        )
        for warning in length_warnings(state):
            self.reporter.log(f"warning: {warning}")

    def timing(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches and measure how long this rank waits for them."""
        source = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(source, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - start
            yield batch

    def due(self, every: int, key: str = "") -> bool:
        """Whether an action with an interval of `every` steps (0: only at the end) is due.

        With `key`, only if no record of this step has it: a run that was killed between a checkpoint and the evaluation
        of the same step evaluates when it resumes.
        """
        step = self.state.step
        return (self.finished or (every > 0 and step > 0 and step % every == 0)) and key not in self.reported

    def record(self, result: StepResult, batches: Sequence[Any]) -> None:
        """Account for a step, and report if due.

        Raises:
            NonFiniteError: on every rank, if the gradient was not finite.
        """
        if not result.applied and not self.is_fp16_overflow():
            indices = [index for batch in batches for index in batch.indices.tolist()]
            failure = {"step": self.state.step - 1, "grad_norm": str(result.grad_norm), "loss": str(float(result.loss))}
            file = self.run_dir.path / f"nonfinite_rank{self.world.rank}.json"
            write_text(file, json.dumps({**failure, "indices": indices}) + "\n")
            newest = f"the newest checkpoint is of step {self.saved_step}" if self.saved_step >= 0 else ""
            raise NonFiniteError(
                f"gradient norm {result.grad_norm} in step {self.state.step - 1}; loss and image indices of each rank "
                f"are in {self.run_dir.path}/nonfinite_rank*.json; {newest or 'no checkpoint exists'}"
            )
        self.reported = set()
        self.local_checksum += sum(int(batch.fingerprints.sum()) for batch in batches)
        if result.applied:
            self.loss += result.loss
            self.applied += 1
            self.unsaved += 1
        else:
            self.overflows += 1
        self.timed += 1
        self.seconds += time.perf_counter() - self.clock
        self.clock = time.perf_counter()
        self.reporter.advance()
        if self.due(self.trainer.log_every):
            self.report(result)

    def is_fp16_overflow(self) -> bool:
        """Whether the skipped step was a tolerable fp16 overflow: the run has applied a step or has steps left."""
        never_applied = self.saved_step < 0 and self.unsaved == 0
        return self.state.is_fp16_overflow() and not (self.finished and never_applied)

    def report(self, result: StepResult) -> None:
        """Write a record of the steps since the last report.

        `data_wait` is the fraction of the time that `data_wait_rank`, the slowest rank, waits for its data. `overflows`
        is the number of steps that fp16 skipped; `loss` is null if it skipped all of them.
        """
        waits = self.world.gather(self.waited / self.seconds)
        self.write(
            {
                "epoch": self.state.step / self.state.steps_per_epoch,
                "loss": self.mean_loss().item() / self.applied if self.applied else None,
                "lr": result.lr,
                "grad_norm": result.grad_norm if result.applied else None,
                **({"overflows": self.overflows} if self.overflows else {}),
                "consumed": self.sum_checksum(),
                "images_per_second": self.timed * self.trainer.global_batch_size / self.seconds,
                **({"data_wait": max(waits), "data_wait_rank": waits.index(max(waits))} if waits else {}),
            }
        )
        self.loss.zero_()
        self.applied, self.overflows, self.timed, self.seconds, self.waited = 0, 0, 0, 0.0, 0.0

    def mean_loss(self) -> Tensor:
        """Average the loss since the last report over the ranks, in place."""
        self.loss = self.world.sum(self.loss) / self.world.size
        return self.loss

    def sum_checksum(self) -> int:
        """Update and return `data_checksum`."""
        total = self.world.sum(torch.tensor(self.local_checksum & MASK, device=self.world.device))  # int64 wraps around
        self.data_checksum = (self.data_checksum + int(total)) & MASK
        self.local_checksum = 0
        return self.data_checksum

    def write(self, record: dict[str, Any]) -> None:
        """Write a record of the current step."""
        self.reporter.write({"step": self.state.step, **record})
        self.clock = time.perf_counter()

    def save(self) -> None:
        """Write a checkpoint; it exists when this returns, on every rank.

        If fp16 has skipped every step since the newest checkpoint, nothing is written: a resume repeats these steps.

        Raises:
            RuntimeError: on every rank, if the checkpoint cannot be written. The previous ones are intact.
        """
        if not self.unsaved and not (self.finished and self.saved_step >= 0):
            return
        report = {"loss": self.mean_loss(), "updates": self.applied, "overflows": self.overflows}
        state = {**self.state.state_dict(), "consumed": self.sum_checksum(), "report": report}
        folder, keep = self.run_dir.checkpoints, self.trainer.keep_checkpoints
        self.world.from_main(lambda: save_checkpoint(folder, self.state.step, state, keep))
        self.saved_step, self.unsaved = self.state.step, 0
        self.clock = time.perf_counter()

    def exit_if_signalled(self) -> None:
        """Save a checkpoint and exit on every rank, after the same step, if any rank received a stop signal.

        Raises:
            PreemptedError: on every rank. A run that has completed its last step ends normally instead.
        """
        signalled = torch.tensor(self.stop.received is not None, dtype=torch.int, device=self.world.device)
        if self.world.sum(signalled) == 0 or self.finished:
            return
        if self.saved_step != self.state.step:
            self.save()
        signal = self.stop.received or "signal to another rank"
        saved = f"checkpoint saved at step {self.saved_step} of {self.state.total_steps}"
        saved = saved if self.saved_step >= 0 else "no step to save"
        raise PreemptedError(f"{self.run_dir.path}: {signal}: {saved}; rerun the same command to resume")

    def plot_curves(self, name: str) -> None:
        """Plot all records as `curves.png`."""
        if self.world.is_main:
            file = self.run_dir.path / "curves.png"
            with self.reporter.expendable(file):
                plot_curves({name: self.run_dir.records()}, file)
        self.clock = time.perf_counter()


def length_warnings(state: TrainState) -> Iterator[str]:
    """Yield a warning for each schedule that is longer than the run."""
    warmup = state.optim.warmup_epochs * state.steps_per_epoch
    if warmup >= state.total_steps:
        yield (
            f"optim.warmup_epochs={state.optim.warmup_epochs:g} is {warmup:.0f} steps, but the run has "
            f"{state.total_steps}: the learning rate never reaches its peak"
        )
    decay = state.trainer.ema_decay
    if decay is not None and 1 / (1 - decay) > state.total_steps:
        yield (
            f"trainer.ema_decay={decay:g} averages over about {1 / (1 - decay):.0f} steps, but the run has "
            f"{state.total_steps}: the EMA stays close to the initial weights"
        )
