"""Visual-Contrast Attention (arXiv 2511.00833). It imports torch only."""

from vca.attention import (
    ContrastParameters,
    VCAConfig,
    VisualContrastAttention,
    replace_attention,
    visual_contrast_attention,
)

__all__ = [
    "ContrastParameters",
    "VCAConfig",
    "VisualContrastAttention",
    "replace_attention",
    "visual_contrast_attention",
]
