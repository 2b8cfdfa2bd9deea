"""The configs of the generator that a `GeneratorConfig` names, and the check of its sampling protocol."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vca.attention import ATTENTIONS
from vca.config.composition import Registry, from_registry, read_protocol
from vca.config.schema import GeneratorConfig
from vca.generation.autoencoder import AUTOENCODERS, AutoencoderConfig
from vca.generation.objective import OBJECTIVES
from vca.generation.pipeline import GeneratedImages, default_batch_size
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError, check
from vca.runtime.rundir import diff_configs, read_config, to_dict
from vca.training.restore import THE_ONLY_ONES, load_generator


def generator_groups(networks: Registry) -> dict[str, Registry]:
    """Return the config groups that define a generator, for `register_schemas`."""
    return {"model": networks, "attention": ATTENTIONS, "objective": OBJECTIVES, "autoencoder": AUTOENCODERS}


def read_generator(config: GeneratorConfig, networks: Registry) -> dict[str, Any]:
    """Return the configs of model, attention, objective and autoencoder, from the run or from the command line.

    For a run, the dict also has `training` (its other configs) and, unless `decoder` is set, `trained_with` (the
    identity of its autoencoder).

    Raises:
        ConfigError: if the run does not exist, or the parts do not match.
    """
    if config.run is not None:
        configs = load_run_config(Path(config.run), networks)
    else:
        configs = {key: getattr(config, key) for key in ("model", "attention", "objective", "autoencoder")}
    channels = configs["model"].in_channels
    autoencoder = configs["autoencoder"] or AutoencoderConfig(channels=channels)  # pixel space
    in_pixels = autoencoder.name == "none"
    check(config.protocol is None or not in_pixels, "protocol", "null for a pixel-space model", config.protocol)
    check(not in_pixels or channels in (1, 3), "autoencoder", f"set for a model with {channels} channels", None)
    check(
        autoencoder.channels == channels, "autoencoder.channels", f"model.in_channels, {channels}", autoencoder.channels
    )
    check(config.decoder is None or not in_pixels, "decoder", "null for a pixel-space model", config.decoder)
    if config.decoder is not None:  # the latents keep the scale that the model was trained with
        trained = configs.pop("trained_with", {})
        scale, shift = trained.get("scale", autoencoder.scale), trained.get("shift", autoencoder.shift)
        autoencoder = replace(autoencoder, source=config.decoder, scale=scale, shift=shift)
    return {**configs, "autoencoder": autoencoder}


def load_run_config(folder: Path, networks: Registry) -> dict[str, Any]:
    """Read the configs of a `train_gen.py` run."""
    check((folder / "config.json").is_file(), "run", "a run directory with a config.json", str(folder))
    saved = read_config(folder)
    check("inputs" in saved, "run", "a run of train_gen.py", str(folder))
    return configs_of_run(saved, networks)


def configs_of_run(saved: Mapping[str, Any], networks: Registry) -> dict[str, Any]:
    """Build the configs of a generator from the `config.json` of its run."""
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
    pipeline = load_generator(
        configs, build, world, config.weights, config.run, config.step, config.checkpoint, config.ema
    )
    check_protocol(config, pipeline.origin)
    images = GeneratedImages(
        pipeline,
        config.sampler,
        config.labels,
        config.seed,
        config.precision,
        count,
        config.batch_size or default_batch_size(world.device),
        config.compile,
    )
    return images, {"protocol": config.protocol, **images.settings()}


def check_protocol(config: GeneratorConfig, origin: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if a field that the protocol fixes has another value; decoders are compared by file name."""
    if config.protocol is None:
        return
    fixed, ours = read_protocol(config.protocol), to_dict(config)
    ours = {key: ours[key] for key in fixed} | {"sampler": {key: ours["sampler"][key] for key in fixed["sampler"]}}
    for values in (fixed, ours):
        values["decoder"] = Path(values["decoder"] or "").name
    if differences := diff_configs(fixed, ours):
        raise ConfigError(f"protocol {config.protocol} fixes other values ({'; '.join(differences)}); omit protocol")
    used = origin["weights"]
    check(used in (fixed["weights"], THE_ONLY_ONES), f"protocol {config.protocol}: weights", fixed["weights"], used)
