"""Class folders, `train/<class>/*.jpg`, in the order of torchvision's `ImageFolder`."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vca.data.scan import Entry, Scan, is_image

THREADS = 16  # hide the latency of a network file system


def scan_folder(paths: Sequence[Path], split: str) -> Scan:
    """List the images of class folders; images of a folder without class folders have no label.

    `paths` is the folder of the split.
    """
    (folder,) = paths
    scan = Scan("file", [folder], watched=[folder])
    with os.scandir(folder) as found:
        top = sorted(found, key=lambda entry: entry.name)
    classes = [entry.name for entry in top if entry.is_dir()]
    with ThreadPoolExecutor(THREADS) as threads:
        results = list(threads.map(lambda name: scan_class(folder, name), classes))
    if not classes:
        results = [files_of(folder, "", None)]
    if empty := [
        name for name, (_, entries, problems) in zip(classes, results, strict=False) if not entries + problems
    ]:
        scan.problems.append(f"{folder}/: no valid file for the classes {', '.join(empty)}; complete them")
    for folders, entries, problems in results:
        scan.watched += folders
        scan.entries += entries
        scan.problems += problems
    return scan


def scan_class(folder: Path, name: str) -> tuple[list[Path], list[Entry], list[str]]:
    """Return the folders, images and problems of a class folder."""
    folders, entries, problems = [], [], []
    for root, _, _ in os.walk(folder / name, onerror=raise_error, followlinks=True):
        folders.append(Path(root))
        found = files_of(folder, os.path.relpath(root, folder), name)
        entries += found[1]
        problems += found[2]
    return folders, entries, problems


def raise_error(error: OSError) -> None:
    raise error


def files_of(folder: Path, below: str, label: str | None) -> tuple[list[Path], list[Entry], list[str]]:
    """Return the images directly in a folder, and problems."""
    entries, problems = [], []
    with os.scandir(folder / below) as found:
        for file in found:
            if not is_image(file.name):
                continue
            name = os.path.join(below, file.name)  # noqa: PTH118, a string is faster
            try:
                size = file.stat().st_size
            except OSError:
                problem = "is a dangling link" if file.is_symlink() else "is missing"
                problems.append(f"{folder / name}: {problem}; restore or remove it")
                continue
            entries.append(Entry(name, label, 0, 0, size, size))
    return [], entries, problems
