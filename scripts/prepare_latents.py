"""Encode images to a latent cache, which runs then read instead of images.

    python scripts/prepare_latents.py data.root=/data/imagenet out=/data/imagenet-latents
    torchrun --nproc_per_node=8 scripts/prepare_latents.py data.root=/data/imagenet out=/data/imagenet-latents
    python scripts/prepare_latents.py autoencoder.source=/data/sd-vae-ft-ema data.img_size=512 ...

Images are resized by ADM's centre crop and encoded twice, original and flipped; `vca/data/latents.py` has the format.
Rerunning the command resumes an interrupted cache, with any world size. To train on the cache: `data=latents
data.root=OUT autoencoder=...`, with the same autoencoder.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vca.cli import command_line
from vca.config import PrepareLatentsConfig, register_schemas
from vca.data import load_dataset
from vca.data.augment import AugmentConfig, Crop, Normalize, train_transform, worker_transform
from vca.data.doctor import check_before_training
from vca.data.imagefolder import IndexedImages
from vca.data.latents import CROP, LatentCache, Manifest, file_is_made, save_array, shard_path
from vca.data.loader import EvalImages
from vca.generation.autoencoder import AUTOENCODERS, Autoencoder, load_autoencoder
from vca.runtime import distributed
from vca.runtime.errors import ConfigError, check
from vca.runtime.metrics_log import progress_bar
from vca.runtime.rundir import check_ranks_agree
from vca.runtime.signals import start_worker


def register_configs() -> None:
    register_schemas(root={"prepare_latents": PrepareLatentsConfig}, groups={"autoencoder": AUTOENCODERS})


def run(config: PrepareLatentsConfig) -> Manifest:
    """Create or complete the cache, and return its manifest."""
    timeout = 7 * distributed.COLLECTIVE_TIMEOUT_MINUTES  # ranks encode for days between two collectives
    with distributed.start(config.device.value, timeout, key="device") as world:
        check_ranks_agree(world, config)
        images = load_dataset(config.data, True, world)
        check(isinstance(images, IndexedImages), "data", "images in files", config.data.name)
        autoencoder = load_autoencoder(config.autoencoder, world.device)
        folder, manifest = Path(config.out), make_manifest(config, images, autoencoder)
        check_before_training(config.data, [images], config.workers, config.batch_size * config.data.image_bytes, world)
        labels = images.labels.astype(np.int64)
        missing = world.from_main(lambda: open_cache(folder, manifest, labels))
        shards = missing[world.rank :: world.size]
        total = sum(len(manifest.rows(shard)) for shard in shards)
        with progress_bar(total, "img", world.is_main) as bar:
            for shard, latents in encode_shards(config, images, autoencoder, manifest, shards):
                save_array(shard_path(folder, shard), latents)
                bar.update(len(latents))
        world.barrier()
        if world.is_main:
            manifest.finish(folder)
            LatentCache(folder)
            gib = manifest.images * np.prod(manifest.shape) * np.dtype(manifest.dtype).itemsize / 2**30
            print(f"{folder}: {manifest.images} images as {manifest.shape} {manifest.dtype}, {gib:.2f} GiB", flush=True)
    return manifest


def open_cache(folder: Path, manifest: Manifest, labels: np.ndarray) -> list[int]:
    """Write manifest and labels, and return the numbers of missing or corrupt shards."""
    complete = manifest.begin(folder).files
    save_array(folder / "labels.npy", labels)
    paths = [shard_path(folder, shard) for shard in range(manifest.shards)]
    missing = [shard for shard, path in enumerate(paths) if not file_is_made(path, complete.get(path.name))]
    print(f"{folder}: {len(missing)} of {manifest.shards} files to encode", flush=True)
    return missing


def make_manifest(config: PrepareLatentsConfig, images: IndexedImages, autoencoder: Autoencoder) -> Manifest:
    """Build the manifest of the cache; a black image gives the shape of a latent."""
    size = config.data.img_size
    moments = encode(autoencoder, torch.zeros(1, 3, size, size), config.flips)
    return Manifest(
        images=len(images),
        classes=list(images.classes),
        files_sha256=images.index.meta.identity["sha256"],
        img_size=size,
        crop=CROP,
        autoencoder=autoencoder.identity(),
        shape=list(moments.shape[1:]),
        dtype=config.dtype.value,
        shard_size=config.shard_size,
    )


def encode(autoencoder: Autoencoder, images: Tensor, flips: bool) -> Tensor:
    """Encode normalised images `(B, 3, H, W)`, original and flipped, to moments `(B, V, K, h, w)` on the CPU."""
    versions = [images, images.flip(-1)] if flips else [images]
    return torch.stack([autoencoder.encode(version) for version in versions], dim=1).cpu()


def encode_shards(
    config: PrepareLatentsConfig, images: Any, autoencoder: Autoencoder, manifest: Manifest, shards: list[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield shards with their moments `(rows, V, K, h, w)`; a batch never spans two shards."""
    batches = [
        list(rows[start : start + config.batch_size])
        for rows in map(manifest.rows, shards)
        for start in range(0, len(rows), config.batch_size)
    ]
    transform = worker_transform(train_transform(AugmentConfig(crop=Crop.adm), config.data))
    normalize = Normalize(config.data, autoencoder.device)
    dataset = EvalImages(images, transform)
    loader = iter(DataLoader(dataset, batch_sampler=batches, num_workers=config.workers, worker_init_fn=start_worker))
    for shard in shards:
        rows = manifest.rows(shard)
        latents = np.empty((len(rows), *manifest.shape), dtype=manifest.dtype)
        done = 0
        while done < len(rows):
            pixels, _ = next(loader)
            latents[done : done + len(pixels)] = encode(autoencoder, normalize(pixels), config.flips).numpy()
            done += len(pixels)
        if not np.isfinite(latents).all():
            raise ConfigError(f"autoencoder: latents must be finite as {manifest.dtype}, got NaN or infinity")
        yield shard, latents


if __name__ == "__main__":
    register_configs()
    command_line("prepare_latents", run)
