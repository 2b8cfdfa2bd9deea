"""Replace the attention of a timm Vision Transformer by VCA, keeping the pretrained projections.

torchvision's `VisionTransformer` calls `nn.MultiheadAttention`; replace it with an adapter and copy the projections:

    class Attention(VisualContrastAttention):
        def forward(self, query, key, value, need_weights=False):
            return super().forward(query), None

    side = model.image_size // model.patch_size
    for index, block in enumerate(model.encoder.layers):
        old = block.self_attention
        new = Attention(old.embed_dim, old.num_heads, (side, side), num_prefix_tokens=1, layer_index=index)
        new.qkv.weight, new.qkv.bias, new.proj = old.in_proj_weight, old.in_proj_bias, old.out_proj
        block.self_attention = new
"""

import inspect
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from vca.attention.contrast import VCAConfig, VisualContrastAttention
from vca.attention.geometry import check_tokens

PARTS = ("qkv", "proj", "attn_drop", "proj_drop")  # of timm's `Attention`
ARGUMENTS = ("x", "attn_mask", "is_causal")  # of its forward
NOT_TIMM = {"torchvision": "torchvision's", "transformers": "Hugging Face's"}  # package -> owner of its models


class InputGrid:
    """Forward pre-hook of a patch embedding that records the token grid `(H, W)` of the latest input.

    The hook and the attentions share one instance, so a deep copy of the model has its own.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid

    def __call__(self, patch_embed: Any, inputs: tuple[Tensor, ...]) -> None:
        height, width = patch_embed.dynamic_feat_size(inputs[0].shape[-2:])
        self.grid = (height, width)


class TimmVisualContrastAttention(VisualContrastAttention):
    """VCA with the forward signature of timm's `Attention`: `attn(x, attn_mask=..., is_causal=...)`."""

    input_grid: InputGrid

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:  # type: ignore[override]
        """Map `(B, N, C)` to `(B, N, C)`; a mask raises `ValueError`."""
        if attn_mask is not None or is_causal:
            raise ValueError("VCA does not support masks: attn_mask must be None and is_causal must be False")
        grid = self.input_grid.grid
        remedy = "call replace_attention without grid, and with the model's num_prefix_tokens"
        check_tokens(x.shape[1], grid, self.num_prefix_tokens, remedy)
        return super().forward(x, grid)


def replace_attention(
    model: nn.Module,
    contrast_grid: tuple[int, int] = (7, 7),
    grid: tuple[int, int] | None = None,
    num_prefix_tokens: int | None = None,
    config: VCAConfig | None = None,
) -> int:
    """Replace every attention of a timm ViT by VCA, in place, keeping the weights of `qkv` and `proj`.

    Contrast tokens, lambdas, norms and the local branch are new, so the model needs fine-tuning. Inputs of any size
    that the model accepts work, also with `dynamic_img_size`. Gradient checkpointing recomputes a block on the grid of
    the latest input: run backward for one image shape before forward for the next.

    Args:
        model: a model with `blocks[i].attn` in timm's layout (`qkv`, `proj`, `num_heads`).
        contrast_grid: contrast grid `(h, w)`.
        grid: `(H, W)` of the patch tokens of every input; if None, `model.patch_embed` gives the grid of each input.
        num_prefix_tokens: number of class and register tokens; if None, `model.num_prefix_tokens`, or 0 without it.
        config: options of VCA; None uses the defaults.

    Returns:
        The number of replaced attentions, at least 1.

    Raises:
        ValueError: if no attention can be replaced, the grid is unknown, the model drops patches, or an attention has
            parts that VCA does not have.

    Example:
        >>> model = timm.create_model("deit_small_patch16_224", pretrained=True)
        >>> vca.replace_attention(model, contrast_grid=(7, 7))
        12
    """
    name = type(model).__name__
    blocks: Any = getattr(model, "blocks", ())
    targets = [(i, block) for i, block in enumerate(blocks) if getattr(getattr(block, "attn", None), "qkv", None)]
    if not targets:
        for package in (base.__module__.partition(".")[0] for base in type(model).__mro__):
            if package in NOT_TIMM:
                raise ValueError(
                    f"replace_attention: model must be timm's, got {NOT_TIMM[package]} {name}; use timm's version of "
                    f"it, such as timm.create_model('vit_base_patch16_224')"
                )
        raise ValueError(f"replace_attention: model must have blocks[i].attn with a qkv projection, got {name}")
    if not isinstance(getattr(model, "patch_drop", None) or nn.Identity(), nn.Identity):
        raise ValueError(
            "replace_attention: model must not drop patches (VCA pools the whole grid); create it with "
            "patch_drop_rate=0 or set model.patch_drop = nn.Identity()"
        )
    patch_embed: Any = getattr(model, "patch_embed", None)
    built_for = grid or getattr(patch_embed, "grid_size", None)
    if built_for is None or (grid is None and not hasattr(patch_embed, "dynamic_feat_size")):
        raise ValueError(
            "replace_attention: model.patch_embed must have grid_size and dynamic_feat_size; "
            "else pass grid=(H, W), the grid of every input"
        )
    if num_prefix_tokens is None:
        num_prefix_tokens = getattr(model, "num_prefix_tokens", 0)
    input_grid = InputGrid((built_for[0], built_for[1]))
    new = [from_timm(block.attn, input_grid, contrast_grid, num_prefix_tokens, i, config) for i, block in targets]
    for (_, block), attention in zip(targets, new, strict=True):  # after all checks, so that errors change nothing
        block.attn = attention
    if grid is None:
        patch_embed.register_forward_pre_hook(input_grid)
    return len(new)


def unsupported_parts(attention: nn.Module) -> list[str]:
    """Return the names of submodules, parameters and arguments of a timm attention that VCA does not have."""
    parts = [name for name, part in attention.named_children() if not isinstance(part, nn.Identity)]
    parts += [name for name, _ in attention.named_parameters(recurse=False)]
    parts += [name for name, _ in attention.named_buffers(recurse=False)]
    arguments = [name for name in inspect.signature(attention.forward).parameters if name not in ARGUMENTS]
    return [name for name in parts if name not in PARTS] + [f"an argument {name}" for name in arguments]


def from_timm(
    attention: Any,
    input_grid: InputGrid,
    contrast_grid: tuple[int, int],
    num_prefix_tokens: int,
    layer_index: int,
    config: VCAConfig | None,
) -> TimmVisualContrastAttention:
    """Build VCA that shares `qkv` and `proj` with a timm `Attention`, and has its device, dtype and training mode."""
    if extra := unsupported_parts(attention):
        raise ValueError(
            f"replace_attention: blocks.{layer_index}.attn must not have parts that VCA lacks, got {', '.join(extra)}"
        )
    dim = attention.qkv.in_features
    if attention.qkv.out_features != 3 * dim or attention.proj.out_features != dim:
        raise ValueError(f"replace_attention: blocks.{layer_index}.attn must map width {dim} to {dim}")
    weight = attention.qkv.weight
    module = TimmVisualContrastAttention(
        dim,
        attention.num_heads,
        input_grid.grid,
        contrast_grid,
        num_prefix_tokens,
        layer_index,
        qkv_bias=attention.qkv.bias is not None,
        proj_drop=attention.proj_drop.p,
        config=replace(config) if config is not None else None,
    )
    module.to(device=weight.device, dtype=weight.dtype)
    module.qkv, module.proj, module.input_grid = attention.qkv, attention.proj, input_grid
    return module.train(attention.training)
