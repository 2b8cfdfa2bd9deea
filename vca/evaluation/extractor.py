"""From 8-bit images to the features that sets of images are compared by.

`inception` is the network of FID: torch-fidelity's conversion of the one of 2015, with its file of weights.
`classifier` is one that this project trained, `file` any other. To add one: a config dataclass, a loader and a line in
`EXTRACTORS`; or a Python file outside the project, see `from_file`.

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
    """Of a batch: `pool` `(B, D)`, and where the network has them `logits` `(B, K)` and `spatial` `(B, S)`."""

    pool: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


@dataclass
class InceptionConfig:
    """The network of FID.

    Attributes:
        weights: its file; null looks where torch-fidelity keeps it, and fetches it where there is a network.
        sha256: that this file must have; null takes any, and a figure is then no FID.
    """

    name: str = "inception"
    weights: str | None = None
    sha256: str | None = INCEPTION_SHA256


@dataclass
class ClassifierConfig:
    """A classifier of this project.

    Attributes:
        run: run directory of `train_cls.py`, of which the newest checkpoint is read.
        weights: `ema`, the average where there is one, or `raw`.
    """

    name: str = "classifier"
    run: str | None = None
    weights: InitWeights = InitWeights.ema

    def __post_init__(self) -> None:
        check(self.run is not None, "extractor.run", "given: a run directory of train_cls.py", None)


@dataclass
class FileConfig:
    """A Python file outside the project.

    Attributes:
        source: the file.
        weights: what its function is given.
    """

    name: str = "file"
    source: str | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        check(self.source is not None, "extractor.source", "given: a Python file", None)


class Extractor:
    """A frozen network on a device. It runs in float32 without TF32.

    Args:
        name: the key in `EXTRACTORS`.
        network: maps images `(B, C, H, W)` uint8 to `Features`, a mapping of such, or pooled features alone.
        channels: C; None takes any.
        text: what makes the network besides its parameters.
        published: whether these are the weights of FID.
    """

    def __init__(
        self, name: str, network: nn.Module, channels: int | None = None, text: str = "", published: bool = False
    ) -> None:
        self.name, self.channels, self.published = name, channels, published
        self.network = network.eval().requires_grad_(False)
        self.sha256 = tensors_sha256(network.state_dict(), text)
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> "Extractor":
        """Move to a device."""
        self.network.to(device)
        self.device = device
        return self

    def identity(self) -> dict[str, Any]:
        """What features depend on besides their image, as plain values."""
        return {"name": self.name, "sha256": self.sha256, "published": self.published}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Features of images `(B, C, H, W)` uint8, on the device, in float32.

        Raises:
            ValueError: if the network returns something else.
        """
        with computing(Precision.fp32, self.device):
            found = self.network(images.to(self.device, non_blocking=True))
        if isinstance(found, Tensor):
            found = Features(found)
        elif isinstance(found, Mapping):
            found = Features(**found)
        for name, rows in found._asdict().items():
            if rows is not None and (rows.ndim != 2 or len(rows) != len(images)):
                shape = tuple(rows.shape)
                raise ValueError(f"{name} of {len(images)} images must be ({len(images)}, features), got {shape}")
        return found


class Inception(nn.Module):
    """torch-fidelity's network. Spatial features are the first 7 channels of `Mixed_6d.branch1x1`, row by row."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.branch: list[Tensor] = []
        branch: Any = network.get_submodule("Mixed_6d.branch1x1")
        branch.register_forward_hook(lambda module, inputs, output: self.branch.append(output))

    def forward(self, images: Tensor) -> Features:
        """`(B, 3, H, W)` uint8; it resizes them to 299 pixels itself, as TensorFlow 1 did."""
        pool, logits = self.network(images)  # (B, 2048), (B, 1008) without the bias of the last layer
        spatial = self.branch.pop()[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)
        return Features(pool, logits, spatial)


class Classifier(nn.Module):
    """A backbone of this project: the features before its head, and its logits."""

    def __init__(self, model: Any, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, images: Tensor) -> Features:
        """`(B, C, H, W)` uint8."""
        mean, std = (images.new_tensor(values, dtype=torch.float32)[:, None, None] for values in (self.mean, self.std))
        tokens = self.model.forward_features((images / 255 - mean) / std)
        return Features(self.model.forward_head(tokens, pre_logits=True), self.model.forward_head(tokens))


def inception(config: InceptionConfig, world: World, rebuild: Any) -> Extractor:
    """The network of FID.

    Raises:
        ConfigError: if its weights are not there, or are others.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = world.from_main(lambda: find_inception_weights(config))
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if config.sha256 is not None and digest != config.sha256:
        raise ConfigError(
            f"extractor.weights: {path} has sha256 {digest[:12]}..., {INCEPTION_FILE} has {config.sha256[:12]}...; "
            f"copy it again, or for other weights: extractor.sha256=null"
        )
    try:
        load_tensors(io.BytesIO(content))  # the network reads it without this
        with redirect_stdout(io.StringIO()):
            network = FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=io.BytesIO(content)
            )
    except Exception as error:  # whatever the parser of unknown bytes ran into
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"extractor.weights: {path} does not hold the Inception network ({reason[0]})") from error
    return Extractor("inception", Inception(network), 3, published=digest == INCEPTION_SHA256)


