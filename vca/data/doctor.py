"""The check of a data set's files before a training reads them for days.

Images, or the files of a latent cache, are visited in a random order until a time is spent, so that a set of thousands
is read whole and one of a million is sampled. What stops a training, or would spoil it, is an error; what is only worth
knowing is a note.
"""

import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from vca.data.config import DataConfig
from vca.data.latents import AGAIN, LatentCache
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError

HIGH_DEPTH = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # PIL's modes of more than 8 bits a channel


@dataclass(frozen=True)
class Finding:
    """One thing wrong with one file, and what to do about it; a training cannot use it if it is `fatal`."""

    path: str
    problem: str
    remedy: str
    fatal: bool

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}; {self.remedy}"


@dataclass
class Examination:
    """What was found in how many images (or files of latents) of how many, in how many seconds."""

    findings: list[Finding]
    checked: int
    images: int
    seconds: float
    unit: str = "images"

    @property
    def errors(self) -> list[Finding]:
        """The findings that a training cannot live with."""
        return [finding for finding in self.findings if finding.fatal]

    def __str__(self) -> str:
        part = "all" if self.checked == self.images else f"{self.checked} of"
        notes = len(self.findings) - len(self.errors)
        return (
            f"read {part} {self.images} {self.unit} in {self.seconds:.1f} s: {len(self.errors)} errors, {notes} notes"
        )


def image_files(datasets: Iterable[Any]) -> list[str]:
    """Files of data sets that list them as `samples`, as torchvision's `ImageFolder` does; others have none."""
    return [path for dataset in datasets for path, _ in getattr(dataset, "samples", ())]


def examine(
    paths: Iterable[str],
    seconds: float,
    examine_file: Callable[[str], list[Finding]] | None = None,
    unit: str = "images",
) -> Examination:
    """Read files in a random order, for at most so many seconds.

    Args:
        paths: of image files, or others.
        seconds: after which no further file is read.
        examine_file: `examine_image` if it is None.
        unit: what the files are called.
    """
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
    """Read the image files of data sets, or compare those of a latent cache with their sha256, for so many seconds."""
    datasets = list(datasets)
    if isinstance(datasets[0], LatentCache):
        return examine(datasets[0].paths(), seconds, partial(examine_latents, datasets[0]), "files of latents")
    return examine(image_files(datasets), seconds)


def examine_latents(cache: LatentCache, path: str) -> list[Finding]:
    """What is wrong with one file of a latent cache."""
    return [] if cache.is_intact(path) else [Finding(path, "is not the file of the manifest (sha256)", AGAIN, True)]


def check_before_training(
    data: DataConfig, datasets: Iterable[Any], workers: int, batch_bytes: int, world: World
) -> None:
    """Read files for `data.check_seconds` on one rank, and print what is found.

    Args:
        data: config of the data.
        datasets: what it was loaded as.
        workers: loader processes a rank.
        batch_bytes: of what a worker hands over at once.
        world: this process.

    Raises:
        ConfigError: on every rank, if a training cannot use what was found.
    """
    result = world.broadcast(examine_datasets(datasets, data.check_seconds) if world.is_main else None)
    if result.errors:
        more = f" ({len(result.errors)} such files; scripts/doctor.py lists them)" if len(result.errors) > 1 else ""
        raise ConfigError(f"{result.errors[0]}{more}")
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    shortage = shared_memory_note(workers * ranks_here, batch_bytes)
    if world.is_main and result.findings:
        print(f"data: {result}, such as {result.findings[0]}", flush=True)
    if world.is_main and shortage:
        print(f"data: {shortage}", flush=True)


def shared_memory_note(workers: int, batch_bytes: int, folder: str = "/dev/shm") -> str | None:
    """A line if the batches that loader workers hold ready may not fit into shared memory, which kills them (SIGBUS).

    Args:
        workers: of all ranks on this machine.
        batch_bytes: of one batch.
        folder: where shared memory is mounted.
    """
    if not workers or not Path(folder).is_dir():
        return None
    needed, free = workers * 2 * batch_bytes, shutil.disk_usage(folder).free  # a worker keeps two batches ready
    if free >= needed:
        return None
    return (
        f"{folder} has {free >> 20} MiB free, and {workers} workers may fill {needed >> 20} MiB; "
        f"give the container a larger --shm-size, or take fewer workers"
    )


def examine_image(path: str) -> list[Finding]:
    """What is wrong with one image file; mostly nothing."""
    try:
        file = Path(path)
        if not file.exists():
            return [
                Finding(path, "is a link to nothing" if file.is_symlink() else "is gone", "restore or remove it", True)
            ]
        if file.stat().st_size == 0:
            return [Finding(path, "is empty", "copy it again", True)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with open(path, "rb") as content, Image.open(content) as image:
                deep = is_16_bit_color(content)
                # All of the file is decoded, but only few of its pixels are made.
                image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
                highest: Any = image.getextrema()[1] if image.mode in HIGH_DEPTH else 0
                mode, exif_problem = image.mode, read_exif(image)
    except UnidentifiedImageError:
        return [Finding(path, "is not an image", "replace it or remove it", True)]
    except Exception as error:  # whatever PIL's parsers of unknown bytes ran into
        return [Finding(path, f"cannot be decoded ({error or type(error).__name__})", "copy it again", True)]

    findings = []
    exif_problem = exif_problem or next((str(w.message) for w in caught if "EXIF" in str(w.message)), None)
    if exif_problem:
        remedy = "harmless; `exiftool -all= FILE` drops it"
        findings.append(Finding(path, f"has bad EXIF data ({exif_problem.strip()})", remedy, False))
    if mode == "F" or highest > 255:
        problem = f"has more than 8 bits a pixel (mode {mode}, values up to {highest:g})"
        findings.append(Finding(path, problem, "it would be clipped to black or white; convert it to 8 bits", True))
    if deep:
        problem = "has 16 bits a channel, and half of them would be lost"
        findings.append(Finding(path, problem, "convert it to 8 bits", True))
    if mode == "CMYK":
        findings.append(Finding(path, "is CMYK", "harmless; it is read as RGB without its colour profile", False))
    return findings


def read_exif(image: Image.Image) -> str | None:
    """What goes wrong when the EXIF data is read, or None."""
    try:
        image.getexif().get_ifd(0x8769)
    except Exception as error:  # PIL lets through whatever its parser of untrusted bytes ran into
        return f"{type(error).__name__}: {error}"
    return None


def is_16_bit_color(file: BinaryIO) -> bool:
    """Whether a file is a PNG of 16 bits a channel; grey ones, which Pillow opens with a mode of their own, left out.

    Pillow opens the others as mode `RGB`, like those of 8 bits: bit depth and colour type are read from the header.
    """
    position = file.tell()
    file.seek(0)
    header = file.read(26)
    file.seek(position)
    return header[:8] == b"\x89PNG\r\n\x1a\n" and header[24:25] == b"\x10" and header[25:26] != b"\0"
