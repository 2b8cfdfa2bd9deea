"""A latent cache: the encoded images of an image folder, with a manifest of everything the latents depend on.

    manifest.json      see `Manifest`
    labels.npy         (images,) int64
    shard_00000.npy    (shard_size, V, K, h, w): V versions of an image (original, flipped), K channels of moments
    shard_00000.json   sha256 of a finished file, until the manifest has all of them

`scripts/prepare_latents.py` writes it. It stores mean and standard deviation, so that every epoch samples new latents,
and encodes flipped images, because the latent of a flipped image is not a flipped latent. A run on the cache therefore
equals a run on the images, up to rounding of the encoder.
"""

import hashlib
import io
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vca.data.augment import AugmentConfig, Crop
from vca.data.config import DataConfig
from vca.runtime.digest import file_sha256
from vca.runtime.distributed import ONE, World
from vca.runtime.errors import ConfigError, check
from vca.runtime.files import write_bytes, write_text
from vca.runtime.rundir import diff_configs

DTYPES = ("float32", "float16")
START = 2**16  # bytes of a file that are compared with the manifest at the start of a run
IMAGE_FIELDS = ("images", "classes", "files_sha256")  # fields of the manifest that depend on the image folder
RERUN = "rerun scripts/prepare_latents.py to write the missing or corrupt files"
OPEN_FILES = 512  # per process; the usual limit is 1024
CROP = "adm-1"  # ADM's centre crop; the number changes with the pixels of `AdmCrop`


@dataclass(frozen=True)
class Manifest:
    """What the latents of a cache depend on, and their layout.

    Attributes:
        images: number of images.
        classes: class names in the order of their labels.
        files_sha256: sha256 of the relative paths and sizes of the images, in order.
        img_size, crop: size and crop of the images.
        autoencoder: `Autoencoder.identity()`.
        shape: `[V, K, h, w]` of one image.
        dtype: `float32` or `float16`.
        shard_size: images per file; the last file has the rest.
        files: `digest` of each file by name; empty until all are written.
    """

    images: int
    classes: list[str]
    files_sha256: str
    img_size: int
    crop: str
    autoencoder: dict[str, Any]
    shape: list[int]
    dtype: str
    shard_size: int
    files: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_size)

    def rows(self, shard: int) -> range:
        """Indices of the images in a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.images))

    @property
    def item_bytes(self) -> int:
        """Size of one version of one image."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    @property
    def names(self) -> list[str]:
        """Names of all files of a complete cache."""
        return ["labels.npy", *(shard_path(Path(), shard).name for shard in range(self.shards))]

    def identity(self) -> dict[str, Any]:
        """Return the manifest with one sha256 for all files; a run on the cache records it."""
        return {**asdict(self), "files": hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()}

    def write(self, folder: Path) -> None:
        """Write `manifest.json`."""
        write_text(folder / "manifest.json", json.dumps(asdict(self), indent=2) + "\n")

    def begin(self, folder: Path) -> "Manifest":
        """Write `manifest.json` unless it exists; return it with the digests of all finished files.

        Raises:
            ConfigError: if the folder has another cache, or the images changed; the message lists the differences.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out: {folder} cannot be created: {error.strerror}") from error
        if not (folder / "manifest.json").exists():
            self.write(folder)
        saved = read_manifest(folder)
        differences = diff_configs(asdict(saved), asdict(self), ["files"])
        if differences and all(line.startswith(IMAGE_FIELDS) for line in differences):
            raise ConfigError(
                f"data.root: the images changed since the cache {folder} was started ({'; '.join(differences)}); "
                f"restore them or choose another out=..."
            )
        if differences:
            raise ConfigError(f"{folder} has another cache ({'; '.join(differences)}); choose another out=...")
        finished = {
            name: json.loads(path.read_text()) for name in self.names if (path := digest_path(folder / name)).exists()
        }
        return replace(saved, files={**saved.files, **finished})

    def finish(self, folder: Path) -> None:
        """Move the digests of all files into `manifest.json`."""
        replace(self, files=self.begin(folder).files).write(folder)
        for name in self.names:
            digest_path(folder / name).unlink(missing_ok=True)


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        ConfigError: if it does not exist or is invalid.
    """
    file = folder / "manifest.json"
    check(file.is_file(), "data.root", "a latent cache (a folder with manifest.json)", str(folder))
    try:
        content = json.loads(file.read_text())
        manifest = Manifest(**content)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{file} is not the manifest of a latent cache: {error}") from error
    if "files" not in content:
        raise ConfigError(
            f"{file} has no sha256 of the files (written by an older version); "
            f"write a new cache: scripts/prepare_latents.py out=..."
        )
    if invalid := invalid_fields(manifest):
        value = getattr(manifest, invalid[0])
        raise ConfigError(f"{file} is corrupt: {invalid[0]} is {value!r}; restore it, or {RERUN}")
    return manifest


