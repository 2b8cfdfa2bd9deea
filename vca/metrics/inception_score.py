"""Inception Score (arXiv 1606.03498): confidence of a classifier per image, and diversity of its predictions.

    IS = exp( mean_x KL( p(y | x) || p(y) ) )

Shape letters: N images, K classes.
"""

import numpy as np
import torch
from torch import Tensor

from vca.metrics.common import Score


def inception_score(logits: Tensor | np.ndarray, split_size: int = 5000) -> Score:
    """Compute mean and std of the score over splits of consecutive images, in float64.

    Args:
        logits: `(N, K)`; for Inception, by convention, without the bias of the last layer.
        split_size: images per split, without shuffling; the last split may be smaller.

    Raises:
        ValueError: if the logits are not `(N, K)`, or not finite.
    """
    logits = torch.as_tensor(logits)
    if logits.ndim != 2 or not len(logits):
        raise ValueError(f"logits must be (N, K), got {tuple(logits.shape)}")
    if split_size < 1:
        raise ValueError(f"split_size must be >= 1, got {split_size}")
    if not torch.isfinite(logits).all():
        raise ValueError("logits must be finite, got NaN or infinity")
    scores = []
    for split in logits.split(split_size):
        log_p = split.double().log_softmax(dim=1)  # (n, K)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(dim=0).log())).nansum(dim=1)  # 0 log 0 is 0
        scores.append(float(divergence.mean().exp()))
    return Score(float(np.mean(scores)), float(np.std(scores)))
