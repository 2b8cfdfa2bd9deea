"""Literal implementation of the paper's equations: one head and one query at a time.

It follows "Linear Differential Vision Transformer" (arXiv 2511.00833), Section 3, equation by equation, in the dtype of
its inputs. The optimized implementations are tested against it, in value and in every gradient.

Shape letters: B batch, M heads, N tokens (P prefix + H x W grid), D head dim, n = h x w contrast tokens.
"""

import torch
from torch import Tensor

from vca.attention.parameters import ContrastParameters


def adaptive_bins(size: int, bins: int) -> list[tuple[int, int]]:
    """Return the half-open ranges of adaptive pooling: [floor(i size / bins), ceil((i + 1) size / bins)) for bin i."""
    return [(i * size // bins, -(-(i + 1) * size // bins)) for i in range(bins)]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `x / sqrt(mean(x^2) + eps) * weight` over the last dimension."""
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parameters: ContrastParameters,
    grid: tuple[int, int],
    contrast_grid: tuple[int, int],
    num_prefix_tokens: int = 0,
    eps: float = 1e-5,
) -> Tensor:
    """Compute VCA before the local branch; arguments and result as in `contrast.visual_contrast_attention`."""
    e_pos, e_neg, lambda1, lambda2, lambda_init, norm1_weight, norm2_weight, _ = parameters
    assert e_pos is not None and e_neg is not None and lambda1 is not None and lambda2 is not None  # noqa: PT018
    batch, heads, _, dim = q.shape
    height, width = grid
    images = []
    for b in range(batch):
        outputs = []
        for m in range(heads):
            # t = AvgPool(q on the grid); prefix tokens are not pooled                                 (n, D)
            q_grid = q[b, m, num_prefix_tokens:].reshape(height, width, dim)
            t = torch.stack(
                [
                    q_grid[top:bottom, left:right].mean(dim=(0, 1))
                    for top, bottom in adaptive_bins(height, contrast_grid[0])
                    for left, right in adaptive_bins(width, contrast_grid[1])
                ]
            )
            t_pos, t_neg = t + e_pos[m], t + e_neg[m]

            # Stage I, global contrast: v^ = (1 - l_init) RMSNorm(v+ - l1 v-)                          (n, D)
            v_pos = torch.softmax(t_pos @ k[b, m].T / dim**0.5, dim=-1) @ v[b, m]
            v_neg = torch.softmax(t_neg @ k[b, m].T / dim**0.5, dim=-1) @ v[b, m]
            v_hat = (1 - lambda_init) * rms_norm(v_pos - lambda1 * v_neg, norm1_weight, eps)

            # Stage II, per-patch differential: o = (1 - l_init) RMSNorm(A v^), one query at a time     (N, D)
            rows = []
            for query in q[b, m]:
                a_pos = torch.softmax(query @ t_pos.T / dim**0.5, dim=-1)
                a_neg = torch.softmax(query @ t_neg.T / dim**0.5, dim=-1)
                rows.append((1 - lambda_init) * rms_norm((a_pos - lambda2 * a_neg) @ v_hat, norm2_weight, eps))
            outputs.append(torch.stack(rows))
        images.append(torch.stack(outputs))
    return torch.stack(images)
