"""Layers that several backbones share.

timm is imported where it is used: `import timm` takes as long as `import torch`, and `--help` needs neither.

Shape letters: B batch, N tokens (of a grid H x W, after P prefix tokens), C channels, K classes, L tokens of a window.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.config import BackboneConfig, check_size
from models.features import LayeredNetwork
from vca.attention import SoftmaxConfig
from vca.attention.geometry import to_image

Config = TypeVar("Config")


class ConditionalPosition(nn.Conv2d):
    """Conditional position encoding (arXiv 2102.10882): `x + DWConv3x3(x)` on the grid, prefix tokens unchanged."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)
        self.to(memory_format=torch.channels_last)  # the memory format of its input and of its weight gradient

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """Tokens `(B, N, C)` of a grid `(H, W)` to `(B, N, C)`; all tokens before the grid are prefix tokens."""
        prefix = x.shape[1] - grid[0] * grid[1]
        encoded = super().forward(to_image(x, grid, prefix)).flatten(2).transpose(1, 2)  # (B, H W, C)
        return x + (F.pad(encoded, (0, 0, prefix, 0)) if prefix else encoded)  # (B, N, C)


class Block(nn.Module):
    """Pre-norm transformer block: `x + Attention(norm(x))`, then `x + MLP(norm(x))`, both with stochastic depth.

    Args:
        norm: class of both norms, called as `norm(dim, eps=norm_eps)`.
        conditional_position: first add a `ConditionalPosition`, without stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        norm_eps: float,
        norm: Callable[..., nn.Module] = nn.LayerNorm,
        conditional_position: bool = False,
    ) -> None:
        from timm.layers import DropPath, Mlp

        super().__init__()
        self.cpe = ConditionalPosition(dim) if conditional_position else None
        self.norm1 = norm(dim, eps=norm_eps)
        self.attn = attention
        self.norm2 = norm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """`(B, N, C)` to `(B, N, C)`."""
        x = x if self.cpe is None else self.cpe(x, grid)
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Backbone(LayeredNetwork):
    """Base class of the image classifiers: size check, head, and the methods that timm expects of a model.

    A subclass defines what `LayeredNetwork` asks for, `resize` and `group_matcher`, and calls `add_head()` at the end
    of `__init__`. The final tokens have `num_features` channels; the first `num_prefix_tokens` are prefix tokens.
    """

    def __init__(self, config: BackboneConfig, num_features: int, num_prefix_tokens: int) -> None:
        super().__init__()
        self.config = config
        self.num_features = self.head_hidden_size = num_features
        self.num_prefix_tokens = num_prefix_tokens
        self.in_chans = config.in_chans
        self.size_multiple = config.size_multiple
        self.grad_checkpointing = False

    def add_head(self) -> None:
        """Add the classifier and initialise all weights."""
        self.num_classes = self.config.num_classes
        self.head = self.new_head(self.num_classes)
        self.init_weights()

    def new_head(self, num_classes: int) -> nn.Module:
        """Build a linear classifier; an identity for `num_classes=0`."""
        return nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def init_weights(self) -> None:
        """Initialise linear layers: weight truncated normal with std 0.02, bias zero."""
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more dimensions that get no weight decay."""
        return set()

    def convert_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict of the original code to this model's names; names of this model are kept."""
        return dict(state)

    def adapt(self, name: str, tensor: Tensor) -> Tensor | None:
        """Resize a parameter of another shape to this model's; None if it cannot be resized."""
        return None

    def check_images(self, images: Tensor) -> None:
        """Raise `ValueError` unless the size of images `(B, in_chans, height, width)` is valid."""
        check_size((images.shape[-2], images.shape[-1]), self.size_multiple, "image height and width")

    def set_input_size(self, img_size: Any = None) -> None:
        """Rebuild what depends on the image size, in place, as if the model had been built with it.

        Position embeddings, and parameters of an attention that depend on the grid, are interpolated. A model also
        accepts other sizes in `forward` without this call, and then interpolates them in each step.

        Args:
            img_size: a side or `(height, width)` in pixels; None keeps the size.

        Raises:
            ValueError: if the size is invalid for the architecture; the message has the nearest valid sizes.
        """
        self.change_config(img_size=img_size)

    def change_config(self, **fields: Any) -> None:
        """Replace the config fields that are not None, and rebuild what depends on the image size."""
        from timm.models._input import update_model_input_size

        fields = {key: value for key, value in fields.items() if value is not None}
        old, self.config = self.config, replace(self.config, **fields)
        try:
            self.resize(old)
        except ValueError:
            self.config = old
            raise
        update_model_input_size(self, **{**fields, "img_size": self.config.size})  # timm's data config reads it

    def resize(self, old: Any) -> None:
        """Rebuild what depends on the image size; `old` is the previous config."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Save only the input of each block for backward, and recompute the block there."""
        self.grad_checkpointing = enable

    def run_block(self, block: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Run a block, with gradient checkpointing if enabled: `(B, N, C)` to `(B, N, C)`."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, grid, use_reentrant=False)
        return block(x, grid)

    def get_classifier(self) -> nn.Module:
        return self.head

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of parameter names: the stem, then the blocks (`coarse=True`: the stages) in order.

        timm's `--layer-decay` scales the learning rate by one factor per layer below the head.
        """
        raise NotImplementedError

    @property
    def global_pool(self) -> str:
        """timm's name of the pooling: `token` (class token) or `avg`."""
        return "token" if self.num_prefix_tokens else "avg"

    def check_global_pool(self, global_pool: str | None) -> None:
        """Raise `ValueError` unless `global_pool` is None or the pooling of this architecture."""
        if global_pool not in (None, self.global_pool):
            raise ValueError(
                f"global_pool must be '{self.global_pool}' (fixed by the architecture) or None, got '{global_pool}'"
            )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; `num_classes=0` returns the pooled features. `global_pool` is fixed."""
        self.check_global_pool(global_pool)
        like = next(self.parameters())
        self.num_classes = num_classes
        self.head = self.new_head(num_classes).to(device=like.device, dtype=like.dtype)
        init_linear(self.head)
        self.head.train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map tokens `(B, N, C)` to logits `(B, K)`, or with `pre_logits` to the pooled features `(B, C)`."""
        x = x[:, 0] if self.num_prefix_tokens else x.mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, in_chans, height, width)` to logits `(B, K)`."""
        return self.forward_head(self.forward_features(x))


class ConvEmbed(nn.Module):
    """Embed an image, or the tokens of a stage as an image, with a strided convolution and a LayerNorm."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, padding: int = 0) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """`(B, in_chans, height, width)` to tokens `(B, N, C)` and their grid `(H, W)`."""
        image = self.proj(image)  # (B, C, H, W)
        return self.norm(image.flatten(2).transpose(1, 2)), (image.shape[2], image.shape[3])


def split_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Split `(B, H, W, C)` into windows `(B, H W / L, L, C)`, row by row; `window` must divide the grid."""
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))  # (B, H / h, h, W / w, w, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def join_windows(x: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Inverse of `split_windows`: `(B, H W / L, L, C)` to `(B, H, W, C)`."""
    x = x.unflatten(2, window).unflatten(1, (grid[0] // window[0], grid[1] // window[1]))  # (B, H/h, W/w, h, w, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def trunc_normal_(tensor: Tensor, std: float) -> None:
    """Fill `tensor` in place from a normal distribution truncated at +-2, with timm's random numbers."""
    import timm.layers

    timm.layers.trunc_normal_(tensor, std=std)


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer: weight truncated normal with std 0.02, bias zero. Other modules are unchanged."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def replaced(parameter: nn.Parameter, tensor: Tensor) -> nn.Parameter:
    """Return `tensor` as a parameter in place of `parameter`; frozen if that was. The same tensor is kept."""
    if tensor is parameter:
        return parameter
    return nn.Parameter(tensor.detach(), requires_grad=parameter.requires_grad)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth rates of `depth` blocks, linear from 0 to `rate`."""
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


class UnknownOptionError(ValueError, TypeError):
    """An option that a config does not have. A `TypeError` too, as timm expects for an unknown argument of a model."""


def select_options(config_class: type[Config], options: Mapping[str, Any]) -> Config:
    """Build a config dataclass from a mapping of its fields; an unknown key is an `UnknownOptionError`."""
    known = {f.name for f in fields(config_class)}  # type: ignore[arg-type]
    unknown = sorted(set(options) - known)
    if unknown:
        raise UnknownOptionError(
            f"{config_class.__name__} has no key '{unknown[0]}'; it has {', '.join(sorted(known))}"
        )
    return config_class(**options)


def load_official(
    network: Callable[[Any, Any], Any],
    config_class: type,
    config: Mapping[str, Any],
    state_dict: Mapping[str, Any],
) -> Any:
    """Build the softmax baseline of a family with weights of the original code; the `from_official` of every family.

    Args:
        network, config_class: the pair in `models.MODELS`.
        config: fields of `config_class`; it has the defaults of the smallest size.
        state_dict: parameters by name, or a checkpoint with them under `model`, `state_dict` or `state_dict_ema`.

    Raises:
        ValueError: if `config` has an unknown key, or the checkpoint has more than one of these keys.
        RuntimeError: if a parameter is missing, unexpected or has another shape.
    """
    model = network(select_options(config_class, config), SoftmaxConfig())
    held = [key for key in ("model", "state_dict", "state_dict_ema") if isinstance(state_dict.get(key), Mapping)]
    if len(held) > 1:
        raise ValueError(f"the checkpoint contains {' and '.join(held)}; pass one of them")
    model.load_state_dict(model.convert_official(state_dict[held[0]] if held else state_dict))
    return model


def square_side(count: int) -> int | None:
    """Side of a square grid of `count` tokens, or None if `count` is not a square."""
    side = math.isqrt(count)
    return side if side * side == count else None
