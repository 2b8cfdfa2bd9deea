"""Throughput of the ImageNet training pipeline and of timm's loader."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Budget, take_turns

BATCH = 16


def deit_recipe(root: Path) -> tuple[Any, Any]:
    """Return the configs `data` and `augment` of DeiT's recipe for class folders, without repeated augmentation."""
    import train_cls
    from vca.config import compose

    train_cls.register_configs()
    classes = sum(entry.is_dir() for entry in (root / "train").iterdir())
    options = ["data=imagefolder", f"data.root={root}", f"data.num_classes={classes}", "recipe=deit_original"]
    config = compose("train_cls", [*options, "augment.aug_repeats=1"])
    return config.data, config.augment


def benchmark_data(root: Path, budget: Budget, workers: int = 0) -> list[dict]:
    """Measure images/s and bytes per image of three loaders, with the same images and the transforms of DeiT's recipe.

    timm's fast path is its default, where workers send uint8 and the device normalises and erases, as here; its slow
    path (`use_prefetcher=False`) does both in the worker, in float32. The work on the device is not timed. Without
    workers, images are loaded in this process. The random operations of RandAugment differ between the loaders. A round
    is 4 batches, and 60 more for each worker, so that the batches that wait at its start do not count.
    """
    from timm.data import ImageDataset, create_loader

    from vca.data import load_dataset
    from vca.data.augment import timm_options
    from vca.data.loader import MicroBatches, TrainOrder, image_inputs, worker_batches
    from vca.runtime.distributed import World

    data, augment = deit_recipe(root)
    images = load_dataset(data, train=True)
    world = World(0, 0, 1, torch.device("cpu"))
    shares = MicroBatches(TrainOrder(len(images), BATCH, 0), world, BATCH, 1, 0, 1_000_000)
    ours = (
        step[0][:5] for step in worker_batches(images, image_inputs(augment, data, 0, world.device), 0, shares, workers)
    )

    def timm_batches(fast: bool) -> Any:
        loader: Any = create_loader(
            ImageDataset(str(root / "train")),
            (3, data.img_size, data.img_size),
            BATCH,
            **timm_options(augment, data),
            use_prefetcher=fast,
            num_workers=workers,
            pin_memory=False,
            persistent_workers=workers > 0,
            device=torch.device("cpu"),
        )
        return (item for _ in range(1_000_000) for item in (loader.loader if fast else loader))

    batches = 4 + 60 * workers
    sources = {"timm, fast path": timm_batches(True), "timm, slow path": timm_batches(False), "ours": iter(ours)}
    sizes = {name: sum(x.nbytes for x in next(source)) / BATCH for name, source in sources.items()}

    def load(name: str) -> None:
        for _ in range(batches):
            next(sources[name])

    loads = {name: lambda name=name: load(name) for name in sources}
    timings = take_turns(loads, "timm, fast path", budget, world.device)
    rows = []
    for name, (seconds, ratio, low, high) in timings.items():
        rate = BATCH * batches / seconds
        print(
            f"{name:<16} {rate:7.1f} images/s  {sizes[name] / 1e3:7.1f} kB/image  time / timm's fast path "
            f"{ratio:.3f} ({low:.3f} to {high:.3f})"
        )
        row = {"loader": name, "workers": workers, "images_per_second": rate, "bytes_per_image": sizes[name]}
        rows.append({**row, "ratio": ratio, "low": low, "high": high})
    return rows
