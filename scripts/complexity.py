"""Print parameters and multiply-adds of every model config with softmax attention and VCA, with the published values.

Also counts every row of the ablations in configs/ablation/ on the models of Tables 3 and 4.

python scripts/complexity.py
python scripts/complexity.py --model swin_tiny --attention agent differential       only these
python scripts/complexity.py --model deit_tiny --attention softmax linear vca --size 224 512 1024
python scripts/complexity.py model.contrast_grid=[8,8] --model deit_tiny --attention mhla vca --size 512 1024
"""

import argparse
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_cls
import train_gen
from models import CLASSIFIERS, build_model
from models.timm_registry import load_sizes
from vca.cli import exit_on_user_error
from vca.config import compose
from vca.config.composition import CONFIGS
from vca.evaluation.complexity import Complexity, count, example_inputs
from vca.report.paper import PAPER
from vca.runtime.errors import ConfigError
from vca.sweep.plan import ablations, rows_of_ablation

# Experiments of the models for small images; all other models are counted on ImageNet.
EXPERIMENTS = {"deit_mini": "cifar10", "dit_mini": "cifar10_dit"}

# Models of Tables 3 and 4.
ABLATED = ("deit_tiny", "dit_s_2")


def config_of(model: str, attention: str, *overrides: str) -> Any:
    """Compose the config of a classifier on 224 px, of a generator on 32 x 32 x 4 latents, or of its experiment."""
    train_cls.register_configs()
    train_gen.register_configs()
    script = "train_cls" if load_sizes()[model]["family"] in CLASSIFIERS else "train_gen"
    if model in EXPERIMENTS:
        base = [f"experiment={EXPERIMENTS[model]}"]
    else:
        base = ["data=imagefolder", *(["data.img_size=256", "autoencoder=sd_vae"] if script == "train_gen" else [])]
    return compose(script, [*base, f"model={model}", f"attention={attention}", *overrides])


@cache
def complexity_of(model: str, attention: str, *overrides: str) -> Complexity:
    """Count a model with an attention, see `config_of`."""
    config = config_of(model, attention, *overrides)
    return count(lambda: build_model(config.model, config.attention), lambda: example_inputs(config.model))


def choices(models: list[str], attentions: list[str], sizes: Sequence[int] = ()) -> list[tuple[str, tuple[str, ...]]]:
    """Return the models to count, each with its attention and further overrides; `sizes` are image sizes in pixels."""
    rows: list[tuple[str, tuple[str, ...]]] = [
        (model, (attention, *size))
        for model in models or sorted(load_sizes())
        for attention in attentions or ("softmax", "vca")
        for size in [[f"data.img_size={pixels}"] for pixels in sizes] or [[]]
    ]
    if not models and not attentions and not sizes:
        ablated = [tuple(row) for name in ablations() for row in rows_of_ablation(name)]
        rows += [(model, row) for model in ABLATED for row in ablated]
    return list(dict.fromkeys(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="config overrides for all models")
    parser.add_argument("--model", nargs="+", default=[], choices=sorted(load_sizes()), metavar="NAME")
    attentions = sorted(path.stem for path in (CONFIGS / "attention").glob("*.yaml"))
    parser.add_argument("--attention", nargs="+", default=[], choices=attentions, metavar="NAME")
    parser.add_argument("--size", nargs="+", type=int, default=[], metavar="PIXELS", help="instead of the default size")
    options = parser.parse_args()

    print(f"{'model':22}{'input':14}{'attention':24}{'params (M)':>12}{'MACs (G)':>10}   paper: params  MACs")
    for model, chosen in choices(options.model, options.attention, options.size):
        attention = " ".join(word for word in chosen if "img_size" not in word).replace("attention.", "")
        try:
            counts = complexity_of(model, *chosen, *options.overrides)
        except ConfigError:  # a wrong override
            raise
        except ValueError as error:  # an image size that the model does not support
            print(f"{model:22}{chosen[-1].partition('=')[2]:14}{attention:24}  {error}")
            continue
        row = None if options.size or options.overrides else PAPER.get((model, attention))
        published = f"{row.params:>16}{row.macs:>6}" if row and row.params else ""
        shape = "x".join(map(str, counts.input))
        print(f"{model:22}{shape:14}{attention:24}{counts.params / 1e6:12.3f}{counts.macs / 1e9:10.3f}{published}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
