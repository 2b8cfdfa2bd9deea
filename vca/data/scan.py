"""The images that a format finds in its files: what every file of `vca/data/formats` returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision's ImageFolder
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid")}  # split -> names in files and folders


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
        classes: names of integer labels, if the files have them.
        problems: one line per unusable file, member or row.
    """

    access: str
    files: list[Path]
    entries: list[Entry] = field(default_factory=list)
    watched: list[Path] = field(default_factory=list)
    classes: list[str] | None = None
    problems: list[str] = field(default_factory=list)


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
