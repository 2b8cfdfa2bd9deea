"""Intermediate features of a network of layers, with the methods of timm's Vision Transformers.

`forward_features` and `forward_intermediates` run the same loop, `run_layers`. timm's `features_only=True` wraps the
model in its `FeatureGetterNet`, which calls `prune_intermediate_layers` and `forward_intermediates`.

Shape letters: B batch, N tokens (of a grid H x W, after P prefix tokens), C channels of a layer.
"""

from collections.abc import Collection
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from vca.attention.geometry import to_image


class LayerOutput(NamedTuple):
    """Output of a layer: tokens `(B, N, C)`, and the grid `(H, W)` of those after the prefix tokens."""

    tokens: Tensor
    grid: tuple[int, int]

    @property
    def num_prefix_tokens(self) -> int:
        return self.tokens.shape[1] - self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> Tensor:
        """Prefix tokens `(B, P, C)`."""
        return self.tokens[:, : self.num_prefix_tokens]

    def patches(self, output_fmt: str) -> Tensor:
        """Tokens of the grid, as an image `(B, C, H, W)` for `NCHW` or as `(B, H W, C)` for `NLC`."""
        if output_fmt == "NCHW":
            return to_image(self.tokens, self.grid, self.num_prefix_tokens).contiguous()
        return self.tokens[:, self.num_prefix_tokens :]


class LayeredNetwork(nn.Module):
    """A network of layers and a final norm.

    A subclass defines `layers`, `run_layers`, `reset_classifier` and `feature_info`: for each layer its channels, its
    stride in pixels and its name.
    """

    norm: nn.Module
    num_features: int
    head_hidden_size: int
    num_prefix_tokens: int
    feature_info: list[dict[str, Any]]
    norm_fits_every_layer: ClassVar[bool] = True  # False: only the last layer has the width of the norm and the head

    @property
    def layers(self) -> nn.ModuleList:
        """The layers that have an index: blocks, or the stages of a pyramid."""
        raise NotImplementedError

    def run_layers(
        self, x: Tensor, take: Collection[int] = (), last: int | None = None
    ) -> tuple[Tensor, list[LayerOutput]]:
        """Run the layers up to index `last` (None: all), without the final norm.

        Returns:
            The tokens `(B, N, C)` after the last one that ran, and the outputs of the layers in `take`, in order.
        """
        raise NotImplementedError

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        raise NotImplementedError

    def norm_output(self, x: Tensor, layer: int) -> Tensor:
        """Apply the final norm to the output `(B, N, C)` of a layer if it fits this layer."""
        return self.norm(x) if self.norm_fits_every_layer or layer == len(self.layers) - 1 else x

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images `(B, in_chans, height, width)` to normalised tokens `(B, N, C)` of the last layer."""
        return self.norm(self.run_layers(x)[0])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Return the final features and the outputs of layers.

        Args:
            x: images `(B, in_chans, height, width)`.
            indices: None for all layers, n for the last n, or indices (negative ones count from the end).
            return_prefix_tokens: return each output as a pair with its prefix tokens `(B, P, C)`; no effect on a model
                without prefix tokens.
            norm: apply the final norm to the outputs that it fits.
            stop_early: end after the last layer in `indices`; its output becomes the final features.
            output_fmt: `NCHW` for outputs `(B, C, H, W)`, `NLC` for `(B, H W, C)`; both without prefix tokens.
            intermediates_only: leave out the final features.
            output_dict: return a dict with timm's keys `image_features`, `image_intermediates` and
                `image_intermediates_prefix`.

        Returns:
            `(final, outputs)`: the final features `(B, N, C)`, equal to `forward_features(x)` unless `stop_early`, and
            the list of outputs in the order of the layers.

        Raises:
            ValueError: if `output_fmt` is neither `NCHW` nor `NLC`.
        """
        from timm.models._features import feature_take_indices

        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got '{output_fmt}'")
        take, last = feature_take_indices(len(self.layers), indices)
        x, taken = self.run_layers(x, take, last if stop_early else None)
        if norm:
            order = sorted(set(take))
            taken = [LayerOutput(self.norm_output(t, i), grid) for i, (t, grid) in zip(order, taken, strict=True)]
        outputs = [output.patches(output_fmt) for output in taken]
        prefixes = [output.prefix for output in taken] if return_prefix_tokens and self.num_prefix_tokens else None
        if output_dict:
            named: dict[str, Any] = {"image_intermediates": outputs}
            named |= {"image_intermediates_prefix": prefixes} if prefixes is not None else {}
            return named if intermediates_only else {**named, "image_features": self._final(x, last, stop_early)}
        pairs: list[Any] = outputs if prefixes is None else list(zip(outputs, prefixes, strict=True))
        return pairs if intermediates_only else (self._final(x, last, stop_early), pairs)

    def _final(self, x: Tensor, last: int, stop_early: bool) -> Tensor:
        return self.norm_output(x, last if stop_early else len(self.layers) - 1)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """Return the outputs of the last `n` layers, or of the layers in `n`: DINO's name and arguments.

        `reshape` returns images `(B, C, H, W)` instead of tokens; the rest as in `forward_intermediates`.
        """
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove, in place, the layers after the last one in `indices`, and optionally the final norm and the head.

        Norm and head are always removed if they do not fit the last layer that remains.

        Returns:
            The indices of `indices`, counted from 0.
        """
        from timm.models._features import feature_take_indices

        take, last = feature_take_indices(len(self.layers), indices)
        misfit = last + 1 < len(self.layers) and not self.norm_fits_every_layer
        del self.layers[last + 1 :]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or misfit:
            self.norm = nn.Identity()
        if prune_head or misfit:
            self.reset_classifier(0)
        return take
