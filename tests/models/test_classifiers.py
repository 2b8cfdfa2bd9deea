"""Backbones: golden outputs, published checkpoints, counts of the paper, gradients, other image sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import models.cswin
import models.deit
import models.pvt
import models.swin
import vca
from models import CLASSIFIERS, MODELS, build_model
from models.layers import Block
from scripts import complexity
from scripts.complexity import complexity_of
from tests.processes import ROOT
from tests.support import GOLDEN
from vca.attention import ATTENTIONS, SoftmaxAttention, SoftmaxConfig, VCAConfig, VisualContrastAttention
from vca.config import compose
from vca.report import paper
from vca.sweep.plan import ablations, rows_of_ablation

models.register_timm()
FAMILY_ATTENTIONS = [(family, name) for family in CLASSIFIERS for name in sorted(ATTENTIONS)]
MODEL_FILES = sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml"))
CONTRACTS = json.loads((GOLDEN / "state_dict_contracts.json").read_text())

# timm's name -> (family, the original's config keys)
TIMM = {
    "deit_tiny_patch16_224": ("deit", {"embed_dim": 192, "depth": 12, "num_heads": 3}),
    "deit_small_patch16_224": ("deit", {"embed_dim": 384, "depth": 12, "num_heads": 6}),
    "deit_base_patch16_224": ("deit", {"embed_dim": 768, "depth": 12, "num_heads": 12}),
    "swin_tiny_patch4_window7_224": ("swin", {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}),
    "swin_small_patch4_window7_224": ("swin", {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]}),
    "swin_base_patch4_window7_224": ("swin", {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}),
}

# Millions of parameters and billions of multiply-adds at 224 px behind the paper's rounded figures. PVT-Tiny's
# 1.933 counts the class token in its last stage, as every other figure counts its tokens; without it, it is 1.926.
SETTLED = {
    ("deit_tiny", "softmax"): (5.717416, 1.254),
    ("deit_tiny", "vca"): (5.974, 1.235),
    ("deit_small", "softmax"): (22.050664, 4.599),
    ("deit_small", "vca"): (22.556, 4.561),
    ("pvt_tiny", "softmax"): (13.229288, 1.933),
    ("pvt_tiny", "vca"): (11.556, 2.033),
    ("swin_tiny", "softmax"): (28.288354, 4.491),
    ("swin_tiny", "vca"): (28.547, 4.597),
    ("cswin_tiny", "softmax"): (20.393, 4.342),
    ("cswin_tiny", "vca"): (20.414, 4.322),
}

# Two blocks in a stage, so that one of Swin's is shifted; as small as the families allow.
SMALL = {
    "deit": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "pvt": {"img_size": 64, "embed_dims": [8, 16, 24, 32], "num_heads": [1, 2, 3, 4]},
    "swin": {"img_size": 128, "embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": 4},
    "cswin": {
        "img_size": 64,
        "embed_dim": 8,
        "depths": [1, 1, 2, 1],
        "num_heads": [2, 2, 4, 8],
        "split_size": [1, 2, 2, 2],
    },
}


def small(family: str, attention: str, **fields) -> nn.Module:
    """A network of a family in its smallest form, with ten classes."""
    config_class, module = CLASSIFIERS[family]
    options = {"pieces": [2, 2]} if attention == "mhla" else {}  # the default divides the grids of larger images only
    torch.manual_seed(0)
    return module(config_class(**{**SMALL[family], "num_classes": 10, **fields}), ATTENTIONS[attention][0](**options))


def official(family: str):
    """`from_official` of a family."""
    return getattr(models, family).from_official


@pytest.mark.process
@pytest.mark.parametrize("name", TIMM)
def test_classifiers_equal_timm(name):
    family, config = TIMM[name]
    torch.manual_seed(0)
    theirs = timm.create_model(name).eval()
    ours = official(family)(config, theirs.state_dict()).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        features, expected = ours.forward_features(images), theirs.forward_features(images)
        torch.testing.assert_close(features, expected.reshape(features.shape), rtol=1e-5, atol=1e-5)
        out, expected = ours.forward_head(features), theirs.forward_head(expected)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(256, 256), (96, 160), (64, 64), (224, 448)])
def test_swin_equals_timm_at_other_sizes(size):
    """Windows that do not divide the grid, grids smaller than a window, images that are not square."""
    torch.manual_seed(0)
    theirs = timm.create_model("swin_tiny_patch4_window7_224", img_size=size).eval()
    ours = models.swin.from_official({"img_size": list(size)}, theirs.state_dict()).eval()
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["pvt", "cswin"])
def test_classifiers_equal_original_code(family):
    golden = np.load(GOLDEN / f"{family}_forward.npz")
    state = {name[6:]: torch.from_numpy(golden[name]) for name in golden.files if name.startswith("param/")}
    ours = official(family)(json.loads(str(golden["config"])), state).eval()
    with torch.no_grad():
        out = ours(torch.from_numpy(golden["x"]))
    expected = torch.from_numpy(golden["out"])
    assert (out - expected).abs().max() / expected.abs().max() < 1e-5


CONTRACT_OF = {
    "deit": "deit_tiny_patch16_224 (timm)",
    "swin": "swin_tiny_patch4_window7_224 (timm)",
    "pvt": "pvt_tiny (official)",
    "cswin": "CSWin_64_12211_tiny_224 (official)",
}


@pytest.mark.parametrize("family", CONTRACT_OF)
def test_from_official_published_layouts_load(family):
    """Every name and shape of the published files loads, also under `model`; errors have the name."""
    state = {name: torch.randn(shape) for name, shape in CONTRACTS[CONTRACT_OF[family]].items()}
    model = official(family)({}, {"model": state})
    assert sum(p.numel() for p in model.parameters()) == sum(tensor.numel() for tensor in state.values())
    with pytest.raises(ValueError, match="no key 'widths'"):
        official(family)({"widths": 192}, state)
    first = next(iter(state))
    with pytest.raises(RuntimeError, match="Missing key"):
        official(family)({}, {k: v for k, v in state.items() if k != first})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*stranger"):
        official(family)({}, {**state, "stranger": torch.zeros(1)})


def test_from_official_swin_repository_layout_loads():
    """It assigns a merging to the preceding stage, names the head `head`, and stores two buffers."""
    state = {}
    for name, tensor in timm.create_model("swin_tiny_patch4_window7_224").state_dict().items():
        stage = name.split(".")[1]
        if ".downsample." in name:
            name = name.replace(f"layers.{stage}.", f"layers.{int(stage) - 1}.")
        state[name.replace("head.fc.", "head.")] = tensor
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    state["layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(49, 49)
    ours = models.swin.from_official({}, {"model": state})
    merged = ours.stages[2].embed.reduction.weight
    assert torch.equal(merged, state["layers.1.downsample.reduction.weight"])
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("head")}
    converted = ours.convert_official(headless)
    assert set(ours.state_dict()) - set(converted) == {"head.weight", "head.bias"}
    assert torch.equal(converted["stages.2.embed.reduction.weight"], merged)
    with pytest.raises(ValueError, match="contains model and state_dict_ema; pass one of them"):
        models.swin.from_official({}, {"model": state, "state_dict_ema": state})


ROWS = complexity.choices([], [])
PARAMS = {
    ("cswin_tiny_original", "softmax"): 22_320_552,
    ("pvt_tiny", "softmax"): 13_229_288,
    ("dit_s_2", "softmax"): 32_963_360,
    ("dit_xl_2", "softmax"): 675_129_632,
}
INPUTS = {"deit_tiny": [3, 224, 224], "dit_s_2": [4, 32, 32], "deit_mini": [3, 32, 32], "dit_mini": [3, 32, 32]}


@pytest.mark.process
@pytest.mark.parametrize(("model", "attention"), sorted({*SETTLED, *PARAMS, *((model, "vca") for model in INPUTS)}))
def test_complexity_counts_equal_paper(model, attention):
    """`scripts/complexity.py` equals the paper's figures, and exact parameter counts."""
    counts = complexity_of(model, attention)
    params, macs = SETTLED.get((model, attention), (counts.params / 1e6, counts.macs / 1e9))
    assert counts.params / 1e6 == pytest.approx(params, abs=1e-3)
    assert counts.macs / 1e9 == pytest.approx(macs, abs=5e-3)
    assert counts.params == PARAMS.get((model, attention), counts.params)
    assert list(counts.input) == INPUTS.get(model, list(counts.input))


