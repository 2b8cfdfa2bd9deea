"""Check the files of a data set before a run.

Images, or the files of a latent cache, are read in random order within a time limit: a set of thousands completely, a
set of millions by a sample. A file that would stop or spoil a run is an error; a harmless one is a note.
"""

import io
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vca.data.config import DataConfig
from vca.data.decode import is_16_bit_color
from vca.data.imagefolder import IndexedImages
from vca.data.latents import RERUN, LatentCache, file_is_made
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError

HIGH_DEPTH = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # PIL's modes with more than 8 bits per channel


@dataclass(frozen=True)
class Finding:
    """A problem of a file and its remedy; `fatal` if a run cannot use the file."""

    path: str
    problem: str
    remedy: str
    fatal: bool

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}; {self.remedy}"


@dataclass
class Examination:
    """Findings in the `checked` first of `images` files, after `seconds`."""

    findings: list[Finding]
    checked: int
    images: int
    seconds: float
    unit: str = "images"

    @property
    def errors(self) -> list[Finding]:
        """The fatal findings."""
        return [finding for finding in self.findings if finding.fatal]

    def __str__(self) -> str:
        part = "all" if self.checked == self.images else f"{self.checked} of"
        notes = len(self.findings) - len(self.errors)
        return (
            f"read {part} {self.images} {self.unit} in {self.seconds:.1f} s: {len(self.errors)} errors, {notes} notes"
        )


def examine(
    count: int, examine_item: Callable[[int], list[Finding]], seconds: float, unit: str = "images"
) -> Examination:
    """Check the items `0 .. count` in random order; check none after `seconds`."""
    start, findings, checked = time.perf_counter(), [], 0
    for item in np.random.default_rng(0).permutation(count):
        if time.perf_counter() - start >= seconds:
            break
        findings += examine_item(int(item))
        checked += 1
    return Examination(findings, checked, count, time.perf_counter() - start, unit)


def examine_datasets(datasets: Iterable[Any], seconds: float) -> Examination:
    """Check the images of data sets, or the sha256 of a latent cache's files, for up to `seconds`."""
    datasets = list(datasets)
    if datasets and isinstance(cache := datasets[0], LatentCache):
        shards = [cache.folder / name for name in cache.manifest.names[1:]]

        def examine_shard(item: int) -> list[Finding]:
            path = shards[item]
            intact = file_is_made(path, cache.manifest.files[path.name])
            return [] if intact else [Finding(str(path), "does not match its sha256 in the manifest", RERUN, True)]

        return examine(len(shards), examine_shard, seconds, "files of latents")
    indexes = [dataset.index for dataset in datasets if isinstance(dataset, IndexedImages)]
    ends = np.cumsum([0, *map(len, indexes)])

    def examine_indexed(item: int) -> list[Finding]:
        split = int(np.searchsorted(ends, item, side="right")) - 1
        index, number = indexes[split], item - int(ends[split])
        return examine_image(index.source(number), lambda: index.read(number))

    return examine(int(ends[-1]), examine_indexed, seconds)


def check_before_training(
    data: DataConfig, datasets: Iterable[Any], workers: int, batch_bytes: int, world: World
) -> None:
    """Check files of the splits `datasets` for `data.check_seconds` on rank 0, and print the findings.

    `workers` is the number of loader workers per rank, `batch_bytes` the size of a micro-batch.

    Raises:
        ConfigError: on every rank, if a file is unusable.
    """
    datasets = list(datasets)
    if world.is_main and data.check_seconds and isinstance(datasets[0], (IndexedImages, LatentCache)):
        print(f"data: checking files for up to {data.check_seconds:g} s", flush=True)
    result = world.broadcast(examine_datasets(datasets, data.check_seconds) if world.is_main else None)
    if result.errors:
        more = f" ({len(result.errors)} errors; scripts/doctor.py lists them)" if len(result.errors) > 1 else ""
        raise ConfigError(f"{result.errors[0]}{more}")
    shortage = shared_memory_note(workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1)), batch_bytes)
    if world.is_main and result.findings:
        print(f"data: {result}, such as {result.findings[0]}", flush=True)
    if world.is_main and shortage:
        print(f"data: {shortage}", flush=True)


def shared_memory_note(workers: int, batch_bytes: int, folder: str = "/dev/shm") -> str | None:
    """Return a warning if the workers of this node may prefetch more than shared memory holds, which kills them."""
    if not workers or not Path(folder).is_dir():
        return None
    needed, free = workers * 2 * batch_bytes, shutil.disk_usage(folder).free  # a worker prefetches two batches
    if free >= needed:
        return None
    return (
        f"{folder} has {free >> 20} MiB free, but {workers} workers may need {needed >> 20} MiB; "
        f"give the container a larger --shm-size or reduce trainer.workers"
    )


def examine_file(path: str) -> list[Finding]:
    """Decode an image file and return its findings."""
    return examine_image(path, Path(path).read_bytes)


def examine_image(path: str, read: Callable[[], bytes]) -> list[Finding]:
    """Decode the image that `read` returns; `path` names it in the findings."""
    try:
        if not (content := read()):
            return [Finding(path, "is empty", "copy it again", True)]
        deep = is_16_bit_color(content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with Image.open(io.BytesIO(content)) as image:
                # Decodes the whole file at a reduced resolution.
                image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
                highest: Any = image.getextrema()[1] if image.mode in HIGH_DEPTH else 0
                mode, exif_problem = image.mode, read_exif(image)
    except FileNotFoundError:
        problem = "is a dangling link" if Path(path).is_symlink() else "is missing"
        return [Finding(path, problem, "restore or remove it", True)]
    except UnidentifiedImageError:
        return [Finding(path, "is not an image", "replace it or remove it", True)]
    except Exception as error:  # PIL raises many kinds of errors on corrupt files
        return [Finding(path, f"cannot be decoded ({error or type(error).__name__})", "copy it again", True)]

    findings = []
    exif_problem = exif_problem or next((str(w.message) for w in caught if "EXIF" in str(w.message)), None)
    if exif_problem:
        remedy = "harmless; `exiftool -all= FILE` removes it"
        findings.append(Finding(path, f"has bad EXIF data ({exif_problem.strip()})", remedy, False))
    if mode == "F" or highest > 255:
        problem = f"has more than 8 bits per pixel (mode {mode}, values up to {highest:g})"
        findings.append(Finding(path, problem, "it would be clipped; convert it to 8 bits", True))
    if deep:
        problem = "has 16 bits per channel, which would be truncated"
        findings.append(Finding(path, problem, "convert it to 8 bits", True))
    if mode == "CMYK":
        findings.append(Finding(path, "is CMYK", "harmless; read as RGB without its colour profile", False))
    return findings


def read_exif(image: Image.Image) -> str | None:
    """Return the error of reading the EXIF data, or None."""
    try:
        image.getexif().get_ifd(0x8769)
    except Exception as error:  # PIL does not wrap the errors of its parser
        return f"{type(error).__name__}: {error}"
    return None
