"""Config fields that several backbones share."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from vca.attention.geometry import is_pair


@dataclass
class BackboneConfig:
    """Fields of every classifier.

    Attributes:
        family: the key in `models.MODELS`.
        name: name of this size in run names and tables.
        img_size: image size in pixels, an integer or `[height, width]`.
        in_chans: channels of the images; follows `data.in_chans`.
        num_classes: number of classes of the head; follows `data.num_classes`.
        drop_rate: dropout after the position embedding, the attention projection and in the MLPs.
        drop_path_rate: stochastic depth rate of the last block; linear from 0 at the first block.
    """

    family: str = ""
    name: str = ""
    img_size: Any = 224
    in_chans: int = 3
    num_classes: int = 1000
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.in_chans < 1:
            raise ValueError(f"model.in_chans must be >= 1, got {self.in_chans}")
        if self.num_classes < 0:
            raise ValueError(f"model.num_classes must be >= 0, got {self.num_classes}")
        for key in ("drop_rate", "drop_path_rate"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"model.{key} must be in [0, 1), got {getattr(self, key)}")
        check_size(self.size, self.size_multiple, "model.img_size")

    @property
    def size(self) -> tuple[int, int]:
        """`(height, width)` in pixels."""
        return height_and_width(self.img_size, "model.img_size")

    @property
    def size_multiple(self) -> int:
        """Height and width of an image must be multiples of this."""
        raise NotImplementedError


@dataclass
class PyramidConfig(BackboneConfig):
    """Fields of backbones with several stages, each at half the resolution of the previous one.

    Attributes:
        patch_size: stride of the first embedding, in pixels.
        depths, num_heads: number of blocks (`depths`) and of heads (`num_heads`) per stage.
        qkv_bias: whether the projections to q, k and v have a bias.
        attention_stages: stages, counted from 1, in which the attention variant replaces the backbone's own attention
            and attends globally. `attention=softmax` keeps the backbone's own attention in every stage.
        conditional_position: add a 3 x 3 depthwise convolution of the grid before the first norm of each block.
        contrast_grid: `[h, w]` of the contrast tokens per stage; `attention.contrast_grid` overrides it.
    """

    patch_size: int = 4
    depths: list[int] = field(default_factory=lambda: [2, 2, 2, 2])
    num_heads: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    qkv_bias: bool = True
    attention_stages: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    conditional_position: bool = False
    contrast_grid: list[list[int]] = field(default_factory=lambda: [[3, 3], [4, 4], [7, 7], [7, 7]])

    # Keys whose lists have one entry per stage.
    per_stage: ClassVar[tuple[str, ...]] = ("num_heads", "contrast_grid")

    def __post_init__(self) -> None:
        check_positive(self, "patch_size", "depths", "num_heads")
        super().__post_init__()
        stages = len(self.depths)
        for key in self.per_stage:
            if len(getattr(self, key)) != stages:
                raise ValueError(
                    f"model.{key} must have {stages} entries, one per stage, got {list(getattr(self, key))}"
                )
        if not set(self.attention_stages) <= set(range(1, stages + 1)):
            raise ValueError(f"model.attention_stages must be stages from 1 to {stages}, got {self.attention_stages}")
        for pair in self.contrast_grid:
            if not is_pair(pair):
                raise ValueError(f"model.contrast_grid must be pairs of integers >= 1, got {pair}")
        for stage, heads in enumerate(self.num_heads):
            if self.dim(stage) % heads:
                raise ValueError(f"model.num_heads must divide the width of its stage, {self.dim(stage)}, got {heads}")

    @property
    def size_multiple(self) -> int:
        """Stride of the last stage."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    def dim(self, stage: int) -> int:
        """Width of a stage, counted from 0."""
        raise NotImplementedError

    def grid(self, stage: int) -> tuple[int, int]:
        """`(H, W)` of the tokens of a stage, counted from 0."""
        stride = self.patch_size * 2**stage
        return self.size[0] // stride, self.size[1] // stride


def check_positive(config: Any, *keys: str) -> None:
    """Raise `ValueError` unless every number, and every entry of a list, is positive."""
    for key in keys:
        value = getattr(config, key)
        entries = value if isinstance(value, (list, tuple)) else [value]
        if not entries or not all(entry > 0 for entry in entries):
            least = "> 0" if any(isinstance(entry, float) for entry in entries) else ">= 1"
            raise ValueError(f"model.{key} must be {least}, got {value}")


def height_and_width(size: Any, key: str) -> tuple[int, int]:
    """Return a side or `[height, width]` as a pair; `ValueError` unless these are integers >= 1."""
    pair = (size, size) if type(size) is int else size
    if not is_pair(pair):
        raise ValueError(f"{key} must be one or two integers >= 1, got {size!r}")
    return (pair[0], pair[1])


def check_size(size: tuple[int, int], multiple: int, what: str) -> None:
    """Raise `ValueError` with the nearest valid sizes unless height and width are multiples of `multiple`."""
    if size[0] % multiple == 0 and size[1] % multiple == 0:
        return
    got = f"{size[0]} x {size[1]}" if size[0] != size[1] else str(size[0])
    near = sorted({max(1, side // multiple + up) * multiple for side in size for up in (0, 1)})
    raise ValueError(f"{what} must be a multiple of {multiple}, such as {' or '.join(map(str, near))}, got {got}")
