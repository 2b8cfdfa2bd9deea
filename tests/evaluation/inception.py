"""torch-fidelity's Inception network with random weights in its own file format; the real ones need a network."""

import io
from unittest.mock import patch

import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

FEATURES = ["2048", "logits_unbiased"]


def write_random_weights(path, images, seed=0):
    """A file like weights-inception-2015-12-05-6726825d.pth: 566 tensors by name.

    The norms are set by the statistics of some images `(B, 3, H, W)` uint8, as a training would: without that, features
    of a random network are almost the same for all images.
    """
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(seed)
    with patch.object(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None):
        network = FeatureExtractorInceptionV3("random", FEATURES, feature_extractor_weights_path=empty)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    nn.init.normal_(network.fc.weight, std=0.1)
    network.train()
    network(images)
    torch.save(network.state_dict(), path)


def theirs(path):
    """torch-fidelity's own extractor of both kinds of features."""
    return FeatureExtractorInceptionV3("theirs", FEATURES, feature_extractor_weights_path=str(path))
