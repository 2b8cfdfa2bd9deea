"""The manifest of prepared images: what `scripts/prepare_images.py` wrote to the folder of a split.

    train/train-000000.tar     shards: WebDataset tars, or train-00000-of-00313.parquet of the Hugging Face layout
    train/classes.txt          class names in the order of their labels, for tars
    train/manifest.json        see `Manifest`
    train/train-000000.json    digest of a finished shard, until the manifest has all of them

Each split has a manifest of its own, so that `data.train` and `data.val` may point to shards of different sources. The
bytes of a shard depend only on the images and on the manifest.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vca.runtime.errors import ConfigError
from vca.runtime.files import write_text
from vca.runtime.rundir import diff_configs

RERUN = "rerun scripts/prepare_images.py to write the missing or corrupt files"


@dataclass(frozen=True)
class Manifest:
    """What the shards of a split depend on.

    Attributes:
        source: identity of the images that were read, see `vca.data.index.Meta`.
        classes: class names in the order of their labels.
        format: `tar` or `parquet`.
        images_per_shard: images per shard; the last shard has the rest.
        max_side: largest shorter side in pixels; null if images were only copied.
        quality, encoder: JPEG quality of resized images, and the libraries that resized them; null without `max_side`.
        resized: number of resized images; null until all shards are written.
        files: `bytes`, `sha256` and number of `resized` images of each shard by name; empty until all are written.
    """

    source: dict[str, Any]
    classes: list[str]
    format: str
    images_per_shard: int
    max_side: int | None
    quality: int | None
    encoder: str | None
    resized: int | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def names(self, split: str) -> list[str]:
        """Names of the shards of a complete folder."""
        count = -(-self.source["files"] // self.images_per_shard)
        if self.format == "tar":
            return [f"{split}-{shard:06d}.tar" for shard in range(count)]
        return [f"{split}-{shard:05d}-of-{count:05d}.parquet" for shard in range(count)]

    @property
    def change(self) -> dict[str, Any] | None:
        """How the images differ from their source; None if they were only copied."""
        if not self.resized:
            return None
        return {"max_side": self.max_side, "quality": self.quality, "source": self.source}

    def begin(self, folder: Path) -> "Manifest":
        """Write `manifest.json` unless it exists, and return the manifest in the folder.

        Raises:
            ConfigError: if the folder cannot be created, has other files or other shards, or the source changed.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out: {folder} cannot be created: {error.strerror}") from error
        saved = read_manifest(folder)
        if saved is None:
            if {path.name for path in folder.iterdir()} - {"manifest.tmp"}:
                raise ConfigError(f"out: {folder} has files of another origin; choose another out=...")
            self.write(folder)
            return self
        differences = diff_configs(asdict(saved), asdict(self), ["files", "resized"])
        if differences and all(line.startswith(("source.", "classes")) for line in differences):
            raise ConfigError(
                f"data: the images changed since {folder} was started ({'; '.join(differences)}); restore them or "
                f"choose another out=..."
            )
        if differences:
            raise ConfigError(f"{folder} has other shards ({'; '.join(differences)}); choose another out=...")
        return saved

    def finish(self, folder: Path, files: dict[str, dict[str, Any]]) -> "Manifest":
        """Write the digests of all shards to `manifest.json`, and remove those beside the shards."""
        resized = sum(digest["resized"] for digest in files.values())
        done = replace(self, files=dict(sorted(files.items())), resized=resized)
        if done != self:  # a run finds changed data by the times of files
            done.write(folder)
        for name in files:
            digest_path(folder / name).unlink(missing_ok=True)
        return done

    def write(self, folder: Path) -> None:
        write_text(folder / "manifest.json", json.dumps(asdict(self), indent=2) + "\n")


def digest_path(shard: Path) -> Path:
    """Path of a shard's digest until the manifest has it."""
    return shard.with_suffix(".json")


def read_manifest(folder: Path) -> Manifest | None:
    """Read `manifest.json`; return None if there is none, or it is not one of prepared images.

    Raises:
        ConfigError: if it is invalid.
    """
    file = folder / "manifest.json"
    try:
        content = file.read_bytes()
        return Manifest(**json.loads(content)) if b'"images_per_shard"' in content else None
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); restore it") from error


def manifest_of(paths: Sequence[Path]) -> Manifest | None:
    """Return the manifest of the files of a split; None if `scripts/prepare_images.py` did not write them.

    Raises:
        ConfigError: if shards are missing, or have another size than in the manifest.
    """
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    if not manifest.files:
        raise ConfigError(f"{folder} is not complete; {RERUN}")
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name in manifest.files}
    others = [name for name, digest in manifest.files.items() if sizes.get(name) != digest["bytes"]]
    if others:
        count = f"{len(others)} of {len(manifest.files)} files are"
        raise ConfigError(f"{folder}: {count} missing or have another size, such as {others[0]}; {RERUN}")
    return manifest
