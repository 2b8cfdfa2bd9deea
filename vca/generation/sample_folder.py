"""Sample folder: one PNG per sample, named by its number, and a manifest with the settings that produced them.

    images/000000.png    the image, with its label and NFE as PNG text
    manifest.json        everything that the pixels depend on; `result` once the folder is complete
    digests.txt          sha256 of each image in order, one per line, once the folder is complete
    samples.npz          optional: `arr_0` (count, H, W, I) uint8, the format of ADM's evaluator
    grid.png             optional: the first samples

An interrupted folder contains only complete images; sampling resumes with the missing ones. Images are not synced to
disk one by one: after a power loss, empty images count as missing, and a corrupt one is an error that names the file.
"""

import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

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

THREADS = min(8, os.cpu_count() or 1)  # of reading and writing images
GRID_SIZE = 100  # samples in grid.png
# Manifest fields that may differ: names of parts whose sha256 is compared, and the result.
FREE = ("autoencoder.source", "origin.checkpoint", "origin.run", "origin.training", "result")


class SampleFolder:
    """A folder of samples."""

    def __init__(self, path: Path) -> None:
        self.path, self.images, self.manifest_file = path, path / "images", path / "manifest.json"
        self.digests_file = path / "digests.txt"

    def open(self, manifest: dict[str, Any], count: int, block: int) -> list[range]:
        """Create the folder, or reopen it to resume or extend it; returns its `missing_blocks`.

        Raises:
            ConfigError: if the folder contains samples with other settings, more samples, or other files.
        """
        if self.manifest_file.exists():
            if differences := diff_configs(self.read_manifest(), manifest, FREE):
                raise ConfigError(
                    f"out: {self.path} contains samples with other settings ({'; '.join(differences)}); "
                    f"choose another folder"
                )
        else:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                if others := {entry.name for entry in os.scandir(self.path)} - {"manifest.tmp"}:
                    raise ConfigError(
                        f"out: {self.path} must be empty or a folder of sample.py, but contains {min(others)}; "
                        f"choose another folder"
                    )
                write_text(self.manifest_file, json.dumps(manifest, indent=2) + "\n")
            except OSError as error:
                raise ConfigError(f"out: cannot write {self.path}: {error.strerror}") from error
        self.images.mkdir(exist_ok=True)
        existing = self.existing()
        if beyond := [index for index in existing if index >= count]:
            raise ConfigError(
                f"count must be >= {max(beyond) + 1} (samples in {self.path}), got {count}; or choose another folder"
            )
        return missing_blocks(existing, count, block)

    def read_manifest(self) -> dict[str, Any]:
        """Read the manifest.

        Raises:
            ConfigError: if it is corrupt.
        """
        try:
            return json.loads(self.manifest_file.read_text())
        except ValueError as error:
            raise ConfigError(f"{self.manifest_file} is corrupt ({error}); choose another folder") from error

    def image_path(self, index: int) -> Path:
        """Return the path of a sample."""
        return self.images / f"{index:06d}.png"

    def existing(self) -> set[int]:
        """Return the numbers of the samples on disk, without empty files."""
        images = (p for p in self.images.glob("*.png") if p.stem.isdigit())
        return {int(p.stem) for p in images if p.stat().st_size > 0}

    @contextmanager
    def writing(self) -> Iterator["ImageWriter"]:
        """Write samples in threads, and wait for them at the end."""
        with ThreadPoolExecutor(THREADS) as pool:
            writer = ImageWriter(self, pool)
            yield writer
            writer.wait()

    def write(self, index: int, sample: GeneratedImage) -> None:
        """Write one sample: a kill leaves a complete image or none."""
        text = PngInfo()
        text.add_text("label", str(sample.label))
        text.add_text("nfe", str(sample.nfe))
        pixels = sample.pixels[..., 0] if sample.pixels.shape[-1] == 1 else sample.pixels
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, format="png", pnginfo=text)
        write_bytes(self.image_path(index), content.getbuffer(), sync=False)

    def read(self, index: int) -> GeneratedImage:
        """Read one sample."""
        try:
            with Image.open(self.image_path(index)) as image:
                pixels = np.asarray(image)
                text: Any = image.text  # type: ignore[attr-defined]
            label, nfe = int(text["label"]), int(text.get("nfe") or text["evaluations"])  # older samples
        except (OSError, SyntaxError, AttributeError, KeyError) as error:
            raise ConfigError(f"{self.image_path(index)} is corrupt; delete it and rerun the command") from error
        return GeneratedImage(pixels if pixels.ndim == 3 else pixels[..., None], label, nfe)

    def read_all(self, count: int) -> Iterator[GeneratedImage]:
        """Yield the samples in order, with read-ahead."""
        ahead = 256
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, count, ahead):
                yield from pool.map(self.read, range(start, min(start + ahead, count)))

    def finish(self, count: int, npz: bool, grid: bool) -> dict[str, Any]:
        """Read all samples, write the optional files, and add `result` to the manifest.

        Returns:
            `count`; `sha256` of the images in order; `nfe` per sample, `{"mean", "min", "max"}`; `classes`, the number
            of samples of each label.

        Raises:
            ConfigError: if an image has changed since the folder was complete; names it.
        """
        digests: list[bytes] = []
        nfe, labels = [], []
        thumbnails: list[torch.Tensor] = []
        before = self.read_manifest().get("result")
        recorded = self.read_digests(before) if before else []
        rows = npz_file(self.path / "samples.npz", (count, *self.read(0).pixels.shape)) if npz else nullcontext()
        with rows as npz_rows, progress_bar(count, "img", show=True) as bar:
            for index, sample in enumerate(self.read_all(count)):
                digests.append(image_sha256(sample.pixels))
                if index < len(recorded) and digests[index] != recorded[index]:
                    changed = f"{self.image_path(index)} has changed since the folder was complete"
                    raise ConfigError(f"{changed}; delete it and rerun the command")
                bar.update()
                if npz_rows is not None:
                    npz_rows.write(sample.pixels.tobytes())
                nfe.append(sample.nfe)
                labels.append(sample.label)
                if len(thumbnails) < GRID_SIZE:
                    thumbnails.append(torch.from_numpy(sample.pixels.copy()).permute(2, 0, 1))
            if before and before["count"] <= count and images_sha256(digests[: before["count"]]) != before["sha256"]:
                raise ConfigError(
                    f"images in {self.images} have changed since the folder was complete; choose another folder"
                )
        if grid:
            zoom = max(1, 48 // thumbnails[0].shape[1])
            save_image_grid(torch.stack(thumbnails), self.path / "grid.png", 10, labels[: len(thumbnails)], zoom)
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
        """Read the digests recorded with `result`; an empty list if the file is missing or does not match."""
        try:
            digests = [bytes.fromhex(line) for line in self.digests_file.read_text().split()[: result["count"]]]
        except (OSError, ValueError):
            return []
        return digests if images_sha256(digests) == result["sha256"] else []


class ImageWriter:
    """Writes blocks of samples in the threads of a pool, at most one block at a time."""

    def __init__(self, folder: SampleFolder, pool: ThreadPoolExecutor) -> None:
        self.folder, self.pool = folder, pool
        self.pending: list[Future[None]] = []

    def write(self, samples: Iterable[tuple[int, GeneratedImage]]) -> None:
        """Wait for the previous block, and start to write this one: samples with their numbers.

        Raises:
            OSError: if an image of the previous block could not be written.
        """
        self.wait()
        self.pending = [self.pool.submit(self.folder.write, index, sample) for index, sample in samples]

    def wait(self) -> None:
        """Wait until all samples are written; raises as `write`."""
        for image in self.pending:
            image.result()
        self.pending = []


def missing_blocks(existing: Collection[int], count: int, size: int) -> list[range]:
    """Return the blocks of `size` consecutive numbers in which a sample below `count` is missing."""
    blocks = (range(start, start + size) for start in range(0, count, size))
    return [block for block in blocks if any(index not in existing for index in block if index < count)]


@contextmanager
def npz_file(path: Path, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """Open `arr_0` (uint8) of an npz to write its rows one by one, without the whole array in memory."""
    temporary = path.with_suffix(".tmp")
    try:
        with zipfile.ZipFile(temporary, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
