"""Learned parameters of the VCA function, in the form that the reference and the optimized implementation take."""

from typing import NamedTuple

from torch import Tensor


class ContrastParameters(NamedTuple):
    """Parameters of one VCA layer, for M heads of dim D and n contrast tokens."""

    e_pos: Tensor | None  # (M, n, D), embedding of the positive stream; None if the stream does not use it
    e_neg: Tensor | None  # (M, n, D), of the negative stream
    lambda1: Tensor | float | None  # of Stage I: scalar or (B, M, n, 1); None: plain stage (positive stream only)
    lambda2: Tensor | float | None  # of Stage II: scalar or (B, M, N, 1)
    lambda_init: float  # constant of the layer; both norms are scaled by 1 - lambda_init
    norm1_weight: Tensor | None  # (D,), of Stage I; None: neither norm nor scale
    norm2_weight: Tensor | None  # (D,), of Stage II
    pool_weight: Tensor | None = None  # (C, 1, H // h, W // w), kernel of pooling=depthwise
