"""Evaluate samples against a reference: FID, sFID, KID, Inception Score, precision and recall.

    python eval_fid.py samples=samples/dit_s_2_vca reference=VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=8 eval_fid.py run=outputs/RUN protocol=dit_table reference=VIRTUAL_imagenet256_labeled.npz
    python eval_fid.py samples=FOLDER reference=data:test data=cifar10 data.root=/data/cifar
    python eval_fid.py samples=FOLDER reference=data:test data=digits extractor=classifier extractor.run=outputs/RUN

`samples` and `reference` are a folder of `sample.py` or of PNG files, an .npz of images (`arr_0`) or of statistics
(from `scripts/reference_stats.py` or ADM), or a split of a data set. With `run` or `checkpoint` instead of `samples`,
images are sampled as by `sample.py` but not written. The metrics do not depend on the world size.
"""

import time
from pathlib import Path
from typing import Any

from models import GENERATORS, build_model, rebuild
from vca.cli import command_line
from vca.config import EvalFidConfig, generator_groups, load_generated_images, register_schemas
from vca.evaluation.compare import check_comparable, compare_sets, labelled_metrics, read_features
from vca.evaluation.extractor import EXTRACTORS, load_extractor
from vca.evaluation.images import ImageSet
from vca.evaluation.record import (
    UNKNOWN_SETTINGS,
    check_writable,
    make_record,
    record_location,
    record_name,
    run_of_samples,
    write_record,
)
from vca.evaluation.sources import check_unchanged, open_samples, open_source
from vca.generation.pipeline import GeneratedImages, default_batch_size, nfe_stats
from vca.report.nearest_neighbours import plot_nearest_neighbours
from vca.runtime import distributed
from vca.runtime.errors import check
from vca.runtime.rundir import check_ranks_agree

DEFAULT_COUNT = 50_000  # samples of `run` or `checkpoint`


def register_configs() -> None:
    register_schemas(root={"eval_fid": EvalFidConfig}, groups={**generator_groups(GENERATORS), "extractor": EXTRACTORS})


def run(config: EvalFidConfig) -> dict[str, Any]:
    """Evaluate, print the metrics, write the record and return it."""
    with distributed.start(config.device.value, distributed.COLLECTIVE_TIMEOUT_MINUTES, key="device") as world:
        start = time.monotonic()
        place = config.samples or config.run or config.checkpoint
        if world.is_main:
            print(f"opening samples {place} and reference {config.reference}", flush=True)
        check_ranks_agree(world, config)
        reference = open_source(config.reference, "reference", config.data, reference=True)
        samples: Any
        if config.samples is not None:
            samples, made = open_samples(config.samples, config.data, config.count)
        else:
            samples, made = load_generated_images(config, GENERATORS, build_model, world, config.count or DEFAULT_COUNT)
        extractor = load_extractor(config.extractor, world, rebuild)
        warnings = check_comparable(samples, reference, extractor, config.allow_few)
        has_images = all(isinstance(source, (ImageSet, GeneratedImages)) for source in (samples, reference))
        check(has_images or not config.picture, "picture", "false with statistics instead of images", config.picture)
        out = config.out and Path(config.out).expanduser()
        folder, prefix = (out.parent, "") if out else record_location(config.run, str(place))
        world.from_main(lambda: check_writable(folder / "record"))
        if world.is_main:
            kind = "statistics" if reference.count is None else f"{reference.count} reference images"
            print(f"opened {samples.count} samples and {kind} in {time.monotonic() - start:.1f} s", flush=True)

        batch_size = config.batch_size or default_batch_size(world.device)
        x = read_features(samples, extractor, world, batch_size, config.features)
        y = read_features(reference, extractor, world, batch_size, config.features)
        if isinstance(samples, GeneratedImages) and made is not None:
            counts = [count for part in world.gather(samples.nfe) for count in part]
            made["nfe"] = nfe_stats(counts) if world.is_main else None

        def conclude() -> dict[str, Any]:
            check_unchanged(config.samples, x)
            print("computing the metrics", flush=True)
            metrics, settings = compare_sets(x, y, world.device, config.precision_recall_dtype)
            notes = [*warnings, *([UNKNOWN_SETTINGS] if made is None else [])]
            run = config.run or run_of_samples(str(place), made)
            record = make_record(metrics, settings, x, y, extractor, made, notes, batch_size, world, run)
            path = out or folder / f"{prefix}{record_name(record)}"
            write_record(path, record)
            for name, value in labelled_metrics(metrics, settings, record["count"], extractor.published).items():
                print(f"{name:<40}{value}")
            print("\n".join([*(f"note: {line}" for line in notes), f"record: {path}"]), flush=True)
            if config.picture:
                plot_nearest_neighbours(samples, reference, x, y, path.with_suffix(".png"))
            return record

        return world.from_main(conclude)


if __name__ == "__main__":
    register_configs()
    command_line("eval_fid", run)
