"""The whole config of each root script, made of the dataclasses that stand beside the code they configure."""

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from omegaconf import MISSING

from vca.config.cluster import ClusterConfig
from vca.data.augment import AugmentConfig
from vca.data.config import DataConfig
from vca.evaluation.online_fid import FidConfig
from vca.generation.autoencoder import AutoencoderConfig
from vca.generation.objective import SamplerConfig
from vca.runtime.compute import Device, Precision
from vca.runtime.errors import check, check_path
from vca.runtime.metrics_log import WandbConfig
from vca.training.config import TrainerConfig
from vca.training.optim import OptimConfig
from vca.training.pretrained import InitWeights


@dataclass
class TrainConfig:
    """What both trainers are told.

    Attributes:
        name: of the run; its directory is `out_dir/name`.
        seed: of everything random.
        model, attention: dataclasses of `models.MODELS` and `vca.attention.ATTENTIONS`.
        cluster: where the jobs of a sweep (`-m`) run.
    """

    name: str = MISSING
    out_dir: str = "outputs"
    seed: int = 0
    model: Any = MISSING
    attention: Any = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        check(self.name not in ("", ".", "..") and "/" not in self.name, "name", "a folder name", self.name)
        for key in ("name", "out_dir"):
            check_path(key, getattr(self, key))
        check(0 <= self.seed < 2**63, "seed", ">= 0 and below 2^63", self.seed)
        optim, trainer = self.optim, self.trainer
        if trainer.steps is None and optim.cooldown_epochs:
            length, rule = optim.warmup_epochs + optim.cooldown_epochs, "optim.warmup_epochs + optim.cooldown_epochs"
            check(trainer.epochs > length, "trainer.epochs", f"> {rule}, {length:g}", trainer.epochs)
        patience = 30 * trainer.timeout_minutes  # seconds; the other ranks wait for the one that checks
        rule = f"at most half of trainer.timeout_minutes, {patience:g} s"
        check(self.data.check_seconds <= patience, "data.check_seconds", rule, self.data.check_seconds)

    def check_model(self, key: str, wanted: int, rule: str) -> None:
        """Raise `ConfigError` unless the model's field is what the data asks for."""
        check(getattr(self.model, key) == wanted, f"model.{key}", f"{rule}, {wanted}", getattr(self.model, key))


