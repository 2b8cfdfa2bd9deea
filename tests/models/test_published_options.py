"""Options of published linear attentions: no class token, no positions, conditional positions, RMSNorm, no qkv bias."""

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

import models
from models.deit import DeiT, DeiTConfig
from models.dit import DiT, DiTConfig
from models.layers import Block, ConditionalPosition, select_options
from tests.models import test_dit
from tests.models.test_classifiers import SMALL, small
from tests.training.test_init import state_of
from vca.attention import ATTENTIONS, SoftmaxAttention, SoftmaxConfig
from vca.config import compose
from vca.runtime.rundir import to_dict
from vca.training.pretrained import init_from

models.register_timm()
BARE = {"class_token": False, "pos_embed": False, "conditional_position": True, "qkv_bias": False}
DEIT = {
    "bare": BARE,
    "average": {"class_token": False, "norm": "rms"},
    "no_positions": {"pos_embed": False},
    "prefix": {"conditional_position": True, "norm": "rms"},
}
DIT = {"conditional_position": True, "qkv_bias": False, "proj_drop": 0.1}
FREE_GRID = ("differential", "softmax", "vca")  # no parameter depends on the grid, prefix tokens attend
OPTIONS = pytest.mark.parametrize("options", DEIT.values(), ids=DEIT)


def network_and_inputs(name, attention):
    """A small network with options, without zero initialisation, and inputs of its size."""
    if name == "dit":
        return test_dit.small(attention, **DIT), test_dit.inputs()
    family, options = (name, {"conditional_position": True}) if name in SMALL else ("deit", DEIT[name])
    network = small(family, attention, drop_rate=0.1, drop_path_rate=0.3, **options)
    return network, (torch.randn(4, 3, *network.config.size),)


NETWORKS = [*DEIT, "pvt", "swin", "cswin", "dit"]
NO_PREFIX = ("bare", "average", "dit")  # any variant, also one that refuses prefix tokens
PAIRS = [(name, attention) for name in NETWORKS for attention in (ATTENTIONS if name in NO_PREFIX else FREE_GRID)]


def test_conditional_position_equals_loop():
    """Zero padding on a grid that is not square, after two prefix tokens."""
    torch.manual_seed(0)
    height, width, prefix, dim = 3, 4, 2, 5
    layer = ConditionalPosition(dim).double()
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    x = torch.randn(2, prefix + height * width, dim, dtype=torch.float64)
    expected = x.clone()
    for row in range(height):
        for column in range(width):
            for c in range(dim):
                expected[:, prefix + row * width + column, c] += bias[c]
                for i in range(max(row - 1, 0), min(row + 2, height)):
                    for j in range(max(column - 1, 0), min(column + 2, width)):
                        factor = weight[c][0][i - row + 1][j - column + 1]
                        expected[:, prefix + row * width + column, c] += factor * x[:, prefix + i * width + j, c]
    out = layer(x, (height, width))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert torch.equal(out[:, :prefix], x[:, :prefix])


def test_block_conditional_position_outside_stochastic_depth():
    """With both branches dropped, a block is its conditional position; so is a DiT block with gates of zero."""
    attention = SoftmaxAttention(8, 2, (2, 3), num_prefix_tokens=1)
    block = Block(8, attention, 2.0, 0.0, 1.0, 1e-6, conditional_position=True).train()
    x = torch.randn(3, 7, 8)
    assert torch.equal(block(x, (2, 3)), block.cpe(x, (2, 3)))
    assert not torch.equal(block(x, (2, 3)), x)
    gated = DiT(DiTConfig(**test_dit.SMALL, **DIT), SoftmaxConfig()).blocks[0]
    x = torch.randn(3, 6, 16)
    assert torch.equal(gated(x, torch.randn(3, 16), (2, 3)), gated.cpe(x, (2, 3)))


def test_conditional_position_keeps_default_initialisation():
    """Neither the classifiers' nor DiT's initialisation changes PyTorch's, uniform within 1 / 3 for 9 inputs."""
    for network in (small("deit", "softmax", embed_dim=64, **BARE), test_dit.small("softmax", hidden_size=64, **DIT)):
        for block in network.blocks:
            for parameter in (block.cpe.weight, block.cpe.bias):
                assert 0.3 < parameter.abs().max() <= 1 / 3


@pytest.mark.parametrize(("name", "attention"), PAIRS)
def test_options_every_parameter_gets_gradient(name, attention):
    """So DDP needs no `find_unused_parameters`; convolutions' gradients have the memory format of their weights."""
    network, inputs = network_and_inputs(name, attention)
    network.train()(*inputs).square().mean().backward()
    for key, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, key
        # The head reads the class token alone: what the last block does to patches reaches nothing.
        unreached = name in ("no_positions", "prefix") and key.startswith("blocks.1.attn.local")
        assert parameter.grad.abs().sum() > 0 or unreached, key
        assert "cpe" not in key or parameter.grad.stride() == parameter.stride(), key


