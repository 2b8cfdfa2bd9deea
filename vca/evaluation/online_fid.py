"""FID during a generation run, measured as by `eval_fid.py`."""

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
    """FID during a run, every `trainer.fid_every` steps.

    Attributes:
        reference: see `vca.evaluation.sources`; `data:train` and `data:test` are splits of the run's data.
        count: number of samples, by `sampler`, with random labels and seed 0.
        batch_size: samples per batch on a GPU.
    """

    reference: str | None = None
    count: int = 1000
    batch_size: int = 32

    def __post_init__(self) -> None:
        check(self.count >= 2, "fid.count", ">= 2", self.count)
        check(self.batch_size >= 1, "fid.batch_size", ">= 1", self.batch_size)


class OnlineFid:
    """Frechet distance between samples of a run and a reference.

    The ranks share the work. `data` is the data set of a reference `data:train` or `data:test`.
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
        reference = open_source(str(fid.reference), "fid.reference", data, reference=True, world=world)
        for warning in check_comparable(self.samples, reference, extractor, allow_few=True):
            if world.is_main:
                print(f"fid: {warning}", flush=True)
        self.reference = read_features(reference, extractor, world, fid.batch_size, keep=0)

    def measure(self, log: Callable[[str], None]) -> dict[str, float | None]:
        """Return `frechet` (None if a sample is NaN or infinite) and `frechet_samples`."""
        self.pipeline.model.eval()
        log(f"sampling {self.fid.count} images for the Frechet distance")
        try:
            features = measure(self.samples, self.extractor, self.world, self.fid.batch_size, keep=0)
            distance = frechet_distance(*features.pooled, *self.reference.pooled)
        except NonFiniteError as error:
            log(f"warning: skipping the Frechet distance: {error}")
            distance = None
        return {"frechet": distance, "frechet_samples": self.fid.count}
