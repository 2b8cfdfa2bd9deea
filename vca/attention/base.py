"""Base class of every attention variant: projections, local branch and gate.

    y = ((attend(q, k, v) + DWConv(v)) * gate(x)) Wo

A variant is a subclass that sets `Config` and defines `attend`; it creates its own parameters in `add_parameters`.
Projections are named as in timm's `Attention` (`qkv`, `proj`), so timm checkpoints load into every variant that has as
many heads of q, k, v and of the output.

Shape letters: B batch, M heads, N = P + H W tokens (P prefix tokens, then the grid), C = M D channels, D head dim.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vca.attention.geometry import check_tokens, is_pair, to_image

Choice = TypeVar("Choice", bound=Enum)


def choose(choices: type[Choice], value: Choice | str, key: str) -> Choice:
    """Convert a string to a member of the enum `choices`; `ValueError` names the key and the valid values."""
    if isinstance(value, choices):
        return value
    try:
        return choices(value)
    except ValueError:
        raise ValueError(f"{key} must be one of {[choice.value for choice in choices]}, got {value!r}") from None


class Gate(Enum):
    """Factor of the heads before the output projection: a linear function of x, with or without SiLU."""

    none = "none"
    linear = "linear"
    silu = "silu"


@dataclass
class AttentionConfig:
    """Options shared by all variants.

    Attributes:
        name: registry key in `vca.attention.ATTENTIONS`.
        local_branch: add a depthwise convolution of v on the grid, before the output projection.
        local_kernel: side of its kernels, odd.
        local_shared: use the same kernels in every head.
        gate: multiply the heads, after the local branch, by a linear function of the layer's input, normalized if the
            variant normalizes it (`linear`), or by its SiLU (`silu`).
        qk_norm: RMSNorm of q and of k over the channels of all heads.
    """

    name: str = ""
    local_branch: bool = False
    local_kernel: int = 3
    local_shared: bool = False
    gate: Gate = Gate.none
    qk_norm: bool = False

    def __post_init__(self) -> None:
        self.gate = choose(Gate, self.gate, "attention.gate")
        if self.local_kernel < 1 or self.local_kernel % 2 == 0:
            raise ValueError(f"attention.local_kernel must be odd and >= 1, got {self.local_kernel}")


class Tokens(NamedTuple):
    """The tokens of a layer, as `attend` sees them."""

    q: Tensor  # (B, M, N, D)
    k: Tensor
    v: Tensor
    x: Tensor  # (B, N, C), input of the projections
    grid: tuple[int, int]  # (H, W)


class HeadCounts(NamedTuple):
    """Number of heads of q, of k and v, and of the result of `attend`."""

    q: int
    kv: int
    out: int


def no_autocast(x: Tensor) -> torch.autocast:
    """Return a context without autocast on the device of `x`."""
    device = "cpu" if x.is_meta else x.device.type  # autocast does not know the meta device
    return torch.autocast(device, enabled=False)


def norm_of_heads(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Normalize `(B, N, M, D)` over all channels of a token, at least in float32."""
    acc_dtype = torch.promote_types(x.dtype, torch.float32)
    weight = norm.weight.to(acc_dtype)
    return F.rms_norm(x.flatten(2).to(acc_dtype), weight.shape, weight, norm.eps).to(x.dtype).unflatten(2, x.shape[2:])


