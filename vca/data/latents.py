"""A cache of latents: what an autoencoder made of an image folder, and a manifest that says all that it depends on.

    manifest.json      see `Manifest`
    labels.npy         (images,) int64
    shard_00000.npy    (shard_size, V, K, h, w): V versions of an image (as it is, and flipped), K channels of moments
    shard_00000.json   sha256 of a file that is made; the manifest holds it once all are made

`scripts/prepare_latents.py` writes it. Mean and standard deviation are kept apart, so that every epoch samples its own
latents, and a flipped image is encoded by itself, because the latent of a flipped image is not a flipped latent. A
training on the cache therefore sees what a training on the images would, to the rounding of the encoder.
"""

import hashlib
import io
import json
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
from vca.runtime.errors import ConfigError, check
from vca.runtime.files import write_bytes, write_text
from vca.runtime.rundir import diff_configs

DTYPES = ("float32", "float16")
START = 2**16  # bytes; a training reads no more of a file to know which one it is
OF_IMAGES = ("images", "classes", "files_sha256")  # fields of the manifest that the image folder decides
AGAIN = "run scripts/prepare_latents.py again, which makes what is missing or damaged"
OPEN_FILES = 512  # that a process keeps open; the usual limit is 1024
CROP = "adm-1"  # ADM's centre crop as this project makes it; a change of its pixels is another number


@dataclass(frozen=True)
class Manifest:
    """What the latents of a cache depend on, and how they are laid out.

    Attributes:
        images: how many.
        classes: names, in the order of their labels.
        files_sha256: of the images' paths, relative to the folder, and sizes, in their order.
        img_size, crop: how an image was cut.
        autoencoder: `Autoencoder.identity()`.
        shape: `[V, K, h, w]` of one image.
        dtype: `float32` or `float16`.
        shard_size: images a file; the last has the rest.
        files: `digest` of each file by its name; empty until all are made.
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
        """How many files there are."""
        return -(-self.images // self.shard_size)

    def rows(self, shard: int) -> range:
        """The images of a file."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.images))

    @property
    def names(self) -> list[str]:
        """Names of the files of a whole cache."""
        return ["labels.npy", *(shard_path(Path(), shard).name for shard in range(self.shards))]

    def identity(self) -> dict[str, Any]:
        """What a run on the cache records: the manifest with one sha256 for all files."""
        return {**asdict(self), "files": hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()}

    def write(self, folder: Path) -> None:
        """Write `manifest.json`.

        Raises:
            OSError: if it cannot be written.
        """
        write_text(folder / "manifest.json", json.dumps(asdict(self), indent=2) + "\n")

    def begin(self, folder: Path) -> "Manifest":
        """Write `manifest.json` where there is none; the one that is there, with the files that are made.

        Raises:
            ConfigError: if the folder holds the manifest of another cache, or one of images that have changed since;
                names what differs.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out: {folder} cannot be made: {error.strerror}") from error
        if not (folder / "manifest.json").exists():
            self.write(folder)
        there = read_manifest(folder)
        differences = diff_configs(asdict(there), asdict(self), ["files"])
        if differences and all(line.startswith(OF_IMAGES) for line in differences):
            raise ConfigError(
                f"data.root: the images changed since the cache {folder} was begun ({'; '.join(differences)}); "
                f"restore them, or choose another out=..."
            )
        if differences:
            raise ConfigError(f"{folder} holds another cache ({'; '.join(differences)}); choose another folder")
        made = {
            name: json.loads(path.read_text()) for name in self.names if (path := digest_path(folder / name)).exists()
        }
        return replace(there, files={**there.files, **made})

    def finish(self, folder: Path) -> None:
        """Put the digests of all files into `manifest.json`."""
        paths = [digest_path(folder / name) for name in self.names]
        replace(self, files=self.begin(folder).files).write(folder)
        for path in paths:
            path.unlink(missing_ok=True)


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        ConfigError: if there is none, or it is not one.
    """
    file = folder / "manifest.json"
    check(file.is_file(), "data.root", "a latent cache, a folder with manifest.json", str(folder))
    try:
        content = json.loads(file.read_text())
        manifest = Manifest(**content)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{file} is not the manifest of a latent cache: {error}") from error
    if "files" not in content:
        raise ConfigError(
            f"{file} has no sha256 of the files, an older version made it; "
            f"make the cache again in another folder: scripts/prepare_latents.py out=..."
        )
    if wrong := wrong_fields(manifest):
        raise ConfigError(f"{file} is damaged: {wrong[0]} is {getattr(manifest, wrong[0])!r}; restore it, or {AGAIN}")
    return manifest


