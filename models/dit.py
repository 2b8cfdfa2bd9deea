"""DiT (arXiv 2212.09748) and SiT (arXiv 2401.08740): one network, two objectives.

A transformer over the patches of a noisy latent or image, conditioned on time and class by adaLN-Zero.
`attention=softmax` is the original of both, parameter for parameter. With VCA every block has contrast tokens on half
the token grid. The objective interprets the output: DiT predicts noise and variance, SiT predicts a velocity and
ignores the second half of the channels.

Shape letters: B batch, I input channels, N = H W tokens, C width, K classes.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.config import check_positive, check_size, height_and_width
from models.layers import ConditionalPosition, load_official
from vca.attention import build_attention
from vca.attention.geometry import is_pair
from vca.attention.pooling import check_layers

FREQUENCIES = 256  # channels of the sinusoidal time embedding
gelu_tanh: Any = partial(nn.GELU, approximate="tanh")
MAX_PERIOD = 10_000
MAX_CONTRAST_SIDE = 8  # of the default contrast grid


@dataclass
class DiTConfig:
    """Config of a DiT, with the names of its repository.

    Attributes:
        family: the key in `models.MODELS`.
        name: name of this size in run names and tables.
        input_size: size of the latent or image, an integer or `[height, width]`.
        patch_size: side of a patch, in latent pixels.
        in_channels: channels of the latent or image; follows `autoencoder.channels`.
        hidden_size: width C.
        depth, num_heads: number of blocks (`depth`) and of heads per block (`num_heads`).
        mlp_ratio: hidden width of the MLPs, as a multiple of `hidden_size`.
        num_classes: number of classes; follows `data.num_classes`.
        class_dropout_prob: probability of replacing a label by the null label, `num_classes`, in training.
        learn_sigma: predict a variance too, which doubles the output channels.
        qkv_bias: whether the projections to q, k and v have a bias.
        proj_drop: dropout after the attention's output projection.
        conditional_position: add a 3 x 3 depthwise convolution of the grid before the first norm of each block.
        contrast_grid: `[h, w]` of the contrast tokens; null is half the token grid per side, at most 8, as in the
            paper at 256 and 512 px. `attention.contrast_grid` overrides it.
    """

    family: str = "dit"
    name: str = "dit_s_2"
    input_size: Any = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    num_classes: int = 1000
    learn_sigma: bool = True
    qkv_bias: bool = True
    proj_drop: float = 0.0
    conditional_position: bool = False
    contrast_grid: Any = None

    def __post_init__(self) -> None:
        check_positive(
            self, "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes", "mlp_ratio"
        )
        for key in ("class_dropout_prob", "proj_drop"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"model.{key} must be in [0, 1), got {getattr(self, key)}")
        check_size(self.size, self.patch_size, "model.input_size")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            rule = f"divisible by 4 and by model.num_heads {self.num_heads}"
            raise ValueError(f"model.hidden_size must be {rule}, got {self.hidden_size}")
        if self.contrast_grid is not None and not is_pair(self.contrast_grid):
            raise ValueError(f"model.contrast_grid must be two integers >= 1 or null, got {self.contrast_grid}")

    @property
    def size(self) -> tuple[int, int]:
        """`(height, width)` of the input."""
        return height_and_width(self.input_size, "model.input_size")

    @property
    def grid(self) -> tuple[int, int]:
        """`(H, W)` of the tokens."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute `x (1 + scale) + shift` for tokens `(B, N, C)`, shift and scale `(B, C)`."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def adaln(dim: int, parts: int) -> nn.Sequential:
    """Build the layers that map the condition `(B, C)` to shifts, scales and gates `(B, parts C)`."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


class TimestepEmbedder(nn.Module):
    """Embed times `(B,)` as `(B, C)`: sinusoids, then an MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """The sinusoids are computed in float32, also under autocast."""
        half = torch.arange(FREQUENCIES // 2, dtype=torch.float32, device=t.device) / (FREQUENCIES // 2)
        angles = t[:, None].float() * torch.exp(-math.log(MAX_PERIOD) * half)  # (B, 128)
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(next(self.mlp.parameters()).dtype))


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero: adaptive norms and gates that start at zero.

    `conditional_position` first adds a `ConditionalPosition`, without modulation and gate.
    """

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float, conditional_position: bool = False) -> None:
        from timm.layers import Mlp

        super().__init__()
        self.cpe = ConditionalPosition(dim) if conditional_position else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=gelu_tanh)
        self.adaLN_modulation = adaln(dim, 6)

    def forward(self, x: Tensor, c: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map tokens `(B, N, C)` and the condition `(B, C)` to tokens `(B, N, C)`."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x if self.cpe is None else self.cpe(x, grid)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), grid)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Project tokens `(B, N, C)` to the pixels of their patches `(B, N, patch_size^2 out_channels)`."""

    def __init__(self, dim: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.adaLN_modulation = adaln(dim, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Diffusion transformer, see `models.build_model`."""

    def __init__(self, config: DiTConfig, attention: Any) -> None:
        from timm.layers import PatchEmbed

        super().__init__()
        check_layers(attention, config.depth)
        self.config = config
        dim, grid = config.hidden_size, config.grid
        self.grad_checkpointing = False
        contrast_grid = config.contrast_grid or [min(max(1, side // 2), MAX_CONTRAST_SIDE) for side in grid]
        self.x_embedder = PatchEmbed(None, config.patch_size, config.in_channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        # With label dropout, the last row is the null label. The name is that of the original's checkpoints.
        table = nn.Embedding(config.num_classes + (config.class_dropout_prob > 0), dim)
        self.y_embedder = nn.Sequential(OrderedDict(embedding_table=table))
        # Constant, but a parameter in the original's checkpoints.
        self.pos_embed = nn.Parameter(sincos_positions(dim, grid), requires_grad=False)
        self.blocks = nn.ModuleList(
            DiTBlock(
                dim,
                build_attention(
                    attention,
                    dim,
                    config.num_heads,
                    grid,
                    (contrast_grid[0], contrast_grid[1]),
                    layer_index=index,
                    qkv_bias=config.qkv_bias,
                    proj_drop=config.proj_drop,
                ),
                config.mlp_ratio,
                config.conditional_position,
            )
            for index in range(config.depth)
        )
        self.final_layer = FinalLayer(dim, config.patch_size, config.out_channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as the original.

        | parameter | initial value |
        |---|---|
        | linear layers, patch embedding | Xavier uniform, bias zero |
        | label embedding, MLP of the time embedding | normal with std 0.02 |
        | adaLN layers, output layer | zero: norms, attentions and MLPs add nothing, the output is zero |
        | conditional positions | PyTorch's default of `Conv2d` |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config.hidden_size, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        for table in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(table.weight, std=0.02)  # type: ignore[arg-type, union-attr]
        starts_at_zero = [block.adaLN_modulation[1] for block in self.blocks]  # type: ignore[index, union-attr]
        for layer in (*starts_at_zero, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type, union-attr]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type, union-attr]

    @property
    def null_label(self) -> int:
        """Label of the unconditional model."""
        return self.config.num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Save only the input of each block for backward, and recompute the block there."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Inputs `(B, I, height, width)`, times `(B,)` and labels `(B,)` to `(B, out_channels, height, width)`."""
        patch = self.config.patch_size
        check_size((x.shape[2], x.shape[3]), patch, "input height and width")
        grid = (x.shape[2] // patch, x.shape[3] // patch)
        x = self.x_embedder(x) + self.positions(grid)  # (B, N, C)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, C)
        for block in self.blocks:
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, c, grid, use_reentrant=False)  # (B, N, C)
            else:
                x = block(x, c, grid)  # (B, N, C)
        x = self.final_layer(x, c)  # (B, N, patch patch out_channels)
        x = x.unflatten(-1, (patch, patch, -1)).unflatten(1, grid)  # (B, H, W, patch, patch, out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, out_channels, height, width)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding `(1, N, C)` of a grid `(H, W)`."""
        if grid == self.config.grid:
            return self.pos_embed
        return sincos_positions(self.config.hidden_size, grid).to(self.pos_embed)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, scale: float, channels: int | None = 3) -> Tensor:
        """Classifier-free guidance: `uncond + scale (cond - uncond)` in the first `channels`, `cond` in the others.

        Both halves run as one batch of 2 B.

        Args:
            scale: guidance scale; 1 is no guidance.
            channels: number of guided channels. The original guides 3 of 4 "for exact reproducibility" of its table;
                None guides every channel of the noise or velocity.
        """
        null = torch.full_like(y, self.null_label)
        out = self(torch.cat((x, x)), torch.cat((t, t)), torch.cat((y, null)))
        channels = min(channels or self.config.in_channels, self.config.in_channels)
        # unflatten instead of chunk, which would fix the batch size in an export.
        cond, uncond = out.unflatten(0, (2, -1)).unbind()  # 2 x (B, out_channels, height, width)
        guided = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
        return torch.cat((guided, cond[:, channels:]), dim=1)

    def convert_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The DiT and SiT repositories use the same names."""
        return dict(state)


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Sine-cosine position embedding `(1, H W, dim)`, float32: first half of the channels column, second half row.

    Computed in float64 and rounded, as in the original (from MAE).
    """
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid)
    frequencies = MAX_PERIOD ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    down = (rows[:, None] * frequencies).unsqueeze(1).expand(-1, grid[1], -1)  # (H, W, dim / 4)
    right = (columns[:, None] * frequencies).unsqueeze(0).expand(grid[0], -1, -1)  # (H, W, dim / 4)
    return torch.cat((right.sin(), right.cos(), down.sin(), down.cos()), dim=-1).flatten(0, 1).float().unsqueeze(0)


def from_official(config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> DiT:
    """Build the softmax baseline with weights of the DiT or SiT repository, see `load_official`.

    Both repositories store `model` and `ema`, and sample from `ema`.
    """
    return load_official(DiT, DiTConfig, config, state_dict.get("ema") or state_dict)
