"""Make reference statistics for `eval_fid.py`, so that the reference images are looked at only once.

    python scripts/reference_stats.py data=cifar10 data.root=/data/cifar out=cifar10-train.npz
    torchrun --nproc_per_node=8 scripts/reference_stats.py data=imagenet data.root=/data/imagenet \\
        data.img_size=256 out=imagenet256-train.npz
    python scripts/reference_stats.py images=FOLDER out=mine.npz extractor=classifier extractor.run=outputs/RUN

Photos are cut by ADM's centre crop to `data.img_size`. The file holds mean and covariance over all images, under ADM's
names, and the features of `features` of them for KID, precision and recall; it names the extractor and the images.
"""

import sys
from pathlib import Path
from typing import Any

from vca.cli import command_line

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import rebuild
from vca.config import ReferenceStatsConfig, register_schemas
from vca.evaluation.extractor import EXTRACTORS, load_extractor
from vca.evaluation.features import measure
from vca.evaluation.record import check_writable
from vca.evaluation.sources import open_source
from vca.evaluation.stats_file import StatisticsFile, save_statistics
from vca.runtime import distributed
from vca.runtime.errors import ConfigError
from vca.runtime.rundir import check_ranks_agree

DAY = 24 * 60.0  # minutes that ranks wait for each other: the slowest has the last word


def register_configs() -> None:
    """Register the config schemas of this script with Hydra."""
    register_schemas(root={"reference_stats": ReferenceStatsConfig}, groups={"extractor": EXTRACTORS})


def run(config: ReferenceStatsConfig) -> Any:
    """Look at all images and write the file."""
    with distributed.start(config.device.value, DAY, key="device") as world:
        check_ranks_agree(world, config)
        extractor, out = load_extractor(config.extractor, world, rebuild), Path(config.out)
        images = open_source(config.images, "images", config.data, reference=True)
        if isinstance(images, StatisticsFile):
            raise ConfigError(f"images: {images.source} holds statistics already, of all the images that it stands for")
        world.from_main(lambda: check_writable(out))
        found = measure(images, extractor, world, config.batch_size, config.features)
        if world.is_main:
            save_statistics(out, found, extractor)
            size, kept = len(found.pool.mean), 0 if found.features is None else len(found.features)
            print(f"{out}: {size} features of {found.count} images, and of {kept} the features themselves", flush=True)
    return found


if __name__ == "__main__":
    register_configs()
    command_line("reference_stats", run)
