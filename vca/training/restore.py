"""Load a trained generator from its run directory or from a file of weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vca.generation.autoencoder import load_autoencoder
from vca.generation.objective import build_objective
from vca.generation.pipeline import DiffusionPipeline
from vca.runtime.digest import tensors_sha256
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError, config_errors
from vca.runtime.rundir import diff_configs
from vca.training.checkpoint import (
    CorruptCheckpointError,
    checkpoint_path,
    ema_weights,
    list_checkpoints,
    load_checkpoint,
    load_latest_for_all,
    must_fit,
)
from vca.training.pretrained import InitWeights, init_from
from vca.training.snapshots import choose_decay, list_snapshots, load_snapshot, run_decays, snapshot_path

THE_ONLY_ONES = "the only ones"  # weights of a file with one set, such as the published ones, which are EMA weights


def load_generator(
    configs: dict[str, Any],
    build: Callable[[Any, Any], Any],
    world: World,
    weights: InitWeights,
    run: str | None = None,
    step: int | None = None,
    checkpoint: str | None = None,
    ema: float | None = None,
) -> DiffusionPipeline:
    """Load network, weights, objective and autoencoder, on `world.device` and in evaluation mode.

    Args:
        configs: `model`, `attention`, `objective` and `autoencoder`; optionally `trained_with`, the identity that the
            autoencoder must have, and `training`, recorded in the pipeline's origin.
        build: builds a network from model and attention config.
        run, step, ema: run directory, and step and EMA decay of its weights, see `load_run`.
        checkpoint: file of weights instead of a run; it must contain exactly this network.

    Raises:
        ConfigError: if run, checkpoint or autoencoder do not exist, or the weights are of another model.
    """
    with config_errors():
        model = build(configs["model"], configs["attention"])
    if run:
        origin = load_run(model, Path(run), step, weights, world, ema)
    else:
        report = init_from(model, Path(str(checkpoint)), weights, key="checkpoint")
        report.check_complete("checkpoint must be a file")
        origin = {"checkpoint": Path(str(checkpoint)).name, "step": None, "weights": report.source or THE_ONLY_ONES}
    origin = {**origin, "training": configs.get("training"), "weights_sha256": tensors_sha256(model.state_dict())}
    autoencoder = load_autoencoder(configs["autoencoder"], world.device)
    trained_with = configs.get("trained_with")
    differences = diff_configs(trained_with, autoencoder.identity(), key="autoencoder") if trained_with else []
    if differences:
        raise ConfigError(f"run: its autoencoder has changed ({'; '.join(differences)}); restore the old one")
    objective = build_objective(configs["objective"], world.device)
    return DiffusionPipeline(model.eval().to(world.device), objective, autoencoder, configs, origin)


def load_other_weights(
    pipeline: DiffusionPipeline, run: Path, step: int | None, weights: InitWeights, world: World, ema: float | None
) -> None:
    """Load other weights of its run into a pipeline, in place; see `load_run`."""
    origin = load_run(pipeline.model, run, step, weights, world, ema)
    sha256 = tensors_sha256(pipeline.model.state_dict())
    pipeline.origin = {**pipeline.origin, **origin, "weights_sha256": sha256}


def load_run(
    model: Any, run: Path, step: int | None, weights: InitWeights, world: World, ema: float | None = None
) -> dict[str, Any]:
    """Load weights of a run, which may be running, on every rank, and return their origin.

    Args:
        step: step of a snapshot (EMA weights only) or checkpoint; None is the newest checkpoint, chosen by rank 0.
        weights: `ema` (raw if the run has no EMA) or `raw`.
        ema: decay of the EMA weights; None is the first one of the run.

    Raises:
        ConfigError: if the run has no such weights, or they are of another model.
    """
    found, error = None, None
    try:
        found = read_run_weights(run, step, weights, world, ema)
        with must_fit(found.file):
            model.load_state_dict(found.tensors)
    except Exception as problem:
        error = problem
    world.raise_first(error)
    assert found is not None
    # Without several decays, origins are as in earlier versions, whose sample folders can be extended.
    several = found.decay is not None and found.decays > 1
    origin = {"run": run.resolve().name, "weights": found.name, "step": found.step}
    return {**origin, "ema_decay": found.decay} if several else origin


class RunWeights(NamedTuple):
    """Weights of a run: tensors by name, step, EMA decay (None for raw weights), number of decays of the run, file."""

    tensors: dict[str, Tensor]
    step: int
    decay: float | None
    decays: int
    file: Path

    @property
    def name(self) -> str:
        return InitWeights.raw.value if self.decay is None else InitWeights.ema.value


def read_run_weights(
    run: Path, step: int | None, weights: InitWeights, world: World, ema: float | None = None
) -> RunWeights:
    """Read weights of a run to the CPU; arguments and errors are those of `load_run`."""
    folder, decays = run / "checkpoints", world.from_main(lambda: run_decays(run))
    decay = choose_decay(run, decays, ema) if weights is InitWeights.ema else None
    if step is not None and decay is not None:
        snapshot = snapshot_path(run / "snapshots", step, decay)
        if world.from_main(snapshot.is_file):  # first, since it is never deleted; the same file on every rank
            return RunWeights(load_snapshot(snapshot), step, decay, len(decays), snapshot)
    saved = load_step(run, step) if step is not None else load_latest_for_all(folder, world, set_aside=False)
    if saved is None:
        raise ConfigError(f"run: {folder} contains no checkpoint; train the run first, or choose another run=...")
    tensors = saved["model"] if decay is None else ema_weights(saved, decay, decays)
    return RunWeights(tensors, saved["step"], decay, len(decays), checkpoint_path(folder, saved["step"]))


def load_step(run: Path, step: int) -> dict[str, Any]:
    folder = run / "checkpoints"
    path = checkpoint_path(folder, step)
    if not path.is_file():
        steps = ", ".join(str(int(path.stem[5:])) for path in list_checkpoints(folder)) or "none"
        snapshots = sorted({snapshot.step for snapshot in list_snapshots(run / "snapshots")})
        more = f"; snapshots of EMA weights: {', '.join(map(str, snapshots))}" if snapshots else ""
        raise ConfigError(f"step: {folder} has no checkpoint of step {step}; available: {steps}{more}")
    try:
        return load_checkpoint(path)
    except CorruptCheckpointError as error:
        raise ConfigError(f"{error}; choose another step=...") from error
