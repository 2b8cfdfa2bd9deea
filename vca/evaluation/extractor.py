"""Feature extractors: networks that map 8-bit images to the features compared by FID and the other metrics.

`inception` is FID's network in torch-fidelity's conversion, `classifier` a classifier trained by this project, `file`
any other network. To add one: a config dataclass, a loader and a line in `EXTRACTORS`; or a Python file outside the
project, see `load_custom_extractor`.

Shape letters: B batch, D features, K classes, S spatial features.
"""

import hashlib
import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vca.runtime.compute import Precision, computing
from vca.runtime.digest import tensors_sha256
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError, check
from vca.runtime.files import load_tensors
from vca.runtime.plugin import describe_weights, load_function
from vca.runtime.rundir import read_config
from vca.training.checkpoint import checkpoint_path, load_latest_for_all, must_fit
from vca.training.pretrained import InitWeights

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Features(NamedTuple):
    """Features of a batch: `pooled` `(B, D)` and, if the network has them, `logits` `(B, K)` and `spatial` `(B, S)`."""

    pooled: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


@dataclass
class InceptionConfig:
    """FID's Inception network.

    Attributes:
        name: `inception`, the key in `EXTRACTORS`.
        weights: weights file; null uses torch-fidelity's location and downloads the file if it is missing.
        sha256: required checksum of the file; null accepts any file, and the metric is then not labelled FID.
    """

    name: str = "inception"
    weights: str | None = None
    sha256: str | None = INCEPTION_SHA256


@dataclass
class ClassifierConfig:
    """A classifier trained by this project.

    Attributes:
        name: `classifier`, the key in `EXTRACTORS`.
        run: run directory of `train_cls.py`; its newest checkpoint is used.
        weights: `ema` (raw if the run has no EMA) or `raw`.
    """

    name: str = "classifier"
    run: str | None = None
    weights: InitWeights = InitWeights.ema

    def __post_init__(self) -> None:
        check(self.run is not None, "extractor.run", "a run directory of train_cls.py", None)


@dataclass
class FileConfig:
    """An extractor from a Python file outside the project.

    Attributes:
        name: `file`, the key in `EXTRACTORS`.
        source: the Python file.
        weights: argument of its `load_extractor`.
    """

    name: str = "file"
    source: str | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        check(self.source is not None, "extractor.source", "a Python file", None)


class Extractor:
    """Frozen feature network; always computes in float32 without TF32.

    Args:
        name: key in `EXTRACTORS`.
        network: maps images `(B, C, H, W)` uint8 to `Features`, a dict of its fields, or pooled features only.
        channels: required C; None accepts any.
        text: source or settings of the network, hashed together with its parameters.
        published: whether these are the standard FID weights.
    """

    def __init__(
        self, name: str, network: nn.Module, channels: int | None = None, text: str = "", published: bool = False
    ) -> None:
        self.name, self.channels, self.published = name, channels, published
        self.network = network.eval().requires_grad_(False)
        self.sha256 = tensors_sha256(network.state_dict(), text)
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> "Extractor":
        self.network.to(device)
        self.device = device
        return self

    def identity(self) -> dict[str, Any]:
        """Return everything that features depend on besides their image."""
        return {"name": self.name, "sha256": self.sha256, "published": self.published}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Compute features of images `(B, C, H, W)` uint8, in float32.

        Raises:
            ValueError: if the network's output has another format.
        """
        with computing(Precision.fp32, self.device):
            output = self.network(images.to(self.device, non_blocking=True))
        if isinstance(output, Tensor):
            output = Features(output)
        elif isinstance(output, Mapping):  # `pool` is the former name of `pooled`
            output = Features(**{"pooled" if name == "pool" else name: rows for name, rows in output.items()})
        for name, rows in output._asdict().items():
            if rows is not None and (rows.ndim != 2 or len(rows) != len(images)):
                shape = tuple(rows.shape)
                raise ValueError(f"{name} of {len(images)} images must be ({len(images)}, features), got {shape}")
        return output


class Inception(nn.Module):
    """torch-fidelity's network; spatial features are the first 7 channels of `Mixed_6d.branch1x1`, flattened."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.branch: list[Tensor] = []
        branch: Any = network.get_submodule("Mixed_6d.branch1x1")
        branch.register_forward_hook(lambda module, inputs, output: self.branch.append(output))

    def forward(self, images: Tensor) -> Features:
        """Compute features of `(B, 3, H, W)` uint8, which the network resizes to 299 pixels as TensorFlow 1 did."""
        pooled, logits = self.network(images)  # (B, 2048), (B, 1008) without the last bias
        spatial = self.branch.pop()[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)
        return Features(pooled, logits, spatial)


class Classifier(nn.Module):
    """A backbone of this project: features before the head, and logits."""

    def __init__(self, model: Any, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, images: Tensor) -> Features:
        mean, std = (images.new_tensor(values, dtype=torch.float32)[:, None, None] for values in (self.mean, self.std))
        tokens = self.model.forward_features((images / 255 - mean) / std)
        return Features(self.model.forward_head(tokens, pre_logits=True), self.model.forward_head(tokens))


