"""From images to latents and back: the first stage of latent diffusion, or none of it (pixel space).

An image's *moments* are what a cache keeps of it: mean and standard deviation of the posterior, `(B, 2 C, h, w)`, or
the code alone, `(B, C, h, w)`, of an autoencoder without a posterior. A latent is a sample of the posterior, shifted
and scaled to about unit variance: `(mean + std noise - shift) scale`, for Stable Diffusion's VAE with scale 0.18215 and
no shift (arXiv 2112.10752, appendix G).

To add one: a loader here and a line in `AUTOENCODERS`; or a Python file outside the project, see `from_file`.

Shape letters: B batch, C latent channels, h w the latent's, H = h factor and W = w factor the image's.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vca.runtime.compute import Precision, computing
from vca.runtime.digest import tensors_sha256
from vca.runtime.errors import ConfigError, check
from vca.runtime.plugin import describe_weights, load_function

PART = 16  # images that go through an autoencoder at once: its activations are large, and its speed is reached


@dataclass
class AutoencoderConfig:
    """Which autoencoder.

    Attributes:
        name: the key in `AUTOENCODERS`: `none`, `diffusers` or `file`.
        source: of `diffusers` a folder or a name on the hub, of `file` a Python file.
        weights: of `file`: what its function is given.
        channels, factor: C, and how many times smaller a latent is than the image; what is loaded must agree.
        scale, shift: of the latents; null takes those of the autoencoder's own config, or 1 and 0.
    """

    name: str = "none"
    source: str | None = None
    weights: str | None = None
    channels: int = 3
    factor: int = 1
    scale: float | None = None
    shift: float | None = None

    def __post_init__(self) -> None:
        check(self.name in AUTOENCODERS, "autoencoder.name", f"one of {sorted(AUTOENCODERS)}", self.name)
        for key in ("channels", "factor"):
            check(getattr(self, key) >= 1, f"autoencoder.{key}", ">= 1", getattr(self, key))
        rule = "null but for autoencoder.name=file"
        check(self.weights is None or self.name == "file", "autoencoder.weights", rule, self.weights)
        check(self.scale is None or self.scale > 0, "autoencoder.scale", "> 0 or null", self.scale)
        if self.name == "none":
            check(self.factor == 1, "autoencoder.factor", "1 in pixel space", self.factor)
            for key in ("source", "scale", "shift"):
                check(getattr(self, key) is None, f"autoencoder.{key}", "null in pixel space", getattr(self, key))
        else:
            check(self.source is not None, "autoencoder.source", "a path or a name", self.source)
        for key in ("source", "weights"):  # so that a run can be read from another folder
            value = getattr(self, key)
            if value is not None and Path(value).expanduser().exists():
                setattr(self, key, str(Path(value).expanduser().resolve()))


class Autoencoder:
    """A frozen autoencoder on a device; it runs in float32, also where the training around it is in bf16.

    Args:
        config: which.
        network: with `encode(images) -> moments` and `decode(unscaled latents) -> images`.
        scale, shift: of the latents.
        text: what makes the network besides its parameters.
    """

    def __init__(
        self, config: AutoencoderConfig, network: Any, scale: float = 1.0, shift: float = 0.0, text: str = ""
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.name, self.channels, self.factor = config.name, config.channels, config.factor
        self.scale = config.scale if config.scale is not None else scale
        self.shift = config.shift if config.shift is not None else shift
        self.sha256 = tensors_sha256(network.state_dict(), text)
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> "Autoencoder":
        """Move to a device."""
        self.network.to(device)
        self.device = device
        return self

    def identity(self) -> dict[str, Any]:
        """What a latent depends on besides its image, as plain values; two autoencoders that agree on it are one."""
        return {key: getattr(self, key) for key in ("name", "sha256", "channels", "factor", "scale", "shift")}

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] to moments `(B, 2 C or C, h, w)`."""
        with computing(Precision.fp32, images.device):
            return torch.cat([self.network.encode(part) for part in images.split(PART)])

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Moments and `noise` `(B, C, h, w)` to latents `(B, C, h, w)`; without a posterior the noise is not used."""
        if not self.has_posterior(moments):
            return (moments - self.shift) * self.scale
        mean, std = moments.chunk(2, dim=1)
        return (mean + std * noise - self.shift) * self.scale

    def has_posterior(self, moments: Tensor) -> bool:
        """Whether these are a mean and a standard deviation."""
        return moments.shape[1] == 2 * self.channels

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `(B, C, h, w)` to images `(B, 3, H, W)`, about in [-1, 1]."""
        with computing(Precision.fp32, latents.device):
            return torch.cat(
                [self.network.decode(part) for part in (latents.float() / self.scale + self.shift).split(PART)]
            )