def wrong_fields(manifest: Manifest) -> list[str]:
    """Fields of a manifest whose value is none that a cache can have."""

    def counts(*values: Any) -> bool:
        return all(type(value) is int and value >= 1 for value in values)

    shape, files = manifest.shape, manifest.files
    fits = {
        **{name: counts(getattr(manifest, name)) for name in ("images", "img_size", "shard_size")},
        **{name: isinstance(getattr(manifest, name), str) for name in ("files_sha256", "crop")},
        "classes": isinstance(manifest.classes, list) and len(manifest.classes) >= 1,
        "autoencoder": isinstance(manifest.autoencoder, dict),
        "shape": isinstance(shape, list) and len(shape) == 4 and counts(*shape) and shape[0] <= 2,
        "dtype": manifest.dtype in DTYPES,
        "files": isinstance(files, dict)
        and all(isinstance(one, dict) and set(one) == set(digest(b"")) for one in files.values()),
    }
    return [name for name, right in fits.items() if not right]


def shard_path(folder: Path, shard: int) -> Path:
    """Where a file of latents lies."""
    return folder / f"shard_{shard:05d}.npy"


def digest_path(path: Path) -> Path:
    """Where the digest of a file lies until the manifest has it."""
    return path.with_suffix(".json")


def digest(content: bytes | memoryview) -> dict[str, str]:
    """sha256 of a file's content, and of its first bytes."""
    return {
        "sha256": hashlib.sha256(content).hexdigest(),
        "start_sha256": hashlib.sha256(content[:START]).hexdigest(),
    }


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as a whole file, and before it its digest."""
    content = io.BytesIO()
    np.save(content, array)
    write_text(digest_path(path), json.dumps(digest(content.getbuffer())) + "\n")
    write_bytes(path, content.getbuffer())


def file_is_made(path: Path, expected: dict[str, str] | None) -> bool:
    """Whether a file is there and has that digest; reads all of it."""
    return expected is not None and path.is_file() and file_sha256(path) == expected["sha256"]


def start_sha256(path: Path) -> str:
    """sha256 of a file's first bytes."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(START)).hexdigest()


def shard_is_whole(folder: Path, manifest: Manifest, shard: int) -> bool:
    """Whether a file is there, with the shape and size that the manifest says."""
    path = shard_path(folder, shard)
    try:
        latents: Any = np.load(path, mmap_mode="r")
        size = path.stat().st_size
    except (OSError, ValueError, EOFError):
        return False
    shape = (len(manifest.rows(shard)), *manifest.shape)
    return latents.shape == shape and latents.dtype == manifest.dtype and size == latents.offset + latents.nbytes


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
                f"such as {shard_path(folder, missing[0]).name}; {AGAIN}"
            )
        names, digests = self.manifest.names, self.manifest.files
        if set(names) != set(digests):
            raise ConfigError(f"{folder} is not complete: its manifest has no sha256 of all its files; {AGAIN}")
        others = [name for name in names[1:] if start_sha256(folder / name) != digests[name]["start_sha256"]]
        others += [name for name in names[:1] if not file_is_made(folder / name, digests[name])]
        if others:
            raise ConfigError(
                f"{folder}: {len(others)} of {len(names)} files are not those of its manifest, such as {others[0]}; "
                f"{AGAIN}"
            )
        self.labels = self.read_labels()
        self.files: dict[int, np.ndarray] = {}  # opened by each process for itself

    def read_labels(self) -> np.ndarray:
        """The labels `(images,)`."""
        path, classes = self.folder / "labels.npy", len(self.manifest.classes)
        try:
            labels = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(f"{path} cannot be read; {AGAIN}") from error
        shape = (self.manifest.images,)
        check(labels.shape == shape, f"{path}: shape", str(shape), labels.shape)
        check(labels.dtype == np.int64, f"{path}: dtype", "int64", str(labels.dtype))
        low, high = int(labels.min()), int(labels.max())
        check(low >= 0 and high < classes, f"{path}: labels", f"from 0 to {classes - 1}", (low, high))
        return labels

    def paths(self) -> list[str]:
        """The files of latents."""
        return [str(self.folder / name) for name in self.manifest.names[1:]]

    def is_intact(self, path: str) -> bool:
        """Whether a file of latents has the sha256 of the manifest; reads all of it."""
        return file_is_made(Path(path), self.manifest.files[Path(path).name])

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
        if differences := diff_configs(self.manifest.autoencoder, autoencoder, key="autoencoder"):
            raise ConfigError(f"{self.folder} was made with another autoencoder ({'; '.join(differences)})")
        check(augment.crop is Crop.adm, "augment.crop", "adm, as the latents are", augment.crop.value)
        for key in ("auto_augment", "color_jitter", "re_prob"):
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
