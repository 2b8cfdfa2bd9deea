"""Throughput of the ImageNet training pipeline and of timm's loader."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Budget, compare


def benchmark_data(root: Path, budget: Budget) -> list[dict]:
    """Measure images/s of one core for both loaders, with the same transforms and images and no workers.

    A round is four batches of 16 images. The random operations of RandAugment differ between the loaders.
    """
    from timm.data import ImageDataset, create_loader

    import train_cls
    from vca.config import compose
    from vca.data import load_dataset
    from vca.data.augment import train_transform
    from vca.data.loader import MicroBatches, TrainOrder, train_loader
    from vca.runtime.distributed import World

    train_cls.register_configs()
    classes = sum(entry.is_dir() for entry in (root / "train").iterdir())
    options = ["data=imagefolder", f"data.root={root}", f"data.num_classes={classes}", "recipe=deit_original"]
    config = compose("train_cls", [*options, "augment.aug_repeats=1"])
    data, augment, batch, batches = config.data, config.augment, 16, 4

    images = load_dataset(data, train=True)
    world = World(0, 0, 1, torch.device("cpu"))
    shares = MicroBatches(TrainOrder(len(images), batch, 0), world, batch, 1, 0, 1_000_000)
    ours = iter(train_loader(images, train_transform(augment, data), 0, shares, workers=0))

    loader = create_loader(
        ImageDataset(str(root / "train")),
        (3, data.img_size, data.img_size),
        batch,
        is_training=True,
        use_prefetcher=False,
        scale=(augment.scale[0], augment.scale[1]),
        ratio=(augment.ratio[0], augment.ratio[1]),
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        mean=tuple(data.mean),
        std=tuple(data.std),
        re_prob=augment.re_prob,
        re_mode=augment.re_mode,
        re_count=augment.re_count,
        num_workers=0,
        pin_memory=False,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    endless = (item for _ in range(1_000_000) for item in loader)

    def load(iterator: Any) -> None:
        for _ in range(batches):
            next(iterator)

    times = compare(lambda: load(endless), lambda: load(ours), budget, world.device)
    rate, timm_rate = (1e3 * batch * batches / times[key] for key in ("other_ms", "ms"))
    print(
        f"ours {rate:.1f} images/s, timm {timm_rate:.1f} images/s; ours / timm "
        f"{times['ratio']:.3f} ({times['low']:.3f} to {times['high']:.3f})"
    )
    row = {"images_per_second": rate, "timm_images_per_second": timm_rate}
    return [{**row, **{key: times[key] for key in ("ratio", "low", "high")}}]
