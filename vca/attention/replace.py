"""Put VCA into a timm Vision Transformer that already exists, keeping its pretrained projections.

model = timm.create_model("deit_small_patch16_224", pretrained=True)
replaced = vca.replace_attention(model, contrast_grid=(7, 7))        # 12
"""

import inspect
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from vca.attention.contrast import VCAConfig, VisualContrastAttention
from vca.attention.geometry import check_tokens

PARTS = ("qkv", "proj", "attn_drop", "proj_drop")  # of timm's `Attention`
ARGUMENTS = ("x", "attn_mask", "is_causal")  # of its forward
NOT_TIMM = {"torchvision": "torchvision's", "transformers": "Hugging Face's"}  # package -> whose its models are


class InputGrid:
    """The token grid `(H, W)` of a model's latest input: a forward pre-hook of its patch embedding.

    An object that hook and attentions share, so that a copy of the model has one of its own.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid

    def __call__(self, patch_embed: Any, inputs: tuple[Tensor, ...]) -> None:
        """Take the grid of images `(B, in_chans, height, width)`."""
        height, width = patch_embed.dynamic_feat_size(inputs[0].shape[-2:])
        self.grid = (height, width)


class TimmVisualContrastAttention(VisualContrastAttention):
    """VCA behind the call that timm's blocks make: `attn(x, attn_mask=..., is_causal=...)`."""

    input_grid: InputGrid

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:  # type: ignore[override]
        """Attend: `(B, N, C)` to `(B, N, C)`. VCA has no masked form, so a mask raises `ValueError`."""
        if attn_mask is not None or is_causal:
            raise ValueError("Visual-Contrast Attention has no masked form; call the model without attn_mask")
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
    """Swap every attention of a timm ViT for VCA, in place; the weights of `qkv` and `proj` are kept.

    Contrast tokens, lambdas, norms and the local branch are new, so the model needs fine-tuning. Each input is computed
    on its own grid, also under `dynamic_img_size`. Gradient checkpointing recomputes a block on the grid of the latest
    input: run the backward pass of one image shape before the forward pass of the next.

    Args:
        model: anything with `blocks[i].attn` in timm's layout (`qkv`, `proj`, `num_heads`).
        contrast_grid: contrast grid `(h, w)`.
        grid: `(H, W)` of the patch tokens of every input; if None, `model.patch_embed` gives that of each input.
        num_prefix_tokens: taken from the model if None.
        config: options of VCA.

    Returns:
        How many were replaced, at least 1.

    Raises:
        ValueError: if there is nothing to replace, the grid is unknown, the model drops patches, or an attention has
            parts that VCA has not.
    """
    name = type(model).__name__
    blocks: Any = getattr(model, "blocks", ())
    found = [(index, block) for index, block in enumerate(blocks) if getattr(getattr(block, "attn", None), "qkv", None)]
    if not found:
        for package in (base.__module__.partition(".")[0] for base in type(model).__mro__):
            if package in NOT_TIMM:
                raise ValueError(
                    f"replace_attention: {name} is {NOT_TIMM[package]}, not timm's; use timm's model of the same "
                    f"network, such as timm.create_model('vit_base_patch16_224')"
                )
        raise ValueError(f"replace_attention: {name} has no blocks[i].attn with a qkv projection")
    if not isinstance(getattr(model, "patch_drop", None) or nn.Identity(), nn.Identity):
        raise ValueError(
            "replace_attention: the model drops patches, and VCA pools the whole grid; create it with "
            "patch_drop_rate=0 or set model.patch_drop = nn.Identity()"
        )
    patch_embed: Any = getattr(model, "patch_embed", None)
    built_for = grid or getattr(patch_embed, "grid_size", None)
    if built_for is None or (grid is None and not hasattr(patch_embed, "dynamic_feat_size")):
        raise ValueError(
            "replace_attention: the model's patch_embed has no grid_size and dynamic_feat_size; "
            "pass grid=(H, W), the grid of every input"
        )
    if num_prefix_tokens is None:
        num_prefix_tokens = getattr(model, "num_prefix_tokens", 0)
    input_grid = InputGrid((built_for[0], built_for[1]))
    new = [from_timm(block.attn, input_grid, contrast_grid, num_prefix_tokens, index, config) for index, block in found]
    for (_, block), attention in zip(found, new, strict=True):  # only now: an error above leaves the model as it was
        block.attn = attention
    if grid is None:
        patch_embed.register_forward_pre_hook(input_grid)
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
    input_grid: InputGrid,
    contrast_grid: tuple[int, int],
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
