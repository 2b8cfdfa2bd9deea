"""Evaluate samples against a reference: FID, sFID, KID, Inception Score, precision and recall.

    python eval_fid.py samples=samples/dit_s_2_vca reference=VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=8 eval_fid.py run=outputs/RUN protocol=dit_table reference=VIRTUAL_imagenet256_labeled.npz
    python eval_fid.py samples=FOLDER reference=data:test data=cifar10 data.root=/data/cifar
    python eval_fid.py samples=FOLDER reference=data:test data=digits extractor=classifier extractor.run=outputs/RUN

`samples` and `reference` are a folder of `sample.py` or of PNG files, an .npz of images (`arr_0`) or of statistics
(from `scripts/reference_stats.py` or ADM), or a split of a data set. With `run` or `checkpoint` instead of `samples`,
images are sampled as by `sample.py` but not written. The metrics do not depend on the world size.
"""

import hashlib
import json
import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from models import GENERATORS, build_model, rebuild
from vca.cli import command_line
from vca.config import EvalFidConfig, generator_groups, load_generated_images, register_schemas
from vca.evaluation.compare import check_comparable, compare_sets, frechet_label, labelled_metrics, read_features
from vca.evaluation.extractor import EXTRACTORS, Extractor, load_extractor
from vca.evaluation.features import FeatureSet
from vca.evaluation.images import ImageSet
from vca.evaluation.record import (
    UNKNOWN_SETTINGS,
    check_writable,
    make_record,
    read_record,
    record_location,
    record_name,
    run_of_samples,
    write_record,
)
from vca.evaluation.sources import check_unchanged, open_samples, open_source
from vca.generation.pipeline import GeneratedImages, default_batch_size, nfe_stats
from vca.report.nearest_neighbours import plot_nearest_neighbours
from vca.report.snapshots import SnapshotFigure, read_figures, report_snapshots, write_figures
from vca.runtime import distributed
from vca.runtime.distributed import World
from vca.runtime.errors import check
from vca.runtime.rundir import check_ranks_agree, to_dict
from vca.training.restore import load_other_weights
from vca.training.snapshots import ALL, select_weights

DEFAULT_COUNT = 50_000  # samples of `run` or `checkpoint`


def register_configs() -> None:
    register_schemas(root={"eval_fid": EvalFidConfig}, groups={**generator_groups(GENERATORS), "extractor": EXTRACTORS})


@dataclass
class Evaluation:
    """The reference and the settings that all evaluations of a command share.

    Attributes:
        source: the reference.
        warnings: notes of the records.
        folder, prefix: folder of the records, and start of their names.
    """

    config: EvalFidConfig
    world: World
    extractor: Extractor
    source: Any
    warnings: list[str]
    folder: Path
    prefix: str
    batch_size: int

    @cached_property
    def features(self) -> FeatureSet:
        """Features of the reference; collective."""
        return read_features(self.source, self.extractor, self.world, self.batch_size, self.config.features)

    def measure(self, samples: Any, made: dict[str, Any] | None) -> tuple[Path, dict[str, Any]]:
        """Evaluate samples, print the metrics, write the record, and return its path and content."""
        config, world = self.config, self.world
        x = read_features(samples, self.extractor, world, self.batch_size, config.features)
        y, extractor = self.features, self.extractor
        if isinstance(samples, GeneratedImages) and made is not None:
            counts = [count for part in world.gather(samples.nfe) for count in part]
            made["nfe"] = nfe_stats(counts) if world.is_main else None

        def conclude() -> tuple[Path, dict[str, Any]]:
            check_unchanged(config.samples, x)
            print("computing the metrics", flush=True)
            metrics, settings = compare_sets(x, y, world.device, config.precision_recall_dtype)
            notes = [*self.warnings, *([UNKNOWN_SETTINGS] if made is None else [])]
            run = config.run or run_of_samples(str(config.samples or config.checkpoint), made)
            record = make_record(metrics, settings, x, y, extractor, made, notes, self.batch_size, world, run)
            path = Path(config.out).expanduser() if config.out else self.folder / f"{self.prefix}{record_name(record)}"
            write_record(path, record)
            for name, value in labelled_metrics(metrics, settings, record["count"], extractor.published).items():
                print(f"{name:<40}{value}")
            print("\n".join([*(f"note: {line}" for line in notes), f"record: {path}"]), flush=True)
            if config.picture:
                plot_nearest_neighbours(samples, self.source, x, y, path.with_suffix(".png"))
            return path, record

        return world.from_main(conclude)


