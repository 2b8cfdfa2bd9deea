"""Labels of images: names and order of the classes, class files, and label files of images without class folders."""

import io
import re
import tarfile
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

from vca.data.config import DataConfig
from vca.data.scan import Entry, Scan
from vca.runtime.errors import ConfigError

WNID = re.compile(r"(?<![a-z0-9])n\d{8}(?!\d)")  # WordNet id, which the names of ImageNet's files contain
DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH, SYNSETS = f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt", f"{DEVKIT}/data/meta.mat"


def number_classes(scan: Scan, config: DataConfig) -> None:
    """Give the entries of a scan integer labels, and set `scan.classes` to the class names in their order.

    Named classes are sorted, as in torchvision's `ImageFolder`; `data.classes` sets another order. Integer labels are
    kept, unless the class file maps their names. Problems are appended to the scan.
    """
    labels: set[Any] = {entry.label for entry in scan.entries}
    aliases = read_class_file(config.classes) if config.classes is not None else None
    integers = [label for label in labels if isinstance(label, int)]
    if integers and len(integers) < len(labels):
        scan.problems.append(f"{scan.files[0]}: has labels that are integers and labels that are names; use one kind")
        return
    names = integer_names(scan, config) if integers else {label: label for label in labels}
    if aliases is None:
        size = max(len(scan.classes or ()), *(label + 1 for label in integers)) if integers else 0
        classes = [names.get(label, str(label)) for label in range(size)] if integers else sorted(names.values())
        known = [name for name in classes if WNID.fullmatch(name)]
        if known != sorted(known):
            scan.problems.append(
                f"{scan.files[0]}: its labels are not in the order of ImageNet's classes (label "
                f"{classes.index(known[0])} is {known[0]}); set data.classes=FILE, one class a line, to map them"
            )
        places = {label: label if integers else classes.index(names[label]) for label in labels}
    else:
        classes = list(dict.fromkeys(aliases.values()))
        places = {label: classes.index(aliases[names[label]]) for label in labels if names.get(label) in aliases}
        if not names:
            places = {label: label for label in integers}
        for label in sorted(labels - set(places)):
            scan.problems.append(f"{scan.files[0]}: class '{names.get(label, label)}' is not in data.classes; add it")
    scan.classes = classes
    scan.entries = [entry._replace(label=places.get(entry.label, 0)) for entry in scan.entries]


def integer_names(scan: Scan, config: DataConfig) -> dict[int, str]:
    """Return the names of integer labels: WordNet ids in the names of all images, else those that the files have."""
    found: dict[int, set[str]] = defaultdict(set)
    for entry in scan.entries:
        found[int(entry.label or 0)] |= set(WNID.findall(entry.name)) or {""}
    if all(len(ids) == 1 and "" not in ids for ids in found.values()):
        return {label: next(iter(ids)) for label, ids in found.items()}
    return dict(enumerate(scan.classes or ()))


def check_same_classes(train: list[str], val: list[str]) -> None:
    """Raise `ConfigError` if both splits have class names, and they differ."""
    unnamed = [str(label) for label in range(len(train))]
    differing = [label for label, pair in enumerate(zip(train, val, strict=False)) if pair[0] != pair[1]]
    if unnamed in (train, val) or (not differing and len(train) == len(val)):
        return
    label = differing[0] if differing else min(len(train), len(val))
    names = [classes[label] if label < len(classes) else "missing" for classes in (train, val)]
    raise ConfigError(
        f"data.train and data.val have different classes: label {label} is '{names[0]}' and '{names[1]}'; set "
        f"data.classes=FILE with a class a line (all its names, separated by tabs)"
    )


