"""Where a set of images is found, by what the user writes:

FOLDER          of `sample.py`, or a flat one of PNG files
FILE.npz        images as `arr_0`, or statistics: of `scripts/reference_stats.py`, or ADM's
data:train      a split of the data set that the config names; or data:test
"""

import json
from pathlib import Path
from typing import Any

from vca.data import load_dataset
from vca.data.config import DataConfig
from vca.evaluation.features import FeatureSet
from vca.evaluation.images import DatasetImages, ImageSet, NpzImages, PngFolder, members
from vca.evaluation.stats_file import StatisticsFile
from vca.runtime.errors import ConfigError, check


def open_source(place: str, key: str, data: DataConfig | None, reference: bool = False) -> ImageSet | StatisticsFile:
    """The set that `place` means.

    Args:
        place: see above.
        key: what the user calls it.
        data: of `data:train` and `data:test`.
        reference: whether of a file that holds statistics and images, as ADM's does, the statistics are meant.

    Raises:
        ConfigError: if there is no such thing, or it is not as it should be.
    """
    if place in ("data:train", "data:test"):
        check(data is not None, "data", f"given for {key}={place}, such as data=cifar10", None)
        assert data is not None
        check(data.name != "latents", "data", f"images for {key}={place}", data.name)
        dataset = load_dataset(data, train=place == "data:train")
        return DatasetImages(dataset, data.img_size, data.in_chans, f"{data.name} ({place})", key)
    path = Path(place).expanduser()
    if path.is_dir():
        return PngFolder(path / "images" if (path / "manifest.json").is_file() else path, key)
    if path.is_file() and path.suffix.lower() == ".npz":
        there = members(path, key)
        is_statistics = bool({"mu", "sigma"} & set(there)) and (reference or "arr_0" not in there)
        return StatisticsFile(path, key) if is_statistics else NpzImages(path, key)
    missing = "" if path.exists() else ", which is not there"
    raise ConfigError(f"{key} must be a folder of PNG files, an .npz, data:train or data:test, got '{place}'{missing}")


def made_by(manifest: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a manifest says about how its samples were made."""
    if manifest is None:
        return None
    made = {key: value for key, value in manifest.items() if key != "result"}
    return {**made, "nfe": manifest["result"].get("nfe") or manifest["result"]["evaluations"]}


def manifest_of(place: str) -> dict[str, Any] | None:
    """How the samples there were made, if `sample.py` made them: the `manifest.json` beside them.

    Raises:
        ConfigError: if it cannot be read, or the set is not complete.
    """
    path = Path(place).expanduser()
    file = (path.parent if path.name in ("images", "samples.npz") else path) / "manifest.json"
    if not file.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"samples: {file} is damaged ({error}); draw the samples again") from error
    if "result" not in manifest:
        raise ConfigError(f"samples: the set in {file.parent} is not complete; run its sample.py command again")
    return manifest


def check_unchanged(samples: str | None, found: FeatureSet) -> None:
    """Raise `ConfigError` if the images are not those that `sample.py` wrote there."""
    manifest = manifest_of(samples) if samples is not None else None
    if manifest is not None and manifest["result"]["sha256"] != found.sha256:
        changed = f"samples: {samples} holds other images than sample.py wrote"
        raise ConfigError(f"{changed}; run its sample.py command again, which names a changed one")
