"""Load exported models from a folder or the Hugging Face hub, and upload exports.

    model = vca.from_pretrained("exported")         # a classifier: logits = model(model.transform(image)[None])
    pipeline = vca.from_pretrained("owner/name")    # a generator: images = pipeline.sample(8, labels="balanced")

`scripts/export.py` writes exports: folders with `model.safetensors`, `config.json` and a model card. Importing this
module needs torch only. It is the only module of `vca` that imports `models`, to return a complete model.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from vca.runtime.digest import file_sha256
from vca.runtime.errors import ConfigError, check, config_errors

FORMAT = "vca-export-1"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
OPTIONAL = ["dit.pt", "sit.pt", "evaluation-*.json", "metrics.jsonl"]  # files that not every export has
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TOKEN = "set HF_TOKEN or run `hf auth login`"


def from_pretrained(source: str | Path, device: str = "cpu", autoencoder: str | None = None) -> Any:
    """Load an exported model in evaluation mode.

    Args:
        source: folder that `scripts/export.py` wrote, or the hub name `OWNER/NAME` of one.
        device: device of the model.
        autoencoder: of a latent generator, the `autoencoder.source` on this machine, such as a folder; it must have the
            weights of training. A Python file must be named here: a file that an export names is not run. So must a hub
            repository other than Stable Diffusion's VAEs, since an export could name any repository.

    Returns:
        A classifier, an `nn.Module` that maps images `(B, I, H, W)` to logits `(B, K)`; its `transform` maps a PIL
        image to `(I, H, W)`. Or a generator, a `DiffusionPipeline` with the sampler of its run. `attention.backend` is
        left at its default.

    Raises:
        ConfigError: if the export is missing or incomplete, its weights have changed, or a package is not installed.
    """
    try:
        folder = find_folder(source)
        export = read_export(folder)
        import models

        ours = hasattr(models, "build_model")
        check(ours, "models", "this project's package for from_pretrained", models.__file__)
        if "objective" in export["run"]["config"]:
            return load_pipeline(folder, export, device, autoencoder)
        check(autoencoder is None, "autoencoder", "None for a classifier", autoencoder)
        return load_classifier(folder, export, device)
    except ModuleNotFoundError as error:
        remedy = "pip install 'visual-contrast-attention[research]'"
        raise ConfigError(f"from_pretrained needs the package {error.name}: {remedy}") from error
    except KeyError as error:
        raise ConfigError(f"{source}: {CONFIG} has no {error}; export the run with scripts/export.py") from error


def find_folder(source: str | Path) -> Path:
    """Return the folder of an export; one on the hub is downloaded, or read from the cache without a network."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    name = str(source)
    check_hub_name(name, "source", "an export folder or a hub name OWNER/NAME")
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # huggingface_hub and its HTTP client raise errors of their own
        if status_of(error) in (401, 403, 404):
            reason = f"the repository does not exist or is private; check the name, or {TOKEN}"
        else:
            reason = f"{first_line(error)}; on a machine with network access: hf download {name} --local-dir DIR, then "
            reason += "from_pretrained('DIR')"
        place = f"cannot be downloaded from {constants.ENDPOINT}"
        raise ConfigError(f"source: {name} is not a folder and {place}: {reason}") from error


def read_export(folder: Path, every_file: bool = False) -> dict[str, Any]:
    """Read the `config.json` of an export and verify the sha256 of its weights, or of every file.

    Raises:
        ConfigError: if a file is missing or incomplete, or has changed.
    """
    file = folder / CONFIG
    try:
        export = json.loads(file.read_bytes())
        found = export.get("format")
        if found != FORMAT:
            raise ConfigError(f"{file} must have format {FORMAT}, got {found!r}; export the run with scripts/export.py")
        expected, _ = export["sha256"], export["run"]["config"]
        names = {WEIGHTS: expected[WEIGHTS], **(expected if every_file else {})}
        actual = {name: file_sha256(folder / name) for name in names}
    except ConfigError:
        raise
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} is not a complete export ({type(error).__name__}: {error})") from error
    for name in [name for name in names if actual[name] != expected[name]]:
        what = "the weights have changed" if name == WEIGHTS else "the file has changed"
        raise ConfigError(
            f"{folder / name} must have the sha256 of {CONFIG}, {str(expected[name])[:12]}, got {actual[name][:12]}: "
            f"{what}; export or download them again"
        )
    return export


