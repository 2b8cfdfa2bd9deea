"""Tars: class tars in a tar or a folder (ILSVRC's own form), class folders in a tar, and WebDataset shards."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from vca.data.scan import Entry, Scan, by_class_folder, is_image

BLOCK = 512  # bytes of a tar header
LABELS = ("cls", "json")  # extensions of the members that have the label of a WebDataset sample


class Member(NamedTuple):
    """A file in a tar: its name and its bytes `offset .. offset + size` of the tar's file."""

    name: str
    offset: int
    size: int


def members(file: BinaryIO, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """Yield the files in a tar that is the bytes `start .. end` of an open file.

    Raises:
        ValueError: if the tar is truncated or corrupt, after its intact members.
    """
    end = file.seek(0, 2) if end is None else end
    file.seek(start)
    try:
        archive = tarfile.TarFile(fileobj=file)
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # else it grows to gigabytes
            if member.offset_data + member.size > end:
                raise ValueError(f"is truncated in {member.name}")
            if member.issparse():
                raise ValueError(f"has the sparse member {member.name}; create it without --sparse")
            if member.isreg():
                yield Member(member.name, member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"is not a tar or is truncated ({error})") from error
    file.seek(archive.offset)  # tarfile takes a corrupt header for the end
    block = file.read(min(BLOCK, end - archive.offset))
    if len(block) < BLOCK or block.strip(b"\0"):
        raise ValueError(f"has no end of archive at byte {archive.offset - start}: it is truncated or corrupt")


def intact_members(file: BinaryIO, name: str, problems: list[str], *limits: int) -> Iterator[Member]:
    """Yield the members before a corrupt one, and append the problem."""
    try:
        yield from members(file, *limits)
    except ValueError as error:
        problems.append(f"{name}: {error}; copy it again")


def scan_tar(paths: Sequence[Path], split: str) -> Scan:
    """Index tars whose classes are class tars, folders, or their own names if there are several."""
    scan = Scan("span", list(paths), watched=[*paths])
    for number, path in enumerate(paths):
        with open(path, "rb") as file:
            found = list(intact_members(file, str(path), scan.problems))
            inner = [member for member in found if member.name.endswith(".tar")]
            classes = by_class_folder([member.name for member in found], split)
            for name, offset, size in found:
                if name in classes:
                    below, label = classes[name]
                    if label is None and len(paths) > 1:
                        below, label = f"{path.stem}/{below}", path.stem
                    scan.entries.append(Entry(below, label, number, offset, size, size))
            for tar in inner:
                label = PurePosixPath(tar.name).stem
                limits = (tar.offset, tar.offset + tar.size)
                for name, offset, size in intact_members(file, f"{path}: {tar.name}", scan.problems, *limits):
                    if is_image(name):
                        below = f"{label}/{PurePosixPath(name).name}"
                        scan.entries.append(Entry(below, label, number, offset, size, size))
    return scan


def scan_webdataset(paths: Sequence[Path], split: str) -> Scan:
    """Index WebDataset shards: members with the same name up to the first dot are one sample.

    The label is the integer in the `.cls` member, or `label` or `cls` of the `.json` member. Names of the classes are
    the lines of `classes.txt` beside the shards, if it exists.
    """
    scan = Scan("span", list(paths), watched=[*paths, *{path.parent for path in paths}])
    for number, path in enumerate(paths):
        with open(path, "rb") as file:
            samples: dict[str, dict[str, Member]] = {}
            for member in intact_members(file, str(path), scan.problems):
                folder, slash, base = member.name.rpartition("/")
                key, _, extension = base.partition(".")
                sample = samples.setdefault(folder + slash + key, {})
                if extension.lower() in sample:
                    scan.problems.append(f"{path}: {member.name} exists twice; write the shard again")
                sample[extension.lower()] = member
            for key, sample in samples.items():
                images = [member for member in sample.values() if is_image(member.name)]
                if len(images) != 1:
                    count = f"{len(images)} images" if images else "no image"
                    scan.problems.append(f"{path}: sample {key} has {count}, must be one; write the shard again")
                    continue
                label = read_label(file, sample)
                if label is None:
                    missing = "has no label, an integer in .cls or 'label' in .json"
                    scan.problems.append(f"{path}: sample {key} {missing}; write the shard again")
                    continue
                scan.entries.append(Entry(images[0].name, label, number, *images[0][1:], images[0].size))
    names = paths[0].parent / "classes.txt"
    scan.classes = names.read_text().splitlines() if names.is_file() else None
    return scan


def read_label(file: BinaryIO, sample: dict[str, Member]) -> int | None:
    """Read the integer label of a WebDataset sample; None if it has none."""
    for extension in LABELS:
        if extension in sample:
            file.seek(sample[extension].offset)
            content = file.read(sample[extension].size)
            try:
                value: Any = json.loads(content)
            except ValueError:
                return None
            if isinstance(value, dict):
                value = value.get("label", value.get("cls"))
            if type(value) is int:
                return value
    return None


def holds_samples(path: Path) -> bool:
    """Whether a tar is a WebDataset shard, by its first members."""
    try:
        with open(path, "rb") as file:
            names = [member.name for member, _ in zip(members(file), range(16), strict=False)]
    except ValueError:
        return False
    return any(name.rpartition("/")[2].partition(".")[2].lower() in LABELS for name in names)