class ProjectedAttention(nn.Module):
    """Multi-head attention on tokens `(B, N, C)`; the subclass defines the attention over heads, `attend`.

    All variants have this constructor and ignore arguments that do not apply to them, such as `contrast_grid` for MHSA.

    Args:
        dim: width C.
        num_heads: number of heads M; must divide `dim`.
        grid: `(H, W)` of the patch tokens; `forward` accepts other grids.
        contrast_grid: the backbone's contrast grid `(h, w)`; `config.contrast_grid` overrides it.
        num_prefix_tokens: P, the number of tokens before the grid (class token, registers).
        layer_index: depth of the layer in the network, from 0. It sets `lambda_init` of VCA and Differential Attention
            and selects the layer's entry of a per-layer `config.contrast_grid`.
        qkv_bias: whether the qkv projection has a bias.
        proj_drop: dropout rate after the output projection.
        config: options of the variant; None uses the defaults.

    Weight decay: `vca.training.optim` decays parameters with two or more dimensions. New parameters of shape `(D,)`
    (norm weights, lambda vectors, biases) are therefore not decayed; stream embeddings and projections are. To exclude
    a parameter, add its name to the backbone's `no_weight_decay()`.

    Raises:
        ValueError: if `num_heads` does not divide `dim`, `config` is not the variant's dataclass, or a value is out of
            range.
    """

    Config: type[AttentionConfig] = AttentionConfig

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        contrast_grid: tuple[int, int] = (7, 7),
        num_prefix_tokens: int = 0,
        layer_index: int = 0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        config: Any = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must be >= 1 and divide dim={dim}, got {num_heads}")
        for key, pair in (("grid", grid), ("contrast_grid", contrast_grid)):
            if not is_pair(pair):
                raise ValueError(f"{key} must be two integers >= 1, got {pair}")
        for key, number in (("num_prefix_tokens", num_prefix_tokens), ("layer_index", layer_index)):
            if number < 0:
                raise ValueError(f"{key} must be >= 0, got {number}")
        if not isinstance(config, (self.Config, type(None))):
            raise ValueError(f"config must be a {self.Config.__name__}, got {type(config).__name__}")
        self.config: Any = config or self.Config()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.grid, self.contrast_grid = (grid[0], grid[1]), (contrast_grid[0], contrast_grid[1])
        self.num_prefix_tokens, self.layer_index = num_prefix_tokens, layer_index
        heads = self.head_counts()
        self.qkv = nn.Linear(dim, (heads.q + 2 * heads.kv) * self.head_dim, bias=qkv_bias)
        self.proj = nn.Linear(heads.out * self.head_dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.local = self.local_convolution(heads) if self.config.local_branch else None
        gated = self.config.gate is not Gate.none
        self.gate = nn.Linear(dim, heads.out * self.head_dim) if gated else None
        self.q_norm, self.k_norm = (
            nn.RMSNorm(count * self.head_dim, eps=1e-6) if self.config.qk_norm else None
            for count in (heads.q, heads.kv)
        )
        self.add_parameters()

    def head_counts(self) -> HeadCounts:
        """Return the number of heads of each projection; M each unless overridden."""
        return HeadCounts(self.num_heads, self.num_heads, self.num_heads)

    def local_convolution(self, heads: HeadCounts) -> nn.Conv2d:
        """Build the convolution of the local branch."""
        if heads.kv != heads.out:
            raise ValueError(
                f"attention.local_branch must be false unless v has as many heads as the result, {heads.out}, "
                f"got {heads.kv}"
            )
        size, channels = self.config.local_kernel, self.head_dim * (1 if self.config.local_shared else heads.kv)
        local = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels)
        return local.to(memory_format=torch.channels_last)  # as its input and its weight gradient

    def add_parameters(self) -> None:
        """Create the variant's own parameters; called at the end of the constructor."""

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Make `(H, W)` the grid of inputs without `grid`, as if the module had been built for it.

        A variant whose parameters depend on the grid also interpolates those.
        """
        self.grid = (grid[0], grid[1])

    def attend(self, tokens: Tokens) -> Tensor:
        """Compute the attention over heads: `(B, M, N, D)`, in the dtype of `q`. M is `head_counts().out`."""
        raise NotImplementedError

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Map `(B, N, C)` to `(B, N, C)`; pass `grid` if it differs from the one the module was built for.

        Raises:
            ValueError: if N is not `num_prefix_tokens + H * W`.
        """
        grid = grid or self.grid
        check_tokens(x.shape[1], grid, self.num_prefix_tokens)
        tokens = self.project(x, grid)
        out = self.attend(tokens).transpose(1, 2).flatten(2)  # (B, N, C)
        if self.local is not None:
            local = self.local_branch(tokens.v.transpose(1, 2).flatten(2), grid)  # (B, H W, C)
            out = out + F.pad(local, (0, 0, self.num_prefix_tokens, 0))  # not in place: SDPA saves its output
        if self.gate is not None:
            gate = self.gate(tokens.x)  # (B, N, C)
            out = out * (F.silu(gate) if self.config.gate is Gate.silu else gate)
        return self.proj_drop(self.proj(out))  # (B, N, C)

    def project(self, x: Tensor, grid: tuple[int, int]) -> Tokens:
        """Project x `(B, N, C)` to q, k and v."""
        count = self.head_counts()
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B, N, 3M, D)
        q, k, v = heads.split([count.q, count.kv, count.kv], dim=2)  # 3 x (B, N, M, D); one copy in backward
        if self.q_norm is not None and self.k_norm is not None:
            q, k = norm_of_heads(self.q_norm, q), norm_of_heads(self.k_norm, k)
        return Tokens(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), x, grid)

    def local_branch(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Convolve v on the grid (depthwise): `(B, N, C)` to `(B, H W, C)`, without prefix tokens."""
        assert self.local is not None
        image = to_image(v, grid, self.num_prefix_tokens)  # (B, C, H, W)
        if self.config.local_shared:
            image = image.unflatten(1, (-1, self.head_dim)).flatten(0, 1)  # (B M, D, H, W)
        return self.local(image).reshape(v.shape[0], v.shape[2], -1).transpose(1, 2)  # (B, H W, C)