def invalid_fields(manifest: Manifest) -> list[str]:
    """Names of the fields with an invalid value."""

    def counts(*values: Any) -> bool:
        return all(type(value) is int and value >= 1 for value in values)

    shape, files = manifest.shape, manifest.files
    valid = {
        **{name: counts(getattr(manifest, name)) for name in ("images", "img_size", "shard_size")},
        **{name: isinstance(getattr(manifest, name), str) for name in ("files_sha256", "crop")},
        "classes": isinstance(manifest.classes, list) and len(manifest.classes) >= 1,
        "autoencoder": isinstance(manifest.autoencoder, dict),
        "shape": isinstance(shape, list) and len(shape) == 4 and counts(*shape) and shape[0] <= 2,
        "dtype": manifest.dtype in DTYPES,
        "files": isinstance(files, dict)
        and all(isinstance(one, dict) and set(one) == set(digest(b"")) for one in files.values()),
    }
    return [name for name, is_valid in valid.items() if not is_valid]


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard_{shard:05d}.npy"


def digest_path(path: Path) -> Path:
    """Path of a file's digest until the manifest has it."""
    return path.with_suffix(".json")


def digest(content: bytes | memoryview) -> dict[str, str]:
    """Hash the content of a file, and its first `START` bytes."""
    return {
        "sha256": hashlib.sha256(content).hexdigest(),
        "start_sha256": hashlib.sha256(content[:START]).hexdigest(),
    }


def save_array(path: Path, array: np.ndarray) -> None:
    """Write the digest of an array's file, then the file, both atomically."""
    content = io.BytesIO()
    np.save(content, array)
    write_text(digest_path(path), json.dumps(digest(content.getbuffer())) + "\n")
    write_bytes(path, content.getbuffer())


def file_is_made(path: Path, expected: dict[str, str] | None) -> bool:
    """Whether a file exists with the expected digest; reads the whole file."""
    return expected is not None and path.is_file() and file_sha256(path) == expected["sha256"]


