"""A trained generator, read back from its run directory or from a file of weights."""

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

THE_ONLY_ONES = "the only ones"  # weights of a file that holds nothing else, as the published ones, which are averages


def load_generator(
    configs: dict[str, Any],
    build: Callable[[Any, Any], Any],
    world: World,
    weights: InitWeights,
    run: str | None = None,
    step: int | None = None,
    checkpoint: str | None = None,
) -> DiffusionPipeline:
    """The network, its weights and what belongs to it, on `world.device` and in evaluation mode.

    Args:
        configs: of `model`, `attention`, `objective` and `autoencoder`; where `trained_with` is the identity of the
            training's autoencoder, the one that is loaded must agree with it; `training` says how it went.
        build: makes a network of the first two.
        world: this process.
        weights: which of those that the file holds.
        run, step: a run directory, and which of its checkpoints; None is the newest.
        checkpoint: or else a file, which must hold this network exactly.

    Raises:
        ConfigError: if there is no such run, checkpoint or autoencoder, or the weights are another model's.
    """
    with config_errors():
        model = build(configs["model"], configs["attention"])
    origin = (
        load_run(model, Path(run), step, weights, world) if run else load_file(model, Path(str(checkpoint)), weights)
    )
    origin = {**origin, "training": configs.get("training"), "weights_sha256": tensors_sha256(model.state_dict())}
    autoencoder = load_autoencoder(configs["autoencoder"], world.device)
    trained_with = configs.get("trained_with")
    differences = diff_configs(trained_with, autoencoder.identity(), key="autoencoder") if trained_with else []
    if differences:
        raise ConfigError(f"run: it was trained with another autoencoder ({'; '.join(differences)})")
    objective = build_objective(configs["objective"])
    return DiffusionPipeline(model.eval().to(world.device), objective, autoencoder, configs, origin)


def load_run(model: Any, run: Path, step: int | None, weights: InitWeights, world: World) -> dict[str, Any]:
    """Load weights of a run's checkpoint: on every rank the one that rank 0 finds, while the run goes on."""
    folder = run / "checkpoints"
    saved = load_step(folder, step) if step is not None else load_latest_for_all(folder, world, set_aside=False)
    if saved is None:
        raise ConfigError(f"{folder} holds no checkpoint")
    used = weights if saved["ema"] is not None else InitWeights.raw
    with must_fit(checkpoint_path(folder, saved["step"])):
        model.load_state_dict(saved["ema" if used is InitWeights.ema else "model"])
    return {"run": run.resolve().name, "step": saved["step"], "weights": used.value}


def load_step(folder: Path, step: int) -> dict[str, Any]:
    """The checkpoint of a step."""
    path = checkpoint_path(folder, step)
    if not path.is_file():
        there = ", ".join(str(int(path.stem[5:])) for path in list_checkpoints(folder)) or "none at all"
        raise ConfigError(f"{folder} holds no checkpoint of step {step}, but of {there}")
    try:
        return load_checkpoint(path)
    except CorruptCheckpointError as error:
        raise ConfigError(f"{error}; choose another step=...") from error


def load_file(model: Any, path: Path, weights: InitWeights) -> dict[str, Any]:
    """Load weights of a file, which must be all of the model's."""
    report = init_from(model, path, weights, key="checkpoint")
    report.check_complete("checkpoint must be a file")
    return {"checkpoint": path.name, "step": None, "weights": report.source or THE_ONLY_ONES}
