"""Labels of images: names and order of the classes, class files, and label files of images without class folders."""

import io
import re
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from vca.data.config import DataConfig
from vca.data.scan import Entry, Scan, and_more, one_line
from vca.runtime.errors import ConfigError

Label = str | int
WNID = re.compile(r"(?<![a-z0-9])n\d{8}(?!\d)")  # WordNet id, which the names of ImageNet's files contain
DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH, SYNSETS = f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt", f"{DEVKIT}/data/meta.mat"


def number_classes(scan: Scan, config: DataConfig) -> None:
    """Give the entries of a scan integer labels, and set `scan.classes` to the class names in their order.

    Named classes are sorted, as in torchvision's `ImageFolder`; `data.classes` sets another order. Integer labels are
    kept, unless the class file maps their names. Problems are appended to the scan.
    """
    aliases = read_class_file(config.classes) if config.classes is not None else None
    try:
        labels = sorted_labels(scan)
        names = label_names(scan, labels)
        if aliases is None:
            classes = class_order(labels, names, scan.classes or ())
            numbers = by_name(labels, classes)
        else:
            classes = list(dict.fromkeys(aliases.values()))
            numbers = by_class_file(labels, names, classes, aliases)
        if not scan.problems:  # else it may be a consequence of them
            check_all_used(classes, numbers)
    except ValueError as error:
        scan.problems.append(f"{scan.files[0]}: {error}")
        return
    scan.classes = classes
    scan.entries = [entry._replace(label=numbers[entry.label]) for entry in scan.entries if entry.label is not None]


def sorted_labels(scan: Scan) -> list[Label]:
    """Return the labels of a scan; raise `ValueError` if they are of two kinds, or an integer is out of range."""
    labels = {entry.label for entry in scan.entries if entry.label is not None}
    names = sorted(label for label in labels if isinstance(label, str))
    integers = sorted(label for label in labels if isinstance(label, int))
    if names and integers:
        raise ValueError("has labels that are integers and labels that are names; use one kind")
    limit = len(scan.classes or scan.entries)
    if integers and integers[-1] >= limit:
        name = next(entry.name for entry in scan.entries if entry.label == integers[-1])
        rule = f"there are {limit} {'class names' if scan.classes else 'images, and each class needs one'}"
        raise ValueError(f"{name} has label {integers[-1]}, but {rule}; correct it")
    return [*names, *integers]


def label_names(scan: Scan, labels: Sequence[Label]) -> dict[Label, str]:
    """Return the names of the labels; {} for integers without names.

    Integers have the WordNet ids in the names of their images, or the names that the files have. The latter come first
    if they are the names of the images' folders.

    Raises:
        ValueError: if images with the same WordNet id have different labels.
    """
    if any(isinstance(label, str) for label in labels):
        return {label: str(label) for label in labels}
    stored: dict[Label, str] = dict(enumerate(scan.classes or ()))
    if all(entry.name.startswith(f"{stored.get(entry.label or 0)}/") for entry in scan.entries):
        return stored
    return wordnet_names(scan.entries) or stored


def wordnet_names(entries: Sequence[Entry]) -> dict[Label, str] | None:
    """Return the WordNet id of each label, from the names of its images; None if not every label has exactly one.

    Raises:
        ValueError: if images with the same WordNet id have different labels.
    """
    found: dict[str, Label] = {}
    every = True
    for entry in entries:
        ids, label = set(WNID.findall(entry.name)), entry.label or 0
        every = every and len(ids) == 1
        for wnid in ids if len(ids) == 1 else ():
            if (other := found.setdefault(wnid, label)) != label:
                raise ValueError(
                    f"{entry.name} has label {label}, but other images of {wnid} have {other}; correct the labels"
                )
    names = {label: wnid for wnid, label in found.items()}
    return names if every and len(names) == len(found) else None


