"""The config of each script, composed of the dataclasses that are defined next to the code they configure."""

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, TypeVar

from omegaconf import MISSING

from vca.config.cluster import ClusterConfig
from vca.data.augment import AugmentConfig, GeneratorAugmentConfig
from vca.data.config import DataConfig, ImageDataConfig
from vca.evaluation.online_fid import FidConfig
from vca.generation.autoencoder import AutoencoderConfig
from vca.generation.objective import SamplerConfig
from vca.generation.pipeline import SamplingCompile
from vca.runtime.compute import Device, Precision
from vca.runtime.errors import check, check_path
from vca.runtime.loggers import WandbConfig, check_loggers
from vca.training.config import ClassifierTrainerConfig, GeneratorTrainerConfig, TrainerConfig
from vca.training.optim import OptimConfig
from vca.training.pretrained import InitWeights
from vca.training.snapshots import ALL

Data = TypeVar("Data", bound=DataConfig)


@dataclass
class TrainConfig:
    """Config that `train_cls.py` and `train_gen.py` share.

    Attributes:
        name: name of the run; its directory is `out_dir/name`.
        out_dir: folder of all runs and sweeps.
        seed: seed of initialization, data order, augmentation and noise.
        logger: where records, sample grids and tables are also sent: a list of `wandb` and `tensorboard`.
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
    logger: list[str] = field(default_factory=list)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        check(self.name not in ("", ".", "..") and "/" not in self.name, "name", "a folder name", self.name)
        for key in ("name", "out_dir"):
            check_path(key, getattr(self, key))
        check(0 <= self.seed < 2**63, "seed", ">= 0 and below 2^63", self.seed)
        check_loggers(self.logger)
        if self.data.name == "imagefolder" and self.data.index is None:
            self.data = replace(self.data, index=f"{self.out_dir}/data_index")
        optim, trainer = self.optim, self.trainer
        if trainer.steps is None and optim.cooldown_epochs:
            length, rule = optim.warmup_epochs + optim.cooldown_epochs, "optim.warmup_epochs + optim.cooldown_epochs"
            check(trainer.epochs > length, "trainer.epochs", f"> {rule}, {length:g}", trainer.epochs)
        patience = 30 * trainer.timeout_minutes  # seconds; the other ranks wait for the rank that checks
        rule = f"at most half of trainer.timeout_minutes, {patience:g} s"
        check(self.data.check_seconds <= patience, "data.check_seconds", rule, self.data.check_seconds)

    def check_model(self, key: str, wanted: int, rule: str) -> None:
        """Raise `ConfigError` unless the model's field matches the data."""
        check(getattr(self.model, key) == wanted, f"model.{key}", f"{rule}, {wanted}", getattr(self.model, key))


@dataclass
class TrainClsConfig(TrainConfig):
    """Config of `train_cls.py`."""

    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    trainer: ClassifierTrainerConfig = field(default_factory=ClassifierTrainerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("num_classes", "in_chans"):
            self.check_model(key, getattr(self.data, key), f"data.{key}")


@dataclass
class TrainGenConfig(TrainConfig):
    """Config of `train_gen.py`. Pixels are normalized to [-1, 1]: `data.mean` and `data.std` are set to 0.5.

    Attributes:
        samples_per_class: samples of each class in the image grids that a run writes.
        sampled_classes: number of classes in these grids, from class 0.
    """

    augment: GeneratorAugmentConfig = field(default_factory=GeneratorAugmentConfig)
    trainer: GeneratorTrainerConfig = field(default_factory=GeneratorTrainerConfig)
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
            "the autoencoder of the latent cache for data=latents, such as sd_vae",
            self.autoencoder.name,
        )
        self.check_model("num_classes", self.data.num_classes, "data.num_classes")
        self.check_model("in_channels", self.autoencoder.channels, "autoencoder.channels")
        size = self.data.img_size // self.autoencoder.factor
        self.check_model("input_size", size, "data.img_size / autoencoder.factor")
        check(self.samples_per_class >= 1, "samples_per_class", ">= 1", self.samples_per_class)
        classes = self.data.num_classes
        check(1 <= self.sampled_classes <= classes, "sampled_classes", f"from 1 to {classes}", self.sampled_classes)
        if self.trainer.fid_every:
            check(self.fid.reference is not None, "fid.reference", "set with trainer.fid_every", None)
            check(self.extractor is not None, "extractor", "set with trainer.fid_every, such as inception", None)


def in_pixel_range(data: Data, autoencoder: AutoencoderConfig) -> Data:
    """Return the data config with normalization to [-1, 1], which generation uses.

    Raises:
        ConfigError: if the image size or channels do not match the autoencoder.
    """
    rule = f"a multiple of autoencoder.factor, {autoencoder.factor}"
    check(data.img_size % autoencoder.factor == 0, "data.img_size", rule, data.img_size)
    if autoencoder.name != "none":
        check(data.in_chans == 3, "data.in_chans", "3 for an autoencoder", data.in_chans)
    return replace(data, mean=[0.5] * data.in_chans, std=[0.5] * data.in_chans)


