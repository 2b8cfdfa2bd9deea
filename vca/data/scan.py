"""The images that a format finds in its files: what every file of `vca/data/formats` returns."""

import hashlib
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
        offset, size: place in the file, as `vca.data.formats.ACCESS` reads it; mostly in bytes.
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
        change: how prepared images differ from their source, see `vca.data.prepared.Manifest.change`.
    """

    access: str
    files: list[Path]
    entries: list[Entry] = field(default_factory=list)
    watched: InitVar[Sequence[Path]] = ()
    classes: list[str] | None = None
    problems: list[str] = field(default_factory=list)
    change: dict[str, Any] | None = None
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
    """Whether a file name has the extension of an image, and is not a file of macOS."""
    return name.lower().endswith(EXTENSIONS) and not is_apple_double(name)


def is_apple_double(name: str) -> bool:
    """Whether a file has attributes that macOS stores beside another, in `._NAME` or `__MACOSX/`."""
    return ("._" in name and name.rpartition("/")[2].startswith("._")) or "__MACOSX" in name


def by_class_folder(names: Sequence[str], split: str) -> dict[str, tuple[str, str | None]]:
    """Map members of an archive of class folders to `(path below the split, class)`.

    Folders above the class folders are removed. If they include folders of splits, such as `train/` and `val/`, members
    of the other splits are left out. The class of an image outside of class folders is None.
    """
    parts = {name: parts_of(name) for name in names if is_image(name)}
    while folders := {path[0] for path in parts.values() if len(path) > 1}:
        if is_split_level(list(parts.values()), folders):
            parts = {name: path[1:] for name, path in parts.items() if path[0] in SPLITS[split] and len(path) > 1}
            break
        if len(folders) > 1 or any(len(path) == 2 for path in parts.values()):
            break
        parts = {name: path[1:] for name, path in parts.items() if len(path) > 1}
    if any(len(path) > 1 for path in parts.values()):  # images beside class folders are no images of `ImageFolder`
        parts = {name: path for name, path in parts.items() if len(path) > 1}
    return {name: ("/".join(path), path[0] if len(path) > 1 else None) for name, path in parts.items()}


def parts_of(name: str) -> tuple[str, ...]:
    """Return the folders and the file of a member, like the slower `PurePosixPath.parts`."""
    return tuple(part for part in name.split("/") if part not in ("", "."))


def is_split_level(paths: Sequence[tuple[str, ...]], folders: set[str]) -> bool:
    """Whether folders are those of splits, and not classes of which one is called `train`."""
    named = folders & {name for names in SPLITS.values() for name in names}
    deeper = any(len(path) > 2 for path in paths if path[0] in named)
    return bool(named) and (deeper or folders <= named | {"test"})


def and_more(items: Sequence[object]) -> str:
    """Return the number of items after the first, for messages."""
    return f" and {len(items) - 1} more" if len(items) > 1 else ""


def one_line(error: Exception) -> str:
    """Return the message of an error in one line of at most 200 characters, for messages."""
    return " ".join(str(error).split())[:200] or type(error).__name__
