"""Open a set of images or statistics by its path or name:

FOLDER                   a `sample.py` folder, or a flat folder of PNG files
FILE.zip, FILE.tar, ...  PNG files in a format of `vca.data.formats`; several files by `*` or `{000..123}`
FILE.npz                 images as `arr_0`, or statistics of `scripts/reference_stats.py` or ADM
data:train, data:test    a split of the config's data set
"""

import json
from pathlib import Path
from typing import Any

from vca.data import load_dataset
from vca.data.config import DataConfig
from vca.data.formats import format_of
from vca.data.splits import expand
from vca.evaluation.features import FeatureSet
from vca.evaluation.images import DatasetImages, ImageSet, NpzImages, members, open_png_archive, open_png_folder
from vca.evaluation.stats_file import StatisticsFile
from vca.runtime.distributed import ONE, World
from vca.runtime.errors import ConfigError, check


def open_source(
    place: str, key: str, data: DataConfig | None, reference: bool = False, world: World = ONE
) -> ImageSet | StatisticsFile:
    """Open a set of images or statistics.

    Args:
        place: path or name, see above.
        key: config key, for messages.
        data: data set of `data:train` and `data:test`.
        reference: use the statistics of a file with both statistics and images, such as ADM's.
        world: every rank must call it.

    Raises:
        ConfigError: if it does not exist or is invalid.
    """
    if place in ("data:train", "data:test"):
        check(data is not None, "data", f"set for {key}={place}, such as data=cifar10", None)
        assert data is not None
        check(data.name != "latents", "data", f"a data set of images for {key}={place}", data.name)
        dataset = load_dataset(data, place == "data:train", world)
        return DatasetImages(dataset, data.img_size, data.in_chans, f"{data.name} ({place})", key)
    path = Path(place).expanduser()
    if path.is_dir():
        return open_png_folder(path / "images" if (path / "manifest.json").is_file() else path, key)
    if path.is_file() and path.suffix.lower() == ".npz":
        names = members(path, key)
        is_statistics = bool({"mu", "sigma"} & set(names)) and (reference or "arr_0" not in names)
        return StatisticsFile(path, key) if is_statistics else NpzImages(path, key)
    files = expand(Path(), str(path))
    form = format_of(files[0]) if files and files[0].is_file() else None
    if form is not None:
        return open_png_archive(files, form, place, key)
    missing = "" if files else " (no such file or folder)"
    rule = "must be a folder or archive of PNG files, an .npz, data:train or data:test"
    raise ConfigError(f"{key} {rule}, got '{place}'{missing}")


def open_samples(
    place: str, data: DataConfig | None, count: int | None, world: World = ONE
) -> tuple[ImageSet | StatisticsFile, dict[str, Any] | None]:
    """Open existing samples, and return them with their sampling settings, None if unknown.

    Raises:
        ConfigError: if they do not exist or are invalid, or there are not `count`.
    """
    samples = open_source(place, "samples", data, world=world)
    check(count in (None, samples.count), "count", f"{samples.count}, the number of images in {place}", count)
    if (manifest := read_sample_manifest(place)) is None:
        return samples, None
    result = manifest.pop("result")
    return samples, {**manifest, "nfe": result.get("nfe") or result["evaluations"]}


def read_sample_manifest(place: str) -> dict[str, Any] | None:
    """Read the `manifest.json` of a `sample.py` folder; None if there is none.

    Raises:
        ConfigError: if it is corrupt, or the folder is not complete.
    """
    path = Path(place).expanduser()
    file = (path.parent if path.name in ("images", "samples.npz") else path) / "manifest.json"
    if not file.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"samples: {file} is corrupt ({error}); sample again with sample.py") from error
    if "result" not in manifest:
        raise ConfigError(f"samples: {file.parent} is not complete; rerun its sample.py command")
    return manifest


def check_unchanged(samples: str | None, features: FeatureSet) -> None:
    """Raise `ConfigError` if the images differ from those that `sample.py` wrote."""
    manifest = read_sample_manifest(samples) if samples is not None else None
    if manifest is not None and manifest["result"]["sha256"] != features.sha256:
        changed = f"samples: images in {samples} have changed since sample.py wrote them"
        raise ConfigError(f"{changed}; rerun its sample.py command, which names a changed image")
