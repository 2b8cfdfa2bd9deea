"""Plot the attention maps of a trained classifier for one patch: one figure per layer.

    python scripts/attention_maps.py outputs/VCA_RUN --baseline outputs/SOFTMAX_RUN        four evaluation images
    python scripts/attention_maps.py outputs/VCA_RUN --images photo.png --patch 3 5 --out maps

Each row is an image, with the patch framed. VCA maps, averaged over heads: attention of the patch's contrast token in
both streams (Stage I: I+, I-, and the weighted difference I), attention of the patch to the contrast tokens (Stage II:
II+, II-, II), and the product of both stages (VCA; see `vca/attention/maps.py`). With --baseline, the MHSA map of the
same patch is added. Other attentions have one map, the derivative of the patch's output by the values. Each map has its
own scale; in differences red is positive and blue negative.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from models import rebuild
from vca.attention.maps import maps_of, recorded_calls
from vca.cli import exit_on_user_error
from vca.config import from_plain
from vca.data import load_dataset
from vca.data.augment import eval_transform
from vca.data.config import DataConfig
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError, config_errors
from vca.runtime.rundir import diff_configs, read_config
from vca.training.pretrained import InitWeights
from vca.training.restore import load_run

Maps = list[dict[str, Tensor]]  # title -> map, for each layer


def read_classifier_config(run: Path) -> dict[str, Any]:
    """Read the config of a run of `train_cls.py`."""
    if not (run / "config.json").exists():
        raise ConfigError(f"{run} must be a run directory with a config.json")
    config = read_config(run)
    if "objective" in config:
        raise ConfigError(f"{run} must be a classifier run (train_cls.py), got a generator")
    return config


def read_images(config: dict[str, Any], root: str | None, images: list[str]) -> Tensor:
    """Load images `(B, C, height, width)` with the evaluation transform, by evaluation index or file name."""
    data = from_plain(DataConfig, {**config["data"], **({"root": root} if root else {})})
    transform = eval_transform(data)
    dataset = load_dataset(data, train=False) if any(name.isdigit() for name in images) else []
    loaded = []
    for name in images:
        if name.isdigit() and int(name) >= len(dataset):
            raise ConfigError(f"--images: index must be < {len(dataset)} (evaluation images), got {name}")
        loaded.append(transform(dataset[int(name)][0] if name.isdigit() else read_file(Path(name), data.in_chans)))
    return torch.stack(loaded)


def read_file(path: Path, in_chans: int) -> Any:
    """Open a PIL image with that many channels; grey is converted to color, color to grey is an error."""
    from PIL import Image

    if not path.is_file():
        raise ConfigError(f"--images: no such file: {path}")
    try:
        image = Image.open(path)
        if in_chans == 1 and image.mode not in ("1", "L", "LA"):
            raise ConfigError(f"--images: {path} must be grey (data.in_chans=1), got {image.mode}")
        return image.convert("L" if in_chans == 1 else "RGB")
    except OSError as error:
        raise ConfigError(f"--images: cannot read {path} ({error})") from error


@torch.no_grad()
def maps_of_run(run: Path, images: Tensor, patch: tuple[int, int] | None) -> Maps:
    """Compute the maps of every layer of a run, see `vca.attention.maps.maps_of`."""
    with config_errors():
        model = rebuild(read_classifier_config(run))
    load_run(model, run, None, InitWeights.ema, World(0, 0, 1, torch.device("cpu")))
    with config_errors():
        with recorded_calls(model.eval()) as calls:
            model(images)
        if not calls:
            raise ConfigError(f"{run} must use an attention variant in some layer, got the backbone's own attention")
        return [maps_of(module, tokens, patch or center_of(tokens.grid)) for module, tokens in calls]


def maps_of_baseline(baseline: Path, run: Path, layers: Maps, images: Tensor, patch: tuple[int, int] | None) -> Maps:
    """Compute the MHSA maps of `baseline` for the same images and grids as `layers`, the maps of `run`."""
    data, other = (read_classifier_config(folder)["data"] for folder in (run, baseline))
    if differences := diff_configs(other, data, ("data.root", "data.check_seconds"), key="data"):
        raise ConfigError(f"--baseline: {baseline} must have the data of {run}, got {'; '.join(differences)}")
    baseline_maps = maps_of_run(baseline, images, patch)
    for folder, maps, title in ((baseline, baseline_maps, "MHSA"), (run, layers, "VCA")):
        if any(title not in one for one in maps):
            raise ConfigError(f"--baseline: {folder} must be a run with {title} (compare a VCA run with an MHSA run)")
    grids = [[tuple(token_map(one).shape[1:]) for one in maps] for maps in (layers, baseline_maps)]
    if grids[0] != grids[1]:
        raise ConfigError(f"--baseline: token grids of {baseline} must be {grids[0]} as in {run}, got {grids[1]}")
    return baseline_maps


def center_of(grid: tuple[int, int]) -> tuple[int, int]:
    """Return the patch at the center of the grid."""
    return grid[0] // 2, grid[1] // 2


def token_map(maps: dict[str, Tensor]) -> Tensor:
    """Return a layer's map of the whole attention, `(B, H, W)` on the token grid."""
    return list(maps.values())[-1]


