"""Class folders, `train/<class>/*.jpg`, in the order of torchvision's `ImageFolder`."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vca.data.scan import THREADS, Entry, Scan, is_image, state_of


def scan_folder(paths: Sequence[Path], split: str) -> Scan:
    """List the images of class folders; images of a folder without class folders have no label.

    `paths` is the folder of the split.
    """
    (folder,) = paths
    scan = Scan("file", [folder], watched=[folder])
    with os.scandir(folder) as found:
        classes = sorted(entry.name for entry in found if entry.is_dir())
    with ThreadPoolExecutor(THREADS) as threads:
        parts = list(threads.map(lambda name: scan_below(folder, name, name), classes))
    if empty := [name for name, part in zip(classes, parts, strict=True) if not part.entries + part.problems]:
        scan.problems.append(f"{folder}/: no valid file for the classes {', '.join(empty)}; complete them")
    for part in parts or [scan_below(folder, "", None)]:
        scan.states |= part.states
        scan.entries += part.entries
        scan.problems += part.problems
    return scan


def scan_below(folder: Path, below: str, label: str | None) -> Scan:
    """List the images in a folder below the folder of the split, and in its folders."""
    scan, folders = Scan("file", [folder]), []
    scan.states[folder / below] = state_of(folder / below)
    with os.scandir(folder / below) as found:
        for file in found:
            name = os.path.join(below, file.name)  # noqa: PTH118, a string is faster
            if file.is_dir():
                folders.append(name)
            elif is_image(file.name):
                try:
                    size = file.stat().st_size
                except OSError:
                    problem = "is a dangling link" if file.is_symlink() else "is missing"
                    scan.problems.append(f"{folder / name}: {problem}; restore or remove it")
                    continue
                scan.entries.append(Entry(name, label, 0, 0, size, size))
    for name in folders:
        part = scan_below(folder, name, label)
        scan.states |= part.states
        scan.entries += part.entries
        scan.problems += part.problems
    return scan
