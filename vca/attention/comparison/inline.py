"""InLine attention (arXiv 2412.06590): linear attention that subtracts the mean score, so that its weights sum to one.

    s_ij = q_i . k_j / (sqrt D N)
    o_i  = sum_j (s_ij - mean_j s_ij + 1 / N) v_j  =  mean(v) + q_i sum_j k_j^T (v_j - mean(v)) / (sqrt D N)
    K    = W2 GELU(W1 mean_i x_i + b1) + b2          W1, W2 grouped by head; a 3 x 3 kernel per image and channel
    y    = (o + DWConv_K(v)) Wo

The second form of o is computed: it is equal, and its large terms, which cancel in the first, are absent. The feature
map is the identity; the original's Swin code also has relu, leaky relu and exp. Weights may be negative and are not
bounded.

Prefix tokens: as in the original, the mean of x includes them, the convolution leaves them out and adds nothing to
them.

Shape letters: B batch, M heads, N = P + H W tokens (P prefix tokens, then the grid), C = M D channels, D head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca.attention.base import AttentionConfig, ProjectedAttention, Tokens
from vca.attention.geometry import to_image

KERNEL = 3  # side of the predicted kernels


@dataclass
class InLineConfig(AttentionConfig):
    """Options of InLine attention.

    Attributes:
        predicted_kernels: add a depthwise 3 x 3 convolution of v whose kernels are predicted for each image.
    """

    name: str = "inline"
    predicted_kernels: bool = True


def centered_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute o of the module's docstring for q, k and v `(B, M, N, D)`, in the dtype of q; means run in float32."""
    dtype, acc_dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    v_mean = v.to(acc_dtype).mean(dim=2, keepdim=True)  # (B, M, 1, D)
    root = k.shape[2] ** -0.5  # on both factors: 1 / N on one is subnormal in float16
    kv = (k * root).transpose(2, 3) @ ((v - v_mean) * root).to(dtype)  # (B, M, D, D)
    return (v_mean + (q @ kv).to(acc_dtype) * k.shape[3] ** -0.5).to(dtype)


class InLineAttention(ProjectedAttention):
    """InLine attention as a replacement for MHSA; takes the arguments of `ProjectedAttention`."""

    Config = InLineConfig

    def add_parameters(self) -> None:
        self.predictor: nn.Module | None = None
        if self.config.predicted_kernels:  # convolutions of one position: linear layers grouped by head
            self.predictor = nn.Sequential(
                nn.Conv1d(self.dim, self.dim, 1, groups=self.num_heads),
                nn.GELU(),
                nn.Conv1d(self.dim, KERNEL**2 * self.dim, 1, groups=self.num_heads),
            )

    def attend(self, tokens: Tokens) -> Tensor:
        out = centered_linear_attention(*tokens[:3])
        if self.predictor is None:
            return out
        residual = self.predicted_convolution(tokens, self.predictor)  # (B, M, H W, D)
        return out + F.pad(residual, (0, 0, self.num_prefix_tokens, 0))

    def predicted_convolution(self, tokens: Tokens, predictor: nn.Module) -> Tensor:
        """Convolve v on the grid with the kernels of each image: `(B, M, H W, D)`."""
        acc_dtype, batch = torch.promote_types(tokens.x.dtype, torch.float32), tokens.x.shape[0]
        mean = tokens.x.to(acc_dtype).mean(dim=1).to(tokens.x.dtype)  # (B, C)
        kernels = predictor(mean.unsqueeze(-1)).view(-1, 1, KERNEL, KERNEL)  # (B C, 1, 3, 3)
        image = to_image(tokens.v.transpose(1, 2).flatten(2), tokens.grid, self.num_prefix_tokens)  # (B, C, H, W)
        # One convolution for all images: B C channels of a batch of one.
        image = image.flatten(0, 1).unsqueeze(0)  # (1, B C, H, W)
        out = F.conv2d(image, kernels.to(image.dtype), padding=KERNEL // 2, groups=image.shape[1])
        return out.view(batch, self.num_heads, self.head_dim, -1).transpose(2, 3)  # (B, M, H W, D)