def plot_layer(layer: int, images: Tensor, maps: dict[str, Tensor], patch: tuple[int, int] | None, path: Path) -> None:
    """Save a figure with one row per image and one column per map."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    pixels = ((images - low) / (high - low).clamp_min(1e-6)).permute(0, 2, 3, 1)
    figure = Figure(figsize=(1.3 * (1 + len(maps)), 1.3 * len(images) + 0.35))
    axes = figure.subplots(len(images), 1 + len(maps), squeeze=False)
    figure.suptitle(f"layer {layer}", fontsize="small", x=0.01, ha="left")
    grid = token_map(maps).shape[1:]
    row, column = patch or center_of((grid[0], grid[1]))
    size = pixels.shape[1] / grid[0], pixels.shape[2] / grid[1]
    for index, image in enumerate(pixels):
        axes[index, 0].imshow(image.squeeze(-1).numpy(), cmap="gray")
        corner = (column * size[1] - 0.5, row * size[0] - 0.5)
        axes[index, 0].add_patch(Rectangle(corner, size[1], size[0], fill=False, color="red", lw=1.2))
        for axis, (name, values) in zip(axes[index, 1:], maps.items(), strict=True):
            one, signed = values[index], name in ("I", "II", "VCA")
            peak = float(one.abs().max())
            axis.imshow(one.numpy(), cmap="seismic" if signed else "viridis", vmin=-peak if signed else 0, vmax=peak)
            if index == 0:
                axis.set_title(name, fontsize="small")
    for axis in axes.flat:
        axis.set_axis_off()
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of train_cls.py")
    parser.add_argument("--baseline", type=Path, help="run directory of the same model with attention=softmax")
    parser.add_argument(
        "--images",
        nargs="+",
        default=["0", "1", "2", "3"],
        help="indices in the evaluation set, or files (default: 0 1 2 3)",
    )
    parser.add_argument(
        "--patch", nargs=2, type=int, metavar=("ROW", "COLUMN"), help="patch on the token grid (default: the center)"
    )
    parser.add_argument("--root", help="overrides the run's data.root")
    parser.add_argument(
        "--out", type=Path, default=Path("attention_maps"), help="output folder (default: attention_maps)"
    )
    options = parser.parse_args()
    with exit_on_user_error():
        images = read_images(read_classifier_config(options.run), options.root, options.images)
        patch = tuple(options.patch) if options.patch else None
        layers = maps_of_run(options.run, images, patch)
        baseline_maps: Maps = [{} for _ in layers]
        if options.baseline:
            baseline_maps = maps_of_baseline(options.baseline, options.run, layers, images, patch)
        options.out.mkdir(parents=True, exist_ok=True)
        for index, (maps, other) in enumerate(zip(layers, baseline_maps, strict=True)):
            plot_layer(index, images, maps | other, patch, options.out / f"layer_{index:02d}.png")
        print(f"{len(layers)} figures written to {options.out}")


if __name__ == "__main__":
    main()
