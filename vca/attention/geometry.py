"""Token layout shared by all variants: P prefix tokens, then an H x W grid of patch tokens."""

from torch import Tensor


def check_tokens(
    num_tokens: int,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    remedy: str = "pass the grid of this input: attn(x, grid=(H, W))",
) -> None:
    """Raise `ValueError` (with `remedy`) unless `num_tokens` is `num_prefix_tokens + H * W`."""
    height, width = grid
    if num_tokens != num_prefix_tokens + height * width:
        raise ValueError(
            f"number of tokens must be {num_prefix_tokens + height * width} ({num_prefix_tokens} prefix tokens + grid "
            f"{height} x {width}), got {num_tokens}; {remedy}"
        )


def to_image(tokens: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """View patch tokens `(B, N, C)` as a channels_last image `(B, C, H, W)`, without prefix tokens."""
    return tokens[:, num_prefix_tokens:].transpose(1, 2).unflatten(2, grid)


def is_pair(value: object) -> bool:
    """Return whether `value` is a list or tuple of two integers >= 1."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(type(v) is int and v >= 1 for v in value)
