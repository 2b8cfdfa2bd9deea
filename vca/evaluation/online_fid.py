"""The FID of a generator while it trains, as `eval_fid.py` would measure it."""

from collections.abc import Callable
from dataclasses import dataclass

from vca.data.config import DataConfig
from vca.evaluation.compare import check_comparable, read_features
from vca.evaluation.extractor import Extractor
from vca.evaluation.features import measure
from vca.evaluation.sources import open_source
from vca.generation.objective import SamplerConfig
from vca.generation.pipeline import DiffusionPipeline, GeneratedImages
from vca.metrics.fid import frechet_distance
from vca.runtime.compute import Precision
from vca.runtime.distributed import World
from vca.runtime.errors import NonFiniteError, check


@dataclass
class FidConfig:
    """How a generator is measured while it trains, at `trainer.fid_every`.

    Attributes:
        reference: see `vca.evaluation.sources`; `data:train` and `data:test` are splits of the training's data.
        count: samples that are drawn, by `sampler`, with random labels, set 0.
        batch_size: samples computed at once on a GPU.
    """

    reference: str | None = None
    count: int = 1000
    batch_size: int = 32

    def __post_init__(self) -> None:
        check(self.count >= 2, "fid.count", ">= 2", self.count)
        check(self.batch_size >= 1, "fid.batch_size", ">= 1", self.batch_size)


class OnlineFid:
    """Samples of a run, measured at some of its steps.

    Args:
        fid: config.
        extractor: of the features, on `world.device`.
        sampler: config of the samples.
        data: of a reference `data:train` or `data:test`.
        pipeline: of the run; its network changes from step to step.
        world: this process; all ranks share the work.
    """

    def __init__(
        self,
        fid: FidConfig,
        extractor: Extractor,
        sampler: SamplerConfig,
        data: DataConfig,
        pipeline: DiffusionPipeline,
        world: World,
    ) -> None:
        self.fid, self.extractor, self.pipeline, self.world = fid, extractor, pipeline, world
        self.samples = GeneratedImages(pipeline, sampler, "random", 0, Precision.fp32, fid.count, fid.batch_size)
        reference = open_source(str(fid.reference), "fid.reference", data, reference=True)
        for warning in check_comparable(self.samples, reference, extractor, allow_few=True):
            if world.is_main:
                print(f"fid: {warning}", flush=True)
        self.reference = read_features(reference, extractor, world, fid.batch_size, keep=0)

    def measure(self, log: Callable[[str], None]) -> dict[str, float | None]:
        """Frechet distance from the reference, None if a sample is not finite, and number of samples."""
        self.pipeline.model.eval()
        log(f"sampling {self.fid.count} images for the Frechet distance")
        try:
            found = measure(self.samples, self.extractor, self.world, self.fid.batch_size, keep=0)
            distance = frechet_distance(*found.pool, *self.reference.pool)
        except NonFiniteError as error:
            log(f"warning: no Frechet distance: {error}")
            distance = None
        return {"frechet": distance, "frechet_samples": self.fid.count}
