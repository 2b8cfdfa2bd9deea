"""Config of a data set; the loaders are in the files named after the data sets."""

from dataclasses import dataclass, field

from vca.runtime.errors import check


@dataclass
class DataConfig:
    """Data set and evaluation transform.

    Attributes:
        name: the key in `vca.data.DATASETS`.
        root: local folder; null for `digits`.
        format: `folder`, `zip`, `tar`, `webdataset`, `parquet`, `arrow`, or `auto` to find out (docs/data.md).
        train, val: files of a split: a path, `*` pattern or range `{000..123}`, relative to `root`; null finds them
            in `root` by their names.
        classes: file with the class names, one a line, in the order of the labels; null sorts the names.
        labels: file with lines `image class` for images without class folders, or ImageNet's development kit.
        index: folder for the index of the images if it cannot be beside them; null is `out_dir/data_index` for
            runs.
        img_size: side of training and evaluation images, in pixels.
        in_chans, num_classes: number of image channels (`in_chans`) and of classes (`num_classes`).
        mean, std: mean and standard deviation that normalise pixels in [0, 1], one number per channel.
        crop_pct: fraction of the shorter side that the evaluation centre crop keeps.
        interpolation: `bicubic` or `bilinear`, for the evaluation resize.
        check_seconds: seconds to check files of the data set, in random order, before a run starts; 0 disables it.
    """

    name: str = "digits"
    root: str | None = None
    format: str = "auto"
    train: str | None = None
    val: str | None = None
    classes: str | None = None
    labels: str | None = None
    index: str | None = None
    img_size: int = 224
    in_chans: int = 3
    num_classes: int = 1000
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    check_seconds: float = 5.0

    @property
    def image_bytes(self) -> int:
        """Size of one image as a uint8 tensor, in bytes."""
        return self.in_chans * self.img_size**2

    def __post_init__(self) -> None:
        forms = ("auto", "folder", "zip", "tar", "webdataset", "parquet", "arrow")
        check(self.format in forms, "data.format", f"one of {', '.join(forms)}", self.format)
        check(self.img_size >= 1, "data.img_size", ">= 1", self.img_size)
        check(self.in_chans in (1, 3), "data.in_chans", "1 or 3", self.in_chans)
        check(self.num_classes >= 2, "data.num_classes", ">= 2", self.num_classes)
        check(len(self.mean) == self.in_chans, "data.mean", f"{self.in_chans} numbers", list(self.mean))
        std_ok = len(self.std) == self.in_chans and min(self.std) > 0
        check(std_ok, "data.std", f"{self.in_chans} numbers > 0", list(self.std))
        check(0 < self.crop_pct <= 1, "data.crop_pct", "in (0, 1]", self.crop_pct)
        check(self.check_seconds >= 0, "data.check_seconds", ">= 0", self.check_seconds)
        known = ("bicubic", "bilinear")
        check(self.interpolation in known, "data.interpolation", " or ".join(known), self.interpolation)


@dataclass
class ImageDataConfig(DataConfig):
    """Data set of images, not of latents."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.name != "latents", "data", "images", self.name)
