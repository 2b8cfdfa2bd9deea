"""Export the weights of a run with a config, a model card and the records of its figures; upload them to the hub.

    python scripts/export.py outputs/table1-deit_tiny-vca-seed0
    python scripts/export.py outputs/table2-dit_s_2-vca-seed0 --weights raw --out exported
    python scripts/export.py outputs/table2-dit_s_2-vca-seed0 --step 400000 --ema 0.9999
    python scripts/export.py outputs/table1-deit_tiny-vca-seed0 --push OWNER/NAME

The default is the newest checkpoint, and its EMA if the run has one, else raw. To load the export, in evaluation mode
with its transform, or with its sampler and autoencoder:

    model = vca.from_pretrained("exported")    # or the hub name OWNER/NAME

A classifier also loads in timm:

    import models, timm
    models.register_timm()
    timm.create_model("local-dir:exported", pretrained=True)
    timm.create_model("vca_deit_tiny_patch16_224", checkpoint_path="exported/model.safetensors")

The last form needs the arguments in `model_args` of `config.json`, if any. A generator with softmax attention is also
written as `dit.pt` or `sit.pt`, the state dict that the original code of DiT or SiT loads.
"""

import argparse
import hashlib
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save

from models import CLASSIFIERS
from models.timm_registry import load_sizes, pretrained_cfg, timm_name, variants
from vca.attention import VCAConfig, variant_name
from vca.hub import CARD, CONFIG, FORMAT, WEIGHTS, check_hub_name, push
from vca.report.accuracy import accuracy_at, ema_warning
from vca.report.card import figures, render_card
from vca.runtime.digest import tensors_sha256
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError, check
from vca.runtime.files import write_bytes, write_text
from vca.runtime.rundir import RunDirectory, read_config, to_dict
from vca.training.checkpoint import list_checkpoints
from vca.training.pretrained import InitWeights
from vca.training.restore import RunWeights, read_run_weights
from vca.training.snapshots import run_decays

# objective -> file in the layout of the original code, repository, class in its models.py
ORIGINALS = {
    "diffusion": ("dit.pt", "facebookresearch/DiT", "DiT"),
    "interpolant": ("sit.pt", "willisma/SiT", "SiT"),
}
# Arguments of both classes; fields of the model config have the same names.
CONSTRUCTOR = ["input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio"]
CONSTRUCTOR += ["class_dropout_prob", "num_classes", "learn_sigma"]


def timm_config(config: dict[str, Any]) -> dict[str, Any]:
    """Build timm's `config.json` from a run's config: architecture, non-default arguments, pretrained config."""
    model, attention = dict(config["model"]), config["attention"]
    if model["family"] not in CLASSIFIERS:
        raise ConfigError(f"model.family must be one of {', '.join(CLASSIFIERS)} for timm, got '{model['family']}'")
    sizes = load_sizes()
    if model["name"] not in sizes:
        raise ConfigError(f"model.name must be one of {', '.join(sizes)} for timm, got '{model['name']}'")
    named = ("patch_size", "window_size", "img_size")  # sizes in the name
    candidates = variants(model["name"])
    size = next((v for v in candidates if all(model[key] == v[key] for key in named if key in v)), candidates[0])
    defaults = {**vars(CLASSIFIERS[size["family"]][0]()), **size}
    model_args = {key: value for key, value in model.items() if value != defaults[key]}
    if attention != to_dict(VCAConfig()):
        model_args["attention"] = attention
    data = config["data"]
    pretrained = {
        **pretrained_cfg(size),
        "input_size": [model["in_chans"], data["img_size"], data["img_size"]],
        "num_classes": model["num_classes"],
        **{key: data[key] for key in ("mean", "std", "crop_pct", "interpolation")},
    }
    return {"architecture": timm_name(size), "model_args": model_args, "pretrained_cfg": pretrained}


def original_layout(config: dict[str, Any]) -> dict[str, str]:
    """Return `file`, `code` and `arguments` for a generator that the original code can build, else `reason`."""
    if "objective" not in config:
        return {}
    model, attention, objective = config["model"], config["attention"], config["objective"]["name"]
    if attention["name"] != "softmax" or attention.get("local_branch"):
        return {"reason": f"that code has no attention={variant_name(attention)}"}
    if objective not in ORIGINALS:
        return {"reason": f"that code has no objective={objective}"}
    if not isinstance(model["input_size"], int):
        return {"reason": "that code accepts only square inputs"}
    file, code, name = ORIGINALS[objective]
    arguments = ", ".join(f"{key}={model[key]}" for key in CONSTRUCTOR)
    return {"file": file, "code": code, "arguments": f"{name}({arguments}).load_state_dict(torch.load('{file}'))"}


def read_weights(run: Path, weights: str | None, step: int | None, ema: float | None) -> RunWeights:
    """Read the weights to export: step of a checkpoint or snapshot, None is the newest checkpoint; EMA decay."""
    if step is None and not list_checkpoints(run / "checkpoints"):
        raise ConfigError(f"{run / 'checkpoints'} contains no checkpoint")
    if weights == "ema" and not run_decays(run):
        raise ConfigError(f"--weights must be raw for {run}, which has no EMA")
    check(ema is None or weights != "raw", "--ema", "unset with --weights raw", ema)
    return read_run_weights(run, step, InitWeights(weights or "ema"), World(0, 0, 1, torch.device("cpu")), ema)


