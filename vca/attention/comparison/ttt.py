"""Test-time training of ViT3 (arXiv 2512.01643): a small model fits the keys to the values and maps the queries.

For each image, one gradient step fits an inner model per head, and a convolution for one more head q', k', v':

    f(u; W1, W2) = (u W1) * SiLU(u W2)                  loss -(1 / 3N) sum_i v_i . f(k_i; W1, W2)
    W  <- W - g / (|g| + 1)                             g gradient of the loss by W, |g| per column of g
    o  = f(q; W1, W2)
    W3 <- W3 - g3 / (|g3| + 1)                          loss -(1 / 3N) sum_p v'_p . (k' (*) W3)_p, |g3| per channel
    o' = q' (*) W3                                      depthwise, 3 x 3, zeros around the grid
    y  = [o | o'] Wo

The gradients g are written out, so autograd differentiates through the step, as in the original.

Differences from the original: the columns of the qkv projection are [q q' | k k' | v v']; the inner step runs in
float32 for float16, where v / N is subnormal and g may overflow; the norm of g always runs in float32. H-ViT3 also
rotates q and k (RoPE); this variant does not. Prefix tokens are not on the grid of the convolution, so they attend by
softmax in all M + 1 heads (`GridAttention`).

Shape letters: B batch, M heads, N = H W patch tokens, D head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca.attention.base import AttentionConfig, HeadCounts, Tokens, no_autocast
from vca.attention.comparison.grid import GridAttention

SCALE = 1 / 3  # of the inner loss: 9^-1/2, for the nine entries of a kernel


@dataclass
class TTTConfig(AttentionConfig):
    """Options of ViT3's test-time training: those of every variant."""

    name: str = "ttt"


def step(weight: Tensor, grad: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Compute `weight - g / (|g| + 1)`, with the norm over `dims`, at least in float32.

    `grad` is minus the gradient of the inner loss.
    """
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    return weight + grad / (torch.linalg.vector_norm(grad, dim=dims, keepdim=True) + 1)


def fit_glu(k: Tensor, v: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the gated linear units: k, v `(B, M, N, D)` and start weights `(1, M, D, D)` to `(B, M, D, D)` each."""
    gated, before = k @ w1.to(k.dtype), k @ w2.to(k.dtype)  # (B, M, N, D)
    sigmoid = before.sigmoid()
    grad1 = v * (before * sigmoid)  # (B, M, N, D)
    grad2 = v * gated * (sigmoid * (1 + before * (1 - sigmoid)))  # (B, M, N, D), with the derivative of SiLU
    keys = k.transpose(2, 3)
    return step(w1, keys @ grad1, (2,)), step(w2, keys @ grad2, (2,))


def fit_kernels(k: Tensor, v: Tensor, w3: Tensor) -> Tensor:
    """Fit the depthwise kernels: k, v `(B, D, H, W)` and start weights `(D, 1, 3, 3)` to `(B, D, 3, 3)`."""
    patches = F.unfold(k, 3, padding=1).unflatten(1, (-1, 9))  # (B, D, 9, H W)
    grad = (patches @ v.flatten(2).unsqueeze(3)).reshape(*k.shape[:2], 3, 3)  # (B, D, 3, 3)
    return step(w3.squeeze(1), grad, (2, 3))


class TTTAttention(GridAttention):
    """ViT3's test-time training as a replacement for MHSA; takes the arguments of `ProjectedAttention`."""

    Config = TTTConfig

    def head_counts(self) -> HeadCounts:
        return HeadCounts(self.num_heads + 1, self.num_heads + 1, self.num_heads + 1)

    def add_parameters(self) -> None:
        def parameter(*size: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(size), std=0.02))

        self.w1 = parameter(1, self.num_heads, self.head_dim, self.head_dim)
        self.w2 = parameter(1, self.num_heads, self.head_dim, self.head_dim)
        self.w3 = parameter(self.head_dim, 1, 3, 3)

    def attend_grid(self, tokens: Tokens) -> Tensor:
        q, k, v = tokens[:3]  # (B, M + 1, N, D)
        dtype = torch.float32 if q.dtype is torch.float16 else q.dtype
        with no_autocast(q):
            k, v = k.to(dtype), v.to(dtype) * (SCALE / v.shape[2])  # (B, M + 1, N, D)
            w1, w2 = fit_glu(k[:, :-1], v[:, :-1], self.w1, self.w2)  # (B, M, D, D)
            images = (x[:, -1].transpose(1, 2).unflatten(2, tokens.grid) for x in (q, k, v))
            q_image, k_image, v_image = images  # (B, D, H, W)
            w3 = fit_kernels(k_image, v_image, self.w3)  # (B, D, 3, 3)
            heads = q[:, :-1]
            out = (heads @ w1.to(q.dtype)) * F.silu(heads @ w2.to(q.dtype))  # (B, M, N, D)
            return torch.cat((out, convolve(q_image, w3.to(q.dtype)).unsqueeze(1)), dim=1)  # (B, M + 1, N, D)


def convolve(image: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each image `(B, D, H, W)` with its own depthwise kernels `(B, D, 3, 3)`: `(B, N, D)`."""
    count = image.shape[0] * image.shape[1]
    out = F.conv2d(image.reshape(1, count, *image.shape[2:]), kernels.reshape(count, 1, 3, 3), padding=1, groups=count)
    return out.reshape(*image.shape[:2], -1).transpose(1, 2)