def read_class_file(path: str) -> dict[str, str]:
    """Read a class file: a class a line, in the order of the labels. Return `{name or alias: name}`.

    A line is a name, a name and aliases separated by tabs, or as in ImageNet's `synset_words.txt` a WordNet id and an
    alias.

    Raises:
        ConfigError: if it cannot be read, or names a class twice.
    """
    try:
        lines = Path(path).expanduser().read_text().splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.classes={path} cannot be read: {error}") from error
    rows = []
    for line in filter(None, map(str.strip, lines)):
        by_wnid = re.fullmatch(r"(n\d{8})\s+(\S.*)", line)
        rows.append(list(by_wnid.groups()) if by_wnid else [name.strip() for name in line.split("\t")])
    counts = Counter(name for row in rows for name in row)  # two classes of ImageNet are called crane
    if twice := [row[0] for row in rows if counts[row[0]] > 1]:
        raise ConfigError(f"data.classes={path}: '{twice[0]}' is in two lines; remove one")
    return {name: row[0] for row in rows for name in row if counts[name] == 1}


def with_label_file(scan: Scan, config: DataConfig) -> list[Entry]:
    """Return the entries, with the labels of `data.labels` for those without one.

    Without a label file, ImageNet's development kit beside the files is used.
    """
    folder = scan.files[0] if scan.access == "file" else scan.files[0].parent
    kits = [path for name in (f"{DEVKIT}.tar.gz", DEVKIT) for path in (folder / name, folder.parent / name)]
    path = Path(config.labels).expanduser() if config.labels else next((kit for kit in kits if kit.exists()), None)
    unlabelled = [entry for entry in scan.entries if entry.label is None]
    if path is None:
        place = f"data.root={config.root}: {folder.name}/" if scan.access == "file" else f"{scan.files[0]}:"
        remedy = f"sort them into {folder.name}/<class>/ or set data.labels=FILE"
        scan.problems.append(f"{place} has {len(unlabelled)} files and no class folders; {remedy}")
        return [entry for entry in scan.entries if entry.label is not None]
    labels = read_label_file(path)
    found = {entry: labels.get(PurePosixPath(entry.name).stem) for entry in unlabelled}
    if missing := [entry.name for entry, label in found.items() if label is None]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        scan.problems.append(f"data.labels={path} has no label of {missing[0]}{more}; complete it")
    entries = []
    for entry in scan.entries:
        label = entry.label if entry.label is not None else found[entry]
        in_class = entry.label is None and isinstance(label, str) and scan.access != "file"
        entries.append(entry._replace(label=label, name=f"{label}/{entry.name}" if in_class else entry.name))
    return [entry for entry in entries if entry.label is not None]


def read_label_file(path: Path) -> dict[str, str | int]:
    """Read a label file: lines `image class`, separated by a space or comma, or ImageNet's development kit.

    Returns:
        Name of the image without extension -> class, a name or an integer.
    """
    try:
        if path.name.startswith(DEVKIT):
            return read_devkit(path)
        rows = [re.split(r"[,\s]+", line.strip()) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        raise ConfigError(f"data.labels={path} cannot be read: {error}") from error
    if short := [row[0] for row in rows if len(row) < 2]:
        raise ConfigError(f"data.labels={path} must have lines 'image class', got '{short[0]}'")
    return {PurePosixPath(row[0]).stem: int(row[1]) if row[1].isdecimal() else row[1] for row in rows}


def read_devkit(path: Path) -> dict[str, str | int]:
    """Read the labels of ILSVRC2012's validation images from its development kit, packed or unpacked."""
    import scipy.io

    if path.is_dir():
        truth, synsets = ((path.parent / name).read_bytes() for name in (GROUND_TRUTH, SYNSETS))
    else:
        with tarfile.open(path) as archive:
            truth, synsets = (archive.extractfile(name).read() for name in (GROUND_TRUTH, SYNSETS))  # type: ignore[union-attr]
    table = scipy.io.loadmat(io.BytesIO(synsets), squeeze_me=True)["synsets"]
    wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    return {f"ILSVRC2012_val_{number:08d}": wnids[int(line)] for number, line in enumerate(truth.split(), start=1)}