def export(
    run: Path,
    weights: str | None,
    out: Path,
    source: str | None = None,
    step: int | None = None,
    ema: float | None = None,
    license: str | None = None,
) -> str:
    """Write an export to `out`, and return a summary line.

    Args:
        weights, step, ema: `ema` or `raw`, step and EMA decay of the weights; see the command's options for None.
        source: hub name for the model card.
        license: the hub's identifier of the license of the weights, see `vca.report.card.front_matter`.

    Raises:
        ConfigError: if the run has no checkpoint or no such weights, a record of the run was changed, or `out` is the
            run directory.
    """
    if not (run / "config.json").is_file():
        raise ConfigError(f"RUN must be a run directory with a config.json, got '{run}'")
    if out.resolve() == run.resolve():
        raise ConfigError(f"--out must not be the run directory, whose config.json it would replace, got '{out}'")
    chosen = read_weights(run, weights, step, ema)
    parameters = chosen.tensors
    config = read_config(run)
    description = {} if "objective" in config else timm_config(config)
    layout = original_layout(config)

    contents = {WEIGHTS: save({name: tensor.contiguous() for name, tensor in parameters.items()})}
    if "file" in layout:
        buffer = io.BytesIO()
        torch.save(dict(parameters), buffer)
        contents[layout["file"]] = buffer.getvalue()
    shown = figures(run, chosen.step, chosen.name, tensors_sha256(parameters), logged_ema(run, chosen.decay))
    contents |= {name: (run / name).read_bytes() for name in sorted({figure.file for figure in shown})}
    description = {
        "format": FORMAT,
        **description,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
        "figures": [asdict(figure) for figure in shown],
        "run": {
            "name": run.resolve().name,
            "weights": chosen.name,
            "ema_decay": chosen.decay,
            "step": chosen.step,
            "config": config,
        },
    }
    count = sum(tensor.numel() for tensor in parameters.values() if tensor.is_floating_point())
    card = render_card(run, description, count, shown, layout, source or out.resolve().name, license)
    write_export(out, contents, card, description)
    return f"{out}: {summary(run, description)}"


def write_export(out: Path, contents: dict[str, bytes], card: str, description: dict[str, Any]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: cannot create {out}: {error.strerror}") from error
    for name, content in contents.items():
        write_bytes(out / name, content)  # safetensors.save_file ignores the umask
    write_text(out / CARD, card)
    write_text(out / CONFIG, json.dumps(description, indent=2) + "\n")


def logged_ema(run: Path, decay: float | None) -> str:
    """Return the prefix of an EMA's values in `metrics.jsonl`."""
    return "ema" if decay is None or decay == run_decays(run)[0] else f"ema_{decay}"


def summary(run: Path, description: dict[str, Any]) -> str:
    """Describe an export in one line, with a second one if the EMA is clearly worse than the raw weights."""
    weights, step, config = (description["run"][key] for key in ("weights", "step", "config"))
    if "objective" in config:
        name = f"{config['model']['name']} with {variant_name(config['attention'])} attention"
        measured = ", ".join(f"{figure['name']} {figure['value']}" for figure in description["figures"])
        return f"{name}, {weights} weights of step {step}, {measured or 'no evaluation record of these weights'}"
    top1 = accuracy_at(RunDirectory(run).records(), step, logged_ema(run, description["run"]["ema_decay"]))
    sizes = {key: description["model_args"].get(key) for key in ("patch_size", "window_size", "img_size")}
    other = ", ".join(f"{key}={value}" for key, value in sizes.items() if value is not None)
    name = description["architecture"] + (f" with {other}" if other else "")
    accuracy = f"top-1 {top1[weights]:.2f} %" if weights in top1 else "not evaluated at this step"
    warning = ema_warning(top1) if weights == "ema" else None
    return f"{name}, {weights} weights of step {step}, {accuracy}" + (
        f"\nwarning: {warning} (--weights raw)" if warning else ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, outputs/<name>")
    parser.add_argument("--weights", choices=("ema", "raw"), help="default: ema if the run has one, else raw")
    parser.add_argument("--step", type=int, help="step of a checkpoint or snapshot; default: the newest checkpoint")
    parser.add_argument("--ema", type=float, metavar="DECAY", help="EMA decay; default: the first one of the run")
    parser.add_argument("--out", type=Path, help="default: RUN/export")
    license_help = "the hub's identifier of the weights' license; default: mit, or other with trainer.init_from"
    parser.add_argument("--license", metavar="ID", help=license_help)
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload the export to this Hugging Face repository")
    arguments = parser.parse_args()
    out = arguments.out or arguments.run / "export"
    try:
        if arguments.push is not None:
            check_hub_name(arguments.push)
        chosen = {key: getattr(arguments, key) for key in ("step", "ema", "license")}
        print(export(arguments.run, arguments.weights, out, arguments.push, **chosen))
        if arguments.push is not None:
            print(f"uploaded to {push(out, arguments.push)}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
