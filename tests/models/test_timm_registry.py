"""The timm interface of the models: layer decay, global_pool, pretrained_cfg."""

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay

import models

models.register_timm()

FAMILIES = ["vca_deit_tiny_patch16_224", "vca_pvt_tiny_224", "vca_swin_tiny_patch4_window7_224", "vca_cswin_tiny_224"]
POOLING = {
    ("vca_deit_tiny_patch16_224", "vca"): "token",
    ("vca_pvt_tiny_224", "softmax"): "token",
    ("vca_pvt_tiny_224", "vca"): "avg",
    ("vca_swin_tiny_patch4_window7_224", "vca"): "avg",
    ("vca_cswin_tiny_224", "vca"): "avg",
}


def on_meta(name: str, **options) -> torch.nn.Module:
    """A timm model on the meta device."""
    with torch.device("meta"):
        return timm.create_model(name, **options)


def decay_groups(name: str, **options) -> list[dict]:
    """Parameter groups of `train.py --layer-decay 0.75` of timm."""
    network = on_meta(name, **options)
    return param_groups_layer_decay(network, layer_decay=0.75, no_weight_decay_list=network.no_weight_decay())


def layers(network: torch.nn.Module, coarse: bool = False) -> dict[str, int]:
    """Layer of each parameter, from 0 at the stem."""
    return group_parameters(network, network.group_matcher(coarse=coarse), reverse=True)


@pytest.mark.parametrize("attention", ["vca", "softmax"])
@pytest.mark.parametrize(
    ("ours", "theirs", "count"),
    [
        ("vca_deit_tiny_patch16_224", "deit_tiny_patch16_224", 2 * (1 + 12 + 1)),
        ("vca_deit_small_patch16_224", "vit_small_patch16_224", 2 * (1 + 12 + 1)),
        ("vca_swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224", 2 * (1 + 12 + 1)),
        ("vca_pvt_tiny_224", "pvt_v2_b1", 2 * (1 + 4 + 1)),
        ("vca_cswin_tiny_224", None, 2 * (1 + 25 + 1)),
    ],
)
def test_group_matcher_layer_decay_groups_equal_timm(ours, theirs, count, attention):
    """Stem, blocks (of PVT: stages), head, each with and without weight decay."""
    groups = decay_groups(ours, attention=attention)
    scales = sorted({group["lr_scale"] for group in groups})
    assert len(groups) == count
    assert scales == [0.75**power for power in reversed(range(count // 2))]
    if theirs is not None:
        expected = decay_groups(theirs)
        assert (len(groups), scales) == (len(expected), sorted({group["lr_scale"] for group in expected}))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("vca_deit_tiny_patch16_224", "deit_tiny_patch16_224"),
        ("vca_swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224"),
    ],
)
def test_group_matcher_every_parameter_in_timm_layer(ours, theirs):
    """For each parameter, by the name conversion that loads timm's weights."""
    network, original = on_meta(ours, attention="softmax"), on_meta(theirs)
    ids = {name: torch.tensor(layer) for name, layer in layers(original).items()}
    expected = {name: int(layer) for name, layer in network.convert_official(ids).items()}
    assert layers(network) == expected


@pytest.mark.parametrize("attention", ["vca", "softmax"])
@pytest.mark.parametrize("name", FAMILIES)
def test_group_matcher_layers_in_order_of_forward(name, attention):
    """Embeddings and positions first, the last norm with the last block, only the head after it."""
    network = on_meta(name, attention=attention)
    for coarse in (False, True):
        found = layers(network, coarse)
        last = max(found.values())
        assert set(found) == {name for name, _ in network.named_parameters()}
        assert {name for name, layer in found.items() if layer == last} == {"head.weight", "head.bias"}
        assert found["norm.weight"] == last - 1
        if "deit" in name:
            assert found["cls_token"] == found["pos_embed"] == found["patch_embed.proj.weight"] == 0
            continue
        assert found["stages.0.embed.proj.weight"] == 0
        assert found["stages.0.blocks.0.mlp.fc1.weight"] == 1
        stage = [found[f"stages.{index}.blocks.0.mlp.fc1.weight"] for index in range(4)]
        assert stage == sorted(set(stage))
        for index in (1, 2, 3):
            embedding = {layer for key, layer in found.items() if key.startswith(f"stages.{index}.embed.")}
            assert embedding == {stage[index]}
        if "pvt" in name:
            assert [found[f"pos_embeds.{index}"] for index in range(4)] == [0, *stage[1:]]
            assert found.get("cls_token", stage[3]) == stage[3]


@pytest.mark.parametrize(("name", "attention"), POOLING)
def test_register_timm_global_pool_of_architecture_accepted(name, attention):
    pooling = POOLING[name, attention]
    other = "avg" if pooling == "token" else "token"
    network = on_meta(name, attention=attention, global_pool=pooling)
    assert network.global_pool == pooling
    network.reset_classifier(3, pooling)
    assert network.get_classifier().out_features == 3
    refusal = rf"global_pool must be '{pooling}' \(fixed by the architecture\) or None, got '{other}'"
    with pytest.raises(ValueError, match=refusal):
        network.reset_classifier(4, other)
    assert network.num_classes == 3
    with pytest.raises(ValueError, match=refusal):
        on_meta(name, attention=attention, global_pool=other)


@pytest.mark.parametrize("name", FAMILIES)
def test_register_timm_fixed_input_size_of_cswin_alone(name):
    """Its stripes divide multiples of 224 px only; timm passes the size on, which can be overridden."""
    network = on_meta(name)
    assert network.default_cfg["fixed_input_size"] == ("cswin" in name)
    assert network.config.size == (224, 224)
    assert on_meta(name, img_size=448).config.size == (448, 448)
