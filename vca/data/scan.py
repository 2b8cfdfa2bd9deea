"""The images that a format finds in its files: what every file of `vca/data/formats` returns."""

import hashlib
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import InitVar, dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision's ImageFolder
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid")}  # split -> names in files and folders

THREADS = 16  # hide the latency of a network file system
SAMPLE, SAMPLES = 4096, 3  # bytes and number of the parts of an archive that are compared


class Entry(NamedTuple):
    """An image in a file.

    Attributes:
        name: path relative to its class folders, name of the archive member, or path that a table stores.
        label: name of the class, integer label, or None if a label file must have it.
        file: index of its file in `Scan.files`.
        offset, size: place in the file, in bytes; see `vca.data.formats.ACCESS`.
        content: size of the image, in bytes.
    """

    name: str
    label: str | int | None
    file: int
    offset: int
    size: int
    content: int


@dataclass
class Scan:
    """The images of a split and where they are.

    Attributes:
        access: key in `vca.data.formats.ACCESS`: how an entry is read.
        files: archives that contain the images; for class folders the folder of the split.
        entries: the images, in any order.
        watched: files and folders that change if images are added, removed or replaced.
        states: state of the watched files and folders before they are read, see `state_of`.
        classes: names of integer labels, if the files have them.
        problems: one line per unusable file, member or row.
    """

    access: str
    files: list[Path]
    entries: list[Entry] = field(default_factory=list)
    watched: InitVar[Sequence[Path]] = ()
    classes: list[str] | None = None
    problems: list[str] = field(default_factory=list)
    states: dict[Path, list] = field(init=False)

    def __post_init__(self, watched: Sequence[Path]) -> None:
        self.states = {}
        if watched:
            with ThreadPoolExecutor(THREADS) as threads:
                self.states = dict(zip(watched, threads.map(state_of, watched), strict=True))


def state_of(path: Path) -> list:
    """Return what changes if a file or folder does.

    Time of a folder; size of an image; size, time and hash of some parts of an archive.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        return ["folder", status.st_mtime_ns]
    if is_image(path.name):
        return ["image", status.st_size]
    with open(path, "rb", buffering=0) as file:
        places = [status.st_size * part // SAMPLES for part in range(SAMPLES)] + [max(0, status.st_size - SAMPLE)]
        parts = [os.pread(file.fileno(), SAMPLE, place) for place in places]
    return ["archive", status.st_size, status.st_mtime_ns, hashlib.sha256(b"".join(parts)).hexdigest()]


def is_image(name: str) -> bool:
    """Whether a file name has the extension of an image."""
    return name.lower().endswith(EXTENSIONS)


def by_class_folder(names: Sequence[str], split: str) -> dict[str, tuple[str, str | None]]:
    """Map members of an archive of class folders to `(path below the split, class)`.

    Folders above the class folders are removed. If they include folders of splits, such as `train/` and `val/`, members
    of the other splits are left out. The class of an image outside of class folders is None.
    """
    parts = {name: PurePosixPath(name).parts for name in names if is_image(name) and "__MACOSX" not in name}
    while parts:
        tops = {path[0] for path in parts.values()}
        if own := tops & set(SPLITS[split]):
            parts = {name: path[1:] for name, path in parts.items() if path[0] in own and len(path) > 1}
            break
        if len(tops) > 1 or any(len(path) < 3 for path in parts.values()):
            break
        parts = {name: path[1:] for name, path in parts.items()}
    return {name: ("/".join(path), path[0] if len(path) > 1 else None) for name, path in parts.items()}
