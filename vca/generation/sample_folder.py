"""A set of samples on the disk: one PNG a sample, named by its number, and a manifest that says how they were made.

    images/000000.png    with its label and its number of function evaluations as PNG text
    manifest.json        everything that the pixels depend on; once the set is complete, its `result`
    digests.txt          once the set is complete: the digest of each image in order, a line each
    samples.npz          on demand: `arr_0` (count, H, W, I) uint8, as ADM's evaluator takes it
    grid.png             on demand: the first samples

A set that was interrupted holds whole images only, and goes on with those that are missing.
"""

import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vca.generation.pipeline import GeneratedImage, nfe_stats, save_image_grid
from vca.runtime.digest import image_sha256, images_sha256
from vca.runtime.errors import ConfigError
from vca.runtime.files import write_bytes, write_text
from vca.runtime.metrics_log import progress_bar
from vca.runtime.rundir import diff_configs

SHOWN = 100  # samples in grid.png
# Names of things whose sha256 is compared, how these came about, and what is not known before the end.
FREE = ("autoencoder.source", "origin.checkpoint", "origin.run", "origin.training", "result")


class SampleFolder:
    """The folder of a set."""

    def __init__(self, path: Path) -> None:
        self.path, self.images, self.manifest_file = path, path / "images", path / "manifest.json"
        self.digests_file = path / "digests.txt"

    def open(self, manifest: dict[str, Any], count: int, block: int) -> list[range]:
        """Begin the set, or enter it again; it may have grown since. Returns `missing_blocks(count, block)`.

        Raises:
            ConfigError: if the folder holds another set (names what differs), or more samples, or none of ours.
        """
        if self.manifest_file.exists():
            if differences := diff_configs(self.read_manifest(), manifest, FREE):
                raise ConfigError(
                    f"out: {self.path} holds other samples ({'; '.join(differences)}); choose another folder"
                )
        else:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                if others := {entry.name for entry in os.scandir(self.path)} - {"manifest.tmp"}:
                    there = f"{self.path} is no set of samples, and holds other files, such as {min(others)}"
                    raise ConfigError(f"out: {there}; choose another folder")
                write_text(self.manifest_file, json.dumps(manifest, indent=2) + "\n")
            except OSError as error:
                raise ConfigError(f"out: {self.path} cannot be written: {error.strerror}") from error
        self.images.mkdir(exist_ok=True)
        if more := [index for index in self.there() if index >= count]:
            raise ConfigError(
                f"count must be >= {max(more) + 1}, which {self.path} holds already; or choose another folder"
            )
        return self.missing_blocks(count, block)

    def read_manifest(self) -> dict[str, Any]:
        """The manifest that is there.

        Raises:
            ConfigError: if it cannot be read.
        """
        try:
            return json.loads(self.manifest_file.read_text())
        except ValueError as error:
            raise ConfigError(f"{self.manifest_file} is damaged ({error}); choose another folder") from error

    def image_path(self, index: int) -> Path:
        """Where a sample lies."""
        return self.images / f"{index:06d}.png"

    def there(self) -> set[int]:
        """Numbers of the samples that are done."""
        return {int(p.stem) for p in self.images.glob("*.png") if p.stem.isdigit()}

    def missing_blocks(self, count: int, size: int) -> list[range]:
        """Blocks of `size` consecutive numbers of which some below `count` are missing; each is a whole block."""
        there: Collection[int] = self.there()
        blocks = (range(start, start + size) for start in range(0, count, size))
        return [block for block in blocks if any(index not in there for index in block if index < count)]

    def write(self, index: int, sample: GeneratedImage) -> None:
        """Add a sample."""
        text = PngInfo()
        text.add_text("label", str(sample.label))
        text.add_text("nfe", str(sample.nfe))
        pixels = sample.pixels[..., 0] if sample.pixels.shape[-1] == 1 else sample.pixels
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, format="png", pnginfo=text)
        write_bytes(self.image_path(index), content.getbuffer())

    def read(self, index: int) -> GeneratedImage:
        """A sample that is there."""
        try:
            with Image.open(self.image_path(index)) as image:
                pixels = np.asarray(image)
                text: Any = image.text  # type: ignore[attr-defined]
            label, nfe = int(text["label"]), int(text.get("nfe") or text["evaluations"])  # its old name
        except (OSError, SyntaxError, AttributeError, KeyError) as error:
            raise ConfigError(f"{self.image_path(index)} is not a whole sample; delete it and start again") from error
        return GeneratedImage(pixels if pixels.ndim == 3 else pixels[..., None], label, nfe)

    def read_all(self, count: int) -> Iterator[GeneratedImage]:
        """The samples in order, a few read ahead."""
        ahead = 256
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, count, ahead):
                yield from pool.map(self.read, range(start, min(start + ahead, count)))

    def finish(self, count: int, npz: bool, grid: bool) -> dict[str, Any]:
        """Read the whole set, write what is asked for, and add the `result` to the manifest.

        Returns:
            `count`; `sha256` of the images in order; `evaluations` a sample, `{"mean", "min", "max"}`; `classes`, how
            many there are of each label.

        Raises:
            ConfigError: if an image is not what it was when the set was complete before; names it.
        """
        digests: list[bytes] = []
        nfe, labels = [], []
        shown: list[torch.Tensor] = []
        before = self.read_manifest().get("result")
        signed = self.read_digests(before) if before else []
        with (
            NpzWriter(self.path / "samples.npz" if npz else None, count) as writer,
            progress_bar(count, "img", show=True) as bar,
        ):
            for index, sample in enumerate(self.read_all(count)):
                content = sample.pixels.tobytes()
                digests.append(image_sha256(sample.pixels))
                if index < len(signed) and digests[index] != signed[index]:
                    changed = f"{self.image_path(index)} was changed after the set was complete"
                    raise ConfigError(f"{changed}; delete it and start again")
                bar.update()
                writer.write(sample.pixels, content)
                nfe.append(sample.nfe)
                labels.append(sample.label)
                if len(shown) < SHOWN:
                    shown.append(torch.from_numpy(sample.pixels.copy()).permute(2, 0, 1))
            if before and before["count"] <= count and images_sha256(digests[: before["count"]]) != before["sha256"]:
                raise ConfigError(f"{self.images} holds other images than the manifest names; choose another folder")
        if grid:
            zoom = max(1, 48 // shown[0].shape[1])
            save_image_grid(torch.stack(shown), self.path / "grid.png", 10, labels[: len(shown)], zoom)
        result = {
            "count": count,
            "sha256": images_sha256(digests),
            "nfe": nfe_stats(nfe),
            "classes": {str(label): count for label, count in sorted(Counter(labels).items())},
        }
        write_text(self.digests_file, "".join(f"{digest.hex()}\n" for digest in digests))
        write_text(self.manifest_file, json.dumps({**self.read_manifest(), "result": result}, indent=2) + "\n")
        return result

    def read_digests(self, result: dict[str, Any]) -> list[bytes]:
        """Digests of the images when the manifest got its `result`; none if the file does not fit it."""
        try:
            digests = [bytes.fromhex(line) for line in self.digests_file.read_text().split()[: result["count"]]]
        except (OSError, ValueError):
            return []
        return digests if images_sha256(digests) == result["sha256"] else []


class NpzWriter:
    """Writes `arr_0` of an npz row by row, so that the whole array is never in memory; without a path, nothing."""

    def __init__(self, path: Path | None, count: int) -> None:
        self.path, self.count = path, count
        self.archive: Any = None
        self.file: Any = None

    def __enter__(self) -> "NpzWriter":
        if self.path is not None:
            self.archive = zipfile.ZipFile(self.path.with_suffix(".tmp"), "w")
        return self

    def write(self, row: np.ndarray, content: bytes) -> None:
        """Append a row, whose bytes are `content`."""
        if self.archive is None:
            return
        if self.file is None:
            self.file = self.archive.open("arr_0.npy", "w", force_zip64=True)
            header = {"descr": row.dtype.str, "fortran_order": False, "shape": (self.count, *row.shape)}
            np.lib.format.write_array_header_1_0(self.file, header)
        self.file.write(content)

    def __exit__(self, *error: object) -> None:
        if self.path is None:
            return
        if self.file is not None:
            self.file.close()
        self.archive.close()
        if error[0] is None:
            os.replace(self.path.with_suffix(".tmp"), self.path)
        else:
            self.path.with_suffix(".tmp").unlink()
