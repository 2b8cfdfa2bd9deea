"""timm models from `configs/model/`: `models.register_timm()` adds `vca_deit_tiny_patch16_224` and so on.

Each YAML of a classifier is one timm model. Keyword arguments override its fields (`num_classes`, `img_size`,
`drop_path_rate`, `depth`, ...). `attention` is the name of a variant, a mapping of its options, or its config.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from models.layers import select_options
from vca.attention import ATTENTIONS

SIZES = Path(__file__).parents[1] / "configs" / "model"

# Fields that set the patch and image size in the name: those of the digits and CIFAR-10 experiments, otherwise 224 px.
VARIANTS: dict[str, tuple[dict[str, int], ...]] = {
    "deit_mini": ({"patch_size": 2, "img_size": 8}, {"patch_size": 4, "img_size": 32})
}

__all__: list[str] = []  # timm appends the names that it registers
default_cfgs: dict[str, Any] = {}


@cache
def load_sizes() -> dict[str, dict[str, Any]]:
    """Load the fields of every file in `configs/model/`, by file name, with `family`.

    Raises:
        ValueError: without `configs/`, which an installed package does not have.
    """
    if not SIZES.is_dir():
        raise ValueError(f"the timm models need a checkout of the repository: there is no {SIZES}")
    return {file.stem: {"name": file.stem, **load_size(file.stem)} for file in sorted(SIZES.glob("*.yaml"))}


def load_size(stem: str) -> dict[str, Any]:
    """Compose the fields of one file as Hydra does: the files of its defaults list in order, itself at `_self_`.

    References to other config groups (`${...}`) are dropped: a timm model has none.
    """
    own = yaml.safe_load((SIZES / f"{stem}.yaml").read_text()) or {}
    defaults = own.pop("defaults", [])
    own = {key: value for key, value in own.items() if not (isinstance(value, str) and value.startswith("${"))}
    fields: dict[str, Any] = {}
    for entry in defaults if "_self_" in defaults else [*defaults, "_self_"]:
        if entry == "_self_":
            fields |= own
        elif entry.endswith("_schema"):
            fields["family"] = entry.removesuffix("_schema")
        else:
            fields |= load_size(entry)
    return fields


def variants(name: str) -> list[dict[str, Any]]:
    """Return the fields of each timm model of a file in `configs/model/`."""
    return [{**load_sizes()[name], **fields} for fields in VARIANTS.get(name, ({"img_size": 224},))]


def pretrained_cfg(size: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's `pretrained_cfg` of a model."""
    return {
        "input_size": (3, size["img_size"], size["img_size"]),
        "fixed_input_size": size["family"] == "cswin",  # its stripes divide few sizes
        "crop_pct": 0.9 if size["family"] == "cswin" else 0.875,
        "interpolation": "bicubic",
        "first_conv": "patch_embed.proj" if size["family"] == "deit" else "stages.0.embed.proj",
        "classifier": "head",
        "license": "mit",
    }


def timm_name(size: Mapping[str, Any]) -> str:
    """Return the name of a timm model, with patch and window size where timm's models of the family have them."""
    patch, window = size.get("patch_size", 16), size.get("window_size", 7)
    parts = {"deit": f"_patch{patch}", "swin": f"_patch4_window{window}"}
    return f"vca_{size['name']}{parts.get(size['family'], '')}_{size['img_size']}"


def attention_config(attention: Any) -> Any:
    """Build an attention config from its name or from a mapping with `name`; a config is returned as it is."""
    options = {"name": attention} if isinstance(attention, str) else attention
    if not isinstance(options, Mapping):
        return attention
    if options.get("name") not in ATTENTIONS:
        raise ValueError(f"attention must be one of {sorted(ATTENTIONS)}, got {attention!r}")
    return select_options(ATTENTIONS[options["name"]][0], options)


def entry_point(size: Mapping[str, Any], registry: Mapping[str, tuple[type, type]]) -> Callable[..., Any]:
    """Build the function that timm calls to create one model."""
    config_class, module = registry[size["family"]]

    def build(
        attention: Any = "vca", global_pool: str | None = None, device: Any = None, dtype: Any = None, **fields: Any
    ) -> Any:
        with nullcontext() if device is None else torch.device(device):
            model: Any = module(select_options(config_class, {**size, **fields}), attention_config(attention))
        model.check_global_pool(global_pool)
        return model.to(dtype)

    def create(pretrained: bool = False, **kwargs: Any) -> Any:
        from timm.models import build_model_with_cfg

        if kwargs.get("feature_cls", "getter") != "getter":
            raise ValueError(f"feature_cls of {create.__name__} must be 'getter', got {kwargs['feature_cls']!r}")
        out_indices = 3 if size["family"] == "deit" else None  # timm's defaults: the last three blocks, or all stages
        features = {"feature_cls": "getter", "out_indices": out_indices}
        return build_model_with_cfg(build, create.__name__, pretrained, feature_cfg=features, **kwargs)

    create.__name__, create.__module__ = timm_name(size), __name__
    create.__doc__ = f"`configs/model/{size['name']}.yaml`."
    return create


def register(registry: Mapping[str, tuple[type, type]]) -> None:
    """Register every model of the families in `registry` with timm."""
    from timm.models import generate_default_cfgs, is_model, register_model

    for size in (size for name in load_sizes() for size in variants(name)):
        if size["family"] not in registry or is_model(timm_name(size)):
            continue
        default_cfgs.update(generate_default_cfgs({timm_name(size): pretrained_cfg(size)}))
        register_model(entry_point(size, registry))
