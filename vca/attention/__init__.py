"""The attention core shared by every backbone: torch and nothing else.

To add a variant: one file here, with a config dataclass whose `name` is its key and a subclass of `ProjectedAttention`
that defines `attend`, and one line in `ATTENTIONS`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vca.attention.agent import AgentAttention, AgentConfig
from vca.attention.contrast import VCAConfig, VisualContrastAttention, backend_of, visual_contrast_attention
from vca.attention.differential import DifferentialAttention, DifferentialConfig
from vca.attention.differential_stages import DifferentialStagesAttention, DifferentialStagesConfig
from vca.attention.focused_linear import FocusedLinearAttention, FocusedLinearConfig
from vca.attention.replace import replace_attention
from vca.attention.softmax import SoftmaxAttention, SoftmaxConfig, softmax_attention

__all__ = [
    "ATTENTIONS",
    "DifferentialStagesConfig",
    "SoftmaxAttention",
    "SoftmaxConfig",
    "VCAConfig",
    "VisualContrastAttention",
    "backend_of",
    "build_attention",
    "describe",
    "replace_attention",
    "softmax_attention",
    "visual_contrast_attention",
]

# name -> (config dataclass, module). Every module has the constructor and the forward described in `build_attention`.
ATTENTIONS: dict[str, tuple[type, type[nn.Module]]] = {
    "softmax": (SoftmaxConfig, SoftmaxAttention),
    "vca": (VCAConfig, VisualContrastAttention),
    "differential": (DifferentialConfig, DifferentialAttention),
    "differential_stages": (DifferentialStagesConfig, DifferentialStagesAttention),
    "agent": (AgentConfig, AgentAttention),
    "focused_linear": (FocusedLinearConfig, FocusedLinearAttention),
}


def variant_name(options: Mapping[str, Any]) -> str:
    """A name for a variant and its options: `vca`, or `vca-stage2_plain` where one is not the default.

    It can stand in the name of a run: lists are written `7x7`.
    """

    def said(value: Any) -> str:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return "x".join(map(said, value))
        return str(getattr(value, "value", value)).lower()

    default = ATTENTIONS[options["name"]][0]()
    changed = {k: v for k, v in options.items() if said(v) != said(getattr(default, k, None))}
    return "-".join([options["name"], *(f"{key}_{said(value)}" for key, value in changed.items())])


def build_attention(
    config: Any, dim: int, num_heads: int, grid: tuple[int, int], contrast_grid: tuple[int, int] = (7, 7), **place: Any
) -> nn.Module:
    """Build the variant that `config` (one of the dataclasses in `ATTENTIONS`) describes.

    The one contract between backbones and attentions: the result maps `(B, N, C)` to `(B, N, C)` when called as
    `attn(x)`, or as `attn(x, grid=(H, W))` on a grid other than the one it was built for.

    Args:
        config: options of the variant.
        dim, num_heads, grid, contrast_grid: width C, heads M, `(H, W)` of the patch tokens, the backbone's contrast grid.
        place: whatever else `ProjectedAttention` takes: `num_prefix_tokens`, `layer_index`, `qkv_bias`, `proj_drop`.

    Raises:
        ValueError: if `config.name` is not a variant, or a value is out of its range.
    """
    if config.name not in ATTENTIONS:
        raise ValueError(f"attention.name must be one of {sorted(ATTENTIONS)}, got '{config.name}'")
    config_class, module = ATTENTIONS[config.name]
    if type(config) is not config_class:
        raise ValueError(
            f"attention.name '{config.name}' goes with {config_class.__name__}, got {type(config).__name__}"
        )
    return module(dim, num_heads, grid, contrast_grid, config=config, **place)
