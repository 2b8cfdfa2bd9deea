"""Load a trained generator from its run directory or from a file of weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    list_checkpoints,
    load_checkpoint,
    load_latest_for_all,
    must_fit,
)
from vca.training.pretrained import InitWeights, init_from

THE_ONLY_ONES = "the only ones"  # weights of a file with one set, such as the published ones, which are EMA weights


def load_generator(
    configs: dict[str, Any],
    build: Callable[[Any, Any], Any],
    world: World,
    weights: InitWeights,
    run: str | None = None,
    step: int | None = None,
    checkpoint: str | None = None,
) -> DiffusionPipeline:
    """Load network, weights, objective and autoencoder, on `world.device` and in evaluation mode.

    Args:
        configs: `model`, `attention`, `objective` and `autoencoder`; optionally `trained_with`, the identity that the
            autoencoder must have, and `training`, recorded in the pipeline's origin.
        build: builds a network from model and attention config.
        run, step: run directory and step of its checkpoint; None is the newest.
        checkpoint: file of weights instead of a run; it must contain exactly this network.

    Raises:
        ConfigError: if run, checkpoint or autoencoder do not exist, or the weights are of another model.
    """
    with config_errors():
        model = build(configs["model"], configs["attention"])
    if run:
        origin = load_run(model, Path(run), step, weights, world)
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


def load_run(model: Any, run: Path, step: int | None, weights: InitWeights, world: World) -> dict[str, Any]:
    """Load weights of a run, which may be running, on every rank from the checkpoint that rank 0 chooses."""
    folder = run / "checkpoints"
    saved = load_step(folder, step) if step is not None else load_latest_for_all(folder, world, set_aside=False)
    if saved is None:
        raise ConfigError(f"run: {folder} contains no checkpoint; train the run first, or choose another run=...")
    weights = weights if saved["ema"] is not None else InitWeights.raw
    with must_fit(checkpoint_path(folder, saved["step"])):
        model.load_state_dict(saved["ema" if weights is InitWeights.ema else "model"])
    return {"run": run.resolve().name, "step": saved["step"], "weights": weights.value}


def load_step(folder: Path, step: int) -> dict[str, Any]:
    path = checkpoint_path(folder, step)
    if not path.is_file():
        steps = ", ".join(str(int(path.stem[5:])) for path in list_checkpoints(folder)) or "none"
        raise ConfigError(f"step: {folder} has no checkpoint of step {step}; available: {steps}")
    try:
        return load_checkpoint(path)
    except CorruptCheckpointError as error:
        raise ConfigError(f"{error}; choose another step=...") from error