def start_sha256(path: Path) -> str:
    """Hash the first `START` bytes of a file."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(START)).hexdigest()


def shard_is_whole(folder: Path, manifest: Manifest, shard: int) -> bool:
    """Whether a file exists with the shape and size of the manifest."""
    path = shard_path(folder, shard)
    try:
        latents: Any = np.load(path, mmap_mode="r")
        size = path.stat().st_size
    except (OSError, ValueError, EOFError):
        return False
    shape = (len(manifest.rows(shard)), *manifest.shape)
    return latents.shape == shape and latents.dtype == manifest.dtype and size == latents.offset + latents.nbytes


class LatentCache(Dataset):
    """Data set of `(latents (V, K, h, w), label)`, memory-mapped from a finished cache.

    Raises:
        ConfigError: if the cache is incomplete or corrupt.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        check(self.manifest.crop == CROP, f"{folder}: crop", f"'{CROP}'", self.manifest.crop)
        missing = [s for s in range(self.manifest.shards) if not shard_is_whole(folder, self.manifest, s)]
        if missing:
            raise ConfigError(
                f"{folder} is not complete: {len(missing)} of {self.manifest.shards} files are missing or cut short, "
                f"such as {shard_path(folder, missing[0]).name}; {RERUN}"
            )
        names, digests = self.manifest.names, self.manifest.files
        if set(names) != set(digests):
            raise ConfigError(f"{folder} is not complete: its manifest lacks the sha256 of some files; {RERUN}")
        others = [name for name in names[1:] if start_sha256(folder / name) != digests[name]["start_sha256"]]
        others += [name for name in names[:1] if not file_is_made(folder / name, digests[name])]
        if others:
            raise ConfigError(
                f"{folder}: {len(others)} of {len(names)} files do not match their sha256 in the manifest, such as "
                f"{others[0]}; {RERUN}"
            )
        self.labels = self.read_labels()
        self.files: dict[int, np.ndarray] = {}  # memory maps of this process

    def read_labels(self) -> np.ndarray:
        """Read and validate the labels `(images,)`."""
        path, classes = self.folder / "labels.npy", len(self.manifest.classes)
        try:
            labels = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(f"{path} cannot be read; {RERUN}") from error
        shape = (self.manifest.images,)
        check(labels.shape == shape, f"{path}: shape", str(shape), labels.shape)
        check(labels.dtype == np.int64, f"{path}: dtype", "int64", str(labels.dtype))
        low, high = int(labels.min()), int(labels.max())
        check(low >= 0 and high < classes, f"{path}: labels", f"from 0 to {classes - 1}", (low, high))
        return labels

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}

    def __len__(self) -> int:
        return self.manifest.images

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        shard, row = divmod(index, self.manifest.shard_size)
        if shard not in self.files:
            if len(self.files) >= OPEN_FILES:
                del self.files[next(iter(self.files))]  # the oldest
            self.files[shard] = np.load(shard_path(self.folder, shard), mmap_mode="r")
        return self.files[shard][row], int(self.labels[index])

    def check(self, autoencoder: dict[str, Any], augment: AugmentConfig) -> None:
        """Raise `ConfigError` unless the cache was made by this autoencoder and supports this augmentation."""
        if differences := diff_configs(self.manifest.autoencoder, autoencoder, key="autoencoder"):
            raise ConfigError(f"{self.folder}: encoded by another autoencoder ({'; '.join(differences)}); use that one")
        check(augment.crop is Crop.adm, "augment.crop", "adm, as the crop of the latents", augment.crop.value)
        for key in ("auto_augment", "color_jitter", "re_prob"):
            check(not getattr(augment, key), f"augment.{key}", "off with data=latents", getattr(augment, key))
        flips = self.manifest.shape[0] == 2
        check(flips or augment.hflip == 0, "augment.hflip", f"0: {self.folder} has no flipped images", augment.hflip)


class RandomVersion:
    """Choose a version: latents `(V, K, h, w)` to `(K, h, w)`; flipped with probability `hflip`.

    It draws one random number as `RandomHorizontalFlip` does, so the same images are flipped as in a run on the images.
    """

    def __init__(self, hflip: float) -> None:
        self.hflip = hflip

    def __call__(self, versions: np.ndarray) -> Tensor:
        flipped = self.hflip > 0 and bool(torch.rand(1) < self.hflip)
        return torch.from_numpy(np.array(versions[int(flipped)]))


def load_latents(config: DataConfig, train: bool, world: World = ONE) -> LatentCache:
    """Open the cache at `data.root`; it has no evaluation split.

    Raises:
        ConfigError: if it is incomplete, or has another image size or number of classes.
    """
    check(config.root is not None, "data.root", "a latent cache of scripts/prepare_latents.py", config.root)
    if not train:
        raise ConfigError("data=latents has no evaluation split")
    cache = LatentCache(Path(str(config.root)))
    size, classes = cache.manifest.img_size, len(cache.manifest.classes)
    check(config.img_size == size, "data.img_size", f"{size}, as in {config.root}", config.img_size)
    check(config.num_classes == classes, "data.num_classes", f"{classes}, as in {config.root}", config.num_classes)
    return cache
