"""Draw samples from a trained generator.

    python sample.py run=outputs/RUN out=samples/RUN count=64 sampler=ddim sampler.guidance=1.5 grid=true
    torchrun --nproc_per_node=8 sample.py run=outputs/RUN out=samples/RUN protocol=dit_table npz=true
    python sample.py checkpoint=DiT-XL-2-256x256.pt model=dit_xl_2 attention=softmax objective=diffusion \\
        autoencoder=sd_vae labels=[207,360,387,974] count=4 sampler.guidance=4.0 grid=true out=samples/dit_xl_2

Sample i of a set follows from `seed` and i alone, on any number of ranks; the same command goes on where it was
interrupted. On CPUs samples are computed one by one, on one thread a rank, so that neither batch size nor threads
decide how something rounds; a GPU computes `batch_size` at once, always the same ones.
"""

import json
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from models import GENERATORS, build_model
from vca.attention import ATTENTIONS
from vca.config import SampleConfig, command_line, from_registry, read_protocol, register_schemas
from vca.generation.autoencoder import AUTOENCODERS, Autoencoder, AutoencoderConfig, load_autoencoder
from vca.generation.objective import OBJECTIVES, Objective, build_objective
from vca.generation.sample_set import Sample, SampleSet
from vca.generation.sampling import check_sampler, draw_samples, label_of, to_uint8
from vca.runtime import distributed
from vca.runtime.digest import tensors_sha256
from vca.runtime.errors import ConfigError, check, config_errors
from vca.runtime.logging import progress_bar
from vca.runtime.rundir import compare, plain
from vca.training.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint, load_latest_for_all
from vca.training.config import autocast, set_precision
from vca.training.init import InitWeights, init_from

THE_ONLY_ONES = "the only ones"  # weights of a file that holds nothing else, as the published ones, which are averages
DAY = 24 * 60.0  # minutes that ranks wait for each other: the slowest has the last word

register_schemas(
    root={"sample": SampleConfig},
    groups={
        "model": GENERATORS,
        "attention": ATTENTIONS,
        "objective": OBJECTIVES,
        "autoencoder": AUTOENCODERS,
    },
)


@dataclass
class Generator:
    """A trained network with all that makes samples of it; `origin` says where its weights are from."""

    model: Any
    objective: Objective
    autoencoder: Autoencoder
    configs: dict[str, Any]
    origin: dict[str, Any]


def run(config: SampleConfig) -> dict[str, Any]:
    """Draw what is missing of the set, and return the `result` of its manifest."""
    with distributed.start(config.device.value, DAY, key="device") as world:
        set_precision(config.precision)
        on_cpu = world.device.type == "cpu"
        if on_cpu:
            torch.set_num_threads(1)
        generator = load_generator(config, world)
        check_sampler(generator.objective, config.sampler, generator.model.config.class_dropout_prob)
        check_labels(config, generator.model.config.num_classes)
        if config.protocol is not None:
            check_protocol(config, generator)

        samples, together = SampleSet(Path(config.out)), 1 if on_cpu else config.batch_size
        manifest = describe(config, generator, together, world.device)
        blocks = world.from_main(lambda: samples.open(manifest, config.count, together))
        with progress_bar(len(blocks) * together, "sample", world.is_main) as bar:
            for block in blocks[world.rank :: world.size]:
                for index, sample in zip(block, draw(config, generator, block, world.device), strict=True):
                    if index < config.count:
                        samples.write(index, sample)
                bar.update(min(together * world.size, bar.total - bar.n))
        world.barrier()
        result = world.from_main(lambda: samples.finish(config.count, config.npz, config.grid))
        if world.is_main:
            mean = result["evaluations"]["mean"]
            print(f"{config.out}: {config.count} samples, {mean:g} evaluations each, sha256 {result['sha256'][:12]}")
        return result


def load_generator(config: SampleConfig, world: distributed.World) -> Generator:
    """The network, its weights and what belongs to it, from a run directory or from a file.

    Raises:
        ConfigError: if there is no such run, checkpoint or autoencoder, or the weights are another model's.
    """
    configs = read_configs(config)
    with config_errors():
        model = build_model(configs["model"], configs["attention"])
    origin = load_file(config, model) if config.run is None else load_run(config, model, world)
    origin["weights_sha256"] = tensors_sha256(model.state_dict())
    autoencoder = load_autoencoder(configs["autoencoder"], world.device)
    trained_with = configs.get("trained_with") if config.decoder is None else None
    differences = compare(trained_with, autoencoder.identity(), key="autoencoder") if trained_with else []
    if differences:
        raise ConfigError(f"run: it was trained with another autoencoder ({'; '.join(differences)})")
    objective = build_objective(configs["objective"])
    return Generator(model.eval().to(world.device), objective, autoencoder, configs, origin)


def read_configs(config: SampleConfig) -> dict[str, Any]:
    """The configs of model, attention, objective and autoencoder: the run's, or those of the command line."""
    if config.run is not None:
        configs = read_run(Path(config.run))
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
        trained = configs.get("trained_with", {})
        scale, shift = trained.get("scale", autoencoder.scale), trained.get("shift", autoencoder.shift)
        autoencoder = replace(autoencoder, source=config.decoder, scale=scale, shift=shift)
    return {**configs, "autoencoder": autoencoder}


