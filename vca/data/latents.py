"""A cache of latents: what an autoencoder made of an image folder, and a manifest that says all that it depends on.

    manifest.json      see `Manifest`
    labels.npy         (images,) int64
    shard_00000.npy    (shard_size, V, K, h, w): V versions of an image (as it is, and flipped), K channels of moments

`scripts/prepare_latents.py` writes it. Mean and standard deviation are kept apart, so that every epoch samples its own
latents, and a flipped image is encoded by itself, because the latent of a flipped image is not a flipped latent. A
training on the cache therefore sees what a training on the images would, to the rounding of the encoder.
"""

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vca.data.augment import AugmentConfig, Crop
from vca.data.config import DataConfig
from vca.runtime.errors import ConfigError, check
from vca.runtime.files import write_bytes, write_text
from vca.runtime.rundir import compare

OPEN_FILES = 512  # that a process keeps open; the usual limit is 1024
CROP = "adm-1"  # ADM's centre crop as this project makes it; a change of its pixels is another number


@dataclass(frozen=True)
class Manifest:
    """What the latents of a cache depend on, and how they are laid out.

    Attributes:
        images: how many.
        classes: names, in the order of their labels.
        files_sha256: of the images' paths, relative to the folder, in their order.
        img_size, crop: how an image was cut.
        autoencoder: `Autoencoder.identity()`.
        shape: `[V, K, h, w]` of one image.
        dtype: `float32` or `float16`.
        shard_size: images a file; the last has the rest.
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

    @property
    def shards(self) -> int:
        """How many files there are."""
        return -(-self.images // self.shard_size)

    def rows(self, shard: int) -> range:
        """The images of a file."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.images))

    def write(self, folder: Path) -> None:
        """Write `manifest.json`; where another cache is, or has been begun, refuse.

        Raises:
            ConfigError: if the folder holds the manifest of another cache; names what differs.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out: {folder} cannot be made: {error.strerror}") from error
        there = read_manifest(folder) if (folder / "manifest.json").exists() else self
        if differences := compare(asdict(there), asdict(self)):
            raise ConfigError(f"{folder} holds another cache ({'; '.join(differences)}); choose another folder")
        write_text(folder / "manifest.json", json.dumps(asdict(self), indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        ConfigError: if there is none, or it is not one.
    """
    file = folder / "manifest.json"
    check(file.is_file(), "data.root", "a latent cache, a folder with manifest.json", str(folder))
    try:
        return Manifest(**json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{file} is not the manifest of a latent cache: {error}") from error


def shard_path(folder: Path, shard: int) -> Path:
    """Where a file of latents lies."""
    return folder / f"shard_{shard:05d}.npy"


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as a whole file."""
    content = io.BytesIO()
    np.save(content, array)
    write_bytes(path, content.getbuffer())


def shard_is_whole(folder: Path, manifest: Manifest, shard: int) -> bool:
    """Whether a file is there, with the shape and size that the manifest says."""
    path = shard_path(folder, shard)
    try:
        latents = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return latents.shape == (len(manifest.rows(shard)), *manifest.shape) and latents.dtype == manifest.dtype


def paths_sha256(paths: Iterable[str]) -> str:
    """Digest of a list of paths, which says which image has which number."""
    return hashlib.sha256("\n".join(paths).encode()).hexdigest()


class LatentCache(Dataset):
    """`(latents (V, K, h, w), label)` of a finished cache, read from the disk as they are asked for.

    Args:
        folder: of the cache.

    Raises:
        ConfigError: if it is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        check(self.manifest.crop == CROP, f"{folder}: crop", f"'{CROP}', as it is made now", self.manifest.crop)
        missing = [s for s in range(self.manifest.shards) if not shard_is_whole(folder, self.manifest, s)]
        if missing:
            raise ConfigError(
                f"{folder} is not complete: {len(missing)} of {self.manifest.shards} files are missing or cut short, "
                f"such as {shard_path(folder, missing[0]).name}; run scripts/prepare_latents.py again"
            )
        try:
            self.labels = np.load(folder / "labels.npy")
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(f"{folder}/labels.npy cannot be read; run scripts/prepare_latents.py again") from error
        check(
            len(self.labels) == self.manifest.images, f"{folder}: labels", str(self.manifest.images), len(self.labels)
        )
        self.files: dict[int, np.ndarray] = {}  # opened by each process for itself

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}

    def __len__(self) -> int:
        return self.manifest.images

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        shard, row = divmod(index, self.manifest.shard_size)
        if shard not in self.files:
            if len(self.files) >= OPEN_FILES:
                del self.files[next(iter(self.files))]  # the one opened first
            self.files[shard] = np.load(shard_path(self.folder, shard), mmap_mode="r")
        return self.files[shard][row], int(self.labels[index])

    def check(self, autoencoder: dict[str, Any], augment: AugmentConfig) -> None:
        """Raise `ConfigError` unless these are the latents of that autoencoder, and allow that augmentation."""
        if differences := compare(self.manifest.autoencoder, autoencoder, key="autoencoder"):
            raise ConfigError(f"{self.folder} was made with another autoencoder ({'; '.join(differences)})")
        check(augment.crop is Crop.adm, "augment.crop", "adm, as the latents are", augment.crop.value)
        for key in ("auto_augment", "color_jitter", "erase_prob"):
            check(not getattr(augment, key), f"augment.{key}", "off on latents", getattr(augment, key))
        flips = self.manifest.shape[0] == 2
        check(flips or augment.hflip == 0, "augment.hflip", f"0: {self.folder} has no flipped images", augment.hflip)


class RandomVersion:
    """Latents `(V, K, h, w)` to those of one version `(K, h, w)`, float32: with probability `hflip` the flipped one.

    It draws as `RandomHorizontalFlip` does, so that the same images are flipped as in a training on the images.
    """

    def __init__(self, hflip: float) -> None:
        self.hflip = hflip

    def __call__(self, versions: np.ndarray) -> Tensor:
        """Choose."""
        flipped = self.hflip > 0 and bool(torch.rand(1) < self.hflip)
        return torch.from_numpy(versions[int(flipped)].astype(np.float32))


def load_latents(config: DataConfig, train: bool) -> LatentCache:
    """The cache at `data.root`; it has no evaluation split.

    Raises:
        ConfigError: if it is not whole, or is of another image size or number of classes.
    """
    check(config.root is not None, "data.root", "a latent cache, as scripts/prepare_latents.py makes it", config.root)
    check(train, "data.name", "another than 'latents' for an evaluation", config.name)
    cache = LatentCache(Path(str(config.root)))
    size, classes = cache.manifest.img_size, len(cache.manifest.classes)
    check(config.img_size == size, "data.img_size", f"{size}, as the latents in {config.root} are", config.img_size)
    rule = f"{classes}, as the latents in {config.root} are"
    check(config.num_classes == classes, "data.num_classes", rule, config.num_classes)
    return cache
