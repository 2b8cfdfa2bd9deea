"""Autoencoders of latent diffusion, and the identity for pixel space.

A latent cache stores the *moments* of an image: mean and standard deviation of the posterior, `(B, 2 C, h, w)`, or the
code `(B, C, h, w)` of an autoencoder without a posterior. A latent is a sample of the posterior, shifted and scaled to
about unit variance: `(mean + std noise - shift) scale`. Stable Diffusion's VAE has scale 0.18215 and no shift
(arXiv 2112.10752, appendix G).

To add one: a loader here and a line in `AUTOENCODERS`; or a Python file outside the project, see `load_custom_vae`.

Shape letters: B batch, C latent channels, h w the latent's, H = h factor and W = w factor the image's.
"""

import functools
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

# Stable Diffusion's VAEs of DiT and SiT on the hub, see configs/autoencoder/sd_vae.yaml.
KNOWN_VAES = ("stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-mse")
CHUNK = 16  # images per call of the autoencoder: limits its large activations at full speed


@dataclass
class AutoencoderConfig:
    """Autoencoder between images and latents.

    Attributes:
        name: key in `AUTOENCODERS`: `none`, `diffusers` or `file`.
        source: folder or hub name (`diffusers`), Python file (`file`).
        weights: argument of the file's `load_autoencoder` (`file` only).
        channels, factor: latent channels (`channels`) and downsampling factor (`factor`) of the loaded autoencoder.
        scale, shift: scale and shift of the latents; null uses the autoencoder's own values, or 1 and 0 without them.
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
        rule = "null unless autoencoder.name=file"
        check(self.weights is None or self.name == "file", "autoencoder.weights", rule, self.weights)
        check(self.scale is None or self.scale > 0, "autoencoder.scale", "> 0 or null", self.scale)
        if self.name == "none":
            check(self.factor == 1, "autoencoder.factor", "1 in pixel space", self.factor)
            for key in ("source", "scale", "shift"):
                check(getattr(self, key) is None, f"autoencoder.{key}", "null in pixel space", getattr(self, key))
        else:
            check(self.source is not None, "autoencoder.source", "a path or a hub name", self.source)
        for key in ("source", "weights"):  # absolute, so that the run can be sampled from any working directory
            value = getattr(self, key)
            if value is not None and Path(value).expanduser().exists():
                setattr(self, key, str(Path(value).expanduser().resolve()))


class Autoencoder:
    """Frozen autoencoder; always computes in float32, also inside a bf16 run.

    Args:
        network: module with `encode(images) -> moments` and `decode(unscaled latents) -> images`.
        scale, shift: scale and shift of the latents where the config has null.
        text: source or settings of the network, hashed together with its parameters.
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
        self.network.to(device)
        self.device = device
        return self

    def identity(self) -> dict[str, Any]:
        """Return everything that a latent depends on besides its image; equal identities give equal latents."""
        return {key: getattr(self, key) for key in ("name", "sha256", "channels", "factor", "scale", "shift")}

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images `(B, 3, H, W)` in [-1, 1] as moments `(B, 2 C or C, h, w)`."""
        with computing(Precision.fp32, images.device):
            return torch.cat([self.network.encode(chunk) for chunk in images.split(CHUNK)])

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Sample latents `(B, C, h, w)` from moments and `noise` of that shape, which is unused without a posterior."""
        if not self.has_posterior:
            return (moments - self.shift) * self.scale
        mean, std = moments.chunk(2, dim=1)
        return (mean + std * noise - self.shift) * self.scale

    @functools.cached_property
    def has_posterior(self) -> bool:
        """Whether the moments are a mean and a standard deviation."""
        image = torch.zeros(1, 3, 8 * self.factor, 8 * self.factor, device=self.device)
        return self.encode(image).shape[1] == 2 * self.channels

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents `(B, C, h, w)` to images `(B, 3, H, W)`, roughly in [-1, 1]."""
        with computing(Precision.fp32, latents.device):
            codes = latents.float() / self.scale + self.shift
            return torch.cat([self.network.decode(chunk) for chunk in codes.split(CHUNK)])


class PixelSpace(nn.Module):
    """Identity: images are their own latents."""

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class DiffusersVAE(nn.Module):
    """Adapter from diffusers' `AutoencoderKL` to `encode` and `decode`."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def encode(self, images: Tensor) -> Tensor:
        posterior = self.vae.encode(images).latent_dist
        return torch.cat((posterior.mean, posterior.std), dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample


def is_path(source: str) -> bool:
    """Whether the source of a diffusers autoencoder is a path, not a hub name."""
    folder = Path(source).expanduser()
    return folder.is_absolute() or source.startswith(".") or folder.exists()


def load_diffusers_vae(config: AutoencoderConfig) -> Autoencoder:
    """Load an `AutoencoderKL` in diffusers' format from a folder or the hub; scale and shift come from its config.

    Raises:
        ConfigError: if it cannot be loaded or does not match the config.
    """
    from diffusers.models import AutoencoderKL

    source = str(config.source)
    folder = Path(source).expanduser()
    if is_path(source):
        check((folder / "config.json").is_file(), "autoencoder.source", "a folder with diffusers' config.json", source)
    try:
        vae, loading_info = AutoencoderKL.from_pretrained(
            str(folder) if folder.exists() else source,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            use_safetensors=None if folder.exists() else True,  # a folder may have only a .bin file, which is a pickle
        )
    except Exception as error:  # diffusers, huggingface_hub and safetensors raise errors of their own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        remedy = "" if folder.exists() else f"; on a machine with network access: hf download {source} --local-dir DIR,"
        remedy += " then autoencoder.source=DIR" if remedy else ""
        raise ConfigError(f"autoencoder.source: '{source}' cannot be loaded ({reason[0]}){remedy}") from error
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    if wrong := [f"{key} {loading_info[key][0]}" for key in keys if loading_info[key]]:
        raise ConfigError(
            f"autoencoder.source: the weights in '{source}' do not match its config.json ({'; '.join(wrong)})"
        )
    settings: Any = vae.config
    expected = {"channels": settings.latent_channels, "factor": 2 ** (len(settings.block_out_channels) - 1)}
    for key, value in expected.items():
        ours = getattr(config, key)
        check(ours == value, f"autoencoder.{key}", f"{value} for '{source}'", ours)
    shift = getattr(settings, "shift_factor", None) or 0.0
    text = json.dumps({key: value for key, value in settings.items() if key[0] != "_"}, sort_keys=True, default=str)
    return Autoencoder(config, DiffusersVAE(vae), settings.scaling_factor, shift, text)


def load_custom_vae(config: AutoencoderConfig) -> Autoencoder:
    """Load the autoencoder that a Python file outside the project builds.

    The file defines `load_autoencoder(weights)`, which receives `autoencoder.weights` and returns an `nn.Module` with
    `encode`, images `(B, 3, H, W)` in [-1, 1] to moments, and `decode`, unscaled latents to images. The identity
    includes the parameters and the text of the file.

    Raises:
        ConfigError: if the file is missing, fails, or returns something else.
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
    except Exception as error:  # user code
        reason = str(error).strip().splitlines() or [""]
        call = f"{path} with autoencoder.weights={config.weights}"
        raise ConfigError(f"autoencoder.source: {call}: {type(error).__name__}: {reason[0]}") from error
    shape = tuple(moments.shape)
    fits = shape in ((1, config.channels, 8, 8), (1, 2 * config.channels, 8, 8))
    if not fits:
        raise ConfigError(
            f"autoencoder.channels={config.channels} autoencoder.factor={config.factor}: {path} must encode "
            f"{side} x {side} px as {config.channels} or {2 * config.channels} channels of 8 x 8, got {shape[1:]}"
        )
    rule = f"decode {config.channels} channels of 8 x 8 to {side} x {side} px"
    check(tuple(image.shape) == (1, 3, side, side), f"autoencoder.source: {path}", rule, tuple(image.shape))
    return autoencoder


# name -> (config dataclass, loader)
AUTOENCODERS: dict[str, tuple[type, Callable[[Any], Autoencoder]]] = {
    "none": (AutoencoderConfig, lambda config: Autoencoder(config, PixelSpace())),
    "diffusers": (AutoencoderConfig, load_diffusers_vae),
    "file": (AutoencoderConfig, load_custom_vae),
}


def load_autoencoder(config: AutoencoderConfig, device: torch.device) -> Autoencoder:
    """Load the autoencoder that `config` describes, on a device."""
    return AUTOENCODERS[config.name][1](config).to(device)
