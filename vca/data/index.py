"""The index of a split: where each image is, its label and its name. It is built once and memory-mapped.

    KEY.json                meta data: format, files, classes, identity of the images, state of the files
    KEY-SHA.images.npy      (images,) of `ROW`
    KEY-SHA.names.npy       names of all images, UTF-8, one after another

KEY depends on the config, SHA on the names and sizes of the images. A start reads the index instead of the folders, and
looks at `watched` files only: size and time of archives and a sample of their contents, times of class folders, and
sizes of some of their images. If one changed, the index is built again.
"""

import hashlib
import io
import json
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vca.data.formats import ACCESS
from vca.data.scan import THREADS, state_of
from vca.runtime.files import write_bytes, write_text

VERSION = 1
ROW = np.dtype([("file", "<u4"), ("offset", "<i8"), ("size", "<i8"), ("label", "<i4"), ("name_end", "<i8")])


@dataclass(frozen=True)
class Meta:
    """Meta data of an index.

    Attributes:
        format, access: key in `FORMATS` and in `ACCESS`.
        files: paths of the files, relative to the folder of the data.
        classes: class names in the order of their labels.
        identity: number of images, total bytes, and a sha256 over names, sizes and labels in the order of the index;
            equal for each format of the same images with the same names. A resized copy has `prepared` in addition.
        arrays: sha256 of the array files.
        watched: state of the files and folders before they were read, see `state_of`.
    """

    format: str
    access: str
    files: list[str]
    classes: list[str]
    identity: dict[str, Any]
    arrays: dict[str, str]
    watched: dict[str, list]
    version: int = VERSION


class ImageIndex:
    """An index in memory: meta data, rows `(images,)` of `ROW`, names; `place` is its `KEY.json` if it is stored."""

    def __init__(self, base: Path, meta: Meta, rows: np.ndarray, names: np.ndarray, place: Path | None = None) -> None:
        self.base, self.meta, self.place = base, meta, place
        self.rows, self.names = np.asarray(rows), np.asarray(names)  # a view of a memory map is faster to index
        self.files = [str(base / file) for file in meta.files]
        self.read_entry = ACCESS[meta.access]

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> Any:
        """Copy the path, not the arrays, to a process that does not share memory."""
        if self.place is not None:
            return read_same_index, (self.place, self.base, self.meta.arrays)
        return ImageIndex, (self.base, self.meta, self.rows, self.names)

    def name(self, index: int) -> str:
        """Return the name of an image, relative to its file or folder."""
        start = self.rows[index - 1]["name_end"] if index else 0
        return os.fsdecode(self.names[start : self.rows[index]["name_end"]].tobytes())

    def source(self, index: int) -> str:
        """Return the file of an image, for messages: a path, or `ARCHIVE: member`."""
        file = self.files[self.rows[index]["file"]]
        return f"{file}/{self.name(index)}" if self.meta.access == "file" else f"{file}: {self.name(index)}"

    def read(self, index: int) -> bytes:
        """Read the file of an image.

        Raises:
            OSError, ValueError: if it cannot be read or changed.
        """
        file, offset, size, _, _ = self.rows[index].item()
        if self.meta.access != "file":
            return self.read_entry(self.files[file], "", offset, size)
        content = self.read_entry(self.files[file], self.name(index), offset, size)
        if len(content) != size:
            raise ValueError(
                f"its size changed from {size} to {len(content)} bytes since {self.place or 'its index'} was written; "
                f"delete the index to use the new images"
            )
        return content


def read_index(path: Path, base: Path) -> ImageIndex:
    """Read the stored index of files in `base`; its arrays are memory-mapped.

    Raises:
        OSError, ValueError: if there is none, it is corrupt, or it has another version.
    """
    try:
        stored = json.loads(path.read_text())
        meta = Meta(**stored["meta"])
        files = array_paths(path.parent, path.stem, meta)
        rows, names = (np.load(files[name], mmap_mode="r", allow_pickle=False) for name in ("images", "names"))
        found = [meta.version, digest_json(stored["meta"]), digest(rows), digest(names), rows.dtype]
        intact = found == [VERSION, stored["sha256"], meta.arrays["images"], meta.arrays["names"], ROW]
    except (TypeError, KeyError, AttributeError, EOFError) as error:  # of another content than `store` writes
        raise ValueError(f"{path} is corrupt ({error})") from error
    if not intact:
        raise ValueError(f"{path} is corrupt or has another version")
    return ImageIndex(base, meta, rows, names, path)


def read_same_index(path: Path, base: Path, arrays: dict[str, str]) -> ImageIndex:
    """Read the stored index whose arrays have the sha256 `arrays`.

    Raises:
        OSError, ValueError: if it is not that index, since another process indexed changed files.
    """
    index = read_index(path, base)
    if index.meta.arrays != arrays:
        raise ValueError(f"{path} was written again, since the images changed; rerun the command")
    return index


def store(index: ImageIndex, folder: Path, key: str) -> Path | None:
    """Write an index atomically, the meta data last; return their path, None if the folder cannot be written."""
    own = f"{platform.node()}-{os.getpid()}"  # several jobs may write the same index
    try:
        for name, array in array_paths(folder, key, index.meta).items():
            content = io.BytesIO()
            np.save(content, index.rows if name == "images" else index.names)
            temporary = array.with_name(f"{array.stem}-{own}.npy")
            write_bytes(temporary, content.getbuffer())
            os.replace(temporary, array)
        path, temporary = folder / f"{key}.json", folder / f"{key}-{own}.json"
        meta = asdict(index.meta)
        write_text(temporary, json.dumps({"meta": meta, "sha256": digest_json(meta)}) + "\n")
        os.replace(temporary, path)
    except OSError:
        return None
    return path


def array_paths(folder: Path, key: str, meta: Meta) -> dict[str, Path]:
    return {name: folder / f"{key}-{sha256[:12]}.{name}.npy" for name, sha256 in meta.arrays.items()}


def first_change(base: Path, watched: dict[str, list]) -> str | None:
    """Return the first file or folder that changed, and how; None if none did."""

    def change(item: tuple[str, list]) -> str | None:
        path, old = base / item[0], item[1]
        try:
            new = state_of(path)
        except OSError:
            return f"{path} was removed"
        if new == old:
            return None
        return (
            f"{path} changed (size {old[1]} -> {new[1]})"
            if old[1] != new[1] and new[0] != "folder"
            else f"{path} changed"
        )

    with ThreadPoolExecutor(THREADS) as threads:
        return next(filter(None, threads.map(change, watched.items())), None)


def digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def digest_json(content: Any) -> str:
    return digest(json.dumps(content).encode())
