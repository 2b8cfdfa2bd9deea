"""Backbones: timm's weights, the checkpoints people have, counts of the paper, gradients, other sizes."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models.deit
import train_cls  # noqa: F401 - registers the schemas
import vca
from models import MODELS, build_model
from tests.conftest import GOLDEN, ROOT
from vca.attention import SoftmaxConfig, VCAConfig
from vca.config import compose

MODEL_FILES = sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml"))
DEIT = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "base": {"embed_dim": 768, "num_heads": 12},
}

# Table 1 of the paper, exact figures settled by arithmetic: millions of parameters, billions of multiply-adds at 224.
PAPER = [
    ("deit_tiny", "softmax", 5.717416, 1.254),
    ("deit_tiny", "vca", 5.974, 1.235),
    ("deit_small", "softmax", 22.050664, 4.599),
    ("deit_small", "vca", 22.556, 4.561),
]


def build(model: str, attention: str, *overrides: str) -> nn.Module:
    config = compose("train_cls", [f"model={model}", f"attention={attention}", *overrides])
    return build_model(config.model, config.attention)


def at_224(model: str, attention: str) -> nn.Module:
    with torch.device("meta"):
        return build(model, attention, "data=imagefolder", "data.root=none").eval()


@pytest.mark.parametrize("size", DEIT)
def test_equals_timm(size):
    torch.manual_seed(0)
    theirs = timm.create_model(f"deit_{size}_patch16_224").eval()
    ours = models.deit.from_official(DEIT[size], theirs.state_dict()).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected, out = theirs(images), ours(images)
        features = ours.forward_features(images)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features, theirs.forward_features(images), rtol=1e-5, atol=1e-5)


def test_official_checkpoint_layout():
    """Weights may lie under `model`, as in the DeiT repository's files; a wrong key is named."""
    contract = json.loads((GOLDEN / "state_dict_contracts.json").read_text())["deit_tiny_patch16_224 (timm)"]
    state = {name: torch.zeros(shape) for name, shape in contract.items()}
    models.deit.from_official(DEIT["tiny"], {"model": state})
    with pytest.raises(ValueError, match="no key 'embed_dims'"):
        models.deit.from_official({"embed_dims": 192}, state)
    with pytest.raises(RuntimeError, match="cls_token"):
        models.deit.from_official(DEIT["tiny"], {k: v for k, v in state.items() if k != "cls_token"})


@pytest.mark.parametrize(("model", "attention", "params", "macs"), PAPER)
def test_counts_of_the_paper(model, attention, params, macs):
    network = at_224(model, attention)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(params, abs=1e-3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(macs, abs=5e-3)


@pytest.mark.parametrize("attention", ["softmax", "vca"])
@pytest.mark.parametrize("model", MODEL_FILES)
def test_every_model_file(model, attention):
    """Every YAML builds; on a small image every parameter gets a gradient."""
    overrides = ("model.depth=2",) if model.startswith("deit") else ()
    network = build(model, attention, "data=cifar10", *overrides).train()
    network(torch.randn(2, 3, 32, 32)).square().mean().backward()
    # The head reads the class token alone, which the last block's local branch does not reach.
    unreached = {f"blocks.{len(network.blocks) - 1}.attn.local.{kind}" for kind in ("weight", "bias")}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or name in unreached, name


@pytest.mark.parametrize("attention", ["softmax", "vca"])
@pytest.mark.parametrize("size", [(32, 32), (48, 16), (8, 40)])
def test_other_sizes(size, attention):
    network = build("deit_mini", attention, "data=cifar10")
    assert network(torch.randn(1, 3, *size)).shape == (1, 10)
    with pytest.raises(ValueError, match="multiples of 2"):
        network(torch.randn(1, 3, 31, 32))


def test_non_square_model():
    network = models.deit.DeiT(models.deit.DeiTConfig(img_size=[64, 32], depth=1), VCAConfig())
    assert network.grid == (4, 2)
    assert network(torch.randn(1, 3, 64, 32)).shape == (1, 1000)


def test_one_attention_core():
    """Every family gets its attention from the one core."""
    for family, (_, module) in MODELS.items():
        source = Path(__import__(module.__module__, fromlist=["_"]).__file__).read_text()
        assert "build_attention" in source, family
        assert "scaled_dot_product_attention" not in source, family


def test_features_without_a_head():
    network = models.deit.DeiT(models.deit.DeiTConfig(num_classes=0, depth=1), SoftmaxConfig())
    assert network(torch.randn(1, 3, 224, 224)).shape == (1, 192)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224", "deit3_small_patch16_224"])
def test_replace_attention(name):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5).eval()
    before = [(block.attn.qkv.weight.clone(), block.attn.proj.bias.clone()) for block in network.blocks]
    assert vca.replace_attention(network, pool=(4, 4)) == 12
    for block, (qkv, proj) in zip(network.blocks, before, strict=True):
        assert isinstance(block.attn, vca.VisualContrastAttention)
        assert torch.equal(block.attn.qkv.weight, qkv)
        assert torch.equal(block.attn.proj.bias, proj)
        assert block.attn.pool == (4, 4)
        assert block.attn.num_prefix_tokens == network.num_prefix_tokens
        assert not block.attn.training
    assert network.blocks[5].attn.lambda_init == pytest.approx(0.8 - 0.6 * torch.e**-1.5)
    network(torch.randn(1, 3, 224, 224)).sum().backward()
    assert all(p.grad is not None for p in network.blocks.parameters())


def test_replace_attention_refuses():
    with pytest.raises(ValueError, match=r"no patch_embed\.grid_size"):
        vca.replace_attention(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no blocks"):
        vca.replace_attention(nn.Linear(2, 2), grid=(2, 2))
    network = timm.create_model("vit_tiny_patch16_224", qk_norm=True)
    with pytest.raises(ValueError, match=r"blocks.0.attn has q_norm, k_norm"):
        vca.replace_attention(network)
    assert not any(isinstance(m, vca.VisualContrastAttention) for m in network.modules())
    network = timm.create_model("vit_tiny_patch16_224", depth=1)
    vca.replace_attention(network)
    with pytest.raises(ValueError, match="no masked form"):
        network.blocks[0](torch.zeros(1, 197, 192), attn_mask=torch.ones(197, 197))
