"""What the attention of a trained classifier looks at from one patch: a picture a layer.

    python scripts/attention_maps.py outputs/VCA_RUN --baseline outputs/SOFTMAX_RUN        four evaluation images
    python scripts/attention_maps.py outputs/VCA_RUN --images photo.png --patch 3 5 --out maps

A row an image, the patch framed in it. Of VCA, averaged over heads: where the positive and the negative stream of the
patch's contrast token look (Stage I: I+, I-, and the weighted difference I), how the patch reads the contrast tokens of
the two streams (Stage II: II+, II-, II), and what comes of both (VCA; see `vca/attention/maps.py`). Of the baseline:
where MHSA looks from the same patch. Each map has its own scale; in the differences red is positive and blue negative.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vca.cli import exit_on_user_error

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from models import rebuild
from vca.attention.maps import listening, maps_of
from vca.config import from_plain
from vca.data import load_dataset
from vca.data.augment import eval_transform
from vca.data.config import DataConfig
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError, config_errors
from vca.runtime.rundir import diff_configs, read_config
from vca.training.pretrained import InitWeights
from vca.training.restore import load_run

Maps = list[dict[str, Tensor]]  # of each layer, by title

ANYWHERE = {"root": None, "check_seconds": None}  # of the data: may differ between two runs


def read_classifier_config(run: Path) -> dict[str, Any]:
    """The config of a run of `train_cls.py`."""
    if not (run / "config.json").exists():
        raise ConfigError(f"{run} is no run directory: it has no config.json")
    config = read_config(run)
    if "objective" in config:
        raise ConfigError(f"{run} is a generator; the maps are those of a classifier")
    return config


def read_images(config: dict[str, Any], root: str | None, images: list[str]) -> Tensor:
    """Images `(B, C, height, width)` as the model gets them: numbers of the evaluation set, or files."""
    data = from_plain(DataConfig, {**config["data"], **({"root": root} if root else {})})
    transform = eval_transform(data)
    dataset = load_dataset(data, train=False) if any(name.isdigit() for name in images) else []
    found = []
    for name in images:
        if name.isdigit() and int(name) >= len(dataset):
            raise ConfigError(f"--images: there are {len(dataset)} evaluation images, no number {name}")
        found.append(transform(dataset[int(name)][0] if name.isdigit() else read_file(Path(name), data.in_chans)))
    return torch.stack(found)


def read_file(path: Path, in_chans: int) -> Any:
    """A PIL image of that many channels; a grey one serves a model of colours, but not the other way round."""
    from PIL import Image

    if not path.is_file():
        raise ConfigError(f"--images: there is no file {path}")
    try:
        image = Image.open(path)
        if in_chans == 1 and image.mode not in ("1", "L", "LA"):
            raise ConfigError(f"--images: {path} is {image.mode}, and the model sees one channel")
        return image.convert("L" if in_chans == 1 else "RGB")
    except OSError as error:
        raise ConfigError(f"--images: {path} is no image that can be read ({error})") from error


@torch.inference_mode()
def maps_of_run(run: Path, images: Tensor, patch: tuple[int, int] | None) -> Maps:
    """Maps of every layer of a run, see `vca.attention.maps.maps_of`."""
    with config_errors():
        model = rebuild(read_classifier_config(run))
    load_run(model, run, None, InitWeights.ema, World(0, 0, 1, torch.device("cpu")))
    with listening(model.eval()) as heard, config_errors():
        model(images)
        if not heard:
            raise ConfigError(f"{run}: its layers keep the attention of their backbone, of which there are no maps")
        return [maps_of(module, heads, patch or centre(heads.grid)) for module, heads in heard]


def maps_of_baseline(baseline: Path, run: Path, layers: Maps, images: Tensor, patch: tuple[int, int] | None) -> Maps:
    """Maps of MHSA to stand beside those of `run`, its layers: of the same images on the same grids."""
    data, other = ({**read_classifier_config(folder)["data"], **ANYWHERE} for folder in (run, baseline))
    if differences := diff_configs(other, data, key="data"):
        raise ConfigError(f"--baseline: {baseline} has other data than {run} ({'; '.join(differences)})")
    beside = maps_of_run(baseline, images, patch)
    for folder, maps, title in ((baseline, beside, "MHSA"), (run, layers, "VCA")):
        if any(title not in one for one in maps):
            raise ConfigError(f"--baseline is for a run of MHSA beside one of VCA; {folder} has no maps of {title}")
    grids = [[tuple(whole(one).shape[1:]) for one in maps] for maps in (layers, beside)]
    if grids[0] != grids[1]:
        raise ConfigError(f"--baseline: the layers of {run} have grids {grids[0]}, those of {baseline} {grids[1]}")
    return beside


def centre(grid: tuple[int, int]) -> tuple[int, int]:
    """The patch in the middle."""
    return grid[0] // 2, grid[1] // 2


def whole(maps: dict[str, Tensor]) -> Tensor:
    """Of a layer's maps the one on the grid of the patches, `(B, H, W)`."""
    return maps["VCA"] if "VCA" in maps else maps["MHSA"]


def draw(layer: int, images: Tensor, maps: dict[str, Tensor], patch: tuple[int, int] | None, path: Path) -> None:
    """A row an image, a column a map."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    shown = ((images - low) / (high - low).clamp_min(1e-6)).permute(0, 2, 3, 1)
    figure, axes = plt.subplots(
        len(images), 1 + len(maps), figsize=(1.3 * (1 + len(maps)), 1.3 * len(images) + 0.35), squeeze=False
    )
    figure.suptitle(f"layer {layer}", fontsize="small", x=0.01, ha="left")
    grid = whole(maps).shape[1:]
    row, column = patch or centre((grid[0], grid[1]))
    size = shown.shape[1] / grid[0], shown.shape[2] / grid[1]
    for index, picture in enumerate(shown):
        axes[index, 0].imshow(picture.squeeze(-1).numpy(), cmap="gray")
        place = (column * size[1] - 0.5, row * size[0] - 0.5)
        axes[index, 0].add_patch(plt.Rectangle(place, size[1], size[0], fill=False, color="red", lw=1.2))
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
    plt.close(figure)


def main() -> None:
    """Read, look, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of train_cls.py")
    parser.add_argument("--baseline", type=Path, help="run directory of the same model with attention=softmax")
    parser.add_argument(
        "--images", nargs="+", default=["0", "1", "2", "3"], help="numbers in the evaluation set, files"
    )
    parser.add_argument("--patch", nargs=2, type=int, metavar=("ROW", "COLUMN"), help="on the grid (the middle)")
    parser.add_argument("--root", help="data.root, if the data has moved")
    parser.add_argument("--out", type=Path, default=Path("attention_maps"), help="folder of the pictures")
    options = parser.parse_args()
    with exit_on_user_error():
        images = read_images(read_classifier_config(options.run), options.root, options.images)
        patch = tuple(options.patch) if options.patch else None
        layers = maps_of_run(options.run, images, patch)
        beside: Maps = [{} for _ in layers]
        if options.baseline:
            beside = maps_of_baseline(options.baseline, options.run, layers, images, patch)
        options.out.mkdir(parents=True, exist_ok=True)
        for index, (maps, other) in enumerate(zip(layers, beside, strict=True)):
            draw(index, images, maps | other, patch, options.out / f"layer_{index:02d}.png")
        print(f"{len(layers)} pictures in {options.out}")


if __name__ == "__main__":
    main()
