"""What several backbones are made of.

What timm provides is imported where it is used: `import timm` takes as long as `import torch`, and `--help` needs none.

Shape letters: B batch, N tokens (of a grid H x W, after P prefix tokens), C channels, K classes, L tokens of a window.
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.config import BackboneConfig, check_size

Config = TypeVar("Config")


class Block(nn.Module):
    """Pre-norm transformer block: `x + Attention(LN(x))`, then `x + MLP(LN(x))`, each under stochastic depth."""

    def __init__(
        self, dim: int, attention: nn.Module, mlp_ratio: float, drop: float, drop_path: float, norm_eps: float
    ) -> None:
        from timm.layers import DropPath, Mlp

        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """`(B, N, C)` to `(B, N, C)`."""
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Backbone(nn.Module):
    """An image classifier: the size check, the head, and what timm's models offer around them.

    A subclass defines `forward_features` and `group_matcher`, and calls `add_head` at the end of its constructor.

    Args:
        config: the size.
        num_features: width of the last tokens.
        num_prefix_tokens: P of the last tokens.
    """

    def __init__(self, config: BackboneConfig, num_features: int, num_prefix_tokens: int) -> None:
        super().__init__()
        self.config = config
        self.num_features = self.head_hidden_size = num_features
        self.num_prefix_tokens = num_prefix_tokens
        self.size_multiple = config.size_multiple
        self.grad_checkpointing = False

    def add_head(self) -> None:
        """The last layer, and the initialisation of all of them."""
        self.num_classes = self.config.num_classes
        self.head = self.new_head(self.num_classes)
        self.init_weights()

    def new_head(self, num_classes: int) -> nn.Module:
        """A linear layer, or nothing for no classes."""
        return nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def init_weights(self) -> None:
        """Linear layers truncated normal 0.02, their biases zero."""
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more dimensions that the recipe does not decay."""
        return set()

    def convert_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by their names in the original code to this model's; names that are ours already stay."""
        return dict(state)

    def adapt(self, name: str, tensor: Tensor) -> Tensor | None:
        """A parameter that a file holds in another shape, made to fit; None where that has no meaning."""
        return None

    def check_images(self, images: Tensor) -> None:
        """Raise `ValueError` with the valid sizes if images `(B, in_chans, height, width)` do not fit."""
        check_size((images.shape[-2], images.shape[-1]), self.size_multiple, "image height and width")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block for the backward pass, and compute the rest again there."""
        self.grad_checkpointing = enable

    def run_block(self, block: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """A block, under gradient checkpointing if it is on: `(B, N, C)` to `(B, N, C)`."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, grid, use_reentrant=False)
        return block(x, grid)

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names, as timm has them: the stem, then the blocks (`coarse`: the stages) in order.

        timm's `--layer-decay` lowers the learning rate by one factor for each of these layers below the head.
        """
        raise NotImplementedError

    @property
    def global_pool(self) -> str:
        """What `contrast_grid` does, by timm's name: `token` or `avg`."""
        return "token" if self.num_prefix_tokens else "avg"

    def check_global_pool(self, global_pool: str | None) -> None:
        """Raise `ValueError` unless it is what the architecture does, or None."""
        if global_pool not in (None, self.global_pool):
            raise ValueError(
                f"global_pool must be '{self.global_pool}', which the architecture has, or None, got '{global_pool}'"
            )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for that many classes; 0 leaves the pooled features. `global_pool` cannot be changed."""
        self.check_global_pool(global_pool)
        like = next(self.parameters())
        self.num_classes = num_classes
        self.head = self.new_head(num_classes).to(device=like.device, dtype=like.dtype)
        init_linear(self.head)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `(B, in_chans, height, width)` to normalised tokens `(B, N, C)`."""
        raise NotImplementedError

    def pool_tokens(self, x: Tensor) -> Tensor:
        """Tokens `(B, N, C)` to features `(B, C)`: the class token if there is one, or the mean."""
        return x[:, 0] if self.num_prefix_tokens else x.mean(dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens `(B, N, C)` to logits `(B, K)`, or to the features `(B, C)` before them."""
        x = self.pool_tokens(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, in_chans, height, width)` to logits `(B, K)`."""
        return self.forward_head(self.forward_features(x))


class ConvEmbed(nn.Module):
    """A strided convolution and a norm: an image, or the tokens of a stage as one, to the tokens of the next."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, padding: int = 0) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """`(B, in_chans, height, width)` to tokens `(B, N, C)` and their grid."""
        image = self.proj(image)  # (B, C, H, W)
        return self.norm(image.flatten(2).transpose(1, 2)), (image.shape[2], image.shape[3])


def split_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Cut `(B, H, W, C)` into windows `(B, H W / L, L, C)`, row by row; `window` must divide the grid."""
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))  # (B, H / h, h, W / w, w, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def join_windows(x: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Windows `(B, H W / L, L, C)` back to `(B, H, W, C)`."""
    x = x.unflatten(2, window).unflatten(1, (grid[0] // window[0], grid[1] // window[1]))  # (B, H/h, W/w, h, w, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def trunc_normal_(tensor: Tensor, std: float) -> None:
    """Fill `tensor` in place from a normal distribution truncated at +-2, with timm's draws for a given seed."""
    import timm.layers

    timm.layers.trunc_normal_(tensor, std=std)


def init_linear(module: nn.Module) -> None:
    """Truncated normal 0.02 for the weight of a linear layer, zero for its bias; other modules are left alone."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth of each of `depth` blocks: from 0 to `rate`, linearly."""
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


def select_options(config_class: type[Config], options: Mapping[str, Any]) -> Config:
    """Build a config dataclass from a mapping of its fields; `ValueError` names a key that it does not have."""
    known = {f.name for f in fields(config_class)}  # type: ignore[arg-type]
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"{config_class.__name__} has no key '{unknown[0]}'; it has {', '.join(sorted(known))}")
    return config_class(**options)


def load_official(model: Any, state_dict: Mapping[str, Any]) -> Any:
    """`model` with the weights of the original code, which may lie under `model`, `state_dict` or `state_dict_ema`.

    Raises:
        ValueError: if they lie under more than one of these.
        RuntimeError: on a missing, unexpected or misshapen parameter.
    """
    held = [key for key in ("model", "state_dict", "state_dict_ema") if isinstance(state_dict.get(key), Mapping)]
    if len(held) > 1:
        raise ValueError(f"the checkpoint holds {' and '.join(held)}; pass the one that is meant")
    model.load_state_dict(model.convert_official(state_dict[held[0]] if held else state_dict))
    return model


def square_side(count: int) -> int | None:
    """The side of a square of `count` tokens, or None if there is none: the grid of a file that does not name it."""
    side = math.isqrt(count)
    return side if side * side == count else None
