"""Published numbers of the paper, Tables 1 to 4; tables, scripts and tests read them from here."""

from typing import NamedTuple


class Table1Row(NamedTuple):
    """Parameters in millions, multiply-adds in billions, and ImageNet-1K top-1 in percent."""

    params: float
    macs: float
    top1: float


class AblationRow(NamedTuple):
    """Top-1 of DeiT-Tiny in percent, and FID-50K of DiT-S/2."""

    top1: float
    fid: float


CLASSIFIERS = {
    "deit_tiny": "DeiT-Tiny",
    "deit_small": "DeiT-Small",
    "pvt_tiny": "PVT-Tiny",
    "swin_tiny": "Swin-Tiny",
    "cswin_tiny": "CSwin-Tiny",
}

# (model, attention) -> row. The softmax parameters of Swin (28.9) and CSwin (20.5) match no known model.
TABLE1 = {
    ("deit_tiny", "softmax"): Table1Row(5.7, 1.2, 72.2),
    ("deit_tiny", "vca"): Table1Row(6.0, 1.2, 75.6),
    ("deit_small", "softmax"): Table1Row(22.1, 4.6, 79.8),
    ("deit_small", "vca"): Table1Row(22.6, 4.6, 80.7),
    ("pvt_tiny", "softmax"): Table1Row(13.2, 1.9, 75.1),
    ("pvt_tiny", "vca"): Table1Row(11.6, 2.0, 78.2),
    ("swin_tiny", "softmax"): Table1Row(28.9, 4.5, 81.3),
    ("swin_tiny", "vca"): Table1Row(28.5, 4.6, 82.3),
    ("cswin_tiny", "softmax"): Table1Row(20.5, 4.3, 82.7),
    ("cswin_tiny", "vca"): Table1Row(20.4, 4.3, 83.3),
}

# Model -> FID-50K without guidance, (softmax, VCA); None: the number is not available. 256 px unless stated.
TABLE2 = {
    "DiT-S/2": (67.2, 62.3),
    "DiT-S/4": (97.9, 92.7),
    "DiT-S/8": (None, None),
    "DiT-B/2": (42.9, 38.9),
    "DiT-B/4": (None, None),
    "DiT-B/8": (None, None),
    "DiT-S/2 at 512 px": (None, None),
    "SiT-S/2": (57.3, 53.0),
    "SiT-B/2": (35.3, 32.7),
}

TABLE3 = {
    "Stage I only": AblationRow(75.4, 64.6),
    "Stage II only": AblationRow(75.5, 64.3),
    "Differential Attention in both stages": AblationRow(75.1, 63.9),
    "VCA": AblationRow(75.6, 62.3),
}

TABLE4 = {
    "embedding only": AblationRow(75.1, 63.7),
    "pool + embedding": AblationRow(75.6, 62.3),
}
