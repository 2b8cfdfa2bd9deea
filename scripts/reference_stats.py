"""Compute reference statistics for `eval_fid.py` once, to reuse them in every evaluation.

    python scripts/reference_stats.py data=cifar10 data.root=/data/cifar out=cifar10-train.npz
    torchrun --nproc_per_node=8 scripts/reference_stats.py data=imagenet data.root=/data/imagenet \\
        data.img_size=256 out=imagenet256-train.npz
    python scripts/reference_stats.py images=FOLDER out=mine.npz extractor=classifier extractor.run=outputs/RUN

Images are resized by ADM's centre crop to `data.img_size`. The file contains mean and covariance over all images, with
ADM's names, the features of `features` images for KID, precision and recall, and the identity of extractor and images.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import rebuild
from vca.cli import command_line
from vca.config import ReferenceStatsConfig, register_schemas
from vca.evaluation.extractor import EXTRACTORS, load_extractor
from vca.evaluation.features import measure
from vca.evaluation.record import check_writable
from vca.evaluation.sources import open_source
from vca.evaluation.stats_file import StatisticsFile, save_statistics
from vca.runtime import distributed
from vca.runtime.errors import ConfigError
from vca.runtime.rundir import check_ranks_agree


def register_configs() -> None:
    register_schemas(root={"reference_stats": ReferenceStatsConfig}, groups={"extractor": EXTRACTORS})


def run(config: ReferenceStatsConfig) -> Any:
    """Compute the statistics and write the file."""
    with distributed.start(config.device.value, distributed.COLLECTIVE_TIMEOUT_MINUTES, key="device") as world:
        check_ranks_agree(world, config)
        extractor, out = load_extractor(config.extractor, world, rebuild), Path(config.out)
        images = open_source(config.images, "images", config.data, reference=True, world=world)
        if isinstance(images, StatisticsFile):
            raise ConfigError(f"images must be a set of images, got a file of statistics: {images.source}")
        world.from_main(lambda: check_writable(out))
        features = measure(images, extractor, world, config.batch_size, config.features)
        if world.is_main:
            save_statistics(out, features, extractor)
            size, kept = len(features.pooled.mean), 0 if features.features is None else len(features.features)
            print(f"{out}: moments of {size} features of {features.count} images; kept features of {kept}", flush=True)
    return features


if __name__ == "__main__":
    register_configs()
    command_line("reference_stats", run)