@pytest.mark.process
@pytest.mark.parametrize(("model", "attention"), ROWS, ids=str)
def test_complexity_rows_build(model, attention):
    config = complexity.config_of(model, *attention)
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(config.model, config.attention).parameters()) > 0


def test_complexity_rows_cover_models_and_ablations():
    """One for each model file as baseline and with VCA, and for each row of the ablations on the models of Tables 3
    and 4; the rows of the paper are all settled."""
    ablated = {" ".join(row).replace("attention.", "") for name in ablations() for row in rows_of_ablation(name)}
    expected = {(model, attention) for model in MODEL_FILES for attention in ("softmax", "vca")}
    rows = {(model, " ".join(chosen).replace("attention.", "")) for model, chosen in ROWS}
    assert rows == expected | {(model, row) for model in ("deit_tiny", "dit_s_2") for row in ablated}
    assert set(SETTLED) == {key for key, row in paper.PAPER.items() if row.params}
    assert {*SETTLED, *PARAMS} <= rows


# DeiT-Tiny: channels, width of a head, layers, patches, tokens with the class token, contrast tokens.
C, D, LAYERS, PATCHES, N, n = 192, 64, 12, 196, 197, 49

# Of one attention besides its projections, parameters and multiply-adds, counted by hand. Of VCA: the convolution, the
# vectors of two lambdas, two norms, e+ and e-; four products with n x N scores in Stage I and three in Stage II.
LOCAL, LOCAL_MACS = 10 * C, 9 * PATCHES * C
VCA = LOCAL + 2 * 4 * D + 2 * D + 2 * n * C
BY_HAND = {
    "softmax": (0, 2 * N * N * C),
    "softmax_local": (LOCAL, 2 * N * N * C + LOCAL_MACS),
    "vca": (VCA, 7 * n * N * C + LOCAL_MACS),
    "vca_no_local": (VCA - LOCAL, 7 * n * N * C),
    "vca_stage1_only": (VCA - 4 * D, 6 * n * N * C + LOCAL_MACS),  # one product less, the negative scores of Stage II
    "vca_stage2_only": (VCA - 4 * D, 5 * n * N * C + LOCAL_MACS),  # two less, the negative stream of Stage I
    "vca_token_lambda": (VCA - 8 * D + 2 * 3 * C, 7 * n * N * C + LOCAL_MACS + 2 * 3 * N * C),  # 3 heads
    "vca_no_norm": (VCA - 2 * D, 7 * n * N * C + LOCAL_MACS),
    "vca_learned_pooling": (VCA + 4 * C, 7 * n * N * C + LOCAL_MACS + PATCHES * C),  # kernels of 2 x 2
    "vca contrast_grid=[4,4]": (VCA - 2 * (n - 16) * C, 7 * 16 * N * C + LOCAL_MACS),
    "differential_stages": (LOCAL + 2 * 4 * D // 2 + 2 * D, 5 * n * N * C + LOCAL_MACS),  # scores of half heads
    "differential": (4 * D // 2 + D, 3 * N * N * C),
    "agent": (LOCAL + 2 * 3 * n * (7 * 7 + 14 + 14 + 1), 4 * n * N * C + LOCAL_MACS),  # 3 heads, two biases
    "focused_linear": (LOCAL, 2 * N * D * C + LOCAL_MACS),
    "inline": (10 * (D + 1) * C, 2 * N * D * C + LOCAL_MACS + 10 * D * C),  # predicted kernels
    "mala": (26 * C + (C + 1) * C, 2 * N * D * C + N * C * C + 25 * PATCHES * C),  # 5 x 5, gate
    "circulant": (C * (C + 1), N * C * C + 2 * N * C),  # the gate, and the class token; FFTs are not counted
    "ttt": (  # columns of q', k', v' and o', start weights; six products per head, two convolutions, the class token
        3 * D * (C + 1) + D * C + 2 * C * D + 9 * D,
        4 * N * C * D + 6 * PATCHES * C * D + 18 * PATCHES * D + 2 * N * (C + D),
    ),
    "polaformer": (  # kernels, gate, scale, power, positions
        26 * D + C * (C + 1) + 2 * C + N * C,
        N * C * C + 4 * N * C * D + 25 * PATCHES * C,
    ),
}


@pytest.mark.parametrize("attention", BY_HAND)
def test_complexity_counts_equal_hand_count(attention):
    """DeiT-Tiny with each attention, spelled out."""
    params, macs = BY_HAND[attention]
    block = 2 * 2 * C + (C + 1) * 3 * C + (C + 1) * C + (C + 1) * 4 * C + (4 * C + 1) * C  # norms, qkv, proj, the MLP
    around = (3 * 16 * 16 + 1) * C + N * C + C + 2 * C + (C + 1) * 1000  # patches, positions, class token, norm, head
    counts = complexity_of("deit_tiny", *attention.replace(" ", " attention.").split())
    assert counts.params == LAYERS * (block + params) + around
    products = (3 + 1 + 4 + 4) * N * C * C  # qkv, proj, the MLP
    assert counts.macs == LAYERS * (products + macs) + PATCHES * 3 * 16 * 16 * C + C * 1000


@pytest.mark.parametrize(("family", "attention"), FAMILY_ATTENTIONS)
def test_classifiers_every_parameter_gets_gradient(family, attention):
    network = small(family, attention, drop_rate=0.1, drop_path_rate=0.1).train()
    network(torch.randn(4, 3, *network.config.size)).square().mean().backward()
    unreached = set()
    if family == "deit":  # the head reads the class token alone: what the last block does to patches reaches nothing
        patches = [
            "local.weight",
            "local.bias",
            "bias2.cells",
            "bias2.rows",
            "bias2.columns",
            "w1",
            "w2",
            "w3",
            "mixing",
        ]
        patches += [f"predictor.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
        unreached = {f"blocks.1.attn.{name}" for name in patches}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or name in unreached, name


@pytest.mark.parametrize(("family", "attention"), FAMILY_ATTENTIONS)
def test_classifiers_gradient_checkpointing_exact(family, attention):
    """Output and every gradient to the bit, with dropout and stochastic depth on."""
    network = small(family, attention, drop_rate=0.1, drop_path_rate=0.3).train()
    images = torch.randn(4, 3, *network.config.size)
    seen, calls = [], []
    next(m for m in network.modules() if isinstance(m, Block)).norm1.register_forward_hook(lambda *_: calls.append(1))
    for enable, expected in ((False, 1), (True, 2)):
        calls.clear()
        network.set_grad_checkpointing(enable)
        network.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        out = network(images)
        out.square().mean().backward()
        assert len(calls) == expected  # checkpointing recomputes the block
        seen.append((out.detach(), {name: p.grad.clone() for name, p in network.named_parameters()}))
    assert torch.equal(seen[0][0], seen[1][0])
    assert all(torch.equal(seen[0][1][name], seen[1][1][name]) for name in seen[0][1])


OTHER_SIZES = {
    "deit": [(32, 32), (48, 16), (8, 40)],
    "pvt": [(64, 64), (96, 32), (32, 160)],
    "swin": [(128, 128), (160, 96), (32, 64)],
    "cswin": [(64, 64), (128, 64), (32, 96)],
}


@pytest.mark.parametrize(("family", "attention"), FAMILY_ATTENTIONS)
def test_classifiers_other_image_sizes(family, attention):
    """Also non-square; images are independent; an invalid size is an error with the nearest valid ones."""
    network = small(family, attention).eval()
    scale = 2 if attention == "mhla" else 1  # 2 x 2 pieces divide every grid
    for size in OTHER_SIZES[family]:
        images = torch.randn(2, 3, scale * size[0], scale * size[1])
        with torch.no_grad():
            out = network(images)
            assert out.shape == (2, 10)
            torch.testing.assert_close(network(images[1:]), out[1:])
    multiple = network.size_multiple
    with pytest.raises(ValueError, match=rf"multiple of {multiple}, such as {multiple} or {2 * multiple}, got "):
        network(torch.randn(1, 3, multiple + 1, multiple + 1))
    with pytest.raises(ValueError, match=r"img_size must be a multiple of .*, got 33"):
        small(family, attention, img_size=33)


def test_cswin_stripes_decide_valid_sizes():
    """Only stages that keep their stripes constrain the image size."""
    assert models.cswin.CSWin(models.cswin.CSWinConfig(), SoftmaxConfig()).size_multiple == 224
    with pytest.raises(
        ValueError, match=r"split_size \[1, 2, 7, 7\], model.img_size must be a multiple of 224, .* 448"
    ):
        models.cswin.CSWin(models.cswin.CSWinConfig(img_size=384), VCAConfig())
    wide = models.cswin.CSWinConfig(img_size=384, split_size=[1, 2, 12, 12], embed_dim=8, num_heads=[2, 2, 2, 2])
    assert models.cswin.CSWin(wide, SoftmaxConfig()).size_multiple == 192
    everywhere = models.cswin.CSWinConfig(img_size=96, attention_stages=[1, 2, 3], embed_dim=8, num_heads=[2, 2, 2, 2])
    assert models.cswin.CSWin(everywhere, VCAConfig()).size_multiple == 32


@pytest.mark.parametrize("family", ["pvt", "swin", "cswin"])
def test_pyramid_attention_stages_and_contrast_grids(family):
    """`attention_stages` and `contrast_grid` are config; the softmax baseline keeps the original everywhere."""

    def kinds(network):
        return [type(stage.blocks[0].attn) for stage in network.stages]

    own = kinds(small(family, "softmax"))
    assert VisualContrastAttention not in own
    assert SoftmaxAttention not in own
    with pytest.raises(ValueError, match=rf"local_branch must be false .*{family} keeps its own attention\), got True"):
        CLASSIFIERS[family][1](CLASSIFIERS[family][0](**SMALL[family]), SoftmaxConfig(local_branch=True))
    with pytest.raises(ValueError, match=r"attention.gate must be none with attention=softmax .*, got silu"):
        CLASSIFIERS[family][1](CLASSIFIERS[family][0](**SMALL[family]), SoftmaxConfig(gate="silu"))
    grids = [[1, 2], [2, 2], [3, 2], [1, 1]]
    network = small(family, "vca", attention_stages=[1, 3], contrast_grid=grids)
    assert kinds(network) == [VisualContrastAttention, own[1], VisualContrastAttention, own[3]]
    assert network.stages[0].blocks[0].attn.contrast_grid == (1, 2)
    assert network.stages[2].blocks[-1].attn.contrast_grid == (3, 2)
    depths = network.config.depths
    blocks = [block.attn for stage in network.stages for block in stage.blocks]
    third = blocks[depths[0] + depths[1]]
    assert third.lambda_init == pytest.approx(0.8 - 0.6 * np.exp(-0.3 * (depths[0] + depths[1])))


def test_pyramid_layout_equals_table1():
    """Stages with VCA in the paper's networks, and their contrast grids."""
    layout = {
        "pvt_tiny": [(3, 3), (4, 4), (7, 7), (7, 7)],
        "swin_tiny": [(3, 3), (4, 4), (7, 7), None],
        "cswin_tiny": [(3, 3), (4, 4), None, None],
    }
    for name, grids in layout.items():
        config = compose("train_cls", [f"model={name}", "attention=vca", "data=imagefolder"])
        with torch.device("meta"):
            network = build_model(config.model, config.attention)
        assert [getattr(stage.blocks[0].attn, "contrast_grid", None) for stage in network.stages] == grids
        assert network.num_prefix_tokens == 0
    config = compose("train_cls", ["model=pvt_tiny", "attention=softmax", "data=imagefolder"])
    assert build_model(config.model, config.attention).num_prefix_tokens == 1


def test_deit_non_square_images():
    network = models.deit.DeiT(models.deit.DeiTConfig(img_size=[64, 32], depth=1), VCAConfig())
    assert network.grid == (4, 2)
    assert network(torch.randn(1, 3, 64, 32)).shape == (1, 1000)


def test_classifiers_share_attention_core():
    """Every family uses the functions of `vca.attention`, and no softmax of its own."""
    import models.pyramid

    assert models.deit.build_attention is models.pyramid.build_attention is vca.attention.build_attention
    for family in (models.pvt, models.swin, models.cswin):
        assert family.softmax_attention is vca.attention.softmax_attention
        assert family.Pyramid is models.pyramid.Pyramid
    for path in Path(models.__file__).parent.glob("*.py"):
        source = path.read_text()
        assert "scaled_dot_product_attention" not in source, path
        assert ".softmax(" not in source, path


WRONG_CONFIGS = {
    "pvt": [({"sr_ratios": [8, 4, 2, 2]}, "sr_ratios must end with 1"), ({"depths": [1, 1]}, "must have 2 entries")],
    "swin": [
        ({"attention_stages": [0]}, "stages from 1 to 4"),
        ({"window_size": 0}, "window_size must be >= 1, got 0"),
    ],
    "cswin": [({"num_heads": [1, 2, 4, 8]}, "must be even"), ({"contrast_grid": [[1]] * 4}, "pairs of integers")],
    "deit": [({"num_heads": 5}, "must divide"), ({"drop_path_rate": 1.0}, r"must be in \[0, 1\), got 1.0")],
}


@pytest.mark.parametrize("family", WRONG_CONFIGS)
def test_classifiers_wrong_config_refused(family):
    for fields, message in WRONG_CONFIGS[family]:
        with pytest.raises(ValueError, match=message):
            small(family, "vca", **fields)


def test_models_contrast_grid_of_too_many_layers_refused():
    depths = {"deit": 2, "pvt": 8, "swin": 8, "cswin": 5, "dit": 1}
    fields = {**SMALL, "pvt": {**SMALL["pvt"], "depths": [2] * 4}, "dit": {"depth": 1}}
    for family, depth in depths.items():
        config_class, module = MODELS[family]
        config = config_class(**fields[family])
        module(config, VCAConfig(contrast_grid=[[1, 1]] * depth))
        with pytest.raises(
            ValueError, match=rf"attention.contrast_grid must have one pair per layer \({depth}\), got {depth + 1}"
        ):
            module(config, VCAConfig(contrast_grid=[[1, 1]] * (depth + 1)))


def test_classifiers_without_head_return_features():
    for family in CLASSIFIERS:
        network = small(family, "vca", num_classes=0)
        images = torch.randn(1, 3, *network.config.size)
        assert network(images).shape == (1, network.num_features)
        network.reset_classifier(3)
        assert network(images).shape == (1, 3)
        network.bfloat16().reset_classifier(4)
        assert network.head.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("name", timm.list_models("vca_*"))
def test_register_timm_models_follow_timm_interface(name):
    """timm's model interface, on the meta device."""
    size = 8 if "mini" in name else 448
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0, img_size=size, in_chans=1, drop_path_rate=0.1)
        assert network.get_classifier().__class__ is nn.Identity
        network.set_grad_checkpointing()
        images = torch.empty(1, 1, size, size)
        features = network.forward_features(images)
        assert features.shape[2] == network.num_features
        assert network.forward_head(features, pre_logits=True).shape == (1, network.num_features)
        if "tiny" in name:
            assert network(images).shape == (1, network.num_features)
            baseline = timm.create_model(name, img_size=size, attention="softmax")
            assert not any(isinstance(module, VisualContrastAttention) for module in baseline.modules())
    assert timm.data.resolve_data_config({}, model=network)["crop_pct"] == (0.9 if "cswin" in name else 0.875)


def test_register_timm_wrong_arguments_refused():
    names = timm.list_models("vca_*")
    assert len(names) == 1 + len([name for name in MODEL_FILES if not name.startswith("dit_")])
    assert {"vca_deit_tiny_patch16_224", "vca_deit_mini_patch2_8", "vca_deit_mini_patch4_32"} <= set(names)
    assert timm.create_model("vca_deit_mini_patch4_32").config.size == (32, 32)
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("vca_pvt_tiny_224", pretrained=True)
    with pytest.raises(ValueError, match="has no key 'windows'"):
        timm.create_model("vca_pvt_tiny_224", windows=3)
    with pytest.raises(ValueError, match=r"attention must be one of \['agent', .*'vca'\], got 'cubic'"):
        timm.create_model("vca_pvt_tiny_224", attention="cubic")
    with pytest.raises(ValueError, match="feature_cls of vca_pvt_tiny_224 must be 'getter', got 'hook'"):
        timm.create_model("vca_pvt_tiny_224", features_only=True, feature_cls="hook")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224", "deit3_small_patch16_224"])
def test_replace_attention_in_timm_vit_keeps_weights(name):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5).eval()
    before = [(block.attn.qkv.weight.clone(), block.attn.proj.bias.clone()) for block in network.blocks]
    assert vca.replace_attention(network, contrast_grid=(4, 4)) == 12
    for block, (qkv, proj) in zip(network.blocks, before, strict=True):
        assert isinstance(block.attn, vca.VisualContrastAttention)
        assert torch.equal(block.attn.qkv.weight, qkv)
        assert torch.equal(block.attn.proj.bias, proj)
        assert block.attn.contrast_grid == (4, 4)
        assert block.attn.num_prefix_tokens == network.num_prefix_tokens
        assert not block.attn.training
    assert network.blocks[5].attn.lambda_init == pytest.approx(0.8 - 0.6 * torch.e**-1.5)
    network(torch.randn(1, 3, 224, 224)).sum().backward()
    assert all(p.grad is not None for p in network.blocks.parameters())


def test_replace_attention_unsupported_network_refused():
    with pytest.raises(ValueError, match=r"model must have blocks\[i\].attn .*, got Linear"):
        vca.replace_attention(nn.Linear(2, 2))
    network = timm.create_model("vit_tiny_patch16_224", qk_norm=True)
    with pytest.raises(ValueError, match=r"blocks.0.attn must not have parts that VCA lacks, got q_norm, k_norm"):
        vca.replace_attention(network)
    assert not any(isinstance(m, vca.VisualContrastAttention) for m in network.modules())
    network = timm.create_model("vit_tiny_patch16_224", depth=1)
    vca.replace_attention(network)
    with pytest.raises(ValueError, match="VCA does not support masks"):
        network.blocks[0](torch.zeros(1, 197, 192), attn_mask=torch.ones(197, 197))


WITH_PARTS_OF_THEIR_OWN = {
    "beit_base_patch16_224": "q_bias, v_bias, relative_position_bias_table",
    "cait_xxs24_224": "proj_l, proj_w",
    "eva02_small_patch14_224": "q_bias, v_bias, k_bias, an argument rope",
    "vit_relpos_small_patch16_224": "rel_pos",
    "vit_srelpos_small_patch16_224": "an argument shared_rel_pos",
    "vit_small_patch16_rope_224": "an argument rope",
}


@pytest.mark.parametrize("name", WITH_PARTS_OF_THEIR_OWN)
def test_replace_attention_extra_parts_refused(name):
    network = timm.create_model(name, depth=1, embed_dim=32, num_heads=2)
    with pytest.raises(ValueError, match=rf"blocks.0.attn must not .* got {WITH_PARTS_OF_THEIR_OWN[name]}"):
        vca.replace_attention(network, grid=(14, 14))