def class_order(labels: Sequence[Label], names: Mapping[Label, str], stored: Sequence[str]) -> list[str]:
    """Return the class names in the order of the labels; `stored` are those of integers that the files have.

    Raises:
        ValueError: if WordNet ids are not sorted, which is the order of ImageNet's classes.
    """
    integers = [label for label in labels if isinstance(label, int)]
    if not integers:
        return sorted(names.values())
    unused = dict(enumerate(stored))
    size = max(len(stored), max(integers) + 1)
    classes = [names.get(label, unused.get(label, str(label))) for label in range(size)]
    known = [name for name in classes if WNID.fullmatch(name)]
    if odd := [name for name, expected in zip(known, sorted(known), strict=True) if name != expected]:
        raise ValueError(
            f"its labels are not in the order of ImageNet's classes (label {classes.index(odd[0])} is {odd[0]}); "
            f"set data.classes=FILE, one class a line, to map them"
        )
    return classes


def by_name(labels: Sequence[Label], classes: Sequence[str]) -> dict[Label | None, int]:
    """Return the number of each label, which is an integer itself or the name of a class."""
    places = {name: number for number, name in enumerate(classes)}
    return {label: label if isinstance(label, int) else places[label] for label in labels}


def by_class_file(
    labels: Sequence[Label], names: Mapping[Label, str], classes: Sequence[str], aliases: Mapping[str, str]
) -> dict[Label | None, int]:
    """Return the number of each label in the order of a class file, which names integers that have no names.

    Raises:
        ValueError: if the class file lacks a class, or two labels are the same class in it.
    """
    names = names or dict(enumerate(classes))
    missing = [str(names.get(label, label)) for label in labels if names.get(label) not in aliases]
    if missing:
        raise ValueError(f"class '{missing[0]}'{and_more(missing)} is not in data.classes; add it")
    found = {label: aliases[names[label]] for label in labels}
    if pair := first_pair(found):
        same = " and ".join(f"'{names[label]}'" for label in pair)
        raise ValueError(f"{same} are one class in data.classes, '{found[pair[0]]}'; give each a line")
    places = {name: number for number, name in enumerate(classes)}
    return {label: places[name] for label, name in found.items()}


def check_all_used(classes: Sequence[str], numbers: Mapping[Label | None, int]) -> None:
    """Raise `ValueError` if a class has no image."""
    if empty := sorted(set(range(len(classes))) - set(numbers.values())):
        names = ", ".join(classes[number] for number in empty[:3])
        raise ValueError(f"{len(empty)} classes have no image, such as {names}; complete it")


def first_pair(names: Mapping[Label, str]) -> tuple[Label, Label] | None:
    """Return two labels with the same name, or None."""
    first: dict[str, Label] = {}
    return next(((first[name], label) for label, name in names.items() if first.setdefault(name, label) != label), None)


def check_same_classes(train: list[str], val: list[str]) -> None:
    """Raise `ConfigError` if both splits have class names, and they differ."""
    unnamed = [str(label) for label in range(len(train))]
    if train == val or (unnamed in (train, val) and len(train) == len(val)):
        return
    differing = [label for label, pair in enumerate(zip(train, val, strict=False)) if pair[0] != pair[1]]
    label = differing[0] if differing else min(len(train), len(val))
    names = [classes[label] if label < len(classes) else "missing" for classes in (train, val)]
    raise ConfigError(
        f"data.train and data.val have different classes: label {label} is '{names[0]}' and '{names[1]}'; set "
        f"data.classes=FILE with a class a line (all its names, separated by tabs)"
    )


def read_class_file(path: str) -> dict[str, str]:
    """Read a class file: a class a line, in the order of the labels. Return `{name or alias: name}`.

    A line is a name, a name and aliases separated by tabs, or as in ImageNet's `synset_words.txt` a WordNet id and an
    alias. An alias of two classes, such as ImageNet's crane, is left out.

    Raises:
        ConfigError: if it cannot be read, or names a class twice.
    """
    try:
        lines = Path(path).expanduser().read_text().splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.classes={path} cannot be read: {error}") from error
    rows = [class_row(line.strip()) for line in lines if line.strip()]
    if not rows:
        raise ConfigError(f"data.classes={path} is empty; write one class a line")
    counts = Counter(name for row in rows for name in dict.fromkeys(row))
    if twice := [row[0] for row in rows if counts[row[0]] > 1]:
        raise ConfigError(f"data.classes={path}: '{twice[0]}' is in two lines; remove one")
    return {name: row[0] for row in rows for name in row if counts[name] == 1}