def read_run(folder: Path) -> dict[str, Any]:
    """The configs of a run of `train_gen.py`, and as `trained_with` the identity of its autoencoder."""
    check((folder / "config.json").is_file(), "run", "a run directory with a config.json", str(folder))
    saved = json.loads((folder / "config.json").read_text())
    check("inputs" in saved, "run", "a run of train_gen.py", str(folder))
    configs = {
        "model": from_registry(GENERATORS, saved["model"], "family"),
        "attention": from_registry(ATTENTIONS, saved["attention"]),
        "objective": from_registry(OBJECTIVES, saved["objective"]),
        "autoencoder": from_registry(AUTOENCODERS, saved["autoencoder"]),
    }
    return {**configs, "trained_with": saved["inputs"]["autoencoder"]}


def load_run(config: SampleConfig, model: Any, world: distributed.World) -> dict[str, Any]:
    """Load weights of a checkpoint of `config.run`: on every rank the one that rank 0 finds, while the run goes on."""
    folder = Path(str(config.run)) / "checkpoints"
    saved = load_step(folder, config.step) if config.step is not None else load_latest_for_all(folder, world, False)
    if saved is None:
        raise ConfigError(f"{folder} holds no checkpoint")
    weights = config.weights if saved["ema"] is not None else InitWeights.raw
    model.load_state_dict(saved["ema" if weights is InitWeights.ema else "model"])
    return {"run": Path(str(config.run)).resolve().name, "step": saved["step"], "weights": weights.value}


def load_step(folder: Path, step: int) -> dict[str, Any]:
    """The checkpoint of a step."""
    path = checkpoint_path(folder, step)
    if not path.is_file():
        there = ", ".join(str(int(path.stem[5:])) for path in list_checkpoints(folder)) or "none at all"
        raise ConfigError(f"{folder} holds no checkpoint of step {step}, but of {there}")
    try:
        return load_checkpoint(path)
    except (zipfile.BadZipFile, RuntimeError) as error:
        raise ConfigError(f"{path} is damaged; choose another step=...") from error


def load_file(config: SampleConfig, model: Any) -> dict[str, Any]:
    """Load weights of the file `config.checkpoint`, which must be all of the model's."""
    path = Path(str(config.checkpoint))
    report = init_from(model, path, config.weights, key="checkpoint")
    report.check_complete("checkpoint must be a file")
    return {"checkpoint": path.name, "weights": report.source or THE_ONLY_ONES}


def check_labels(config: SampleConfig, classes: int) -> None:
    """Raise `ConfigError` if a class is asked for that the model does not have."""
    if isinstance(config.labels, list):
        fits = all(0 <= label < classes for label in config.labels)
        check(fits, "labels", f"from 0 to {classes - 1}", config.labels)


def check_protocol(config: SampleConfig, generator: Generator) -> None:
    """Raise `ConfigError` if a field that the protocol fixes has another value; a decoder is known by its last name."""
    fixed, ours = read_protocol(str(config.protocol)), plain(config)
    ours = {key: ours[key] for key in fixed} | {"sampler": {key: ours["sampler"][key] for key in fixed["sampler"]}}
    for values in (fixed, ours):
        values["decoder"] = Path(values["decoder"] or "").name
    if differences := compare(fixed, ours):
        raise ConfigError(f"protocol {config.protocol} has other values ({'; '.join(differences)}); leave protocol out")
    used = generator.origin["weights"]
    check(used in (fixed["weights"], THE_ONLY_ONES), f"protocol {config.protocol}: weights", fixed["weights"], used)


def describe(config: SampleConfig, generator: Generator, together: int, device: torch.device) -> dict[str, Any]:
    """The manifest of the set: everything that its pixels depend on."""
    source = generator.configs["autoencoder"].source
    return {
        "protocol": config.protocol,
        "seed": config.seed,
        "labels": config.labels,
        "sampler": plain(config.sampler),
        "precision": config.precision.value,
        "computed_together": together,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "origin": generator.origin,
        **{key: plain(generator.configs[key]) for key in ("model", "attention", "objective")},
        "autoencoder": {"source": source and Path(source).name, **generator.autoencoder.identity()},
    }


def draw(config: SampleConfig, generator: Generator, block: range, device: torch.device) -> list[Sample]:
    """The samples of a block."""
    model, autoencoder = generator.model, generator.autoencoder
    classes = [label_of(config.labels, index, config.seed, model.config.num_classes) for index in block]
    labels = torch.tensor(classes, device=device)
    shape = (autoencoder.channels, *model.config.size)
    with autocast(config.precision, device):
        drawn = draw_samples(model, generator.objective, config.sampler, labels, block, config.seed, shape)
    pixels = to_uint8(autoencoder.decode(drawn.x)).permute(0, 2, 3, 1).cpu().numpy()
    return [Sample(image, label, drawn.evaluations) for image, label in zip(pixels, classes, strict=True)]


if __name__ == "__main__":
    command_line("sample", run)
