"""Evaluate the weights of a classifier run, raw, EMA or snapshots, and write the records of their accuracy."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vca.data import images_identity
from vca.data.augment import Normalize
from vca.evaluation.accuracy import evaluate
from vca.evaluation.accuracy_record import accuracy_record_name, make_accuracy_record
from vca.evaluation.record import record_text
from vca.report.snapshots import SnapshotFigure, report_snapshots
from vca.runtime.digest import tensors_sha256
from vca.runtime.files import write_text
from vca.runtime.rundir import to_dict
from vca.training.checkpoint import must_fit
from vca.training.run import TrainingRun, log_on_main
from vca.training.snapshots import ALL, load_snapshot, select_weights, snapshot_path


@dataclass(frozen=True)
class ClassifierEvaluation:
    """The evaluation of a run's weights on the evaluation images.

    Attributes:
        config: the config of `train_cls.py`.
        training: the run.
        images: the evaluation images, of which `loader` loads this rank's part.
        normalize: maps the loader's images to the network's input.
    """

    config: Any
    training: TrainingRun
    images: Any
    loader: Iterable[Any]
    normalize: Normalize

    def models(self) -> dict[str, nn.Module]:
        """Return the networks by the prefix of their results: raw `val`, first EMA `ema`, others `ema_<decay>`."""
        state = self.training.state
        emas = {"ema" if ema is state.ema else f"ema_{ema.decay}": ema.module for ema in state.emas}
        return {"val": state.model, **emas}

    def evaluate(self, models: Mapping[str, nn.Module] | None = None) -> dict[str, float]:
        """Evaluate networks, by default all of the run, in the run's precision; see `vca.evaluation.accuracy`."""
        state = self.training.state
        device = state.world.device
        batches = ((self.normalize(images), labels.to(device, non_blocking=True)) for images, labels in self.loader)
        return evaluate(models or self.models(), batches, state.world, state.autocast)

    def evaluate_snapshots(self) -> dict[str, float]:
        """Evaluate all snapshots, write `snapshots.json` and `snapshots.png`, and return top-1 by snapshot."""
        state, run_dir, world = self.training.state, self.training.run_dir, self.training.world
        selected = world.from_main(lambda: select_weights(run_dir.path, ALL, ALL, "trainer.eval_snapshots=true"))
        figures = []
        for step in dict.fromkeys(step for step, _ in selected):
            emas = [ema for ema in state.emas if (step, ema.decay) in selected]
            for ema in emas:
                snapshot = snapshot_path(run_dir.snapshots, step, ema.decay)
                with must_fit(snapshot):
                    ema.module.load_state_dict(load_snapshot(snapshot))
            result = self.evaluate({str(ema.decay): ema.module for ema in emas})
            for ema in emas:
                own = of_model(result, str(ema.decay))
                sha256 = tensors_sha256(ema.module.state_dict())
                figures.append(SnapshotFigure(step, ema.decay, own["top1"], sha256, own))
                log_on_main(world, f"step {step}, EMA {ema.decay}: top-1 {own['top1']:.2f} %")
        settings = {"data": to_dict(self.config.data)}
        world.from_main(lambda: report_snapshots(run_dir.path / "snapshots.json", "top-1 (%)", settings, figures))
        return {snapshot_path(run_dir.snapshots, f.step, f.ema_decay).stem: f.value for f in figures}

    def write_records(self, result: Mapping[str, float]) -> None:
        """Write the accuracy record of each network in `result`, on rank 0; a failure is a warning."""
        state, run_dir = self.training.state, self.training.run_dir
        if not self.training.world.is_main:
            return
        data = {"name": self.config.data.name, **images_identity(self.images)}
        for prefix, model in self.models().items():
            weights = {
                "name": "raw" if prefix == "val" else prefix,
                "source": self.config.name,
                "step": state.step,
                "steps": state.total_steps,
                "sha256": tensors_sha256(model.state_dict()),
            }
            batch_size = self.config.trainer.eval_batch_size
            record = make_accuracy_record(of_model(result, prefix), weights, data, run_dir, batch_size, state.world)
            file = run_dir.path / accuracy_record_name(record)
            with self.training.reporter.expendable(file):
                write_text(file, record_text(record))


def of_model(result: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Return the results of one network, without its prefix."""
    return {key.removeprefix(f"{prefix}/"): value for key, value in result.items() if key.startswith(f"{prefix}/")}


def summarize(run: Path, result: dict[str, float], verbose: bool) -> dict[str, float]:
    """Print top-1 of each set of weights in one line, and return the results."""
    if verbose:
        names = {key.partition("/")[0] for key in result} - {"val"}
        emas = "".join(f", {format_ema(name)} {result[f'{name}/top1']:.2f} %" for name in sorted(names))
        print(f"{run}: top-1 {result['val/top1']:.2f} % of {result['val/images']} images{emas}", flush=True)
    return result


def format_ema(prefix: str) -> str:
    return "EMA weights" if prefix == "ema" else f"EMA {prefix.removeprefix('ema_')}"
