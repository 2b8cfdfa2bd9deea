"""Plan a run before it is started: memory, time, data, disk and GPU-hours, in seconds and without a GPU.

python scripts/plan.py experiment=table1/deit_small_vca --gpu h100 --gpus 8
python scripts/plan.py experiment=table2/dit_s_2_vca trainer.precision=bf16 --gpu a100 --gpus 4 --mfu 0.3
python scripts/plan.py model=swin_tiny data=imagenet recipe=swin trainer.micro_batch_size=64 --gpu rtx4090

The arguments are those of train_cls.py or train_gen.py. Each line says whether its figure is from the config, counted,
measured or assumed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import yaml

import train_cls
import train_gen
from models import GENERATORS, build_model
from models.timm_registry import load_sizes
from vca.cli import exit_on_user_error
from vca.config import compose
from vca.config.composition import CONFIGS
from vca.report.plan import plan
from vca.runtime.devices import GPUS
from vca.runtime.errors import check, config_errors


def script_of(overrides: Sequence[str]) -> str:
    """Return the root script of an experiment or model; `train_cls` without one."""
    choices = dict(override.split("=", 1) for override in overrides if "=" in override)
    file = CONFIGS / "experiment" / f"{choices.get('experiment')}.yaml"
    defaults = yaml.safe_load(file.read_text()).get("defaults", []) if file.is_file() else []
    models = [str(entry["override /model"]) for entry in defaults if "override /model" in entry]
    model = choices.get("model", models[0] if models else "")
    return "train_gen" if load_sizes().get(model, {}).get("family") in GENERATORS else "train_cls"


def main() -> None:
    """Compose the config, and print its plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of train_cls.py or train_gen.py")
    parser.add_argument("--gpu", default="h100", help=f"kind of GPU: {', '.join(GPUS)}; default: h100")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs; default: 1")
    parser.add_argument("--mfu", type=float, default=0.35, help="assumed share of the peak FLOP/s; default: 0.35")
    parser.add_argument("--images", type=int, help="training images; default: those of a known data set")
    parser.add_argument("--per-core", type=float, help="images/s that a CPU core loads; default: measured")
    options = parser.parse_intermixed_args()
    with exit_on_user_error():
        check(options.gpu in GPUS, "--gpu", f"one of {', '.join(GPUS)}", options.gpu)
        check(options.gpus >= 1, "--gpus", ">= 1", options.gpus)
        check(0 < options.mfu <= 1, "--mfu", "in (0, 1]", options.mfu)
        for name in ("images", "per_core"):
            value = getattr(options, name)
            check(value is None or value > 0, f"--{name.replace('_', '-')}", "> 0", value)
        train_cls.register_configs()
        train_gen.register_configs()
        config = compose(script_of(options.overrides), options.overrides)
        with config_errors():
            figures = plan(
                config, build_model, GPUS[options.gpu], options.gpus, options.mfu, options.images, options.per_core
            )
            print(f"{config.name} on {options.gpus} x {options.gpu}, {config.trainer.precision.value}")
            for what, value, source in figures:
                print(f"  {what:28}{value:>14}   {source}", flush=True)


if __name__ == "__main__":
    main()
