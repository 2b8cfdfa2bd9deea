"""Sets of 8-bit images addressed by number. Invalid input is an error that names the file and the fix.

Every set has the interface of `ImageSet`, as `vca.generation.pipeline.GeneratedImages` does:

    PngImages       PNG files in a flat folder, in `images/` of a `sample.py` folder, or in archives
    NpzImages       `arr_0` `(N, H, W, C)` uint8, the format of ADM's evaluator
    DatasetImages   a data set of the project with ADM's centre crop
"""

import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from vca.data.augment import AdmCrop
from vca.data.decode import is_16_bit_color
from vca.data.formats import ACCESS, FORMATS
from vca.data.imagefolder import IndexedImages
from vca.runtime.errors import ConfigError

THREADS = min(8, os.cpu_count() or 1)  # decoding threads; PIL releases the GIL
MODES = {"L": 1, "RGB": 3}  # PIL's mode -> channels
REMEDIES = {  # for modes that are neither
    "RGBA": "has an alpha channel; save it as RGB",
    "LA": "has an alpha channel; save it as RGB",
    "P": "has a palette; save it as RGB",
    "1": "has one bit per pixel; save it as RGB",
}


class ImageSet:
    """Images with numbers from 0; `stream` reads them in blocks of numbers.

    Attributes:
        source: the set, as named by the user.
        count: number of images.
        shape: `(H, W, C)` of each image.
    """

    source: str
    count: int
    shape: tuple[int, int, int]

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """Read images `(len(numbers), H, W, C)` uint8."""
        with ThreadPoolExecutor(THREADS) as threads:
            return np.stack(list(threads.map(self.load, numbers)))

    def load(self, number: int) -> np.ndarray:
        """Read one image `(H, W, C)`."""
        raise NotImplementedError

    def stream(self, blocks: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """Yield blocks of images in order, reading one block ahead."""
        with ThreadPoolExecutor(1) as reader:
            pending = [reader.submit(self.read, block) for block in blocks[:1]]
            for index, block in enumerate(blocks):
                pixels = pending.pop().result()
                pending = [reader.submit(self.read, following) for following in blocks[index + 1 : index + 2]]
                yield block, pixels


class PngImages(ImageSet):
    """PNG files of one size in a folder or in an archive. Their headers are checked before any is decoded.

    Args:
        source: path, as named by the user.
        key: config key, for messages.
        names: the file of each image, for messages.
        open_image: opens the file of an image.

    Raises:
        ConfigError: if a file is not a PNG of 8 bits per channel and of the size of the first one.
    """

    def __init__(self, source: str, key: str, names: Sequence[str], open_image: Callable[[int], BinaryIO]) -> None:
        self.source, self.key, self.names, self.open_image = source, key, names, open_image
        self.count = len(names)
        with ThreadPoolExecutor(THREADS) as threads:
            shapes = list(threads.map(self.shape_of, range(self.count)))
        self.shape = shapes[0]
        for name, shape in zip(names, shapes, strict=True):
            if shape != self.shape:
                first = f"{format_shape(self.shape)} like {PurePosixPath(names[0].split(': ')[-1]).name}"
                raise ConfigError(f"{key}: {name} must be {first}, got {format_shape(shape)}")

    def load(self, number: int) -> np.ndarray:
        try:
            with self.open_image(number) as content, Image.open(content) as image:
                return np.asarray(image).reshape(self.shape)
        except (OSError, SyntaxError, ValueError) as error:
            raise ConfigError(f"{self.key}: {self.names[number]} cannot be decoded ({error}); recreate it") from error

    def shape_of(self, number: int) -> tuple[int, int, int]:
        """Read the shape from the header, and check format and mode."""
        name = self.names[number]
        try:
            with self.open_image(number) as content:
                deep = is_16_bit_color(content.read(26))
                content.seek(0)
                with Image.open(content) as image:
                    kind, mode, (width, height) = image.format, image.mode, image.size
                    mode = f"{mode} with transparency" if "transparency" in image.info else mode
        except UnidentifiedImageError as error:
            raise ConfigError(f"{self.key}: {name} is not an image; remove or recreate it") from error
        except (OSError, SyntaxError, ValueError) as error:
            raise ConfigError(f"{self.key}: {name} cannot be read ({error}); recreate it") from error
        if kind != "PNG":
            raise ConfigError(f"{self.key}: {name} must be a PNG file, got {kind} content; save images as PNG")
        if mode not in MODES:
            problem = REMEDIES.get(mode, f"has mode {mode}; save it as 8-bit RGB")
            raise ConfigError(f"{self.key}: {name} {problem}")
        if deep:
            raise ConfigError(f"{self.key}: {name} has 16 bits per channel; save it as 8-bit RGB")
        return height, width, MODES[mode]


def open_png_folder(folder: Path, key: str) -> PngImages:
    """Open a flat folder of PNG files. If the names are numbers, they must be 0, 1, 2, ...

    Raises:
        ConfigError: if the folder is empty or contains anything else, or a number is missing or duplicated.
    """
    files = list_png(folder, key)
    return PngImages(str(folder), key, [str(file) for file in files], lambda number: open(files[number], "rb"))


def open_png_archive(paths: Sequence[Path], form: str, source: str, key: str) -> PngImages:
    """Open the PNG files in archives of a format of `vca.data.formats`, in the order of their names.

    Raises:
        ConfigError: if an archive is corrupt or contains no images.
    """
    try:
        scan, other = (FORMATS[form](paths, split) for split in ("train", "val"))
    except OSError as error:
        raise ConfigError(f"{key}: {error}") from error
    if scan.entries != other.entries:
        splits = "data:train or data:test with data=imagefolder and data.root"
        raise ConfigError(f"{key}: {source} has folders of splits; use {splits}")
    if scan.problems or not scan.entries:
        raise ConfigError(f"{key}: {(scan.problems or [f'{source} contains no images'])[0]}")
    entries = sorted(scan.entries, key=lambda entry: entry.name)
    files, read = [str(file) for file in scan.files], ACCESS[scan.access]

    def open_image(number: int) -> BinaryIO:
        name, _, file, offset, size, _ = entries[number]
        return io.BytesIO(read(files[file], name, offset, size))

    return PngImages(source, key, [f"{files[entry.file]}: {entry.name}" for entry in entries], open_image)


def list_png(folder: Path, key: str) -> list[Path]:
    """List the files of a folder in the order of their numbers or names; see `open_png_folder`."""
    try:
        files = sorted(Path(entry.path) for entry in os.scandir(folder))
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {folder}: {error.strerror}") from error
    if not files:
        raise ConfigError(f"{key}: {folder} is empty; pass the folder with the PNG files")
    for file in files:
        if file.suffix.lower() in (".jpg", ".jpeg"):
            raise ConfigError(
                f"{key}: {file} must be a PNG, got a JPEG (lossy compression changes metrics); save images as PNG"
            )
        if file.suffix.lower() != ".png" or file.is_dir():
            raise ConfigError(f"{key}: {file} is not a PNG file; the folder must contain only PNG files: move it away")
    numbered = [file for file in files if file.stem.isdecimal()]
    if not numbered:
        return files
    if len(numbered) < len(files):
        stray = next(file for file in files if not file.stem.isdecimal())
        raise ConfigError(
            f"{key}: all names must be numbers or none, got {numbered[0].name} and {stray.name}; move one away"
        )
    by_number: dict[int, Path] = {}
    for file in files:
        number = int(file.stem)
        if number in by_number:
            raise ConfigError(f"{key}: {file} and {by_number[number].name} both have number {number}; remove one")
        by_number[number] = file
    if missing := set(range(len(files))) - set(by_number):
        raise ConfigError(
            f"{key}: {folder} contains {len(files)} images up to number {max(by_number)}, but number {min(missing)} is "
            f"missing; create it, or number the images from 0"
        )
    return [by_number[number] for number in range(len(files))]


class NpzImages(ImageSet):
    """`arr_0` of an npz, memory-mapped unless the file is compressed.

    Raises:
        ConfigError: if there is no such array, or it is not 8-bit images.
    """

    def __init__(self, file: Path, key: str) -> None:
        self.source, self.key = str(file), key
        self.pixels = read_member(file, "arr_0", key, mapped=True)
        array = self.pixels
        if array.dtype != np.uint8:
            first = array[:256]
            finite = "" if array.dtype.kind != "f" or np.isfinite(first).all() else ", with NaN or infinite values"
            remedy = "convert x in [-1, 1] by clip(127.5 x + 128, 0, 255)"
            raise ConfigError(f"{key}: arr_0 of {file} must be uint8, got {array.dtype}{finite}; {remedy}")
        if array.ndim != 4 or array.shape[3] not in MODES.values() or not len(array):
            raise ConfigError(f"{key}: arr_0 of {file} must be images (N, H, W, 1 or 3), got {array.shape}")
        self.count, self.shape = len(array), array.shape[1:]

    def load(self, number: int) -> np.ndarray:
        return self.pixels[number]


def members(file: Path, key: str) -> list[str]:
    """List the names of the arrays in an npz.

    Raises:
        ConfigError: if the file is not an npz.
    """
    with npz_errors(file, key), zipfile.ZipFile(file) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_member(file: Path, name: str, key: str, mapped: bool = False) -> np.ndarray:
    """Read an array of an npz; the zip's checksum is verified.

    With `mapped`, an array that the archive stores uncompressed is memory-mapped instead.

    Raises:
        ConfigError: if the file is not an npz or is corrupt, or has no such array (names the existing ones).
    """
    if name not in (names := members(file, key)):
        raise ConfigError(f"{key}: {file} must contain an array '{name}', got {', '.join(names) or 'none'}")
    with npz_errors(file, key), np.load(file, allow_pickle=False) as archive:
        if not mapped or (member := archive.zip.getinfo(f"{name}.npy")).compress_type != zipfile.ZIP_STORED:
            return archive[name]
    with npz_errors(file, key), open(file, "rb") as content:
        content.seek(member.header_offset + 26)  # lengths of the name and extra field before the data
        lengths = np.frombuffer(content.read(4), "<u2")
        content.seek(member.header_offset + 30 + int(lengths.sum()))
        version = np.lib.format.read_magic(content)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
        shape, fortran, dtype = read_header(content)
        if fortran or dtype.hasobject:
            raise ValueError("Fortran order and object arrays are not supported")
        return np.memmap(file, dtype, "r", content.tell(), shape)


@contextmanager
def npz_errors(file: Path, key: str) -> Iterator[None]:
    """Turn errors of reading an npz into a `ConfigError`."""
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{key}: {file} cannot be read as an npz ({error}); copy it again") from error


class DatasetImages(ImageSet):
    """A data set of `(PIL image, label)` with ADM's centre crop to `img_size` pixels."""

    def __init__(self, dataset: Any, img_size: int, in_chans: int, source: str, key: str) -> None:
        self.dataset, self.source, self.key = dataset, source, key
        self.count, self.shape = len(dataset), (img_size, img_size, in_chans)
        self.crop, self.mode = AdmCrop(img_size), "L" if in_chans == 1 else "RGB"

    def load(self, number: int) -> np.ndarray:
        try:
            image, _ = self.dataset[number]
        except ConfigError:
            raise
        except (OSError, SyntaxError, ValueError) as error:
            file = self.dataset.index.source(number) if isinstance(self.dataset, IndexedImages) else f"number {number}"
            raise ConfigError(f"{self.key}: {file} cannot be decoded ({error}); copy it again") from error
        return np.asarray(self.crop(image.convert(self.mode))).reshape(self.shape)


def format_shape(shape: Sequence[int]) -> str:
    """Format a shape as `32 x 32 RGB`."""
    return f"{shape[0]} x {shape[1]} {'grey' if shape[2] == 1 else 'RGB'}"