def load_inception(config: InceptionConfig, world: World, rebuild: Any) -> Extractor:
    """Load FID's Inception network.

    Raises:
        ConfigError: if the weights file is missing, or its checksum differs.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = world.from_main(lambda: find_inception_weights(config))
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if config.sha256 is not None and digest != config.sha256:
        raise ConfigError(
            f"extractor.weights: {path} must have sha256 {config.sha256[:12]}... ({INCEPTION_FILE}), got "
            f"{digest[:12]}...; copy it again, or set extractor.sha256=null for other weights"
        )
    try:
        load_tensors(io.BytesIO(content))  # rejects pickles; the network class does not
        with redirect_stdout(io.StringIO()):
            network = FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=io.BytesIO(content)
            )
    except Exception as error:  # unpickling unknown bytes raises anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"extractor.weights: {path} does not contain the Inception network ({reason[0]})") from error
    return Extractor("inception", Inception(network), 3, published=digest == INCEPTION_SHA256)


def find_inception_weights(config: InceptionConfig) -> Path:
    """Return the path of the weights file; downloads the file if it is missing.

    Raises:
        ConfigError: names the required file, its sha256, and where to put it.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    if config.weights is not None:
        path = Path(config.weights).expanduser()
        check(path.is_file(), "extractor.weights", f"the file {INCEPTION_FILE}", config.weights)
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), INCEPTION_SHA256, progress=False)
        except Exception as error:  # urllib, ssl and the file system raise errors of their own
            raise ConfigError(
                f"extractor.weights: cannot download {INCEPTION_FILE} ({error}); download it elsewhere from "
                f"{URL_INCEPTION_V3} (sha256 {INCEPTION_SHA256}), then put it into {path.parent} or set "
                f"extractor.weights=FILE"
            ) from error
    return path


def load_classifier(
    config: ClassifierConfig, world: World, rebuild: Callable[[Mapping[str, Any]], nn.Module]
) -> Extractor:
    """Load a classifier trained by this project.

    Raises:
        ConfigError: if there is no such run, or it has no checkpoint.
    """
    folder = Path(str(config.run)).expanduser()
    check((folder / "config.json").is_file(), "extractor.run", "a run directory with a config.json", config.run)
    saved_config = read_config(folder)
    check("inputs" not in saved_config, "extractor.run", "a run of train_cls.py", config.run)
    saved = load_latest_for_all(folder / "checkpoints", world, set_aside=False)
    if saved is None:
        raise ConfigError(f"extractor.run: {folder / 'checkpoints'} contains no checkpoint")
    model = rebuild(saved_config)
    use_ema = config.weights is InitWeights.ema and saved["ema"] is not None
    with must_fit(checkpoint_path(folder / "checkpoints", saved["step"])):
        model.load_state_dict(saved["ema" if use_ema else "model"])
    data = saved_config["data"]
    text = f"{saved_config['model']} {saved_config['attention']} {data['mean']} {data['std']}"
    return Extractor("classifier", Classifier(model, data["mean"], data["std"]), data["in_chans"], text)


def load_custom_extractor(config: FileConfig, world: World, rebuild: Any) -> Extractor:
    """Load the network that a Python file outside the project builds.

    The file defines `load_extractor(weights)`, which receives `extractor.weights` and returns an `nn.Module` that maps
    images `(B, C, H, W)` uint8 to pooled features `(B, D)`, or to a dict of `pooled`, `logits`, `spatial`. The identity
    includes the parameters and the text of the file.

    Raises:
        ConfigError: if the file is missing, fails, or returns something else.
    """
    path = Path(str(config.source)).expanduser()
    try:
        network = load_function(path, "load_extractor", "extractor.source")(config.weights)
        if not isinstance(network, nn.Module):
            raise TypeError("load_extractor must return a module")
    except ConfigError:
        raise
    except Exception as error:  # user code
        reason = str(error).strip().splitlines() or [""]
        call = f"{path} with extractor.weights={config.weights}"
        raise ConfigError(f"extractor.source: {call}: {type(error).__name__}: {reason[0]}") from error
    return Extractor("file", network, text=path.read_text() + describe_weights(config.weights))


# name -> (config dataclass, loader)
EXTRACTORS: dict[str, tuple[type, Callable[[Any, World, Any], Extractor]]] = {
    "inception": (InceptionConfig, load_inception),
    "classifier": (ClassifierConfig, load_classifier),
    "file": (FileConfig, load_custom_extractor),
}


def load_extractor(config: Any, world: World, rebuild: Callable[[Mapping[str, Any]], nn.Module]) -> Extractor:
    """Load the extractor that `config` (one of the dataclasses in `EXTRACTORS`) describes, on this rank's device.

    Args:
        config: the extractor's config.
        world: rank and device of this process; collective, all ranks must call it.
        rebuild: builds the network that a run's `config.json` describes, for `classifier`.
    """
    return EXTRACTORS[config.name][1](config, world, rebuild).to(world.device)
