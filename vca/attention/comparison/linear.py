"""Plain linear attention with three feature maps f.

    elu, relu   o_i = f(q_i) sum_j f(k_j)^T v_j / (f(q_i) . sum_j f(k_j) + eps),   f(x) = elu(x) + 1 or relu(x)
    softmax     o_i = softmax_D(q_i) sum_j softmax_N(k)_j^T v_j

`elu` is "Transformers are RNNs" (arXiv 2006.16236), `softmax` is Efficient Attention (arXiv 1812.01243), with a softmax
of q over the head dim and of k over the tokens. `relu` with `qk_norm=true` is the linear baseline of MHLA (arXiv
2601.07832). A query that relu maps to zero gives zero.

Shape letters: B batch, M heads, N tokens, D head dim.
"""

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from vca.attention.base import AttentionConfig, ProjectedAttention, Tokens, choose

EPS = 1e-6  # added to the sum over all tokens


class FeatureMap(Enum):
    """Map of queries and keys to non-negative features."""

    elu = "elu"
    relu = "relu"
    softmax = "softmax"


@dataclass
class LinearConfig(AttentionConfig):
    """Options of linear attention.

    Attributes:
        feature_map: `elu` (elu + 1), `relu` or `softmax`.
    """

    name: str = "linear"
    feature_map: FeatureMap = FeatureMap.elu

    def __post_init__(self) -> None:
        super().__post_init__()
        self.feature_map = choose(FeatureMap, self.feature_map, "attention.feature_map")


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Compute `q sum_j k_j^T v_j / (q . sum_j k_j + eps)` of features q, k and v `(B, M, N, D)`, in the dtype of v.

    Sums and the division run at least in float32. Dividing both sums by N keeps them within the range of float16.
    """
    acc_dtype, num_tokens = torch.promote_types(v.dtype, torch.float32), k.shape[2]
    k_mean = k.to(acc_dtype).mean(dim=2, keepdim=True)  # (B, M, 1, D)
    kv = k.to(v.dtype).transpose(2, 3) @ (v / num_tokens)  # (B, M, D, D)
    out = (q.to(v.dtype) @ kv).to(acc_dtype)  # (B, M, N, D)
    return (out / ((q.to(acc_dtype) * k_mean).sum(-1, keepdim=True) + eps / num_tokens)).to(v.dtype)


class LinearAttention(ProjectedAttention):
    """Plain linear attention as a replacement for MHSA; takes the arguments of `ProjectedAttention`."""

    Config = LinearConfig

    def attend(self, tokens: Tokens) -> Tensor:
        q, k, v = tokens[:3]
        acc_dtype = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(acc_dtype), k.to(acc_dtype)
        if self.config.feature_map is FeatureMap.softmax:
            kv = k.softmax(dim=2).to(v.dtype).transpose(2, 3) @ v  # (B, M, D, D)
            return q.softmax(dim=3).to(v.dtype) @ kv
        feature_map = F.relu if self.config.feature_map is FeatureMap.relu else elu_plus_one
        return linear_attention(feature_map(q), feature_map(k), v, EPS)


def elu_plus_one(x: Tensor) -> Tensor:
    """Compute `elu(x) + 1`, which is positive."""
    return F.elu(x) + 1
