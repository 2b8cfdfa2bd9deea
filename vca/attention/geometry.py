"""Token geometry shared by all variants: heads, and prefix tokens followed by an H x W grid of patch tokens."""

from torch import Tensor


def check_heads(dim: int, num_heads: int) -> None:
    """Raise `ValueError` unless `num_heads` divides `dim`."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must be >= 1 and divide the width {dim}, got {num_heads}")


def check_tokens(
    num_tokens: int,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    remedy: str = "pass the grid of this input: attn(x, grid=(H, W))",
) -> None:
    """Raise `ValueError` with the remedy unless `num_tokens` is `num_prefix_tokens + H * W`."""
    height, width = grid
    if num_tokens != num_prefix_tokens + height * width:
        raise ValueError(
            f"{num_tokens} tokens do not fill grid {height} x {width} after {num_prefix_tokens} prefix tokens "
            f"({num_prefix_tokens + height * width}); {remedy}"
        )


def to_image(tokens: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Patch tokens `(B, N, C)` as an image `(B, C, H, W)`: a view, channels_last in memory, prefix tokens left out."""
    return tokens[:, num_prefix_tokens:].transpose(1, 2).unflatten(2, grid)


def is_pair(value: object) -> bool:
    """Whether `value` is two integers >= 1."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(type(v) is int and v >= 1 for v in value)
