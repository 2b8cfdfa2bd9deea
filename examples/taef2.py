"""Example of an autoencoder for `autoencoder=file`: TAEF2, with 32 latent channels (madebyollin/taesd, MIT).

    autoencoder=file autoencoder.source=examples/taef2.py autoencoder.weights=FOLDER autoencoder.channels=32

FOLDER contains taef2_encoder.pth and taef2_decoder.pth. The file must define `load_autoencoder(weights)`; it returns a
module with `encode(images)` and `decode(latents)` for images in [-1, 1].
"""

from pathlib import Path

import torch
from torch import nn


def conv3(n_in, n_out, **options):
    return nn.Conv2d(n_in, n_out, 3, padding=1, **options)


class Block(nn.Module):
    """Residual block of three convolutions; `norm` adds a normalized 1 x 1 branch."""

    def __init__(self, norm=False):
        super().__init__()
        self.conv = nn.Sequential(conv3(64, 64), nn.ReLU(), conv3(64, 64), nn.ReLU(), conv3(64, 64))
        self.pool = None
        if norm:
            wide, narrow = nn.Conv2d(64, 256, 1, bias=False), nn.Conv2d(256, 64, 1, bias=False)
            self.pool = nn.Sequential(wide, nn.GroupNorm(4, 256), nn.ReLU(), narrow)

    def forward(self, x):
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(x + self.conv(x))


class SoftClamp(nn.Module):
    """Limit latents smoothly to [-3, 3]."""

    def forward(self, x):
        return 3 * torch.tanh(x / 3)


def down():
    return conv3(64, 64, stride=2, bias=False)


def up():
    return nn.Upsample(scale_factor=2), conv3(64, 64, bias=False)


def blocks(norm=False):
    return [Block(norm) for _ in range(3)]


class TAEF2(nn.Module):
    """Encoder and decoder with a spatial factor of 8."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            conv3(3, 64), Block(), down(), *blocks(), down(), *blocks(), down(), *blocks(norm=True), conv3(64, 32)
        )
        self.decoder = nn.Sequential(
            SoftClamp(), conv3(32, 64), nn.ReLU(), *blocks(norm=True),
            *up(), *blocks(), *up(), *blocks(), *up(), Block(), conv3(64, 3),
        )  # fmt: skip

    def encode(self, images):
        return self.encoder((images + 1) / 2)

    def decode(self, latents):
        return 2 * self.decoder(latents) - 1


def load_autoencoder(weights):
    network = TAEF2()
    for part in ("encoder", "decoder"):
        state = torch.load(Path(weights) / f"taef2_{part}.pth", map_location="cpu", weights_only=True)
        getattr(network, part).load_state_dict(state)
    return network
