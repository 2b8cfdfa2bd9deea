"""Tars: class tars in a tar or a folder (ILSVRC's own form), class folders in a tar, and WebDataset shards."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from vca.data.scan import Entry, Scan, by_class_folder, is_apple_double, is_image, state_of

BLOCK = 512  # bytes of a tar header
COPY = "copy it again"
LABELS = ("cls", "json")  # extensions of the members that have the label of a WebDataset sample


class Member(NamedTuple):
    """A file in a tar: its name and its bytes `offset .. offset + size` of the tar's file."""

    name: str
    offset: int
    size: int


def members(file: BinaryIO, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """Yield the files in a tar that is the bytes `start .. end` of an open file.

    macOS's `._*` files are left out.

    Raises:
        ValueError: if the tar is truncated or corrupt, after its intact members, or has links or sparse files.
    """
    end = file.seek(0, 2) if end is None else end
    file.seek(start)
    try:
        archive = tarfile.TarFile(fileobj=file)
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # else it grows to gigabytes
            if member.offset >= end:  # the next member of the tar around it
                archive.offset = member.offset
                break
            if member.issparse():
                raise ValueError(f"has the sparse member {member.name}; create it without --sparse")
            if member.issym() or member.islnk():
                remedy = "create it with `tar --dereference --hard-dereference`"
                raise ValueError(f"has the link {member.name}, must be a file; {remedy}")
            if member.offset_data + member.size > end:
                raise ValueError(f"is truncated in {member.name}; {COPY}")
            if member.isreg() and not is_apple_double(member.name):
                yield Member(member.name, member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"is not a tar or is truncated ({error}); {COPY}") from error
    file.seek(archive.offset)  # tarfile takes a corrupt header for the end
    block = file.read(min(BLOCK, end - archive.offset))
    if len(block) < BLOCK or block.strip(b"\0"):
        place = archive.offset - start
        raise ValueError(f"has no end of archive at byte {place}: it is truncated or corrupt; {COPY}")


def intact_members(file: BinaryIO, name: str, problems: list[str], *limits: int) -> Iterator[Member]:
    """Yield the members before a corrupt one, and append the problem."""
    try:
        yield from members(file, *limits)
    except ValueError as error:
        problems.append(f"{name}: {error}")


def scan_tar(paths: Sequence[Path], split: str) -> Scan:
    """Index tars whose classes are class tars, folders, or their own names if there are several."""
    folders = {path.parent for path in paths} if len(paths) > 1 else set()  # which change if a file is added
    scan = Scan("span", list(paths), watched=[*paths, *folders])
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
            for key, sample in samples_of(file, path, scan.problems).items():
                try:
                    image, label = image_of(sample), read_label(file, sample)
                    scan.entries.append(Entry(image.name, label, number, image.offset, image.size, image.size))
                except ValueError as error:
                    scan.problems.append(f"{path}: sample {key} {error}; write the shard again")
    names = paths[0].parent / "classes.txt"
    if names.is_file():
        scan.states[names] = state_of(names)
        scan.classes = names.read_text(errors="replace").splitlines()
    return scan


def samples_of(file: BinaryIO, path: Path, problems: list[str]) -> dict[str, dict[str, Member]]:
    """Return the samples of a shard, `{name: {extension: member}}`; hidden files and names without a dot are none."""
    samples: dict[str, dict[str, Member]] = {}
    try:
        for member in members(file):
            folder, slash, base = member.name.rpartition("/")
            key, dot, extension = base.partition(".")
            if not key or not dot:
                continue
            sample = samples.setdefault(folder + slash + key, {})
            if extension.lower() in sample:
                problems.append(f"{path}: {member.name} exists twice; write the shard again")
            sample[extension.lower()] = member
    except ValueError as error:
        problems.append(f"{path}: {error}")
        if samples:
            samples.popitem()  # may be incomplete
    return samples


def image_of(sample: dict[str, Member]) -> Member:
    """Return the image of a WebDataset sample; raise `ValueError` unless it has one."""
    images = [member for member in sample.values() if is_image(member.name)]
    if len(images) != 1:
        raise ValueError(f"has {f'{len(images)} images' if images else 'no image'}, must be one")
    return images[0]


def read_label(file: BinaryIO, sample: dict[str, Member]) -> int:
    """Read the label of a WebDataset sample; raise `ValueError` unless it is an integer >= 0."""
    extension = next((name for name in LABELS if name in sample), None)
    if extension is None:
        raise ValueError("has no label, an integer in .cls or 'label' in .json")
    file.seek(sample[extension].offset)
    content = file.read(sample[extension].size).strip()
    try:
        value: Any = json.loads(content)
        value = value.get("label", value.get("cls")) if isinstance(value, dict) else value
    except ValueError:
        value = content.decode(errors="replace")[:40]
    if type(value) is not int or value < 0:
        raise ValueError(f"has the label {value!r} in .{extension}, must be an integer >= 0")
    return value


def holds_samples(path: Path) -> bool:
    """Whether a tar is a WebDataset shard, by its first members."""
    problems: list[str] = []
    with open(path, "rb") as file:
        names = [member.name for member in islice(intact_members(file, str(path), problems), 16)]
    return any(name.rpartition("/")[2].partition(".")[2].lower() in LABELS for name in names)
