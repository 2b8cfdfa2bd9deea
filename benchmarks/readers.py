"""Throughput of one process for the same images in each form: beside class folders, and beside timm's readers."""

import contextlib
import importlib
import io
import itertools
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.forms import FORMS, copy_folders
from benchmarks.timing import Budget, cpu_clock, take_turns
from vca.data import load_dataset
from vca.data.augment import AugmentConfig
from vca.data.config import DataConfig
from vca.data.loader import MicroBatches, TrainOrder, image_inputs, worker_batches
from vca.runtime.distributed import World

BATCH, BATCHES = 16, 2  # images of a batch, batches of a turn
IMAGES = 2400
READERS = {  # timm's reader -> its module, the package that it needs
    "ReaderImageFolder": ("reader_image_folder", "timm"),
    "ReaderImageInTar": ("reader_image_in_tar", "timm"),
    "ReaderWds": ("reader_wds", "webdataset"),
    "ReaderHfds": ("reader_hfds", "datasets"),
}
CPU = torch.device("cpu")


class Streamed:
    """Images that a reader gives in its own order, whatever the index."""

    def __init__(self, reader: Any) -> None:
        self.items = (item for _ in itertools.count() for item in reader)

    def __getitem__(self, index: int) -> Any:
        return next(self.items)


def open_with_timm(reader: str, folder: Path, images: int, cache: Path) -> Any:
    """Open the images of a folder with one of timm's readers, as RGB; `cache` is a folder for `datasets`.

    Raises:
        ImportError: if the package of the reader is not installed.
    """
    from timm.data import ImageDataset

    module, package = READERS[reader]
    installed = importlib.import_module(package)
    open_reader = getattr(importlib.import_module(f"timm.data.readers.{module}"), reader)
    if reader == "ReaderWds":  # only sequential: shards, and samples in a buffer, are shuffled
        logging.getLogger(open_reader.__module__).setLevel(logging.ERROR)  # a file with sizes is missing
        split = f"train-{{000000..{len(list(folder.glob('*.tar'))) - 1:06d}}}.tar|{images}"
        buffer = {"sample_shuffle_size": 100, "sample_initial_size": 100}
        return Streamed(open_reader(str(folder), split=split, is_training=True, **buffer))
    if reader == "ReaderHfds":
        installed.disable_progress_bars()
        return ImageDataset(None, open_reader(str(folder), root=str(cache)))
    path = folder / "train" if reader == "ReaderImageFolder" else next(folder.glob("*.tar"))
    return ImageDataset(None, open_reader(str(path)))


def batches_of(images: Any, count: int, pipeline: bool, data: DataConfig, augment: AugmentConfig) -> Iterator[Any]:
    """Yield batches in the order of training: only read and decoded, or through the pipeline up to the device."""
    shares = MicroBatches(TrainOrder(count, BATCH, 0), World(0, 0, 1, CPU), BATCH, 1, 0, 1_000_000)
    if pipeline:
        return worker_batches(images, image_inputs(augment, data, 0, CPU), 0, shares, workers=0)
    return ([images[address.image] for address in batch] for batch in shares)


def benchmark_readers(root: Path, data: DataConfig, augment: AugmentConfig, budget: Budget) -> list[dict]:
    """Write images of the class folders `root/train` in each form to a temporary folder, and measure how they load.

    A ratio is the throughput of a form relative to class folders, or to timm's reader, with images of the same content
    in random order and the same augmentation. Files are in the page cache. The order of WebDataset with timm's reader
    is its own. Throughput is that of a core: images per CPU second of this process.
    """
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        photos = copy_folders(root / "train", folder / "class folders", IMAGES)
        kilobytes = sum(len(photo.content) for photo in photos) / len(photos) / 1e3
        print(f"{len(photos)} images of {kilobytes:.0f} kB on average; ratios of throughput: ours / the other\n")
        opened: dict[str, Any] = {}
        forms = {"class folders": "ReaderImageFolder", **{form: reader for form, (_, reader) in FORMS.items()}}
        for form, reader in forms.items():
            place = folder / form
            if form in FORMS:
                place.mkdir()
                FORMS[form][0](photos, place)
            with contextlib.redirect_stdout(io.StringIO()):
                opened[form] = load_dataset(replace(data, root=str(place)), train=True)
            contestants = {name: opened[name] for name in ("class folders", form)}
            if reader is not None:
                try:
                    contestants[reader] = open_with_timm(reader, place, len(photos), folder / f"cache of {form}")
                except ImportError as error:
                    print(f"{form}: {reader} is not measured: {error}")
            for stage in ("decode", "pipeline"):
                sources = {
                    name: batches_of(images, len(photos), stage == "pipeline", data, augment)
                    for name, images in contestants.items()
                }
                part = budget.share(1 / (2 * len(forms) - len(rows)))
                rows.append(measure(form, stage, sources, part))
    return rows


def measure(form: str, stage: str, sources: dict[str, Iterator[Any]], budget: Budget) -> dict[str, Any]:
    """Time the sources in turn, and print and return the throughput of the form relative to the others."""

    def load(source: Iterator[Any]) -> Callable[[], None]:
        def load_turn() -> None:
            for _ in range(BATCHES):
                next(source)

        return load_turn

    timings = take_turns({name: load(source) for name, source in sources.items()}, form, budget, CPU, measure=cpu_clock)
    row: dict[str, Any] = {"form": form, "stage": stage}
    row["images_per_second"] = BATCH * BATCHES / timings[form].seconds
    line = f"{form:<15} {stage:<9} {row['images_per_second']:7.1f} images/s per core"
    for name, timing in timings.items():
        if name != form:
            row[name] = {"ratio": timing.ratio, "low": timing.low, "high": timing.high}
            line += f"   {name} {timing.ratio:.3f} ({timing.low:.3f} to {timing.high:.3f})"
    print(line, flush=True)
    return row
