"""Attention variants shared by every backbone. This package depends on torch only.

To add a variant, add a file to `comparison/` with a config dataclass (its `name` is the registry key) and a subclass of
`ProjectedAttention` that defines `attend`, and add one line to `ATTENTIONS`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vca.attention.comparison.agent import AgentAttention, AgentConfig
from vca.attention.comparison.circulant import CirculantAttention, CirculantConfig
from vca.attention.comparison.differential import DifferentialAttention, DifferentialConfig
from vca.attention.comparison.differential_stages import DifferentialStagesAttention, DifferentialStagesConfig
from vca.attention.comparison.differential_v2 import DifferentialV2Attention, DifferentialV2Config
from vca.attention.comparison.focused_linear import FocusedLinearAttention, FocusedLinearConfig
from vca.attention.comparison.inline import InLineAttention, InLineConfig
from vca.attention.comparison.linear import LinearAttention, LinearConfig
from vca.attention.comparison.mala import MALAAttention, MALAConfig
from vca.attention.comparison.mhla import MHLAAttention, MHLAConfig
from vca.attention.comparison.polaformer import PolaFormerAttention, PolaFormerConfig
from vca.attention.comparison.ttt import TTTAttention, TTTConfig
from vca.attention.contrast import VCAConfig, VisualContrastAttention, backend_of, visual_contrast_attention
from vca.attention.parameters import ContrastParameters
from vca.attention.replace import replace_attention
from vca.attention.softmax import SoftmaxAttention, SoftmaxConfig, softmax_attention

__all__ = [
    "ATTENTIONS",
    "ContrastParameters",
    "DifferentialStagesConfig",
    "SoftmaxAttention",
    "SoftmaxConfig",
    "VCAConfig",
    "VisualContrastAttention",
    "backend_of",
    "build_attention",
    "replace_attention",
    "softmax_attention",
    "variant_name",
    "visual_contrast_attention",
]

# name -> (config dataclass, module class)
ATTENTIONS: dict[str, tuple[type, type[nn.Module]]] = {
    "softmax": (SoftmaxConfig, SoftmaxAttention),
    "vca": (VCAConfig, VisualContrastAttention),
    "differential": (DifferentialConfig, DifferentialAttention),
    "differential_v2": (DifferentialV2Config, DifferentialV2Attention),
    "differential_stages": (DifferentialStagesConfig, DifferentialStagesAttention),
    "agent": (AgentConfig, AgentAttention),
    "linear": (LinearConfig, LinearAttention),
    "circulant": (CirculantConfig, CirculantAttention),
    "focused_linear": (FocusedLinearConfig, FocusedLinearAttention),
    "inline": (InLineConfig, InLineAttention),
    "mala": (MALAConfig, MALAAttention),
    "mhla": (MHLAConfig, MHLAAttention),
    "polaformer": (PolaFormerConfig, PolaFormerAttention),
    "ttt": (TTTConfig, TTTAttention),
}


def variant_name(options: Mapping[str, Any]) -> str:
    """Return a name for a variant that is valid in a run name, with its non-default options: `vca-stage2_plain`."""

    def as_text(value: Any) -> str:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return "x".join(map(as_text, value))
        return str(getattr(value, "value", value)).lower()

    default = ATTENTIONS[options["name"]][0]()
    changed = {k: v for k, v in options.items() if as_text(v) != as_text(getattr(default, k, None))}
    return "-".join([options["name"], *(f"{key}_{as_text(value)}" for key, value in changed.items())])


def build_attention(
    config: Any, dim: int, num_heads: int, grid: tuple[int, int], contrast_grid: tuple[int, int] = (7, 7), **kwargs: Any
) -> nn.Module:
    """Build the attention variant that `config` selects.

    Every variant maps `(B, N, C)` to `(B, N, C)` when called as `attn(x)`, or as `attn(x, grid=(H, W))` for another
    grid than the one it was built for.

    Args:
        config: options of the variant, one of the dataclasses in `ATTENTIONS`.
        dim, num_heads: width C and number of heads M.
        grid, contrast_grid: `(H, W)` of the patch tokens, and the backbone's contrast grid `(h, w)`.
        kwargs: other arguments of `ProjectedAttention`: `num_prefix_tokens`, `layer_index`, `qkv_bias`, `proj_drop`.

    Raises:
        ValueError: if `config.name` is unknown or a value is out of range.
    """
    if config.name not in ATTENTIONS:
        raise ValueError(f"attention.name must be one of {sorted(ATTENTIONS)}, got '{config.name}'")
    config_class, module = ATTENTIONS[config.name]
    if type(config) is not config_class:
        raise ValueError(
            f"attention.name '{config.name}' must have a {config_class.__name__}, got {type(config).__name__}"
        )
    return module(dim, num_heads, grid, contrast_grid, config=config, **kwargs)
