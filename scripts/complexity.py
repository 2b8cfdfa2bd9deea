"""Parameters and multiply-adds of every model config as baseline and with VCA, beside the paper's figures; and of every
row of the ablations in configs/ablation/ on the models of Tables 3 and 4.

python scripts/complexity.py
python scripts/complexity.py --model swin_tiny --attention agent differential       these alone
python scripts/complexity.py --json         [{"model": ..., "attention": ..., "params": ..., "macs": ..., "input": ...}]
"""

import argparse
import json
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import train_cls
import train_gen
from models import CLASSIFIERS, build_model
from models.config import BackboneConfig
from models.timm_registry import load_sizes
from vca.config import compose
from vca.config.composition import CONFIGS
from vca.evaluation.complexity import Complexity, count
from vca.sweep.plan import ablations, rows_of_ablation

# The models for small images as the experiments have them that RESULTS.md reports; the others on ImageNet.
EXPERIMENTS = {"deit_mini": "cifar10", "dit_mini": "cifar10_dit"}

# Table 1 of the paper: millions of parameters, billions of multiply-adds, top-1 in percent. Its base figures for Swin
# (28.9) and CSWin (20.5) match no known model.
PAPER = {
    ("deit_tiny", "softmax"): (5.7, 1.2, 72.2),
    ("deit_tiny", "vca"): (6.0, 1.2, 75.6),
    ("deit_small", "softmax"): (22.1, 4.6, 79.8),
    ("deit_small", "vca"): (22.6, 4.6, 80.7),
    ("pvt_tiny", "softmax"): (13.2, 1.9, 75.1),
    ("pvt_tiny", "vca"): (11.6, 2.0, 78.2),
    ("swin_tiny", "softmax"): (28.9, 4.5, 81.3),
    ("swin_tiny", "vca"): (28.5, 4.6, 82.3),
    ("cswin_tiny", "softmax"): (20.5, 4.3, 82.7),
    ("cswin_tiny", "vca"): (20.4, 4.3, 83.3),
}


# The models of the ablations, Tables 3 and 4.
ABLATED = ("deit_tiny", "dit_s_2")


def config_of(model: str, attention: str, *overrides: str) -> Any:
    """Of a classifier on 224 px images, a generator on 32 x 32 x 4 latents, or as `EXPERIMENTS` has it."""
    train_cls.register_configs()
    train_gen.register_configs()
    script = "train_cls" if load_sizes()[model]["family"] in CLASSIFIERS else "train_gen"
    choice = [f"model={model}", f"attention={attention}", *overrides]
    if model in EXPERIMENTS:
        return compose(script, [f"experiment={EXPERIMENTS[model]}", *choice])
    latents = ["data.img_size=256", "autoencoder=sd_vae"] if script == "train_gen" else []
    return compose(script, [*choice, "data=imagefolder", *latents])


@cache
def complexity_of(model: str, attention: str, *overrides: str) -> Complexity:
    """Counts of a model with an attention, see `config_of`."""
    config = config_of(model, attention, *overrides)

    def inputs() -> tuple[torch.Tensor, ...]:
        if isinstance(config.model, BackboneConfig):
            return (torch.empty(1, config.model.in_chans, *config.model.size),)
        latents = torch.empty(1, config.model.in_channels, *config.model.size)
        return latents, torch.empty(1), torch.empty(1, dtype=torch.long)

    return count(lambda: build_model(config.model, config.attention), inputs)


def choices(models: list[str], attentions: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """What is counted: a model, and its attention with further overrides."""
    shown = models or sorted(load_sizes()), attentions or ("softmax", "vca")
    rows: list[tuple[str, tuple[str, ...]]] = [(model, (attention,)) for model in shown[0] for attention in shown[1]]
    if not models and not attentions:
        ablated = [tuple(row) for name in ablations() for row in rows_of_ablation(name)]
        rows += [(model, row) for model in ABLATED for row in ablated]
    return list(dict.fromkeys(rows))


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    parser.add_argument("--model", nargs="+", default=[], choices=sorted(load_sizes()), metavar="NAME")
    attentions = sorted(path.stem for path in (CONFIGS / "attention").glob("*.yaml"))
    parser.add_argument("--attention", nargs="+", default=[], choices=attentions, metavar="NAME")
    options = parser.parse_args()

    rows = [
        (model, " ".join(chosen).replace("attention.", ""), complexity_of(model, *chosen))
        for model, chosen in choices(options.model, options.attention)
    ]
    if options.json:
        print(json.dumps([{"model": model, "attention": attention, **asdict(c)} for model, attention, c in rows]))
        return
    print(f"{'model':22}{'input':14}{'attention':24}{'params (M)':>12}{'MACs (G)':>10}   paper: params  MACs")
    for model, attention, counts in rows:
        paper = PAPER.get((model, attention))
        beside = f"{paper[0]:>16}{paper[1]:>6}" if paper else ""
        shape = "x".join(map(str, counts.input))
        print(f"{model:22}{shape:14}{attention:24}{counts.params / 1e6:12.3f}{counts.macs / 1e9:10.3f}{beside}")


if __name__ == "__main__":
    main()
