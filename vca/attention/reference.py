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


def lambda_at(value: Tensor | float, b: int, m: int, index: int) -> Tensor | float:
    """Return the lambda of a (contrast) token in one head of one image: the scalar of the stage, or the token's."""
    return value[b, m, index] if isinstance(value, Tensor) and value.ndim == 4 else value


def reference_token_lambdas(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    grid: tuple[int, int],
    contrast_grid: tuple[int, int],
    num_prefix_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute the token lambdas of x `(B, N, C)`; arguments and result as in `lambdas.token_lambdas`, weights `(M, C)`.

    l1 = sigmoid(AvgPool(x Wl1 on the grid)), l2 = sigmoid(x Wl2).
    """
    rows, columns = (adaptive_bins(size, bins) for size, bins in zip(grid, contrast_grid, strict=True))
    first = []
    for image in x:
        on_grid = (image[num_prefix_tokens:] @ weight1.T).reshape(*grid, -1)  # (H, W, M)
        cells = [on_grid[top:bottom, left:right] for top, bottom in rows for left, right in columns]
        first.append(torch.stack([cell.mean(dim=(0, 1)) for cell in cells], dim=1))  # (M, n)
    lambda1 = torch.stack(first)  # (B, M, n)
    lambda2 = torch.stack([weight2 @ image.T for image in x])  # (B, M, N)
    return lambda1.sigmoid().unsqueeze(-1), lambda2.sigmoid().unsqueeze(-1)


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

    def scaled_norm(x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else (1 - lambda_init) * rms_norm(x, weight, eps)

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
            contrasts = [v_pos[i] - lambda_at(lambda1, b, m, i) * v_neg[i] for i in range(len(t))]
            v_hat = scaled_norm(torch.stack(contrasts), norm1_weight)

            # Stage II, per-patch differential: o = (1 - l_init) RMSNorm(A v^), one query at a time     (N, D)
            rows = []
            for i, query in enumerate(q[b, m]):
                a_pos = torch.softmax(query @ t_pos.T / dim**0.5, dim=-1)
                a_neg = torch.softmax(query @ t_neg.T / dim**0.5, dim=-1)
                weights = a_pos - lambda_at(lambda2, b, m, i) * a_neg
                rows.append(scaled_norm(weights @ v_hat, norm2_weight))
            outputs.append(torch.stack(rows))
        images.append(torch.stack(outputs))
    return torch.stack(images)
