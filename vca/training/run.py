"""A training run around its updates, the same for both trainers: resume, reports, checkpoints, the end."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vca.runtime.compute import Precision
from vca.runtime.distributed import World
from vca.runtime.errors import NonFiniteError, PreemptedError
from vca.runtime.metrics_log import Reporter, WandbConfig, WandbMirror
from vca.runtime.rundir import RunDirectory
from vca.runtime.signals import StopRequest, catch_stop_signals
from vca.training.checkpoint import checkpoint_path, load_latest_for_all, must_fit, save_checkpoint
from vca.training.config import TrainerConfig
from vca.training.curves import plot_curves
from vca.training.step import StepResult, TrainState

MASK = 2**63 - 1


class TrainingRun:
    """Counts what the updates of a `TrainState` used and cost, reports it, and keeps checkpoints.

    Attributes:
        consumed: sum of the fingerprints of all images used so far, over all ranks, modulo 2^63. Two runs that used
            the same images the same number of times agree on it.
    """

    def __init__(self, folder: RunDirectory, state: TrainState, trainer: TrainerConfig, world: World) -> None:
        self.folder, self.state, self.trainer, self.world = folder, state, trainer, world
        self.consumed = 0
        self.pending = 0  # fingerprints of this rank not yet summed over the ranks
        self.loss = torch.zeros((), device=world.device)  # sum over this rank's updates since the last report
        self.updates = 0  # how many these are
        self.unsaved = 0  # applied since the newest checkpoint
        self.timed = 0  # how many of them this process made, and in how long; neither counts pauses
        self.seconds = 0.0
        self.waited = 0.0  # of these seconds, for data
        self.clock = time.perf_counter()
        self.reporter = Reporter()
        self.saved_step = -1  # of the newest checkpoint
        self.reported: set[str] = set()  # keys of the records of the current step, as far as it was resumed
        self.stop = StopRequest()

    @property
    def finished(self) -> bool:
        """Whether all updates are made."""
        return self.state.step >= self.state.total_steps

    def resume(self) -> bool:
        """Load the newest intact checkpoint; False if there is none.

        Raises:
            ConfigError: if all checkpoints are corrupt, or the newest one is another model's.
        """
        saved = load_latest_for_all(self.folder.checkpoints, self.world)
        if saved is None:
            return False
        with must_fit(checkpoint_path(self.folder.checkpoints, saved["step"])):
            self.state.load_state_dict(saved)
        step = self.saved_step = self.state.step
        self.reported = self.world.from_main(
            lambda: {key for record in self.folder.records() if record["step"] == step for key in record}
        )
        self.consumed = saved["consumed"]
        # Of the mean loss over all ranks, each now holds the same part.
        self.loss, self.updates = saved["report"]["loss"].to(self.world.device), saved["report"]["updates"]
        return True

    @contextmanager
    def open(self, name: str, config: dict[str, Any], wandb: WandbConfig) -> Iterator[None]:
        """Open the run directory for writing, drop the reports that will be made again; however it ends, close it.

        From here on a signal to stop waits for `leave_if_asked`.
        """
        step, total = self.state.step, self.state.total_steps
        self.world.from_main(lambda: self.folder.begin(config, self.world, step))
        if self.world.is_main:
            self.reporter = Reporter(self.folder, step, total, self.trainer.global_batch_size)
            self.reporter.wandb = WandbMirror(wandb, self.folder.path, name, config)
        self.clock = time.perf_counter()
        with catch_stop_signals() as self.stop:
            try:
                yield
            finally:
                self.reporter.close()

    def log_setup(self, name: str, model: str, data: str) -> None:
        """Say what is about to happen: the run, the model (its name, with what), the data."""
        state, trainer = self.state, self.trainer
        parameters = sum(p.numel() for p in state.model.parameters())
        self.reporter.log(
            f"{name}: {model}, {parameters / 1e6:.3f} M parameters\n"
            f"{data}\n"
            f"{state.total_steps - state.step} of {state.total_steps} updates of {trainer.global_batch_size} images "
            f"({self.world.size} rank(s) x {state.accumulation} x {state.micro_batch_size}), peak lr {state.peak_lr:.3g}, "
            f"{trainer.precision.value} on {self.world.device.type} ({torch.get_num_threads()} threads)"
        )

    def timing(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches; how long this rank waited for them is reported."""
        source = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(source, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - start
            yield batch

    def due(self, every: int, key: str = "") -> bool:
        """Whether something that happens every so many updates (0: only at the end) happens now.

        With `key`, only if no record of this step has it yet: a run that was killed after a checkpoint and before the
        evaluation of the same step evaluates when it resumes.
        """
        step = self.state.step
        return (self.finished or (every > 0 and step > 0 and step % every == 0)) and key not in self.reported

    def record(self, update: StepResult, batches: Sequence[Any]) -> None:
        """Account for an update; report if it is time.

        Raises:
            NonFiniteError: on every rank alike, if the gradient was not finite.
        """
        if not update.applied and not self.is_fp16_overflow():
            indices = [index for batch in batches for index in batch.indices.tolist()]
            failure = {"step": self.state.step - 1, "grad_norm": str(update.grad_norm), "loss": str(float(update.loss))}
            self.folder.write_failure(self.world.rank, {**failure, "indices": indices})
            raise NonFiniteError(
                f"gradient norm {update.grad_norm} in step {self.state.step - 1}; loss and image indices of each rank "
                f"are in {self.folder.path}/nonfinite_rank*.json; {self.newest()}"
            )
        self.reported = set()
        self.pending += sum(int(batch.fingerprints.sum()) for batch in batches)
        if update.applied:
            self.loss += update.loss
            self.updates += 1
            self.unsaved += 1
        self.timed += 1
        self.seconds += time.perf_counter() - self.clock
        self.clock = time.perf_counter()
        self.reporter.advance()
        if self.due(self.trainer.log_every):
            self.report(update)

    def is_fp16_overflow(self) -> bool:
        """In fp16 an overflow only lowers the loss scale, until there is nothing left to lower, or no step left."""
        never_applied = self.saved_step < 0 and self.unsaved == 0
        if self.trainer.precision is not Precision.fp16 or (self.finished and never_applied):
            return False
        return self.state.scaler.get_scale() >= 1

    def newest(self) -> str:
        """What the newest checkpoint is."""
        return f"the newest checkpoint is of step {self.saved_step}" if self.saved_step >= 0 else "no checkpoint exists"

    def report(self, update: StepResult) -> None:
        """Write a record of the updates since the last one.

        `data_wait` is the share of the time that the rank which waits longest for its data waits, `data_wait_rank`: the
        others wait for it. `overflows` is the number of steps that fp16 skipped; `loss` is null if it skipped all.
        """
        overflows = (self.state.step - 1) % self.trainer.log_every + 1 - self.updates
        waits = self.world.gather(self.waited / self.seconds)
        self.write(
            {
                "epoch": self.state.step / self.state.steps_per_epoch,
                "loss": self.mean_loss().item() / self.updates if self.updates else None,
                "lr": update.lr,
                "grad_norm": update.grad_norm if update.applied else None,
                **({"overflows": overflows} if overflows else {}),
                "consumed": self.sum_consumed(),
                "images_per_second": self.timed * self.trainer.global_batch_size / self.seconds,
                **({"data_wait": max(waits), "data_wait_rank": waits.index(max(waits))} if waits else {}),
            }
        )
        self.loss.zero_()
        self.updates, self.timed, self.seconds, self.waited = 0, 0, 0.0, 0.0

    def mean_loss(self) -> Tensor:
        """The sum of losses since the last report, averaged over the ranks and the same on each."""
        self.loss = self.world.sum(self.loss) / self.world.size
        return self.loss

    def sum_consumed(self) -> int:
        """Bring `consumed` up to date over all ranks."""
        total = self.world.sum(torch.tensor(self.pending & MASK, device=self.world.device))  # int64, wraps around
        self.consumed = (self.consumed + int(total)) & MASK
        self.pending = 0
        return self.consumed

    def write(self, record: dict[str, Any]) -> None:
        """Report something about the current step."""
        self.reporter.write({"step": self.state.step, **record})
        self.clock = time.perf_counter()

    def save(self) -> None:
        """Write a checkpoint; it exists when this returns, on every rank.

        While fp16 has skipped every step since the last one, the last one stays the newest: resuming there makes the
        same steps again.

        Raises:
            RuntimeError: on every rank alike, if it cannot be written. The previous checkpoints are intact.
        """
        if not self.unsaved and not (self.finished and self.saved_step >= 0):
            return
        report = {"loss": self.mean_loss(), "updates": self.updates}
        state = {**self.state.state_dict(), "consumed": self.sum_consumed(), "report": report}
        folder, keep = self.folder.checkpoints, self.trainer.keep_checkpoints
        self.world.from_main(lambda: save_checkpoint(folder, self.state.step, state, keep))
        self.saved_step, self.unsaved = self.state.step, 0
        self.clock = time.perf_counter()

    def exit_if_signalled(self) -> None:
        """Once a signal asked any rank to stop: save, and leave on every rank after the same update.

        Raises:
            PreemptedError: on every rank alike; a training that has just made its last update ends as always.
        """
        asked = self.world.sum(torch.tensor(self.stop.received is not None, dtype=torch.int, device=self.world.device))
        if asked == 0 or self.finished:
            return
        if self.saved_step != self.state.step:
            self.save()
        signal = self.stop.received or "a signal to another rank"
        step = f"saved after step {self.saved_step}" if self.saved_step >= 0 else "no step to save"
        raise PreemptedError(
            f"{self.folder.path}: {signal}; {step} of {self.state.total_steps}, the same command goes on from there"
        )

    def draw(self, name: str) -> None:
        """Draw the curves of all that is reported."""
        if self.world.is_main:
            file = self.folder.path / "curves.png"
            with self.reporter.expendable(file):
                plot_curves({name: self.folder.records()}, file)
        self.clock = time.perf_counter()
