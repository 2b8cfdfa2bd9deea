"""Which generator a `GeneratorConfig` means: the configs that it was trained with, and the protocol it must keep to."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vca.attention import ATTENTIONS
from vca.config.composition import Registry, from_registry, read_protocol
from vca.config.schema import GeneratorConfig
from vca.generation.autoencoder import AUTOENCODERS, AutoencoderConfig
from vca.generation.objective import OBJECTIVES
from vca.generation.pipeline import GeneratedImages
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError, check
from vca.runtime.rundir import diff_configs, read_config, to_dict
from vca.training.restore import THE_ONLY_ONES, load_generator


def read_generator(config: GeneratorConfig, networks: Registry) -> dict[str, Any]:
    """The configs of model, attention, objective and autoencoder: the run's, or those of the command line.

    Args:
        config: of `sample.py` or `eval_fid.py`.
        networks: of what a run's `model.family` is one.

    Returns:
        Besides these, of a run: `training`, how it went, and unless another decoder is asked for `trained_with`, the
        identity of its autoencoder.

    Raises:
        ConfigError: if there is no such run, or the parts do not fit each other.
    """
    if config.run is not None:
        configs = load_run_config(Path(config.run), networks)
    else:
        configs = {key: getattr(config, key) for key in ("model", "attention", "objective", "autoencoder")}
    channels = configs["model"].in_channels
    autoencoder = configs["autoencoder"] or AutoencoderConfig(channels=channels)  # pixel space
    in_pixels = autoencoder.name == "none"
    check(config.protocol is None or not in_pixels, "protocol", "null for a model of pixels", config.protocol)
    check(not in_pixels or channels in (1, 3), "autoencoder", f"given for a model of {channels} channels", None)
    check(
        autoencoder.channels == channels, "autoencoder.channels", f"model.in_channels, {channels}", autoencoder.channels
    )
    check(config.decoder is None or not in_pixels, "decoder", "null for a model of pixels", config.decoder)
    if config.decoder is not None:  # the latents stay those of the training
        trained = configs.pop("trained_with", {})
        scale, shift = trained.get("scale", autoencoder.scale), trained.get("shift", autoencoder.shift)
        autoencoder = replace(autoencoder, source=config.decoder, scale=scale, shift=shift)
    return {**configs, "autoencoder": autoencoder}


def load_run_config(folder: Path, networks: Registry) -> dict[str, Any]:
    """The configs of a run of `train_gen.py`."""
    check((folder / "config.json").is_file(), "run", "a run directory with a config.json", str(folder))
    saved = read_config(folder)
    check("inputs" in saved, "run", "a run of train_gen.py", str(folder))
    return {
        "model": from_registry(networks, saved["model"], "family"),
        "attention": from_registry(ATTENTIONS, saved["attention"]),
        "objective": from_registry(OBJECTIVES, saved["objective"]),
        "autoencoder": from_registry(AUTOENCODERS, saved["autoencoder"]),
        "training": {key: saved[key] for key in ("seed", "data", "augment", "optim", "trainer")},
        "trained_with": saved["inputs"]["autoencoder"],
    }


def load_generated_images(
    config: GeneratorConfig, networks: Registry, build: Callable[[Any, Any], Any], world: World, count: int
) -> tuple[GeneratedImages, dict[str, Any]]:
    """Load the generator that `config` names, and return its first `count` samples with their settings."""
    configs = read_generator(config, networks)
    pipeline = load_generator(configs, build, world, config.weights, config.run, config.step, config.checkpoint)
    check_protocol(config, pipeline.origin)
    images = GeneratedImages(
        pipeline, config.sampler, config.labels, config.seed, config.precision, count, config.batch_size
    )
    return images, {"protocol": config.protocol, **images.settings()}


def check_protocol(config: GeneratorConfig, origin: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if a field that the protocol fixes has another value; a decoder is known by its last name."""
    if config.protocol is None:
        return
    fixed, ours = read_protocol(config.protocol), to_dict(config)
    ours = {key: ours[key] for key in fixed} | {"sampler": {key: ours["sampler"][key] for key in fixed["sampler"]}}
    for values in (fixed, ours):
        values["decoder"] = Path(values["decoder"] or "").name
    if differences := diff_configs(fixed, ours):
        raise ConfigError(f"protocol {config.protocol} has other values ({'; '.join(differences)}); leave protocol out")
    used = origin["weights"]
    check(used in (fixed["weights"], THE_ONLY_ONES), f"protocol {config.protocol}: weights", fixed["weights"], used)
