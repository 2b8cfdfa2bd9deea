"""Put VCA into a timm Vision Transformer that already exists, keeping its pretrained projections.

model = timm.create_model("deit_small_patch16_224", pretrained=True)
replaced = vca.replace_attention(model, pool=(7, 7))        # 12
"""

import inspect
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from vca.attention.contrast import VCAConfig, VisualContrastAttention

PARTS = ("qkv", "proj", "attn_drop", "proj_drop")  # of timm's `Attention`
ARGUMENTS = ("x", "attn_mask", "is_causal")  # of its forward


class TimmVisualContrastAttention(VisualContrastAttention):
    """VCA behind the call that timm's blocks make: `attn(x, attn_mask=..., is_causal=...)`."""

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:  # type: ignore[override]
        """Attend: `(B, N, C)` to `(B, N, C)`. VCA has no masked form, so a mask raises `ValueError`."""
        if attn_mask is not None or is_causal:
            raise ValueError("Visual-Contrast Attention has no masked form; call the model without attn_mask")
        return super().forward(x)


def replace_attention(
    model: nn.Module,
    pool: tuple[int, int] = (7, 7),
    grid: tuple[int, int] | None = None,
    num_prefix_tokens: int | None = None,
    config: VCAConfig | None = None,
) -> int:
    """Swap every attention of a timm ViT for VCA, in place; the weights of `qkv` and `proj` are kept.

    Contrast tokens, lambdas, norms and the local branch are new, so the model needs fine-tuning.

    Args:
        model: anything with `blocks[i].attn` in timm's layout (`qkv`, `proj`, `num_heads`).
        pool: contrast grid `(h, w)`.
        grid: `(H, W)` of the patch tokens; taken from `model.patch_embed` if None.
        num_prefix_tokens: taken from the model if None.
        config: options of VCA.

    Returns:
        How many were replaced, at least 1.

    Raises:
        ValueError: if there is nothing to replace, the grid is unknown, or an attention has parts that VCA has not.
    """
    grid = grid or getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None:
        raise ValueError("replace_attention: the model has no patch_embed.grid_size; pass grid=(H, W)")
    if num_prefix_tokens is None:
        num_prefix_tokens = getattr(model, "num_prefix_tokens", 0)
    blocks: Any = getattr(model, "blocks", ())
    found = [(index, block) for index, block in enumerate(blocks) if getattr(getattr(block, "attn", None), "qkv", None)]
    if not found:
        raise ValueError(f"replace_attention: {type(model).__name__} has no blocks[i].attn with a qkv projection")
    new = [from_timm(block.attn, (grid[0], grid[1]), pool, num_prefix_tokens, index, config) for index, block in found]
    for (_, block), attention in zip(found, new, strict=True):  # only now: an error above leaves the model as it was
        block.attn = attention
    return len(new)


def without_a_place(attention: nn.Module) -> list[str]:
    """Names of what a timm attention has, or is called with, besides what VCA takes over or does without."""
    parts = [name for name, part in attention.named_children() if not isinstance(part, nn.Identity)]
    parts += [name for name, _ in attention.named_parameters(recurse=False)]
    parts += [name for name, _ in attention.named_buffers(recurse=False)]
    arguments = [name for name in inspect.signature(attention.forward).parameters if name not in ARGUMENTS]
    return [name for name in parts if name not in PARTS] + [f"an argument {name}" for name in arguments]


def from_timm(
    attention: Any,
    grid: tuple[int, int],
    pool: tuple[int, int],
    num_prefix_tokens: int,
    layer_index: int,
    config: VCAConfig | None,
) -> TimmVisualContrastAttention:
    """VCA holding the `qkv` and `proj` of a timm `Attention`, on their device and in their dtype and mode."""
    extra = without_a_place(attention)
    if extra:
        raise ValueError(
            f"replace_attention: blocks.{layer_index}.attn has {', '.join(extra)}, which VCA has no place for"
        )
    dim = attention.qkv.in_features
    if attention.qkv.out_features != 3 * dim or attention.proj.out_features != dim:
        raise ValueError(f"replace_attention: blocks.{layer_index}.attn changes its width, which VCA does not")
    weight = attention.qkv.weight
    module = TimmVisualContrastAttention(
        dim,
        attention.num_heads,
        grid,
        pool,
        num_prefix_tokens,
        layer_index,
        qkv_bias=attention.qkv.bias is not None,
        proj_drop=attention.proj_drop.p,
        config=replace(config) if config is not None else None,
    )
    module.to(device=weight.device, dtype=weight.dtype)
    module.qkv, module.proj = attention.qkv, attention.proj
    return module.train(attention.training)
