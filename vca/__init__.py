"""Visual-Contrast Attention (arXiv 2511.00833). It needs torch only, besides `from_pretrained`."""

from vca.attention import (
    ContrastParameters,
    VCAConfig,
    VisualContrastAttention,
    replace_attention,
    visual_contrast_attention,
)
from vca.hub import from_pretrained

__all__ = [
    "ContrastParameters",
    "VCAConfig",
    "VisualContrastAttention",
    "from_pretrained",
    "replace_attention",
    "visual_contrast_attention",
]
