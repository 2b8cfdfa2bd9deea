"""A training run around its steps, the same for both trainers: resume, reports, checkpoints, stopping."""

import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from vca.runtime.compute import without_automatic_gc
from vca.runtime.devices import peak_memory
from vca.runtime.distributed import World
from vca.runtime.errors import NonFiniteError, PreemptedError
from vca.runtime.files import write_text
from vca.runtime.loggers import LoggedRun, WandbConfig, start_loggers
from vca.runtime.metrics_log import Reporter, is_evaluation
from vca.runtime.rundir import RunDirectory
from vca.runtime.signals import StopRequest, catch_stop_signals
from vca.training.checkpoint import checkpoint_path, load_latest_for_all, must_fit, save_checkpoint
from vca.training.config import CompileMode, TrainerConfig
from vca.training.cost import RunCost
from vca.training.curves import plot_curves
from vca.training.profiling import StepProfiler
from vca.training.snapshots import save_snapshots
from vca.training.step import StepResult, TrainState, length_warnings

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
        self.cost = RunCost(world, trainer.precision, state.total_steps)
        self.profiler = StepProfiler(trainer.profile if world.is_main else None, state.total_steps, world.device)
        self.data_checksum = 0
        self.local_checksum = 0  # of this rank, not yet summed over the ranks

        # Results and image indices of the steps since the last `settle`:
        self.unsettled: list[tuple[StepResult, list[int]]] = []
        # The settled steps since the last report:
        self.loss = torch.zeros((), device=world.device)  # sum over this rank's applied steps
        self.applied = 0  # steps
        self.overflows = 0  # steps that fp16 skipped
        self.timed = 0  # steps of this process, which took `seconds`, `waited` of them for data; without pauses
        self.seconds = 0.0
        self.waited = 0.0
        self.clock = time.perf_counter()

        self.unsaved = 0  # applied steps since the newest checkpoint
        self.saved_step = -1  # step of the newest checkpoint
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future[Any] | None = None  # of rank 0: the newest write, until its outcome is known
        self.reported: set[str] = set()  # keys of the records of the step at which the run was resumed
        self.reporter = Reporter()
        self.stop = StopRequest()
        self.signalled: Callable[[], int] = lambda: 0  # returns how many ranks had a stop signal before the step

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
    def open(
        self, name: str, config: dict[str, Any], loggers: Sequence[str] = (), wandb: WandbConfig | None = None
    ) -> Iterator[None]:
        """Open the run directory for writing, drop the records after the current step, and close it at the end.

        Inside, a stop signal takes effect at an `exit_if_signalled`, and garbage is collected at reports only, which
        are at the same step on every rank.
        """
        step, total = self.state.step, self.state.total_steps
        self.cost.earlier = self.world.from_main(lambda: self.run_dir.begin(config, self.world, step))
        self.cost.first_step = step
        if self.world.is_main:
            self.reporter = Reporter(self.run_dir, step, total, self.trainer.global_batch_size)
            of = LoggedRun(self.run_dir.path, name, config, step, wandb or WandbConfig())
            self.reporter.loggers = start_loggers(loggers, of)
            self.reporter.evaluations = [one for one in self.run_dir.records() if is_evaluation(one)]
        self.clock = time.perf_counter()
        with catch_stop_signals() as self.stop, without_automatic_gc():
            try:
                self.save_snapshots_if_due()  # of the checkpoint that the run resumes from, if their write failed
                yield
                self.finish_writing()
            finally:
                self.writer.shutdown()
                self.reporter.close()

    def log_setup(self, name: str, model: str, data: str, count_macs: Callable[[], int | None]) -> None:
        """Log model and data, the steps to run, the batch size, and settings that may be mistakes.

        `count_macs` counts the MACs of one image; only rank 0 calls it.
        """
        state, trainer = self.state, self.trainer
        self.cost.macs = count_macs() if self.world.is_main else None
        self.clock = time.perf_counter()
        parameters = sum(p.numel() for p in state.model.parameters())
        left = state.total_steps - state.step
        start = f"resumed from step {state.step}, {left} steps left" if state.step else f"starting, {left} steps"
        self.reporter.log(
            f"{name}: {model}, {parameters / 1e6:.3f} M parameters\n"
            f"{data}\n"
            f"global batch size {trainer.global_batch_size} ({self.world.size} rank(s) x {state.accumulation} x "
            f"{state.micro_batch_size}), peak lr {state.peak_lr:.3g}, {trainer.precision.value} on "
            f"{self.world.device.type} ({torch.get_num_threads()} threads)\n"
            f"{start}{'; the first step compiles the model' if trainer.compile is not CompileMode['off'] else ''}"
        )
        for warning in length_warnings(state):
            self.reporter.log(f"warning: {warning}")

    def timing(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of each step, and measure how long this rank waits for them.

        The ranks start to tell each other of stop signals here, and `exit_if_signalled` ends it, so that the message
        travels during the step.
        """
        source = iter(batches)
        while True:
            self.profile_step()
            start = time.perf_counter()
            batch = next(source, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - start
            self.signalled = self.world.start_sum(self.stop.received is not None)
            yield batch

    def profile_step(self) -> None:
        """Start or end the trace of `trainer.profile` before a step."""
        start = time.perf_counter()
        if self.profiler.begin(self.state.step):
            file = self.run_dir.path / f"profile_step_{self.trainer.profile:08d}.json.gz"
            with self.reporter.expendable(file):
                self.profiler.save(file)
                self.reporter.log(f"profile: {file}, which https://ui.perfetto.dev opens")
        self.clock += time.perf_counter() - start

    def due(self, every: int, key: str = "") -> bool:
        """Whether an action with an interval of `every` steps (0: only at the end) is due; if so, settle the steps.

        With `key`, only if no record of this step has it: a run that was killed between a checkpoint and the evaluation
        of the same step evaluates when it resumes.

        Raises:
            NonFiniteError: as `settle`.
        """
        step = self.state.step
        if not (self.finished or (every > 0 and step > 0 and step % every == 0)) or key in self.reported:
            return False
        self.settle()
        return True

    def record(self, result: StepResult, batches: Sequence[Any]) -> None:
        """Account for a step, without waiting for it, and report if due.

        Raises:
            NonFiniteError: as `settle`, if a report is due.
        """
        self.unsettled.append((result, [index for batch in batches for index in batch.indices.tolist()]))
        self.reported = set()
        self.local_checksum += sum(int(batch.fingerprints.numpy().sum()) for batch in batches)  # int64 wraps around
        self.timed += 1
        self.count_seconds()
        self.reporter.advance()
        if self.due(self.trainer.log_every):
            self.report(result)

    def count_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.clock = now

    def settle(self) -> None:
        """Wait for the steps since the last call, and account for their results.

        Nothing else in a step waits for the device.

        Raises:
            NonFiniteError: on every rank, if the gradient of a step was not finite. No step since then was applied.
        """
        results = [result for result, _ in self.unsettled]
        flags = torch.stack([torch.stack((r.applied, r.failed)) for r in results]).tolist() if results else []
        self.count_seconds()
        never_applied = self.finished and self.saved_step < 0 and self.unsaved == 0
        for number, (applied, failed) in enumerate(flags):
            result = results[number]
            never_applied = never_applied and not applied
            if failed or (never_applied and number == len(flags) - 1):
                self.raise_non_finite(result, self.state.step - len(flags) + number, self.unsettled[number][1])
            if applied:
                self.loss += result.loss
            self.applied += applied
            self.unsaved += applied
            self.overflows += not applied
        self.unsettled = []

    def raise_non_finite(self, result: StepResult, step: int, indices: list[int]) -> None:
        grad_norm = float(result.grad_norm)
        failure = {"step": step, "grad_norm": str(grad_norm), "loss": str(float(result.loss)), "indices": indices}
        file = self.run_dir.path / f"nonfinite_rank{self.world.rank}.json"
        write_text(file, json.dumps(failure) + "\n")
        newest = f"the newest checkpoint is of step {self.saved_step}" if self.saved_step >= 0 else ""
        raise NonFiniteError(
            f"gradient norm {grad_norm} in step {step}; loss and image indices of each rank "
            f"are in {self.run_dir.path}/nonfinite_rank*.json; {newest or 'no checkpoint exists'}"
        )

    def report(self, result: StepResult) -> None:
        """Write a record of the steps since the last report.

        `data_wait` is the fraction of the time that `data_wait_rank`, the slowest rank, waits for its data. `overflows`
        is the number of steps that fp16 skipped; `loss` is null if it skipped all of them. `peak_memory` is that of the
        rank with the most.

        Raises:
            RuntimeError: on every rank, if the newest checkpoint could not be written.
        """
        gc.collect()
        self.count_seconds()
        if self.world.from_main(lambda: self.writing is not None and self.writing.done()):
            self.finish_writing()
        ranks = self.world.gather((self.waited / self.seconds, peak_memory(self.world.device)))
        waits, memory = [wait for wait, _ in ranks], max((bytes for _, bytes in ranks), default=0)
        images_per_second = self.timed * self.trainer.global_batch_size / self.seconds
        self.write(
            {
                "epoch": self.state.step / self.state.steps_per_epoch,
                "loss": self.mean_loss().item() / self.applied if self.applied else None,
                "lr": result.lr,
                "grad_norm": float(result.grad_norm) if result.applied else None,
                **({"overflows": self.overflows} if self.overflows else {}),
                "consumed": self.sum_checksum(),
                "images_per_second": images_per_second,
                **({"data_wait": max(waits), "data_wait_rank": waits.index(max(waits))} if waits else {}),
                **self.cost.utilization(images_per_second),
                "peak_memory": memory,
                "device_hours_total": self.cost.device_hours_total(self.state.step),
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
        """Write a record of the current step, with the device-hours of the run up to now."""
        self.reporter.write({"step": self.state.step, **record, "device_hours": self.cost.device_hours()})
        self.clock = time.perf_counter()

    def save(self) -> None:
        """Copy the state, and write it as a checkpoint in the background; at most one copy is in memory.

        If fp16 has skipped every step since the newest checkpoint, nothing is written: a resume repeats these steps.

        Raises:
            RuntimeError: on every rank, if the previous checkpoint could not be written. Earlier ones are intact.
        """
        self.settle()
        if not self.unsaved and not (self.finished and self.saved_step >= 0):
            return
        self.finish_writing()
        report = {"loss": self.mean_loss(), "updates": self.applied, "overflows": self.overflows}
        state = {**self.state.state_dict(), "consumed": self.sum_checksum(), "report": report}
        self.saved_step, self.unsaved = self.state.step, 0
        if self.world.is_main:
            folder, keep = self.run_dir.checkpoints, self.trainer.keep_checkpoints
            self.writing = self.writer.submit(save_checkpoint, folder, self.saved_step, copy_to_cpu(state), keep)
        self.clock = time.perf_counter()

    def save_snapshots(self) -> None:
        """Copy the weights of the EMAs, and write them as snapshots in the background; at most one copy is in memory.

        Raises:
            RuntimeError: on every rank, if the previous checkpoint or snapshot could not be written.
        """
        self.finish_writing()
        if self.world.is_main:
            weights = copy_to_cpu({ema.decay: ema.module.state_dict() for ema in self.state.emas})
            self.writing = self.writer.submit(save_snapshots, self.run_dir.snapshots, self.state.step, weights)
        self.clock = time.perf_counter()

    def save_snapshots_if_due(self) -> bool:
        due = self.trainer.snapshot_every > 0 and self.due(self.trainer.snapshot_every)
        if due:
            self.save_snapshots()
        return due

    def save_if_due(self) -> None:
        """Write the snapshots and the checkpoint of this step, if they are due.

        Snapshots are written first. If that fails, the checkpoint is written before the error is raised, and the run
        that resumes from it writes the snapshots.
        """
        snapshots = self.save_snapshots_if_due()
        if self.due(self.trainer.checkpoint_every):
            try:
                if snapshots:
                    self.finish_writing()
            except Exception:
                self.save()
                self.finish_writing()  # before any rank exits, since torchrun then ends the others
                raise
            self.save()

    def finish_writing(self) -> None:
        """Wait on every rank until the newest checkpoint or snapshot is written.

        Raises:
            RuntimeError: on every rank, if it cannot be written. The earlier ones are intact.
        """
        writing, self.writing = self.writing, None
        self.world.from_main(lambda: writing and writing.result())

    def exit_if_signalled(self) -> None:
        """Save a checkpoint and exit on every rank, after the same step, if any had a stop signal before this step.

        Raises:
            PreemptedError: on every rank. A run that has completed its last step ends normally instead.
        """
        if self.signalled() == 0 or self.finished:
            return
        if self.saved_step != self.state.step:
            self.save()
        self.finish_writing()
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


def copy_to_cpu(state: dict[Any, Any]) -> Any:
    """Copy the tensors in nested dicts and lists to the CPU."""
    return tree_map(lambda x: x.to("cpu", copy=True) if isinstance(x, Tensor) else x, state)