class PixelSpace(nn.Module):
    """Images are their own latents."""

    def encode(self, images: Tensor) -> Tensor:
        """As they are."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """As they are."""
        return latents


class DiffusersVAE(nn.Module):
    """An `AutoencoderKL` of diffusers with the interface of this file."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def encode(self, images: Tensor) -> Tensor:
        """Mean and standard deviation `(B, 2 C, h, w)`."""
        posterior = self.vae.encode(images).latent_dist
        return torch.cat((posterior.mean, posterior.std), dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents to images."""
        return self.vae.decode(latents).sample


def pixel_space(config: AutoencoderConfig) -> Autoencoder:
    """No autoencoder."""
    return Autoencoder(config, PixelSpace())


def from_diffusers(config: AutoencoderConfig) -> Autoencoder:
    """An `AutoencoderKL` in diffusers' format, from a folder or from the hub; scale and shift from its config.

    Raises:
        ConfigError: if it cannot be had, or is not what the config says.
    """
    from diffusers.models import AutoencoderKL

    source = str(config.source)
    folder = Path(source).expanduser()
    if folder.is_absolute() or source.startswith(".") or folder.exists():
        check((folder / "config.json").is_file(), "autoencoder.source", "a folder with diffusers' config.json", source)
    try:
        vae, loaded = AutoencoderKL.from_pretrained(
            str(folder) if folder.exists() else source, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # diffusers, the hub's client and safetensors each have their own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        there = "" if folder.exists() else f"; where there is a network: hf download {source} --local-dir FOLDER, then"
        there += " autoencoder.source=FOLDER" if there else ""
        raise ConfigError(f"autoencoder.source: '{source}' cannot be loaded ({reason[0]}){there}") from error
    if wrong := [
        f"{key} {loaded[key][0]}" for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if loaded[key]
    ]:
        raise ConfigError(
            f"autoencoder.source: the weights in '{source}' are not those of its config ({'; '.join(wrong)})"
        )
    settings: Any = vae.config
    found = {"channels": settings.latent_channels, "factor": 2 ** (len(settings.block_out_channels) - 1)}
    for key, value in found.items():
        ours = getattr(config, key)
        check(ours == value, f"autoencoder.{key}", f"{value}, as '{source}' has it", ours)
    shift = getattr(settings, "shift_factor", None) or 0.0
    text = json.dumps({key: value for key, value in settings.items() if key[0] != "_"}, sort_keys=True, default=str)
    return Autoencoder(config, DiffusersVAE(vae), settings.scaling_factor, shift, text)


def from_file(config: AutoencoderConfig) -> Autoencoder:
    """An autoencoder that a Python file outside the project makes.

    The file defines `load_autoencoder(weights)`, which gets `autoencoder.weights` and returns an `nn.Module` with
    `encode`, images `(B, 3, H, W)` in [-1, 1] to moments, and `decode`, unscaled latents to images. The text of the
    file is part of the identity, as the parameters are.

    Raises:
        ConfigError: if the file is missing, fails, or makes something else.
    """
    path = Path(str(config.source)).expanduser()
    side = 8 * config.factor
    try:
        network = load_function(path, "load_autoencoder", "autoencoder.source")(config.weights)
        if not isinstance(network, nn.Module) or not hasattr(network, "encode") or not hasattr(network, "decode"):
            raise TypeError("load_autoencoder must return a module with encode and decode")
        autoencoder = Autoencoder(config, network, text=path.read_text() + describe_weights(config.weights))
        moments = autoencoder.encode(torch.zeros(1, 3, side, side))
        image = autoencoder.decode(torch.zeros(1, config.channels, 8, 8))
    except ConfigError:
        raise
    except Exception as error:  # somebody else's code
        reason = str(error).strip().splitlines() or [""]
        made = f"{path} with autoencoder.weights={config.weights}"
        raise ConfigError(f"autoencoder.source: {made}: {type(error).__name__}: {reason[0]}") from error
    shape = tuple(moments.shape)
    fits = shape in ((1, config.channels, 8, 8), (1, 2 * config.channels, 8, 8))
    if not fits:
        raise ConfigError(
            f"autoencoder.channels={config.channels} autoencoder.factor={config.factor}: {path} makes {side} x {side} "
            f"px {shape[1:]}, not {config.channels} or {2 * config.channels} channels of 8 x 8; set what it has"
        )
    rule = f"decode {config.channels} channels of 8 x 8 to {side} x {side} px"
    check(tuple(image.shape) == (1, 3, side, side), f"autoencoder.source: {path}", rule, tuple(image.shape))
    return autoencoder


# name -> (config dataclass, loader)
AUTOENCODERS: dict[str, tuple[type, Callable[[Any], Autoencoder]]] = {
    "none": (AutoencoderConfig, pixel_space),
    "diffusers": (AutoencoderConfig, from_diffusers),
    "file": (AutoencoderConfig, from_file),
}


def load_autoencoder(config: AutoencoderConfig, device: torch.device) -> Autoencoder:
    """The autoencoder that `config` describes, on a device."""
    return AUTOENCODERS[config.name][1](config).to(device)