def run(config: EvalFidConfig) -> dict[str, Any]:
    """Evaluate, print the metrics, write the record and return it; with `all`, return records by file name."""
    with distributed.start(config.device.value, distributed.COLLECTIVE_TIMEOUT_MINUTES, key="device") as world:
        start = time.monotonic()
        place = config.samples or config.run or config.checkpoint
        if world.is_main:
            print(f"opening samples {place} and reference {config.reference}", flush=True)
        check_ranks_agree(world, config)
        source = open_source(config.reference, "reference", config.data, reference=True, world=world)
        selected: list[tuple[Any, Any]] = [(config.step, config.ema)]
        if ALL in (config.step, config.ema):
            selected = world.from_main(lambda: select_weights(Path(str(config.run)), config.step, config.ema))
        samples: Any
        if config.samples is not None:
            samples, made = open_samples(config.samples, config.data, config.count, world)
        else:
            first = replace(config, step=selected[0][0], ema=selected[0][1])
            samples, made = load_generated_images(first, GENERATORS, build_model, world, config.count or DEFAULT_COUNT)
        extractor = load_extractor(config.extractor, world, rebuild)
        warnings = check_comparable(samples, source, extractor, config.allow_few)
        has_images = all(isinstance(one, (ImageSet, GeneratedImages)) for one in (samples, source))
        check(has_images or not config.picture, "picture", "false with statistics instead of images", config.picture)
        out = config.out and Path(config.out).expanduser()
        folder, prefix = (out.parent, "") if out else record_location(config.run, str(place))
        world.from_main(lambda: check_writable(folder / "record"))
        if world.is_main:
            kind = "statistics" if source.count is None else f"{source.count} reference images"
            print(f"opened {samples.count} samples and {kind} in {time.monotonic() - start:.1f} s", flush=True)

        batch_size = config.batch_size or default_batch_size(world.device)
        evaluation = Evaluation(config, world, extractor, source, warnings, folder, prefix, batch_size)
        if ALL in (config.step, config.ema):
            return measure_all(evaluation, samples, selected)
        return evaluation.measure(samples, made)[1]


def measure_all(
    evaluation: Evaluation, images: GeneratedImages, selected: list[tuple[int, float]]
) -> dict[str, dict[str, Any]]:
    """Evaluate the weights of each step and EMA decay, and print and plot their Frechet distances.

    If the same command was interrupted, weights that have a record are not evaluated again.

    Returns:
        The records by file name.
    """
    config, world, extractor = evaluation.config, evaluation.world, evaluation.extractor
    metric = frechet_label(images.count, extractor.published)
    free = ("run", "reference", "device", "picture")  # the reference is identified by its sha256
    settings = {key: value for key, value in to_dict(config).items() if key not in free}
    settings |= {"extractor": extractor.identity(), "reference": evaluation.features.sha256}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    file = evaluation.folder / f"snapshots-{extractor.name}-{images.count}-{digest}.json"
    figures = world.from_main(lambda: {(one.step, one.ema_decay): one for one in read_figures(file)})
    records, keys = {}, []
    for number, (step, decay) in enumerate(selected):
        load_other_weights(images.pipeline, Path(str(config.run)), step, config.weights, world, decay)
        step, sha256 = (images.pipeline.origin[key] for key in ("step", "weights_sha256"))
        if world.is_main:
            print(f"{number + 1} of {len(selected)}: step {step}, EMA {decay}", flush=True)
        earlier = world.from_main(partial(earlier_record, evaluation.folder, figures.get((step, decay)), sha256))
        made = {"protocol": config.protocol, **images.settings()}
        path, record = earlier or evaluation.measure(images, made)
        records[path.name] = record
        value = record["metrics"]["frechet"]
        figures[step, decay] = SnapshotFigure(step, decay, value, sha256, {"record": path.name})
        keys.append((step, decay))
        world.from_main(lambda: write_figures(file, metric, settings, list(figures.values())))
    world.from_main(lambda: report_snapshots(file, metric, settings, [figures[key] for key in keys]))
    return records


def earlier_record(folder: Path, figure: SnapshotFigure | None, sha256: str) -> tuple[Path, dict[str, Any]] | None:
    """Return path and content of the record that an earlier call of the command wrote for these weights, if any."""
    path = folder / (figure.details["record"] if figure is not None else "")
    if figure is None or figure.weights_sha256 != sha256 or not path.is_file():
        return None
    print(f"evaluated before, record: {path}", flush=True)
    return path, read_record(path)


if __name__ == "__main__":
    register_configs()
    command_line("eval_fid", run)
