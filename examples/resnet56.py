"""Example of a feature extractor for `extractor=file`: a CIFAR-10 ResNet-56 (akamaster/pytorch_resnet_cifar10, BSD).

    extractor=file extractor.source=examples/resnet56.py extractor.weights=resnet56-4bfd9763.th

The file must define `load_extractor(weights)`. It returns a module that maps images `(B, 3, H, W)` in [0, 255] to
pooled features `(B, 64)` and logits `(B, 10)`.
"""

import torch
import torch.nn.functional as F
from torch import nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Residual block; if the width grows, the shortcut is strided and padded with zero channels."""

    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.stride, self.padding = stride, (n_out - n_in) // 2

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding)))


def stage(n_in, n_out, stride):
    return nn.Sequential(Block(n_in, n_out, stride), *(Block(n_out, n_out, 1) for _ in range(8)))


class ResNet56(nn.Module):
    """ResNet-56 with input normalization."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, images):
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
        x = F.relu(self.bn1(self.conv1((images / 255 - mean) / std)))
        pooled = self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3))
        return {"pool": pooled, "logits": self.linear(pooled)}


def load_extractor(weights):
    network = ResNet56()
    state = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return network
