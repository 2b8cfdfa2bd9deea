"""Write the weights of a run as safetensors, with a config beside them that timm understands.

    python scripts/export.py outputs/table1-deit_tiny-vca-seed0
    python scripts/export.py outputs/table1-deit_tiny-vca-seed0 --weights raw --out exported

EMA weights are the default where the run has them. To load them again:

    import models, timm
    models.register_timm()
    timm.create_model("local-dir:exported", pretrained=True)
    timm.create_model("vca_deit_tiny_patch16_224", checkpoint_path="exported/model.safetensors")

The second form needs the arguments that `model_args` in `config.json` lists, if it lists any.
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
from vca.runtime.errors import ConfigError
from vca.runtime.files import write_bytes
from vca.runtime.rundir import read_config, to_dict
from vca.training.checkpoint import load_latest


def describe(config: dict[str, Any]) -> dict[str, Any]:
    """timm's `config.json` of a run, from the run's own config: the architecture, and how this model differs."""
    model, attention = dict(config["model"]), config["attention"]
    if model["family"] not in CLASSIFIERS:
        raise ConfigError(f"only classifiers have a place in timm, and model.family is '{model['family']}'")
    sizes = load_sizes()
    if model["name"] not in sizes:
        raise ConfigError(f"model.name must be one of {', '.join(sizes)} to have a name in timm, got '{model['name']}'")
    named = ("patch_size", "window_size", "img_size")  # sizes in the name
    candidates = variants(model["name"])
    size = next((v for v in candidates if all(model[key] == v[key] for key in named if key in v)), candidates[0])
    usual = {**vars(CLASSIFIERS[size["family"]][0]()), **size}
    differs = {key: value for key, value in model.items() if value != usual[key]}
    if attention != to_dict(VCAConfig()):
        differs["attention"] = attention
    data = config["data"]
    described = {
        **pretrained_cfg(size),
        "input_size": [model["in_chans"], data["img_size"], data["img_size"]],
        "num_classes": model["num_classes"],
        **{key: data[key] for key in ("mean", "std", "crop_pct", "interpolation")},
    }
    return {"architecture": timm_name(size), "model_args": differs, "pretrained_cfg": described}


def export(run: Path, weights: str | None, out: Path) -> str:
    """Write `model.safetensors` and `config.json` into `out`; what was written, in one line.

    Raises:
        ConfigError: if the run has no checkpoint, or not those weights.
    """
    if not (run / "config.json").is_file():
        raise ConfigError(f"RUN must be a run directory with a config.json, got '{run}'")
    saved = load_latest(run / "checkpoints", set_aside=False)
    if saved is None:
        raise ConfigError(f"{run / 'checkpoints'} holds no checkpoint")
    weights = weights or ("ema" if saved["ema"] is not None else "raw")
    if weights == "ema" and saved["ema"] is None:
        raise ConfigError(f"{run} keeps no EMA; use --weights raw")
    parameters = saved["ema" if weights == "ema" else "model"]
    config = read_config(run)
    description = describe(config)
    description["run"] = {"weights": weights, "step": saved["step"], "config": config}

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be made: {error.strerror}") from error
    content = save({name: tensor.contiguous() for name, tensor in parameters.items()})
    write_bytes(out / "model.safetensors", content)  # save_file would leave a file that only its owner reads
    (out / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    sizes = {key: description["model_args"].get(key) for key in ("patch_size", "window_size", "img_size")}
    other = ", ".join(f"{key}={value}" for key, value in sizes.items() if value is not None)
    name = description["architecture"] + (f" with {other}" if other else "")
    return f"{out}: {name}, {weights} weights of step {saved['step']}"


def main() -> None:
    """Export and say what was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, outputs/<name>")
    parser.add_argument("--weights", choices=("ema", "raw"), help="default: ema where the run has it")
    parser.add_argument("--out", type=Path, help="default: RUN/export")
    arguments = parser.parse_args()
    try:
        print(export(arguments.run, arguments.weights, arguments.out or arguments.run / "export"))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
