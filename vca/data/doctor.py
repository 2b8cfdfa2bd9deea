"""Check the files of a data set before a run.

Images, or the files of a latent cache, are read in random order within a time limit: a set of thousands completely, a
set of millions by a sample. A file that would stop or spoil a run is an error; a harmless one is a note.
"""

import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from vca.data.config import DataConfig
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


def image_files(datasets: Iterable[Any]) -> list[str]:
    """List the files of data sets with `samples`, such as torchvision's `ImageFolder`."""
    return [path for dataset in datasets for path, _ in getattr(dataset, "samples", ())]


def examine(
    paths: Iterable[str],
    seconds: float,
    examine_file: Callable[[str], list[Finding]] | None = None,
    unit: str = "images",
) -> Examination:
    """Check files in random order by `examine_file`, by default `examine_image`; read none after `seconds`."""
    paths = list(paths)
    random.Random(0).shuffle(paths)
    start, findings, checked = time.perf_counter(), [], 0
    for path in paths:
        if time.perf_counter() - start >= seconds:
            break
        findings += (examine_file or examine_image)(path)
        checked += 1
    return Examination(findings, checked, len(paths), time.perf_counter() - start, unit)


def examine_datasets(datasets: Iterable[Any], seconds: float) -> Examination:
    """Check the image files of data sets, or the sha256 of a latent cache's files, for up to `seconds`."""
    datasets = list(datasets)
    cache = datasets[0]
    if not isinstance(cache, LatentCache):
        return examine(image_files(datasets), seconds)

    def examine_shard(path: str) -> list[Finding]:
        intact = file_is_made(Path(path), cache.manifest.files[Path(path).name])
        return [] if intact else [Finding(path, "does not match its sha256 in the manifest", RERUN, True)]

    shards = [str(cache.folder / name) for name in cache.manifest.names[1:]]
    return examine(shards, seconds, examine_shard, "files of latents")


def check_before_training(
    data: DataConfig, datasets: Iterable[Any], workers: int, batch_bytes: int, world: World
) -> None:
    """Check files of the splits `datasets` for `data.check_seconds` on rank 0, and print the findings.

    `workers` is the number of loader workers per rank, `batch_bytes` the size of a micro-batch.

    Raises:
        ConfigError: on every rank, if a file is unusable.
    """
    datasets = list(datasets)
    if world.is_main and data.check_seconds and (image_files(datasets) or isinstance(datasets[0], LatentCache)):
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


def examine_image(path: str) -> list[Finding]:
    """Decode an image file and return its findings."""
    try:
        file = Path(path)
        if not file.exists():
            return [
                Finding(path, "is a dangling link" if file.is_symlink() else "is missing", "restore or remove it", True)
            ]
        if file.stat().st_size == 0:
            return [Finding(path, "is empty", "copy it again", True)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with open(path, "rb") as content, Image.open(content) as image:
                deep = is_16_bit_color(content)
                # Decodes the whole file at a reduced resolution.
                image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
                highest: Any = image.getextrema()[1] if image.mode in HIGH_DEPTH else 0
                mode, exif_problem = image.mode, read_exif(image)
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


def is_16_bit_color(file: BinaryIO) -> bool:
    """Whether a file is a colour PNG with 16 bits per channel, according to its header.

    Pillow opens it as `RGB`, like one with 8 bits. Grey ones have a mode of their own.
    """
    position = file.tell()
    file.seek(0)
    header = file.read(26)
    file.seek(position)
    return header[:8] == b"\x89PNG\r\n\x1a\n" and header[24:25] == b"\x10" and header[25:26] != b"\0"