class LatentType(Enum):
    """Storage dtype of a latent cache."""

    float32 = "float32"
    float16 = "float16"


@dataclass
class PrepareLatentsConfig:
    """Config of `scripts/prepare_latents.py`.

    Attributes:
        out: folder of the cache.
        flips: also encode the horizontally flipped images.
        dtype: dtype of the cache; `float16` halves its size and rounds latents to 3 digits.
        shard_size: images per file.
        batch_size: images per batch on each rank.
        device: `auto`, `cpu` or `cuda`.
        workers: loader processes per rank.
    """

    out: str = MISSING
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
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
        check(self.autoencoder.name != "none", "autoencoder", "an autoencoder, such as sd_vae", self.autoencoder.name)
        for key in ("shard_size", "batch_size"):
            check(getattr(self, key) >= 1, key, ">= 1", getattr(self, key))
        check(self.workers >= 0, "workers", ">= 0", self.workers)


class ShardFormat(Enum):
    """Format of prepared images: WebDataset tars, or parquet files of the Hugging Face layout."""

    tar = "tar"
    parquet = "parquet"


@dataclass
class PrepareImagesConfig:
    """Config of `scripts/prepare_images.py`.

    Attributes:
        out: folder of the shards, the `data.root` of runs on them.
        format: `tar` (WebDataset shards) or `parquet` (Hugging Face layout).
        images_per_shard: images per file.
        max_side: largest shorter side, in pixels; larger images are resized. Null copies all images byte for byte.
        quality: JPEG quality of resized images.
        workers: processes, each of which writes one shard at a time; 0 uses the main process.
    """

    out: str = MISSING
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    format: ShardFormat = ShardFormat.tar
    images_per_shard: int = 4096
    max_side: int | None = None
    quality: int = 95
    workers: int = 4

    def __post_init__(self) -> None:
        check_path("out", self.out)
        check(self.images_per_shard >= 1, "images_per_shard", ">= 1", self.images_per_shard)
        check(self.max_side is None or self.max_side >= 1, "max_side", ">= 1 or null", self.max_side)
        check(1 <= self.quality <= 95, "quality", "from 1 to 95", self.quality)
        check(self.workers >= 0, "workers", ">= 0", self.workers)


@dataclass
class GeneratorConfig:
    """A trained generator and its sampling settings, shared by `sample.py` and `eval_fid.py`.

    Attributes:
        run: run directory of `train_gen.py`; its config determines the model.
        checkpoint: file of weights, such as those of the DiT and SiT repositories, instead of `run`; needs model=...,
            attention=..., objective=... and, for latents, autoencoder=...
        step: step of a checkpoint or snapshot of the run; null uses the newest checkpoint. In `eval_fid.py`, `all`
            evaluates every snapshot.
        ema: decay of the EMA weights, one of the run's `trainer.ema_decay`; null uses the first one. In `eval_fid.py`,
            `all` evaluates each of them.
        weights: `ema` (raw weights if the run has no EMA) or `raw`.
        decoder: an `autoencoder.source` whose decoder replaces the run's.
        protocol: name of a file in `configs/protocol/`; the fields that it fixes must not be overridden.
        labels: `random`, `balanced` (0, 1, 2, ... in turn), or a list of classes that is repeated.
        seed: seed of the set; labels and noise of sample i depend only on it and i.
        batch_size: samples per batch on each GPU, and images per batch of the extractor; on CPUs samples are computed
            one at a time. Null is 128 on GPUs and 32 on CPUs.
        precision: `fp32`, `tf32`, `bf16` or `fp16`.
        compile: `off`, or `default` to compile the network with `torch.compile`, which changes rounding.
        device: `auto`, `cpu` or `cuda`.
    """

    run: str | None = None
    checkpoint: str | None = None
    model: Any = None
    attention: Any = None
    objective: Any = None
    autoencoder: Any = None
    step: Any = None
    ema: Any = None
    weights: InitWeights = InitWeights.ema
    decoder: str | None = None
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    protocol: str | None = None
    labels: Any = "random"
    seed: int = 0
    batch_size: int | None = None
    precision: Precision = Precision.fp32
    compile: SamplingCompile = SamplingCompile.off
    device: Device = Device.auto

    def __post_init__(self) -> None:
        for key in ("model", "attention", "objective", "autoencoder"):
            value = getattr(self, key)
            if self.checkpoint is None:
                rule = "omitted with run, which determines it" if self.run else "null without checkpoint"
                check(value is None, key, rule, getattr(value, "name", value))
            elif key != "autoencoder":
                check(value is not None, key, "set with checkpoint", value)
        self.check_selection()
        check(self.batch_size is None or self.batch_size >= 1, "batch_size", ">= 1 or null", self.batch_size)
        check(0 <= self.seed < 2**63, "seed", ">= 0 and below 2^63", self.seed)
        listed = isinstance(self.labels, list) and self.labels and all(type(label) is int for label in self.labels)
        known = bool(listed) or self.labels in ("random", "balanced")
        check(known, "labels", "random, balanced or a list of classes such as [207, 360]", self.labels)

    def check_selection(self) -> None:
        """Check `step` and `ema`."""
        step, ema = self.step, self.ema
        more = ", all" if isinstance(self, EvalFidConfig) else ""
        number = type(step) is int and step >= 0
        check(step is None or number or bool(more and step == ALL), "step", f"a step{more} or null", step)
        number = type(ema) in (int, float) and 0 <= ema < 1
        check(ema is None or number or bool(more and ema == ALL), "ema", f"a decay in [0, 1){more} or null", ema)
        for key, value in (("step", step), ("ema", ema)):
            check(self.run is not None or value is None, key, "null without run", value)
        if self.weights is InitWeights.raw:
            check(ema is None, "ema", "null with weights=raw", ema)
            check(step != ALL, "step", "a step or null with weights=raw, as snapshots contain EMA weights", step)


