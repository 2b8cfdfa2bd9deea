"""Measure a set of samples against a reference: FID, sFID, KID, Inception Score, precision and recall.

    python eval_fid.py samples=samples/dit_s_2_vca reference=VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=8 eval_fid.py run=outputs/RUN protocol=dit_table reference=VIRTUAL_imagenet256_labeled.npz
    python eval_fid.py samples=FOLDER reference=data:test data=cifar10 data.root=/data/cifar
    python eval_fid.py samples=FOLDER reference=data:test data=digits extractor=classifier extractor.run=outputs/RUN

`samples` and `reference` are a folder of `sample.py` or of PNG files, an .npz of images (`arr_0`) or of statistics
(those of `scripts/reference_stats.py`, and ADM's), or a split of a data set. With `run` or `checkpoint` instead of
`samples` they are drawn as `sample.py` draws them, and not written. The figures are the same on any number of ranks.
"""

import time
from pathlib import Path
from typing import Any

from models import GENERATORS, build_model, rebuild
from vca.attention import ATTENTIONS
from vca.cli import command_line
from vca.config import EvalFidConfig, check_protocol, drawn_set, read_generator, register_schemas
from vca.evaluation.compare import check_comparable, compare_sets, labelled, read_features
from vca.evaluation.extractor import EXTRACTORS, load_extractor
from vca.evaluation.images import ImageSet
from vca.evaluation.record import check_writable, make_record, record_path, write_record
from vca.evaluation.sources import check_unchanged, made_by, manifest_of, open_source
from vca.generation.autoencoder import AUTOENCODERS
from vca.generation.objective import OBJECTIVES
from vca.generation.pipeline import GeneratedImages, nfe_stats
from vca.report.nearest_neighbours import plot_nearest_neighbours
from vca.runtime import distributed
from vca.runtime.errors import check
from vca.runtime.rundir import check_ranks_agree
from vca.training.restore import load_generator

DAY = 24 * 60.0  # minutes that ranks wait for each other: the slowest has the last word
DRAWN = 50_000  # samples, if nothing else is said
UNKNOWN = "nothing says how the samples were made, so scripts/table.py will not take this record"


def register_configs() -> None:
    """Register the config schemas of this script with Hydra."""
    register_schemas(
        root={"eval_fid": EvalFidConfig},
        groups={
            "model": GENERATORS,
            "attention": ATTENTIONS,
            "objective": OBJECTIVES,
            "autoencoder": AUTOENCODERS,
            "extractor": EXTRACTORS,
        },
    )


def run(config: EvalFidConfig) -> dict[str, Any]:
    """Measure, print a table, write the record and return it."""
    with distributed.start(config.device.value, DAY, key="device") as world:
        start = time.monotonic()
        if world.is_main:
            place = config.samples or config.run or config.checkpoint
            print(f"opening samples {place} and reference {config.reference}", flush=True)
        check_ranks_agree(world, config)
        reference = open_source(config.reference, "reference", config.data, reference=True)
        samples, made = open_samples(config, world)
        extractor = load_extractor(config.extractor, world, rebuild)
        warnings = check_comparable(samples, reference, extractor, config.allow_few)
        at_hand = all(isinstance(source, (ImageSet, GeneratedImages)) for source in (samples, reference))
        check(at_hand or not config.picture, "picture", "false where statistics stand for images", config.picture)
        folder, prefix = place_of_record(config)
        world.from_main(lambda: check_writable(folder / "record"))
        if world.is_main:
            kind = "statistics" if reference.count is None else f"{reference.count} reference images"
            print(f"opened {samples.count} samples and {kind} in {time.monotonic() - start:.1f} s", flush=True)

        found = read_features(samples, extractor, world, config.batch_size, config.features)
        there = read_features(reference, extractor, world, config.batch_size, config.features)
        if isinstance(samples, GeneratedImages) and made is not None:
            counts = [count for part in world.gather(samples.nfe) for count in part]
            made["nfe"] = nfe_stats(counts) if world.is_main else None

        def conclude() -> dict[str, Any]:
            check_unchanged(config.samples, found)
            print("computing the figures", flush=True)
            metrics, settings = compare_sets(found, there, world.device, config.precision_recall_dtype)
            said = [*warnings, *([UNKNOWN] if made is None else [])]
            record = make_record(metrics, settings, found, there, extractor, made, said, config.batch_size, world)
            path = Path(config.out).expanduser() if config.out else record_path(folder, prefix, record)
            write_record(path, record)
            for name, value in labelled(metrics, settings, record["count"], extractor.published).items():
                print(f"{name:<40}{value}")
            print("\n".join([*(f"note: {line}" for line in said), f"record: {path}"]), flush=True)
            if config.picture:
                plot_nearest_neighbours(samples, reference, found, there, path.with_suffix(".png"))
            return record

        return world.from_main(conclude)


def open_samples(config: EvalFidConfig, world: distributed.World) -> tuple[Any, dict[str, Any] | None]:
    """The set to be measured, and how it was made, if that is known."""
    if config.samples is not None:
        samples = open_source(config.samples, "samples", config.data)
        if config.count is not None:
            check(
                samples.count == config.count, "count", f"{samples.count}, which {config.samples} holds", config.count
            )
        return samples, made_by(manifest_of(config.samples))
    configs = read_generator(config, GENERATORS)
    generator = load_generator(configs, build_model, world, config.weights, config.run, config.step, config.checkpoint)
    check_protocol(config, generator.origin)
    drawn = drawn_set(config, generator, config.count or DRAWN)
    return drawn, {"protocol": config.protocol, **drawn.describe()}


def place_of_record(config: EvalFidConfig) -> tuple[Path, str]:
    """Folder of the record, and what its name begins with: in the run or the set that it is about, or beside it."""
    if config.out is not None:
        return Path(config.out).expanduser().parent, ""
    if config.run is not None:
        return Path(config.run), ""
    place = str(config.samples or config.checkpoint)
    if place.startswith("data:"):
        return Path(), ""
    path = Path(place).expanduser().resolve()
    return (path, "") if (path / "manifest.json").is_file() else (path.parent, f"{path.stem}-")


if __name__ == "__main__":
    register_configs()
    command_line("eval_fid", run)
