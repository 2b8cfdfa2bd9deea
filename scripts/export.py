"""Export the weights of a run as safetensors with a timm `config.json`.

    python scripts/export.py outputs/table1-deit_tiny-vca-seed0
    python scripts/export.py outputs/table1-deit_tiny-vca-seed0 --weights raw --out exported

The default is the EMA if the run has one, else raw. To load the export:

    import models, timm
    models.register_timm()
    timm.create_model("local-dir:exported", pretrained=True)
    timm.create_model("vca_deit_tiny_patch16_224", checkpoint_path="exported/model.safetensors")

The second form needs the arguments in `model_args` of `config.json`, if any.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from safetensors.torch import save

from models import CLASSIFIERS
from models.timm_registry import load_sizes, pretrained_cfg, timm_name, variants
from vca.attention import VCAConfig
from vca.report.accuracy import accuracy_at, ema_warning
from vca.runtime.errors import ConfigError
from vca.runtime.files import write_bytes
from vca.runtime.rundir import RunDirectory, read_config, to_dict
from vca.training.checkpoint import load_latest


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


def export(run: Path, weights: str | None, out: Path) -> str:
    """Write `model.safetensors` and `config.json` to `out`, and return a summary line.

    Raises:
        ConfigError: if the run has no checkpoint, or no such weights.
    """
    if not (run / "config.json").is_file():
        raise ConfigError(f"RUN must be a run directory with a config.json, got '{run}'")
    saved = load_latest(run / "checkpoints", set_aside=False)
    if saved is None:
        raise ConfigError(f"{run / 'checkpoints'} contains no checkpoint")
    weights = weights or ("ema" if saved["ema"] is not None else "raw")
    if weights == "ema" and saved["ema"] is None:
        raise ConfigError(f"--weights must be raw for {run}, which has no EMA")
    top1 = accuracy_at(RunDirectory(run).records(), saved["step"])
    parameters = saved["ema" if weights == "ema" else "model"]
    config = read_config(run)
    description = timm_config(config)
    description["run"] = {"weights": weights, "step": saved["step"], "config": config}

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: cannot create {out}: {error.strerror}") from error
    content = save({name: tensor.contiguous() for name, tensor in parameters.items()})
    write_bytes(out / "model.safetensors", content)  # safetensors.save_file ignores the umask
    (out / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    sizes = {key: description["model_args"].get(key) for key in ("patch_size", "window_size", "img_size")}
    other = ", ".join(f"{key}={value}" for key, value in sizes.items() if value is not None)
    name = description["architecture"] + (f" with {other}" if other else "")
    accuracy = f"top-1 {top1[weights]:.2f} %" if weights in top1 else "not evaluated at this step"
    warning = ema_warning(top1) if weights == "ema" else None
    return f"{out}: {name}, {weights} weights of step {saved['step']}, {accuracy}" + (
        f"\nwarning: {warning} (--weights raw)" if warning else ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, outputs/<name>")
    parser.add_argument("--weights", choices=("ema", "raw"), help="default: ema if the run has one, else raw")
    parser.add_argument("--out", type=Path, help="default: RUN/export")
    arguments = parser.parse_args()
    try:
        print(export(arguments.run, arguments.weights, arguments.out or arguments.run / "export"))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
