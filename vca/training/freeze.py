"""Freeze the first layers of a model: linear probing, and fine-tuning of the last blocks only."""

from collections.abc import Collection
from typing import Any

from vca.runtime.errors import check


def freeze_layers(model: Any, count: int) -> set[str]:
    """Freeze the layers `[:count]` of a classifier, in place, and return the names of their parameters.

    The layers are those of the model's `group_matcher`: the stem, each block (PVT: each stage) with the final norm in
    the last one, the head. Frozen parameters have `requires_grad=False`: they get no gradient, optimizer state or
    weight decay. The modules keep their training mode, so dropout and stochastic depth are active in frozen layers too.

    Args:
        model: the bare model, before the optimizer and DDP are built.
        count: end of the slice; a negative one counts from the head: -1 freezes all but the head.

    Raises:
        ConfigError: unless at least one layer is frozen and one is not.
    """
    from timm.models import group_parameters

    layer_of = group_parameters(model, model.group_matcher(), reverse=True)
    layers = max(layer_of.values()) + 1
    rule = f"from {1 - layers} to {layers - 1} for {type(model).__name__} with {layers} layers (stem to head)"
    check(0 < abs(count) < layers, "trainer.freeze_layers", rule, count)
    frozen = set()
    for name, parameter in model.named_parameters():
        if layer_of[name] < count % layers:
            parameter.requires_grad_(False)
            frozen.add(name)
    return frozen


def format_frozen(model: Any, frozen: Collection[str], missing: Collection[str]) -> str:
    """Format how much of a model is trained, and warn of frozen parameters that `init_from` did not load."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trained = sum(size for name, size in sizes.items() if name not in frozen)
    line = f"trained: {trained:,} of {sum(sizes.values()):,} parameters, the others are frozen"
    random = [name for name in missing if name in frozen]
    if random:
        line += f"\nwarning: {len(random)} frozen parameters were not loaded and stay random, such as {random[0]}"
    return line