def find_inception_weights(config: InceptionConfig) -> Path:
    """The file of weights; fetched where it is not there and there is a network.

    Raises:
        ConfigError: says which file is needed, its sha256, and where to put it.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    if config.weights is not None:
        path = Path(config.weights).expanduser()
        check(path.is_file(), "extractor.weights", f"a file: {INCEPTION_FILE}", config.weights)
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), INCEPTION_SHA256, progress=False)
        except Exception as error:  # urllib, ssl and the disk each have their own
            raise ConfigError(
                f"extractor.weights: {INCEPTION_FILE} cannot be fetched ({error}); get it where there is a network, "
                f"from {URL_INCEPTION_V3} (sha256 {INCEPTION_SHA256}), and put it into {path.parent} or name it: "
                f"extractor.weights=FILE"
            ) from error
    return path


def classifier(config: ClassifierConfig, world: World, rebuild: Callable[[Mapping[str, Any]], nn.Module]) -> Extractor:
    """A classifier of this project.

    Raises:
        ConfigError: if there is no such run, or it holds no checkpoint.
    """
    folder = Path(str(config.run)).expanduser()
    check((folder / "config.json").is_file(), "extractor.run", "a run directory with a config.json", config.run)
    saved_config = read_config(folder)
    check("inputs" not in saved_config, "extractor.run", "a run of train_cls.py", config.run)
    saved = load_latest_for_all(folder / "checkpoints", world, set_aside=False)
    if saved is None:
        raise ConfigError(f"extractor.run: {folder / 'checkpoints'} holds no checkpoint")
    model = rebuild(saved_config)
    averaged = config.weights is InitWeights.ema and saved["ema"] is not None
    with must_fit(checkpoint_path(folder / "checkpoints", saved["step"])):
        model.load_state_dict(saved["ema" if averaged else "model"])
    data = saved_config["data"]
    text = f"{saved_config['model']} {saved_config['attention']} {data['mean']} {data['std']}"
    return Extractor("classifier", Classifier(model, data["mean"], data["std"]), data["in_chans"], text)


def from_file(config: FileConfig, world: World, rebuild: Any) -> Extractor:
    """A network that a Python file outside the project makes.

    The file defines `load_extractor(weights)`, which gets `extractor.weights` and returns an `nn.Module` that maps
    images `(B, C, H, W)` uint8 to pooled features `(B, D)`, or to a dict of `pool`, `logits`, `spatial`. The text of
    the file is part of the identity, as the parameters are.

    Raises:
        ConfigError: if the file is missing, fails, or makes something else.
    """
    path = Path(str(config.source)).expanduser()
    try:
        network = load_function(path, "load_extractor", "extractor.source")(config.weights)
        if not isinstance(network, nn.Module):
            raise TypeError("load_extractor must return a module")
    except ConfigError:
        raise
    except Exception as error:  # somebody else's code
        reason = str(error).strip().splitlines() or [""]
        made = f"{path} with extractor.weights={config.weights}"
        raise ConfigError(f"extractor.source: {made}: {type(error).__name__}: {reason[0]}") from error
    return Extractor("file", network, text=path.read_text() + describe_weights(config.weights))


# name -> (config dataclass, loader)
EXTRACTORS: dict[str, tuple[type, Callable[[Any, World, Any], Extractor]]] = {
    "inception": (InceptionConfig, inception),
    "classifier": (ClassifierConfig, classifier),
    "file": (FileConfig, from_file),
}


def load_extractor(config: Any, world: World, rebuild: Callable[[Mapping[str, Any]], nn.Module]) -> Extractor:
    """The extractor that `config` (one of the dataclasses in `EXTRACTORS`) describes, on the device of this process.

    Args:
        config: which.
        world: this process; all ranks call this alike.
        rebuild: makes the network that a run's `config.json` describes, for `classifier`.
    """
    return EXTRACTORS[config.name][1](config, world, rebuild).to(world.device)