@pytest.mark.parametrize("name", NETWORKS)
def test_options_gradient_checkpointing_exact(name):
    network, inputs = network_and_inputs(name, "vca")
    seen, calls = [], []
    first = network.blocks[0] if hasattr(network, "blocks") else network.stages[0].blocks[0]
    first.norm1.register_forward_hook(lambda *_: calls.append(1))
    for enable, expected in ((False, 1), (True, 2)):
        calls.clear()
        network.train().set_grad_checkpointing(enable)
        network.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        network(*inputs).square().mean().backward()
        assert len(calls) == expected
        seen.append({key: p.grad.clone() for key, p in network.named_parameters() if p.grad is not None})
    assert all(torch.equal(seen[0][key], seen[1][key]) for key in seen[0])


@pytest.mark.parametrize("attention", FREE_GRID)
@OPTIONS
def test_deit_options_other_image_sizes(options, attention):
    """In `forward` and after `set_input_size`, which gives the same network; features without prefix tokens."""
    network = small("deit", attention, **options).eval()
    assert network.num_prefix_tokens == (network.cls_token is not None) == options.get("class_token", True)
    for size in ((32, 32), (48, 16), (8, 40)):
        x = torch.randn(2, 3, *size)
        grid = (size[0] // 8, size[1] // 8)
        with torch.no_grad():
            tokens = network.forward_features(x)
            assert tokens.shape == (2, network.num_prefix_tokens + grid[0] * grid[1], 16)
            pooled = tokens[:, 0] if network.num_prefix_tokens else tokens.mean(dim=1)
            assert torch.equal(network(x), network.head(pooled))
            final, features = network.forward_intermediates(x, norm=True)
            assert torch.equal(features[-1].flatten(2).transpose(1, 2), final[:, network.num_prefix_tokens :])
    x = torch.randn(2, 3, 48, 16)
    with torch.no_grad():
        before = network(x)
        network.set_input_size((48, 16))
        torch.testing.assert_close(network(x), before)
        network.set_input_size((16, 24), patch_size=4)
        assert network(torch.randn(2, 3, 16, 24)).shape == (2, 10)
    assert network.pos_embed is None or network.pos_embed.shape[1] == network.num_prefix_tokens + 4 * 6


def test_deit_norms_and_autocast():
    """RMSNorm in every place of LayerNorm; the residual stream is float32 under autocast, also without positions."""
    network = small("deit", "vca", **BARE, norm="rms").eval()
    norms = [module for name, module in network.named_modules() if name.split(".")[-1] in ("norm", "norm1", "norm2")]
    norms = [module for module in norms if not isinstance(module, nn.Identity)]
    assert [(type(module), module.eps) for module in norms] == [(nn.RMSNorm, 1e-6)] * 5
    seen: list[torch.dtype] = []
    network.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    for autocast in (True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert network(torch.randn(1, 3, 32, 32)).isfinite().all()
    network.bfloat16()(torch.randn(1, 3, 32, 32).bfloat16())
    assert seen == [torch.float32, torch.float32, torch.bfloat16]


OVERRIDES = (
    "img_size=224",
    "class_token=false",
    "pos_embed=false conditional_position=true",
    "class_token=false norm=rms qkv_bias=false img_size=256",
)


@pytest.mark.parametrize("overrides", [line.split() for line in OVERRIDES], ids=OVERRIDES)
def test_deit_parameter_count_equals_hand_count(overrides):
    """DeiT-Tiny with softmax attention, from Hydra's overrides; the saved config builds the same network."""
    fixed = ["model=deit_tiny", "attention=softmax", "data=imagefolder"]
    config = compose("train_cls", [*fixed, *(f"model.{one}" for one in overrides)]).model
    with torch.device("meta"):
        network = DeiT(config, SoftmaxConfig())
        again = DeiT(select_options(DeiTConfig, to_dict(config)), SoftmaxConfig())
    dim, tokens = 192, (256 if "img_size=256" in overrides else 224) ** 2 // 256
    prefix, vectors = "class_token=false" not in overrides, 1 if "norm=rms" in overrides else 2
    block = 2 * vectors * dim + 3 * dim * dim + 3 * dim * ("qkv_bias=false" not in overrides)
    block += (dim + 1) * dim + (dim + 1) * 4 * dim + (4 * dim + 1) * dim
    block += (9 + 1) * dim * ("conditional_position=true" in overrides)
    around = (3 * 16 * 16 + 1) * dim + prefix * dim + vectors * dim + (dim + 1) * 1000
    around += (prefix + tokens) * dim * ("pos_embed=false" not in overrides)
    assert sum(p.numel() for p in network.parameters()) == 12 * block + around
    assert network.state_dict().keys() == again.state_dict().keys()


def test_dit_parameter_count_equals_hand_count():
    """DiT-S/2 has 32,963,360 parameters; other latent sizes keep them."""
    with torch.device("meta"):
        network = DiT(DiTConfig(conditional_position=True, qkv_bias=False), SoftmaxConfig())
    assert sum(p.numel() for p in network.parameters()) == 32_963_360 + 12 * (10 - 3) * 384
    network = test_dit.small("vca", **DIT).eval()
    for size in ((8, 8), (16, 16), (4, 10)):
        with torch.no_grad():
            assert network(torch.randn(2, 4, *size), torch.rand(2), torch.tensor([0, 1])).shape == (2, 8, *size)


def test_dit_proj_drop_acts_in_training():
    network, inputs = test_dit.small("softmax", proj_drop=0.5), test_dit.inputs()
    assert [block.attn.proj_drop.p for block in network.blocks] == [0.5, 0.5]
    with torch.no_grad():
        assert not torch.equal(network.train()(*inputs), network(*inputs))
        assert torch.equal(network.eval()(*inputs), network(*inputs))


def test_init_from_official_without_class_token(tmp_path):
    """A class token and positions of the file that the model does not have are reported; the grid's are loaded."""
    torch.save(state_of("deit"), tmp_path / "official.pth")
    fields = {"depth": 12, "embed_dim": 192, "num_heads": 3}
    model = DeiT(DeiTConfig(**fields, class_token=False), SoftmaxConfig())
    report = init_from(model, tmp_path / "official.pth")
    assert report.unexpected == {"cls_token": "not in the model"}
    assert report.resized == {"pos_embed": "1 x 197 x 192 in the file, 1 x 196 x 192 in the model"}
    assert report.missing == []
    assert torch.equal(model.pos_embed, state_of("deit")["pos_embed"][:, 1:])
    torch.testing.assert_close(model.adapt("pos_embed", torch.ones(1, 256, 192)), torch.ones(1, 196, 192))
    assert model.adapt("pos_embed", torch.ones(1, 198, 192)) is None  # a distilled DeiT's
    torch.save(model.state_dict(), tmp_path / "average.pth")
    report = init_from(DeiT(DeiTConfig(**fields), SoftmaxConfig()), tmp_path / "average.pth")
    assert report.unexpected == {"pos_embed": "1 x 196 x 192 in the file, 1 x 197 x 192 in the model"}
    assert report.missing == ["cls_token", "pos_embed"]
    bare = DeiT(DeiTConfig(**fields, **{**BARE, "qkv_bias": True}), SoftmaxConfig())
    report = init_from(bare, tmp_path / "official.pth")
    assert set(report.unexpected) == {"cls_token", "pos_embed"}
    assert report.missing == [f"blocks.{i}.cpe.{part}" for i in range(12) for part in ("weight", "bias")]


@OPTIONS
def test_deit_options_follow_timm_interface(options):
    """Pooling, weight decay, layer groups and features of a model from timm's registry."""
    fields = {**SMALL["deit"], "depth": 4, **options}
    pooling, other = ("token", "avg") if options.get("class_token", True) else ("avg", "token")
    network = timm.create_model("vca_deit_tiny_patch16_224", global_pool=pooling, **fields)
    with pytest.raises(ValueError, match=f"global_pool must be '{pooling}'"):
        timm.create_model("vca_deit_tiny_patch16_224", global_pool=other, **fields)
    parameters = dict(network.named_parameters())
    assert network.no_weight_decay() == {"cls_token", "pos_embed"} & set(parameters)
    groups = group_parameters(network, network.group_matcher())
    assert sorted(name for names in groups.values() for name in names) == sorted(parameters)
    assert [index for index, names in groups.items() if "blocks.1.norm1.weight" in names] == [2]
    if "conditional_position" in options:
        assert {"blocks.1.cpe.weight", "blocks.1.norm1.weight"} <= set(groups[2])
    getter = timm.create_model("vca_deit_tiny_patch16_224", features_only=True, **fields)
    assert [out.shape for out in getter(torch.randn(1, 3, 48, 16))] == [(1, 16, 6, 2)] * 3


def test_options_wrong_values_refused():
    with pytest.raises(ValueError, match=r"^model.norm must be one of \['layer', 'rms'\], got 'batch'$"):
        DeiTConfig(norm="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^model.proj_drop must be in \[0, 1\), got 1.0$"):
        DiTConfig(proj_drop=1.0)
