"""Sets of 8-bit images by number, read strictly: what an evaluator would otherwise swallow is an error here.

Every set has `count`, `shape` and `stream(blocks of numbers)`, so that ranks can share it in any way; so has the set of
a generator's samples (`vca.generation.pipeline.DrawnSet`):

    PngFolder       a flat folder of PNG files, or the folder of `sample.py` that holds `images/`
    NpzImages       `arr_0` `(N, H, W, C)` uint8, as ADM's evaluator takes it
    DatasetImages   a data set of the project, cut by ADM's centre crop
"""

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vca.data.augment import AdmCrop
from vca.data.doctor import is_16_bit_color
from vca.runtime.errors import ConfigError

THREADS = min(8, os.cpu_count() or 1)  # that decode images; PIL lets them run side by side
MODES = {"L": 1, "RGB": 3}  # PIL's mode -> channels
REMEDIES = {  # of modes that are neither
    "RGBA": "has an alpha channel; save it as RGB",
    "LA": "has an alpha channel; save it as RGB",
    "P": "has a palette; save it as RGB",
    "1": "has one bit a pixel; save it as RGB",
}


class ImageSet:
    """A set of images.

    Attributes:
        source: what the user calls it.
        count: how many there are.
        shape: `(H, W, C)` of each.
    """

    source: str
    count: int
    shape: tuple[int, int, int]

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """Images `(len(numbers), H, W, C)`, uint8."""
        raise NotImplementedError

    def stream(self, blocks: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """Blocks of images in order, the next one being read while the one before is used."""
        with ThreadPoolExecutor(1) as reader:
            coming = [reader.submit(self.read, block) for block in blocks[:1]]
            for index, block in enumerate(blocks):
                pixels = coming.pop().result()
                coming = [reader.submit(self.read, following) for following in blocks[index + 1 : index + 2]]
                yield block, pixels


class PngFolder(ImageSet):
    """A flat folder of PNG files. If their names are numbers, these must be 0, 1, 2, ...

    Raises:
        ConfigError: if there is no image, or anything that is no PNG file, or a number is missing or there twice.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.source, self.key = str(folder), key
        self.files = list_png(folder, key)
        self.count = len(self.files)
        with ThreadPoolExecutor(THREADS) as pool:  # of all before any is used: their headers alone
            shapes = list(pool.map(self.shape_of, self.files))
        self.shape = shapes[0]
        for file, shape in zip(self.files, shapes, strict=True):
            if shape != self.shape:
                first = f"{self.files[0].name} is {format_shape(self.shape)}"
                raise ConfigError(f"{key}: {file} is {format_shape(shape)}, but {first}; all must be alike")

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """The files of these numbers.

        Raises:
            ConfigError: names the file that cannot be decoded.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            return np.stack(list(pool.map(lambda number: self.decode(self.files[number]), numbers)))

    def decode(self, file: Path) -> np.ndarray:
        """`(H, W, C)`."""
        try:
            with Image.open(file) as image:
                return np.asarray(image).reshape(self.shape)
        except (OSError, SyntaxError, ValueError) as error:
            raise ConfigError(f"{self.key}: {file} cannot be decoded ({error}); make it again") from error

    def shape_of(self, file: Path) -> tuple[int, int, int]:
        """What the header says."""
        try:
            with open(file, "rb") as content, Image.open(content) as image:
                deep = is_16_bit_color(content)
                kind, mode, (width, height) = image.format, image.mode, image.size
                mode = f"{mode} with transparency" if "transparency" in image.info else mode
        except UnidentifiedImageError as error:
            raise ConfigError(f"{self.key}: {file} is not an image; remove it, or make it again") from error
        except (OSError, SyntaxError, ValueError) as error:
            raise ConfigError(f"{self.key}: {file} cannot be read ({error}); make it again") from error
        if kind != "PNG":
            raise ConfigError(f"{self.key}: {file} is a {kind} by its content; save images as PNG")
        if mode not in MODES:
            problem = REMEDIES.get(mode, f"has mode {mode}; save it as 8-bit RGB")
            raise ConfigError(f"{self.key}: {file} {problem}")
        if deep:
            raise ConfigError(f"{self.key}: {file} has 16 bits a channel; save it as 8-bit RGB")
        return height, width, MODES[mode]


def list_png(folder: Path, key: str) -> list[Path]:
    """The files of a folder in the order of their numbers, or names; see `PngFolder`."""
    try:
        files = sorted(Path(entry.path) for entry in os.scandir(folder))
    except OSError as error:
        raise ConfigError(f"{key}: {folder} cannot be read: {error.strerror}") from error
    if not files:
        raise ConfigError(f"{key}: {folder} is empty; name the folder that holds the PNG files")
    for file in files:
        if file.suffix.lower() in (".jpg", ".jpeg"):
            raise ConfigError(f"{key}: {file} is a JPEG, whose compression moves every figure; save images as PNG")
        if file.suffix.lower() != ".png" or file.is_dir():
            raise ConfigError(f"{key}: {file} is no PNG file; a folder of images holds nothing else: move it away")
    numbered = [file for file in files if file.stem.isdecimal()]
    if not numbered:
        return files
    if len(numbered) < len(files):
        stray = next(file for file in files if not file.stem.isdecimal())
        raise ConfigError(f"{key}: {stray} has no number, but {numbered[0].name} has; move one or the other away")
    by_number: dict[int, Path] = {}
    for file in files:
        number = int(file.stem)
        if number in by_number:
            raise ConfigError(f"{key}: {file} and {by_number[number].name} are both number {number}; remove one")
        by_number[number] = file
    if missing := set(range(len(files))) - set(by_number):
        raise ConfigError(
            f"{key}: {folder} holds {len(files)} images up to number {max(by_number)}, but none of number "
            f"{min(missing)}; make it, or number them from 0"
        )
    return [by_number[number] for number in range(len(files))]


class NpzImages(ImageSet):
    """`arr_0` of an npz. It is not read into memory, unless the file is compressed.

    Raises:
        ConfigError: if there is no such array, or it does not hold 8-bit images.
    """

    def __init__(self, file: Path, key: str) -> None:
        self.source, self.key = str(file), key
        self.pixels = map_member(file, "arr_0", key)
        array = self.pixels
        if array.dtype != np.uint8:
            first = array[:256]
            finite = "" if array.dtype.kind != "f" or np.isfinite(first).all() else ", with NaN or infinite numbers"
            rule = "uint8; make it so by clip(127.5 x + 128, 0, 255) for x in [-1, 1]"
            raise ConfigError(f"{key}: arr_0 of {file} must be {rule}, got {array.dtype}{finite}")
        if array.ndim != 4 or array.shape[3] not in MODES.values() or not len(array):
            raise ConfigError(f"{key}: arr_0 of {file} must be images (N, H, W, 1 or 3), got {array.shape}")
        self.count, self.shape = len(array), array.shape[1:]

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """Rows of the array."""
        return np.stack([self.pixels[number] for number in numbers])


def members(file: Path, key: str) -> list[str]:
    """Names of the arrays in an npz.

    Raises:
        ConfigError: if it is none.
    """
    with unreadable(file, key), zipfile.ZipFile(file) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_member(file: Path, name: str, key: str) -> np.ndarray:
    """An array of an npz, its checksum verified.

    Raises:
        ConfigError: if the file is no npz, is damaged, or has no such array (names those that it has).
    """
    if name not in (there := members(file, key)):
        raise ConfigError(f"{key}: {file} has no array '{name}', but {', '.join(there) or 'none at all'}")
    with unreadable(file, key), np.load(file, allow_pickle=False) as archive:
        return archive[name]


def map_member(file: Path, name: str, key: str) -> np.ndarray:
    """`read_member`, but mapped into memory where the archive stores the array as it is."""
    if name not in members(file, key):
        return read_member(file, name, key)  # which says so
    with unreadable(file, key), zipfile.ZipFile(file) as archive:
        member = archive.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        return read_member(file, name, key)
    with unreadable(file, key), open(file, "rb") as content:
        content.seek(member.header_offset + 26)  # lengths of name and extra field, which precede the data
        lengths = np.frombuffer(content.read(4), "<u2")
        content.seek(member.header_offset + 30 + int(lengths.sum()))
        version = np.lib.format.read_magic(content)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
        shape, fortran, dtype = read_header(content)
        if fortran or dtype.hasobject:
            raise ValueError("its layout is not supported")
        return np.memmap(file, dtype, "r", content.tell(), shape)


@contextmanager
def unreadable(file: Path, key: str) -> Iterator[None]:
    """Turn what goes wrong in the bytes of an npz into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{key}: {file} cannot be read as an npz ({error}); copy it again") from error


class DatasetImages(ImageSet):
    """A data set of `(PIL image, label)`, cut by ADM's centre crop to `img_size` pixels."""

    def __init__(self, dataset: Any, img_size: int, in_chans: int, source: str, key: str) -> None:
        self.dataset, self.source, self.key = dataset, source, key
        self.count, self.shape = len(dataset), (img_size, img_size, in_chans)
        self.crop, self.mode = AdmCrop(img_size), "L" if in_chans == 1 else "RGB"

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """Images of the data set."""
        with ThreadPoolExecutor(THREADS) as pool:
            return np.stack(list(pool.map(self.one, numbers)))

    def one(self, number: int) -> np.ndarray:
        """`(H, W, C)`."""
        try:
            image, _ = self.dataset[number]
        except ConfigError:
            raise
        except (OSError, SyntaxError, ValueError) as error:
            file = getattr(self.dataset, "samples", {number: (f"number {number}",)})[number][0]
            raise ConfigError(f"{self.key}: {file} cannot be decoded ({error}); copy it again") from error
        return np.asarray(self.crop(image.convert(self.mode))).reshape(self.shape)


def format_shape(shape: Sequence[int]) -> str:
    """`32 x 32 RGB`."""
    return f"{shape[0]} x {shape[1]} {'grey' if shape[2] == 1 else 'RGB'}"
