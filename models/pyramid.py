"""Base of PVT, Swin and CSWin: stages of transformer blocks, each at half the height and width of the previous one.

The stages in `attention_stages` use the configured attention variant on the whole grid. The other stages, and all
stages under `attention=softmax`, use the backbone's own attention with its windows, stripes or spatial reduction. Both
are called as `attn(x, grid)`.

Shape letters: B batch, N tokens of a grid H x W (after P prefix tokens), C channels of the stage.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor, nn

from models.config import PyramidConfig
from models.features import LayerOutput
from models.layers import Backbone, Block, drop_path_rates
from vca.attention import SoftmaxConfig, build_attention
from vca.attention.geometry import to_image
from vca.attention.pooling import check_layers


class Stage(nn.Module):
    """A downsampling embedding followed by transformer blocks."""

    def __init__(self, embed: nn.Module, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)


class OwnAttention(nn.Module):
    """A backbone's own attention, called as `attn(x, grid)`."""

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Rebuild what depends on the grid `(H, W)` that the module is built for."""


def keeps_own(config: PyramidConfig, attention: Any, stage: int) -> bool:
    """Whether a stage, counted from 0, uses the backbone's own attention."""
    return attention.name == SoftmaxConfig.name or stage + 1 not in config.attention_stages


class Pyramid(Backbone):
    """Hierarchical backbone.

    Args:
        embeds: one module per stage; it maps an image `(B, C, H, W)` to tokens and their grid.
        own_attention: `(stage, block) -> module`, the backbone's own attention.
        mlp_ratios: one per stage.
        norm_eps: epsilon of every LayerNorm in and after the blocks.
        num_prefix_tokens: prefix tokens of the last stage.

    Raises:
        ValueError: if `attention` is softmax with other than its default options.
    """

    config: PyramidConfig
    norm_fits_every_layer: ClassVar[bool] = False

    def __init__(
        self,
        config: PyramidConfig,
        attention: Any,
        embeds: Sequence[nn.Module],
        own_attention: Callable[[int, int], OwnAttention],
        mlp_ratios: Sequence[float],
        norm_eps: float = 1e-5,
        num_prefix_tokens: int = 0,
    ) -> None:
        if attention.name == SoftmaxConfig.name and attention != SoftmaxConfig():
            changed = next(f for f in fields(attention) if getattr(attention, f.name) != f.default)
            default, value = (
                str(getattr(one, "value", one)) for one in (changed.default, getattr(attention, changed.name))
            )
            raise ValueError(
                f"attention.{changed.name} must be {default.lower()} with attention=softmax ({config.family} keeps its "
                f"own attention), got {value}"
            )
        check_layers(attention, sum(config.depths))
        last = len(config.depths) - 1
        super().__init__(config, config.dim(last), num_prefix_tokens)
        rates = iter(drop_path_rates(config.drop_path_rate, sum(config.depths)))

        def attention_of(stage: int, block: int) -> nn.Module:
            if keeps_own(config, attention, stage):
                return own_attention(stage, block)
            return build_attention(
                attention,
                config.dim(stage),
                config.num_heads[stage],
                config.grid(stage),
                (config.contrast_grid[stage][0], config.contrast_grid[stage][1]),
                num_prefix_tokens=num_prefix_tokens if stage == last else 0,
                layer_index=sum(config.depths[:stage]) + block,
                qkv_bias=config.qkv_bias,
                proj_drop=config.drop_rate,
            )

        self.stages = nn.ModuleList()
        for stage, embed in enumerate(embeds):
            dim, ratio = config.dim(stage), mlp_ratios[stage]
            attentions = (attention_of(stage, block) for block in range(config.depths[stage]))
            cpe = config.conditional_position
            blocks = [
                Block(dim, attn, ratio, config.drop_rate, next(rates), norm_eps, conditional_position=cpe)
                for attn in attentions
            ]
            self.stages.append(Stage(embed, blocks))
        self.norm = nn.LayerNorm(self.num_features, eps=norm_eps)
        self.feature_info = [
            {"num_chs": config.dim(stage), "reduction": config.patch_size * 2**stage, "module": f"stages.{stage}"}
            for stage in range(len(config.depths))
        ]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group as timm's Swin: one layer per block; a stage's embedding joins its first block.

        The final norm joins the last block (timm marks it by 99999).
        """
        blocks: list[tuple[str, Any]] = [(r"^stages\.(\d+)", None)]
        if not coarse:
            blocks = [(r"^stages\.(\d+)\.embed", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stages\.0\.embed", "blocks": [*blocks, (r"^norm", (99999,))]}

    def resize(self, old: Any) -> None:
        """Set the grid of each attention."""
        stage: Any
        for index, stage in enumerate(self.stages):
            for block in stage.blocks:
                block.attn.set_grid(self.config.grid(index))

    @property
    def layers(self) -> nn.ModuleList:
        return self.stages

    def enter(self, stage: int, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Hook between the embedding and the blocks of a stage: `(B, H W, C)` to `(B, N, C)`."""
        return x

    def run_layers(
        self, x: Tensor, take: Collection[int] = (), last: int | None = None
    ) -> tuple[Tensor, list[LayerOutput]]:
        """Images `(B, in_chans, height, width)` to tokens `(B, N, C)` of a stage; see `LayeredNetwork`."""
        self.check_images(x)
        taken = []
        stage: Any
        for index, stage in enumerate(self.stages):
            tokens, grid = stage.embed(x)  # (B, H W, C)
            tokens = self.enter(index, tokens, grid)  # (B, N, C)
            for block in stage.blocks:
                tokens = self.run_block(block, tokens, grid)  # (B, N, C)
            if index in take:
                taken.append(LayerOutput(tokens, grid))
            if index == last:
                break
            x = to_image(tokens, grid, tokens.shape[1] - grid[0] * grid[1])  # (B, C, H, W)
        return tokens, taken  # (B, N, C)
