"""Build the index of a split, or find the stored one."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from vca.data.classes import number_classes, with_label_file, without_single_folder
from vca.data.config import DataConfig
from vca.data.formats import FORMATS
from vca.data.index import ROW, VERSION, ImageIndex, Meta, digest, first_change, read_index, read_same_index, store
from vca.data.prepared import manifest_of
from vca.data.scan import Entry, Scan
from vca.data.splits import base_folder, check_class_folders, find_source, is_shared
from vca.runtime.distributed import ONE, World
from vca.runtime.errors import ConfigError

FOLDER = ".vca_index"
SAMPLED_IMAGES = 64  # images of class folders whose size is compared at each start


def open_index(config: DataConfig, split: str, world: World = ONE) -> ImageIndex:
    """Open the index of a split; every rank reads it.

    Rank 0 builds it if there is none or the files changed. So does the first rank of another node, if it has its own
    copy of the files.

    Raises:
        ConfigError: on every rank, if files are missing or unusable, or a rank has other images than rank 0.
    """
    opened: list[ImageIndex] = []

    def open_checked() -> tuple[Path | None, dict[str, str]]:
        opened.append(find_index(config, split, print) or build_index(config, split))
        return opened[0].place, opened[0].meta.arrays

    (place, arrays), error = world.from_main_slowly(open_checked), None
    for first_of_node in (True, False):  # a node may have its own copy of the data
        try:
            if not opened and first_of_node == (world.local_rank == 0):
                with suppress(OSError, ValueError):  # not on this node, or of another node's copy
                    if place is not None and not first_of_node:
                        opened.append(read_same_index(place, base_folder(config, split), arrays))
                if not opened:
                    open_checked()
        except (ConfigError, OSError, ValueError) as problem:
            error = ConfigError(f"rank {world.rank} on {platform.node()}: {problem}")
        world.raise_first(error)
    index = opened[0]
    expected = world.broadcast(index.meta.identity)
    if index.meta.identity != expected:
        difference = f"{index.meta.identity['files']} images, not the {expected['files']} of rank 0"
        error = ConfigError(f"rank {world.rank} on {platform.node()} has other data ({difference}); copy it again")
    world.raise_first(error)
    classes = index.meta.classes
    if len(classes) != config.num_classes:
        names = f"{', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''}"
        raise ConfigError(
            f"data.num_classes is {config.num_classes}, but {index.files[0]} has {len(classes)} classes ({names}); "
            f"complete it or set data.num_classes={len(classes)}"
        )
    return index


def find_index(config: DataConfig, split: str, log: Callable[[str], object]) -> ImageIndex | None:
    """Return the stored index of a split if it describes the files; None if it must be built."""
    changes = []
    for folder in index_folders(config, split):
        try:
            index = read_index(folder / f"{index_key(config, split)}.json", base_folder(config, split))
        except (OSError, ValueError):  # there is none, or it is corrupt
            continue
        if (change := first_change(index.base, index.meta.watched)) is None:
            return index
        changes.append(change)
    if changes:
        log(f"data: {changes[0]} since it was indexed; indexing {split} again")
    return None


def index_folders(config: DataConfig, split: str) -> list[Path]:
    """Return the folders that may contain the index of a split, in order."""
    base = base_folder(config, split)
    cache = [Path(config.index, digest(os.fsencode(base.absolute()))[:12])] if config.index is not None else []
    return [base / FOLDER, *cache]


def index_key(config: DataConfig, split: str) -> str:
    """Return the name of an index: the split, and a hash of the options that it depends on."""
    files = [Path(path).expanduser() if path else None for path in (config.classes, config.labels)]
    contents = [file.read_bytes() if file is not None and file.is_file() else str(file).encode() for file in files]
    base, root = base_folder(config, split), Path(config.root or "").expanduser()
    place = root.name if base.absolute() != root.absolute() else ""
    options = [VERSION, config.format, place, getattr(config, split), *map(digest, contents)]
    return f"{split}-{digest(json.dumps(options).encode())[:12]}"


def writable_folder(config: DataConfig, split: str) -> Path | None:
    """Return the first folder for the index that can be written; it is created before the state of others is taken."""
    for folder in index_folders(config, split):
        try:
            folder.mkdir(parents=folder.name != FOLDER, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return None


def build_index(config: DataConfig, split: str) -> ImageIndex:
    """Index the files of a split, and store the index in the first folder that can be written.

    Raises:
        ConfigError: if files are missing or unusable.
    """
    start, base = time.perf_counter(), base_folder(config, split)
    find_source(config, split)  # before a folder is created
    place = writable_folder(config, split)
    form, scan = scan_split(config, split)
    if scan.problems:
        more = f" ({len(scan.problems)} errors; scripts/doctor.py lists them)" if len(scan.problems) > 1 else ""
        raise ConfigError(f"{scan.problems[0]}{more}")
    index = pack(base, form, scan)
    if place is not None:
        index.place = store(index, place, index_key(config, split))
    stored = index.place or "not stored, since no folder can be written; set data.index"
    print(f"data: indexed {len(index)} images of {split} in {time.perf_counter() - start:.1f} s: {stored}", flush=True)
    return index


def index_readable(config: DataConfig, split: str) -> ImageIndex:
    """Index the readable images of a split with problems, in memory; all have label 0.

    Raises:
        ConfigError: if there are no files.
    """
    form, paths = find_source(config, split)
    scan = FORMATS[form](paths, split)
    scan.entries, scan.classes = [entry._replace(label=0) for entry in scan.entries], [""]
    return pack(base_folder(config, split), form, scan)


def scan_split(config: DataConfig, split: str) -> tuple[str, Scan]:
    """Find the images of a split; return their format and the scan, with class names and integer labels.

    Unusable files and members are problems of the scan.

    Raises:
        ConfigError: if there are no files, or a class or label file is invalid.
    """
    form, paths = find_source(config, split)
    prepared = manifest_of(paths)
    if form == "folder" and config.train is None and config.val is None:
        check_class_folders(config)
    try:
        scan = FORMATS[form](paths, split)
    except OSError as error:
        raise ConfigError(
            f"data.{split}: {error.filename or paths[0]} cannot be read ({error.strerror or error}); make it readable"
        ) from error
    if scan.access != "file":
        scan.entries = without_single_folder(scan.entries)
    scan.change = prepared.change if prepared is not None else None
    if split == "val" and is_shared(config) and scan.entries and FORMATS[form](paths, "train").entries == scan.entries:
        scan.problems.append(f"{paths[0]}: has no folders train/ and val/; set data.train and data.val")
    if any(entry.label is None for entry in scan.entries):
        scan.entries = with_label_file(scan, config)
    if not scan.entries:
        scan.problems = scan.problems or [f"{paths[0]}: no images of {split} found"]
        return form, scan
    number_classes(scan, config)
    if form not in ("parquet", "arrow"):  # whose names are often not unique
        first: dict[str, Entry] = {}
        twice = [entry for entry in scan.entries if first.setdefault(entry.name, entry) is not entry]
        scan.problems += [
            f"{scan.files[entry.file]}: {entry.name} exists twice; remove or rename it" for entry in twice
        ]
    return form, scan


def pack(base: Path, form: str, scan: Scan) -> ImageIndex:
    """Make an index of the entries, in the order of `ImageFolder`: by label, folder and name."""
    entries = sorted(scan.entries, key=lambda entry: (entry.label, *os.path.split(entry.name)))
    encoded = [os.fsencode(entry.name) for entry in entries]
    rows = np.empty(len(entries), ROW)
    for key in ("file", "offset", "size", "label"):
        rows[key] = [getattr(entry, key) for entry in entries]
    rows["name_end"] = np.cumsum([len(name) for name in encoded])
    names = np.frombuffer(b"".join(encoded), np.uint8)
    listing = hashlib.sha256()
    classes = scan.classes or []
    for name, entry in zip(encoded, entries, strict=True):
        listing.update(name + b"\0%d\0" % entry.content)
        label = int(entry.label or 0)
        if not entry.name.startswith(f"{classes[label]}/"):
            listing.update(b"%d\0" % label)
    if classes != sorted(classes):
        listing.update("\0".join(classes).encode())
    size = sum(entry.content for entry in entries)
    identity = {"files": len(entries), "bytes": size, "sha256": listing.hexdigest()}
    identity |= {"prepared": scan.change} if scan.change is not None else {}
    states = dict(zip(relative([*scan.states], base), scan.states.values(), strict=True))
    if scan.access == "file":
        sampled = entries[:: max(1, len(entries) // SAMPLED_IMAGES)]
        folder = os.path.relpath(scan.files[0], base)
        states |= {f"{folder}/{entry.name}": ["image", entry.size] for entry in sampled}
    files, arrays = relative(scan.files, base), {"images": digest(rows), "names": digest(names)}
    meta = Meta(form, scan.access, files, classes, identity, arrays, states)
    return ImageIndex(base, meta, rows, names)


def relative(paths: Sequence[Path], base: Path) -> list[str]:
    return [os.path.relpath(path, base) for path in paths]