def run_config(export: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the exported run, without `attention.backend`, which belongs to the machine."""
    from vca.runtime.renamed import with_new_names

    config = with_new_names(export["run"]["config"])
    return {**config, "attention": {key: value for key, value in config["attention"].items() if key != "backend"}}


def load_classifier(folder: Path, export: dict[str, Any], device: str) -> Any:
    """Load a classifier; its attribute `transform` is the evaluation transform."""
    from models import CLASSIFIERS, build_model
    from vca.attention import ATTENTIONS
    from vca.config.composition import from_plain, from_registry
    from vca.data.augment import eval_transform
    from vca.data.config import DataConfig
    from vca.training.pretrained import init_from

    config = run_config(export)
    with config_errors():
        attention = from_registry(ATTENTIONS, config["attention"])
        model = build_model(from_registry(CLASSIFIERS, config["model"], "family"), attention)
    init_from(model, folder / WEIGHTS, key="source").check_complete(f"{folder / WEIGHTS} must be a file")
    model.transform = eval_transform(from_plain(DataConfig, config["data"]))
    return model.to(device).eval()


def load_pipeline(folder: Path, export: dict[str, Any], device: str, autoencoder: str | None) -> Any:
    """Load a generator with its autoencoder, which must be that of training, and its run's sampler."""
    import torch

    from models import GENERATORS, build_model
    from vca.config.composition import from_plain
    from vca.config.pipeline import configs_of_run
    from vca.generation.autoencoder import KNOWN_VAES, is_path
    from vca.generation.objective import SamplerConfig
    from vca.runtime.distributed import World
    from vca.training.pretrained import InitWeights
    from vca.training.restore import load_generator

    run, config = export["run"], run_config(export)
    configs = configs_of_run(config, GENERATORS)
    trained = configs["autoencoder"]
    if autoencoder is not None:
        check(trained.name != "none", "autoencoder", "None for a pixel-space model", autoencoder)
        configs["autoencoder"] = replace(trained, source=autoencoder)
    elif trained.name == "file":
        raise ConfigError(f"autoencoder must be the Python file with load_autoencoder, such as '{trained.source}'")
    elif trained.name == "diffusers" and trained.source not in KNOWN_VAES and not is_path(trained.source):
        rule = f"a folder or one of {', '.join(KNOWN_VAES)} if it is not passed to from_pretrained"
        raise ConfigError(f"autoencoder must be {rule}, got '{trained.source}' in the export")
    world = World(0, 0, 1, torch.device(device))
    pipeline = load_generator(configs, build_model, world, InitWeights.ema, checkpoint=str(folder / WEIGHTS))
    origin = {"run": run["name"], "step": run["step"], "weights": run["weights"]}
    origin |= {key: pipeline.origin[key] for key in ("training", "weights_sha256")}
    return replace(pipeline, origin=origin, sampler=from_plain(SamplerConfig, config["sampler"]))


def push(folder: Path, name: str) -> str:
    """Upload the files of an export to the hub repository `OWNER/NAME`, created if needed, and return its address.

    Files of an earlier export that this one does not have are deleted there.

    Raises:
        ConfigError: if the export is incomplete or has changed, or the hub is not reachable or refuses the upload.
    """
    check_hub_name(name)
    from huggingface_hub import HfApi, constants

    export = read_export(folder, every_file=True)
    try:
        api = HfApi()
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[CARD, CONFIG, *export["sha256"]],  # other files of the folder are not uploaded
            delete_patterns=OPTIONAL,
            commit_message=f"{export['run']['name']}, step {export['run']['step']}",
        )
    except Exception as error:  # huggingface_hub and its HTTP client raise errors of their own
        if status_of(error) in (401, 403):
            reason = f"the token is missing, invalid or has no write access; {TOKEN}"
        else:
            reason = f"{first_line(error)}; the export is complete, rerun the command with network access"
        raise ConfigError(f"--push: {name} cannot be uploaded to {constants.ENDPOINT}: {reason}") from error
    return str(address)


def check_hub_name(name: str, key: str = "--push", rule: str = "a hub name OWNER/NAME") -> None:
    """Raise `ConfigError` about `key` unless `name` is a hub name."""
    check(HUB_NAME.fullmatch(name) is not None, key, rule, name)


def status_of(error: Exception) -> int | None:
    """Return the HTTP status of a refused request."""
    return getattr(getattr(error, "response", None), "status_code", None)


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "").removeprefix("Got: ") or type(error).__name__