@dataclass
class TrainClsConfig(TrainConfig):
    """`train_cls.py`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.trainer.fid_every == 0, "trainer.fid_every", "0 in train_cls.py", self.trainer.fid_every)
        for key in ("num_classes", "in_chans"):
            self.check_model(key, getattr(self.data, key), f"data.{key}")


@dataclass
class TrainGenConfig(TrainConfig):
    """`train_gen.py`.

    Attributes:
        data: images, or latents of a cache. `mean` and `std` are set here: pixels are in [-1, 1].
        objective: a dataclass of `vca.generation.objective.OBJECTIVES`.
        autoencoder: one of `vca.generation.autoencoder.AUTOENCODERS`; between the images and the network, `none` is
            pixel space.
        sampler: of the pictures that a run draws while it trains.
        samples_per_class: how many samples of each class these pictures show.
        sampled_classes: of how many classes, the first ones.
        fid, extractor: how it is measured while it trains.
    """

    objective: Any = MISSING
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    samples_per_class: int = 8
    sampled_classes: int = 10
    fid: FidConfig = field(default_factory=FidConfig)
    extractor: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data = in_pixel_range(self.data, self.autoencoder)
        check(
            self.data.name != "latents" or self.autoencoder.name != "none",
            "autoencoder",
            "that of the latents for data=latents, such as sd_vae",
            self.autoencoder.name,
        )
        self.check_model("num_classes", self.data.num_classes, "data.num_classes")
        self.check_model("in_channels", self.autoencoder.channels, "autoencoder.channels")
        size = self.data.img_size // self.autoencoder.factor
        self.check_model("input_size", size, "data.img_size / autoencoder.factor")
        for key in ("mixup", "cutmix"):
            check(getattr(self.augment, key) == 0, f"augment.{key}", "0 in generation", getattr(self.augment, key))
        check(self.samples_per_class >= 1, "samples_per_class", ">= 1", self.samples_per_class)
        classes = self.data.num_classes
        check(1 <= self.sampled_classes <= classes, "sampled_classes", f"from 1 to {classes}", self.sampled_classes)
        if self.trainer.fid_every:
            check(self.fid.reference is not None, "fid.reference", "given for trainer.fid_every", None)
            check(self.extractor is not None, "extractor", "given for trainer.fid_every, such as inception", None)
        check(self.trainer.init_from is None, "trainer.init_from", "null in train_gen.py", self.trainer.init_from)
        check(not self.trainer.eval_only, "trainer.eval_only", "false in train_gen.py", self.trainer.eval_only)


def in_pixel_range(data: DataConfig, autoencoder: AutoencoderConfig) -> DataConfig:
    """The same data normalised to [-1, 1], which generation reads.

    Raises:
        ConfigError: if the images do not fit the autoencoder.
    """
    rule = f"a multiple of autoencoder.factor, {autoencoder.factor}"
    check(data.img_size % autoencoder.factor == 0, "data.img_size", rule, data.img_size)
    if autoencoder.name != "none":
        check(data.in_chans == 3, "data.in_chans", "3 for an autoencoder", data.in_chans)
    return replace(data, mean=[0.5] * data.in_chans, std=[0.5] * data.in_chans)


class LatentType(Enum):
    """How a cache stores its numbers."""

    float32 = "float32"
    float16 = "float16"


@dataclass
class PrepareLatentsConfig:
    """`scripts/prepare_latents.py`.

    Attributes:
        out: folder of the cache.
        data: the images; their training split is taken.
        autoencoder: what encodes them.
        flips: encode every image a second time, flipped.
        dtype: of the cache; `float16` is half as large, and its latents are rounded to 3 digits.
        shard_size: images a file.
        batch_size: images a rank encodes at once.
        device, workers: as in `trainer`.
    """

    out: str = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    flips: bool = True
    dtype: LatentType = LatentType.float32
    shard_size: int = 1024
    batch_size: int = 32
    device: Device = Device.auto
    workers: int = 4

    def __post_init__(self) -> None:
        check_path("out", self.out)
        self.data = in_pixel_range(self.data, self.autoencoder)
        check(self.data.name != "latents", "data", "images", self.data.name)
        check(self.autoencoder.name != "none", "autoencoder", "one, such as sd_vae", self.autoencoder.name)
        for key in ("shard_size", "batch_size"):
            check(getattr(self, key) >= 1, key, ">= 1", getattr(self, key))
        check(self.workers >= 0, "workers", ">= 0", self.workers)


@dataclass
class GeneratorConfig:
    """Which trained generator, and how samples of it are drawn.

    Attributes:
        run: run directory of `train_gen.py`, which says what the model is; or else
        checkpoint: file of weights, such as those of the DiT and SiT repositories, for
        model, attention, objective, autoencoder: as in `train_gen.py`; only with `checkpoint`.
        step: of the run; null is its newest checkpoint.
        weights: `ema`, the average where there is one, or `raw`.
        decoder: another `autoencoder.source`, whose decoder is used.
        sampler: how samples are made.
        protocol: name of the file in `configs/protocol/` that fixed all this; no field of it may be overridden.
        labels: `random`, `balanced` (0, 1, 2, ... in turn), or a list of classes that is repeated.
        seed: of the set: labels and noise of sample i follow from it and i.
        batch_size: samples a rank computes at once on a GPU; on CPUs samples are computed one by one.
        precision, device: as in `trainer`.
    """

    run: str | None = None
    checkpoint: str | None = None
    model: Any = None
    attention: Any = None
    objective: Any = None
    autoencoder: Any = None
    step: int | None = None
    weights: InitWeights = InitWeights.ema
    decoder: str | None = None
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    protocol: str | None = None
    labels: Any = "random"
    seed: int = 0
    batch_size: int = 32
    precision: Precision = Precision.fp32
    device: Device = Device.auto

    def __post_init__(self) -> None:
        for key in ("model", "attention", "objective", "autoencoder"):
            value = getattr(self, key)
            if self.checkpoint is None:
                rule = "left out with run, which has its own" if self.run else "null without checkpoint"
                check(value is None, key, rule, getattr(value, "name", value))
            elif key != "autoencoder":
                check(value is not None, key, "given with checkpoint", value)
        check(self.run is not None or self.step is None, "step", "null without run", self.step)
        check(self.batch_size >= 1, "batch_size", ">= 1", self.batch_size)
        check(0 <= self.seed < 2**63, "seed", ">= 0 and below 2^63", self.seed)
        listed = isinstance(self.labels, list) and self.labels and all(type(label) is int for label in self.labels)
        known = bool(listed) or self.labels in ("random", "balanced")
        check(known, "labels", "random, balanced or a list of classes such as [207, 360]", self.labels)


@dataclass
class SampleConfig(GeneratorConfig):
    """`sample.py`.

    Attributes:
        out: folder of the samples.
        count: how many samples.
        npz, grid: besides the PNG files, write all images as `samples.npz` (`arr_0`), and the first ones as `grid.png`.
    """

    out: str = MISSING
    count: int = 50_000
    npz: bool = False
    grid: bool = False

    def __post_init__(self) -> None:
        one = (self.run is None) != (self.checkpoint is None)
        rule = "given, and not both: run=outputs/RUN, or checkpoint=FILE with its model=... and so on"
        check(one, "run or checkpoint", rule, (self.run, self.checkpoint))
        super().__post_init__()
        check_path("out", self.out)
        check(self.count >= 1, "count", ">= 1", self.count)


@dataclass
class EvalFidConfig(GeneratorConfig):
    """`eval_fid.py`.

    Attributes:
        samples: what is measured: a folder of `sample.py` or of PNG files, an .npz, `data:train` or `data:test`; or
            else `run` or `checkpoint`, whose samples are drawn.
        reference: what it is measured against, likewise, or statistics as an .npz.
        data: of `data:train` and `data:test`.
        extractor: a group, see below: what looks at the images, with extractor.weights, .run or .source.
        count: how many samples are drawn, null is 50,000; of samples that are there, how many these must be.
        features: of how many images of each set, chosen at random, features are kept, for KID, precision and recall.
        allow_few: evaluate fewer images than there are features, too.
        out: file of the record; null puts it in the set or the run that it is about, or beside the samples.
        precision_recall_dtype: of the distances of precision and recall: `float64`, or `float16` as ADM computes them.
        picture: beside the record, draw the samples that are farthest from the reference and nearest to it.
    """

    samples: str | None = None
    reference: str = MISSING
    data: DataConfig | None = None
    extractor: Any = MISSING
    count: int | None = None
    features: int = 50_000
    allow_few: bool = False
    out: str | None = None
    precision_recall_dtype: str = "float64"
    picture: bool = False

    def __post_init__(self) -> None:
        given = [key for key in ("samples", "run", "checkpoint") if getattr(self, key) is not None]
        check(len(given) == 1, "samples, run or checkpoint", "given, one of them", given or None)
        super().__post_init__()
        check_path("out", self.out or "")
        check(self.count is None or self.count >= 2, "count", ">= 2 or null", self.count)
        check(self.features >= 2, "features", ">= 2", self.features)
        dtype = self.precision_recall_dtype
        check(dtype in ("float64", "float16"), "precision_recall_dtype", "float64 or float16", dtype)
        if self.samples is not None:
            for key in ("protocol", "decoder"):
                check(getattr(self, key) is None, key, "null with samples", getattr(self, key))
            rule = "left out with samples, which are drawn already"
            check(self.sampler == SamplerConfig(), "sampler", rule, self.sampler.method.value)


@dataclass
class ReferenceStatsConfig:
    """`scripts/reference_stats.py`.

    Attributes:
        out: the npz that is written.
        images: a set of images, see `vca.evaluation.sources`.
        data: of `data:train` and `data:test`.
        extractor: as in `eval_fid.py`.
        features: of how many images, chosen at random, features are kept, for KID, precision and recall.
        batch_size: images a rank looks at together.
        device: as in `trainer`.
    """

    out: str = MISSING
    images: str = "data:train"
    data: DataConfig | None = None
    extractor: Any = MISSING
    features: int = 10_000
    batch_size: int = 64
    device: Device = Device.auto

    def __post_init__(self) -> None:
        check_path("out", self.out)
        check(self.out.endswith(".npz"), "out", "a file name that ends in .npz", self.out)
        for key in ("features", "batch_size"):
            check(getattr(self, key) >= 1, key, ">= 1", getattr(self, key))


@dataclass
class DoctorConfig:
    """`scripts/doctor.py`."""

    data: DataConfig = field(default_factory=DataConfig)