@dataclass
class SampleConfig(GeneratorConfig):
    """Config of `sample.py`.

    Attributes:
        out: folder of the samples.
        count: number of samples.
        npz: also write all images as `samples.npz` (`arr_0`).
        grid: also write the first images as `grid.png`.
    """

    out: str = MISSING
    count: int = 50_000
    npz: bool = False
    grid: bool = False

    def __post_init__(self) -> None:
        one = (self.run is None) != (self.checkpoint is None)
        rule = "set, but not both: run=outputs/RUN, or checkpoint=FILE with model=... and so on"
        check(one, "run or checkpoint", rule, (self.run, self.checkpoint))
        super().__post_init__()
        check_path("out", self.out)
        check(self.count >= 1, "count", ">= 1", self.count)


@dataclass
class EvalFidConfig(GeneratorConfig):
    """Config of `eval_fid.py`.

    Attributes:
        samples: images to evaluate: a folder of `sample.py`, a folder or archive of PNG files, an .npz, `data:train` or
            `data:test`. Instead, `run` or `checkpoint` generates them.
        reference: reference images, as for `samples`, or an .npz of statistics.
        count: number of samples to generate, null is 50,000; with `samples`, the number that the set must have.
        features: number of random images of each set whose features are kept for KID, precision and recall.
        allow_few: allow fewer images than feature dimensions.
        out: file of the record; null writes it to the sample folder or the run, or next to the samples.
        data: data set of `data:train` and `data:test`, such as `data=digits`.
        precision_recall_dtype: dtype of the distances of precision and recall: `float64`, or `float16` as in ADM.
        picture: also plot the samples that are farthest from the reference and closest to it.
    """

    samples: str | None = None
    reference: str = MISSING
    data: ImageDataConfig | None = None
    extractor: Any = MISSING
    count: int | None = None
    features: int = 50_000
    allow_few: bool = False
    out: str | None = None
    precision_recall_dtype: str = "float64"
    picture: bool = False

    def __post_init__(self) -> None:
        given = [key for key in ("samples", "run", "checkpoint") if getattr(self, key) is not None]
        check(len(given) == 1, "samples, run or checkpoint", "set, exactly one of them", given or None)
        super().__post_init__()
        check_path("out", self.out or "")
        one_record = self.out is None or ALL not in (self.step, self.ema)
        check(one_record, "out", "null with step=all or ema=all, which write several records", self.out)
        check(self.count is None or self.count >= 2, "count", ">= 2 or null", self.count)
        check(self.features >= 2, "features", ">= 2", self.features)
        dtype = self.precision_recall_dtype
        check(dtype in ("float64", "float16"), "precision_recall_dtype", "float64 or float16", dtype)
        if self.samples is not None:
            for key in ("protocol", "decoder"):
                check(getattr(self, key) is None, key, "null with samples", getattr(self, key))
            rule = "omitted with samples, which already exist"
            check(self.sampler == SamplerConfig(), "sampler", rule, self.sampler.method.value)


@dataclass
class ReferenceStatsConfig:
    """Config of `scripts/reference_stats.py`.

    Attributes:
        out: the .npz file to write.
        images: a folder or archive of PNG files, an .npz, `data:train` or `data:test`.
        data: data set of `data:train` and `data:test`, such as `data=digits`.
        features: number of random images whose features are kept for KID, precision and recall.
        batch_size: images per batch on each rank.
        device: `auto`, `cpu` or `cuda`.
    """

    out: str = MISSING
    images: str = "data:train"
    data: ImageDataConfig | None = None
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
    """Config of `scripts/doctor.py`."""

    data: DataConfig = field(default_factory=DataConfig)
