"""Visual-Contrast Attention (arXiv 2511.00833). Importing this package needs torch and nothing else."""

from vca.attention import VCAConfig, VisualContrastAttention, replace_attention, visual_contrast_attention

__all__ = ["VCAConfig", "VisualContrastAttention", "replace_attention", "visual_contrast_attention"]
