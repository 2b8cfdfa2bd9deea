"""Copy a data set to shards, which runs then read instead of many small files; optionally resize large images.

    python scripts/prepare_images.py data.root=/data/imagenet out=/data/imagenet-shards workers=16
    python scripts/prepare_images.py data.root=/data/imagenet out=/data/imagenet-256 max_side=256 format=parquet

The source may have any format that a run reads; `out/train` and, if the source has it, `out/val` contain the shards. To
train on them: `data.root=OUT`. Images are shuffled with a fixed seed, for tools that stream shards and shuffle only a
buffer; runs of this project read images in any order. Rerunning the command resumes, with any number of workers.

Without `max_side` all images are copied byte for byte. Parquet files also keep their names, so that a run on class
folders can be resumed on the copy; tars name JPEG files `.jpg`. With `max_side`, images whose shorter side is larger
are resized. The config of a run on them says so (`data_files.train.prepared`), since it is another data set.
"""

import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from vca.cli import command_line
from vca.config import PrepareImagesConfig, register_schemas
from vca.data import identify_files, load_dataset
from vca.data.config import DataConfig
from vca.data.imagefolder import IndexedImages
from vca.data.index import ImageIndex
from vca.data.indexing import scan_split
from vca.data.prepared import Manifest
from vca.data.shards import encoder_version, sample_keys, shard_order, write_shard
from vca.data.splits import in_root
from vca.runtime.errors import ConfigError, check
from vca.runtime.files import lock_folder, write_text
from vca.runtime.metrics_log import progress_bar
from vca.runtime.signals import start_worker


def register_configs() -> None:
    register_schemas(root={"prepare_images": PrepareImagesConfig}, groups={})


def run(config: PrepareImagesConfig) -> dict[str, Manifest]:
    """Write or complete the shards of each split, and return their manifests."""
    indexes, out = open_splits(config.data), Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(out)
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be written: {error.strerror}") from error
    with lock:
        started = {split: make_manifest(config, index).begin(out / split) for split, index in indexes.items()}
        return {split: prepare(config, split, indexes[split], manifest) for split, manifest in started.items()}


def open_splits(data: DataConfig) -> dict[str, ImageIndex]:
    """Open the training split and, if there is one, the evaluation split."""
    images = {"train": load_dataset(data, True)}
    check(isinstance(images["train"], IndexedImages), "data", "images in files", data.name)
    if has_val(data):
        images["val"] = load_dataset(data, False)
        identify_files(**images)  # raises an error if the classes differ
    return {split: one.index for split, one in images.items()}


def has_val(data: DataConfig) -> bool:
    """Whether the data has `val`; an archive without folders of splits is `train`."""
    root = Path(data.root or "").expanduser()
    if data.val is not None or not root.is_file():
        return data.val is not None or bool(data.root and in_root(root, "val"))
    train, val = (scan_split(data, split)[1].entries for split in ("train", "val"))
    return bool(val) and val != train


def make_manifest(config: PrepareImagesConfig, index: ImageIndex) -> Manifest:
    """Return the manifest of a split before its shards are written."""
    for name in index.meta.classes:
        check(name.splitlines() == [name], "class names", "single lines", name)
    resize = config.max_side is not None
    return Manifest(
        source=index.meta.identity,
        classes=index.meta.classes,
        format=config.format.value,
        images_per_shard=config.images_per_shard,
        max_side=config.max_side,
        quality=config.quality if resize else None,
        encoder=encoder_version() if resize else None,
    )


def prepare(config: PrepareImagesConfig, split: str, index: ImageIndex, manifest: Manifest) -> Manifest:
    """Write the missing shards of a split and its class names, and return the complete manifest."""
    folder, names = Path(config.out, split), manifest.names(split)
    if manifest.format == "tar" and not (folder / "classes.txt").exists():
        write_text(folder / "classes.txt", "".join(f"{name}\n" for name in manifest.classes))
    keys = sample_keys(index, manifest.format)
    images = [(number, keys[number]) for number in shard_order(index).tolist()]
    size = manifest.images_per_shard
    parts = [images[start : start + size] for start in range(0, len(images), size)]
    files = {}
    try:
        with progress_bar(len(names), "shard", True) as bar:
            write = partial(write_shard, index, manifest, folder)
            for name, digest in write_shards(write, names, parts, config.workers):
                files[name] = digest
                bar.update()
    finally:
        for interrupted in folder.glob("*.tmp"):
            interrupted.unlink()
    manifest = manifest.finish(folder, files)
    gib = sum(digest["bytes"] for digest in files.values()) / 2**30
    counts = f"{len(index)} images in {len(names)} files, {gib:.2f} GiB, {manifest.resized} images resized"
    print(f"{folder}: {counts}", flush=True)
    return manifest


def write_shards(write: Any, names: list[str], parts: list[Any], workers: int) -> Iterator[tuple[str, Any]]:
    """Yield the results of `write(name, part)`, computed by processes, as they finish."""
    if workers == 0:
        yield from map(write, names, parts)
        return
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        try:
            for done in as_completed([pool.submit(write, *task) for task in zip(names, parts, strict=True)]):
                yield done.result()
        except BaseException:
            for process in multiprocessing.active_children():
                process.kill()
            raise


if __name__ == "__main__":
    register_configs()
    command_line("prepare_images", run)
