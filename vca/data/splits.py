"""Find the files of a split from `data.root`, `data.train` and `data.val`."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vca.data.config import DataConfig
from vca.data.formats import format_of
from vca.data.scan import SPLITS, and_more
from vca.runtime.errors import ConfigError

# Files of a split in `data.root`, in this order; {} is a name of the split.
PATTERNS = (
    "{}",
    "{}.zip",
    "{}.tar",
    "ILSVRC2012_img_{}.tar",
    "*{}*.tar",
    "*{}*.parquet",
    "data/*{}*.parquet",
    "*{}*.arrow",
)
BOTH = ("train", "val")
ARCHIVES = ("*.tar", "*.parquet", "*.arrow")  # in the folder of a split
NO_DATA = "data.root must be a folder with train/ and val/ class folders"
OR_ARCHIVES = "; archives of a split are found by its name (docs/data.md)"
COMPRESSED = (".tgz", ".gz", ".bz2", ".xz", ".zst")
REMOTE = r"\w[\w+.-]*://|pipe:"


class Source(NamedTuple):
    """Format and files of a split."""

    form: str
    paths: list[Path]


def base_folder(config: DataConfig, split: str) -> Path:
    """Return the folder that contains the files of a split, where its index is stored."""
    given = getattr(config, split)
    if given is None:
        root = Path(config.root or "").expanduser()
        return root.parent if root.is_file() else root
    parts = Path(given).parts
    first = next((index for index, part in enumerate(parts) if re.search(r"[*?\[{]", part)), len(parts) - 1)
    return Path(config.root or "").expanduser() / Path(*parts[:first]).expanduser()


def find_source(config: DataConfig, split: str) -> Source:
    """Find the files of a split and their format.

    Raises:
        ConfigError: if there are none, or they cannot be read at random.
    """
    given, key = getattr(config, split), f"data.{split}"
    for name, place in ((key, given), ("data.root", config.root)):
        if re.match(REMOTE, place or ""):
            raise ConfigError(
                f"{name} must be files of this machine, read in any order, got {place!r}; download them first"
            )
    if given is None:
        if config.root is None:
            raise ConfigError(f"{NO_DATA}, got None{OR_ARCHIVES}")
        root = Path(config.root).expanduser()
        paths = [root] if root.is_file() else in_root(root, split)
        key = "data.root"
        if not paths:
            raise ConfigError(f"{NO_DATA}, got {config.root!r}{OR_ARCHIVES}")
    else:
        paths = expand(Path(config.root or "").expanduser(), given)
        missing = [path for path in paths if not path.exists()] if paths else [Path(config.root or "", given)]
        if missing:
            raise ConfigError(f"{key}={given}: {missing[0]}{and_more(missing)} does not exist")
    all_files = given is None or paths[0].is_dir()
    if len(paths) == 1 and config.format != "folder" and not any(path.is_dir() for path in paths[0].glob("[!.]*")):
        paths = next((found for pattern in ARCHIVES if (found := sorted(paths[0].glob(pattern)))), paths)
    form = check_form(paths, config.format, key)
    if all_files and form in ("webdataset", "parquet", "arrow"):
        check_complete(paths, key)
    return Source(form, paths)


def check_form(paths: Sequence[Path], chosen: str, key: str) -> str:
    """Return the format of files, `chosen` unless it is auto; `key` is the option that names them.

    Raises:
        ConfigError: if they have no format, another than the chosen one, or are of several formats.
    """
    for path in paths:
        if path.suffix.lower() in COMPRESSED:
            raise ConfigError(f"{key}: {path} is compressed and cannot be read at random; decompress it first")
        if not path.exists():
            raise ConfigError(f"{key}: {path} does not exist (a dangling link); restore it")
        if path.suffix.lower() != paths[0].suffix.lower() or (path.is_dir() and len(paths) > 1):
            raise ConfigError(f"{key} must be files of one format, got {paths[0]} and {path}; choose one")
    try:
        found = format_of(paths[0])
    except OSError as error:
        raise ConfigError(f"{key}: {paths[0]} cannot be read ({error.strerror}); make it readable") from error
    form = found if chosen == "auto" else chosen
    if form is None:
        raise ConfigError(f"{key}: {paths[0]} must be a folder, .zip, .tar, .parquet or .arrow")
    if found not in (None, form) and {found, form} != {"tar", "webdataset"}:
        raise ConfigError(f"data.format={chosen}, but {paths[0]} is a {found}; set data.format=auto")
    return form


def check_complete(paths: Sequence[Path], key: str) -> None:
    """Raise `ConfigError` if a file of `NAME-00000-of-00010` is missing, or of `NAME-000000` between others."""
    found: dict[tuple[str, int], set[str]] = defaultdict(set)
    for path in paths:
        if parts := re.fullmatch(r"(.*?)(\d+)(?:-of-(\d+))?(?:-[0-9a-f]{16})?", path.stem):
            found[parts[1], int(parts[3] or 0)].add(parts[2])
    for (prefix, total), numbers in found.items():
        first, last = min(map(int, numbers)), max(map(int, numbers))
        expected = range(total) if total else range(first, last + 1) if first < 2 else ()
        if missing := sorted(set(expected) - set(map(int, numbers))):
            name = prefix + str(missing[0]).zfill(len(min(numbers))) + (f"-of-{total:05d}" if total else "")
            file = paths[0].with_name(name + paths[0].suffix)
            remedy = "copy it, or choose files with data.train and data.val"
            raise ConfigError(f"{key}: {file}{and_more(missing)} is missing; {remedy}")


def in_root(root: Path, split: str) -> list[Path]:
    """Return the files of a split in a folder, by their names, which contain its name as a word."""
    for pattern in PATTERNS:
        for name in SPLITS[split]:
            if found := named(root, pattern, name):
                return found
    for name in SPLITS[split]:  # refused, but not as missing
        if found := [path for path in named(root, "*{}*.t*", name) if path.suffix in COMPRESSED]:
            return found
    return []


def named(root: Path, pattern: str, name: str) -> list[Path]:
    """Return the files of a pattern whose name contains `name` as a word: `evaluation` contains no `val`."""
    word = re.compile(rf"(?<![A-Za-z]){name}(?![A-Za-z])")
    return [path for path in sorted(root.glob(pattern.format(name))) if word.search(path.name)]


def is_shared(config: DataConfig) -> bool:
    """Whether both splits are found in the same files."""
    root = Path(config.root or "").expanduser()
    found = config.train is None and config.val is None
    return found and (root.is_file() or in_root(root, "train") == in_root(root, "val"))


def expand(root: Path, given: str) -> list[Path]:
    """Expand `*`, `?` and a numeric range `{000..123}`; paths are relative to `root`."""
    if numbers := re.search(r"\{(\d+)\.\.(\d+)\}", given):
        first, last = numbers.groups()
        names = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        files = [given[: numbers.start()] + name + given[numbers.end() :] for name in names]
        return [root / Path(file).expanduser() for file in files]
    path = root / Path(given).expanduser()
    if not re.search(r"[*?\[]", given):
        return [path] if path.exists() else []
    return sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path)))


def check_class_folders(config: DataConfig) -> None:
    """Check the class folders in `train/` and `val/` of `data.root`, without looking at their images.

    Raises:
        ConfigError: if both splits exist and have different classes, or their number is not `data.num_classes`.
    """
    root = Path(config.root or "").expanduser()
    splits = [split for split in BOTH if (root / split).is_dir()]
    classes = {split: {entry.name for entry in os.scandir(root / split) if entry.is_dir()} for split in splits}
    if "train" not in classes or not all(classes.values()):  # archives, or images that need a label file
        return
    if odd := sorted(classes["train"] ^ classes[splits[-1]]):
        present, absent = BOTH if odd[0] in classes["train"] else BOTH[::-1]
        others = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise ConfigError(
            f"data.root={config.root}: class folder '{odd[0]}'{others} is in {present}/ but not in {absent}/; "
            f"complete {absent}/ or remove it"
        )
    if len(classes["train"]) != config.num_classes:
        count = len(classes["train"])
        raise ConfigError(
            f"data.num_classes is {config.num_classes}, but {root / 'train'} has {count} class folders; "
            f"complete it or set data.num_classes={count}"
        )