def class_row(line: str) -> list[str]:
    """Return the name of a class and its aliases."""
    by_wnid = re.fullmatch(r"(n\d{8})\s+(\S.*)", line)
    names = line.split("\t") if "\t" in line or by_wnid is None else list(by_wnid.groups())
    return [name.strip() for name in names if name.strip()]


def with_label_file(scan: Scan, config: DataConfig) -> list[Entry]:
    """Return the entries, with the labels of `data.labels` for those without one.

    Without a label file, ImageNet's development kit beside the files is used. Problems are appended to the scan.

    Raises:
        ConfigError: if the label file is invalid.
    """
    unlabelled = [entry for entry in scan.entries if entry.label is None]
    path = Path(config.labels).expanduser() if config.labels else find_devkit(scan)
    if path is None:
        file, is_folder = scan.files[0], scan.access == "file"
        place = f"data.root={config.root}: {file.name}/" if is_folder and config.root else f"{file}:"
        folders = f"{file.name}/<class>/" if is_folder else "class folders"
        count = len(unlabelled)
        problem = f"has {count} files and no class folders; sort them into {folders} or set data.labels=FILE"
        scan.problems.append(f"{place} {problem}")
        return [entry for entry in scan.entries if entry.label is not None]
    labels = read_label_file(path)
    if missing := [entry.name for entry in unlabelled if PurePosixPath(entry.name).stem not in labels]:
        scan.problems.append(f"data.labels={path} has no label of {missing[0]}{and_more(missing)}; complete it")
    labelled = [entry if entry.label is not None else with_label(entry, labels, scan.access) for entry in scan.entries]
    return [entry for entry in labelled if entry.label is not None]


def without_single_folder(entries: list[Entry]) -> list[Entry]:
    """Return the entries without label if all are in one folder, which is that of an archive and not a class."""
    only = entries[0].label if entries else None
    if only is None or not all(entry.label == only and entry.name.startswith(f"{only}/") for entry in entries):
        return entries
    return [entry._replace(name=entry.name.removeprefix(f"{only}/"), label=None) for entry in entries]


def with_label(entry: Entry, labels: Mapping[str, Label], access: str) -> Entry:
    """Return an entry with its label; outside of class folders, its name is that which class folders would have."""
    label = labels.get(PurePosixPath(entry.name).stem)
    name = f"{label}/{entry.name}" if isinstance(label, str) and access != "file" else entry.name
    return entry._replace(label=label, name=name)


def find_devkit(scan: Scan) -> Path | None:
    """Return ImageNet's development kit in the folder of the files or the one above, packed or unpacked, or None."""
    folder = scan.files[0] if scan.access == "file" else scan.files[0].parent
    places = [path / name for name in (f"{DEVKIT}.tar.gz", DEVKIT) for path in (folder, folder.parent)]
    return next((path for path in places if path.exists()), None)


def read_label_file(path: Path) -> dict[str, Label]:
    """Read a label file: lines `image class`, separated by a space or comma, or ImageNet's development kit.

    Further columns are ignored, such as the boxes of Kaggle's `LOC_val_solution.csv`.

    Returns:
        Name of the image without extension -> class, a name or an integer.

    Raises:
        ConfigError: if it cannot be read, or gives an image two classes.
    """
    try:
        if path.name.startswith(DEVKIT):
            return read_devkit(path)
        rows = [re.split(r"[,\s]+", line.strip()) for line in path.read_text().splitlines() if line.strip()]
    except Exception as error:  # scipy and the decompression raise many kinds of errors on a corrupt kit
        raise ConfigError(f"data.labels={path} cannot be read: {one_line(error)}") from error
    labels: dict[str, Label] = {}
    for image, *columns in rows:
        if not columns:
            raise ConfigError(f"data.labels={path} must have lines 'image class', got '{image}'")
        label = int(columns[0]) if columns[0].isdecimal() else columns[0]
        if labels.setdefault(PurePosixPath(image).stem, label) != label:
            raise ConfigError(f"data.labels={path}: {image} has two classes; remove one")
    return labels


def read_devkit(path: Path) -> dict[str, Label]:
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
