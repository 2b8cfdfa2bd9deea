"""The methods of timm's own models: intermediate features, pruning, other image sizes, checkpointing, layer decay."""

import copy
import runpy
import sys

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import models
from models import CLASSIFIERS
from models.layers import Block
from tests.models.test_classifiers import SMALL, small
from vca.attention import ATTENTIONS, VCAConfig
from vca.attention.comparison.agent import PositionBias

models.register_timm()

NAMES = {
    "deit": "vca_deit_tiny_patch16_224",
    "pvt": "vca_pvt_tiny_224",
    "swin": "vca_swin_tiny_patch4_window7_224",
    "cswin": "vca_cswin_tiny_224",
}
BOTH = pytest.mark.parametrize("attention", ["vca", "softmax"])
FAMILIES = pytest.mark.parametrize("family", CLASSIFIERS)
SIZES = {"deit": (48, 16), "pvt": (96, 128), "swin": (64, 64), "cswin": (128, 64)}  # another than in SMALL


FIELDS = {**SMALL, "deit": {**SMALL["deit"], "depth": 4}}  # features_only returns three blocks by default


def images(network: nn.Module, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *network.config.size)


def layer_outputs(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output `(B, N, C)` of the last block of each layer, recorded by hooks, without prefix tokens."""
    seen: list[torch.Tensor] = []
    blocks = [layer if isinstance(layer, Block) else layer.blocks[-1] for layer in network.layers]
    hooks = [block.register_forward_hook(lambda module, inputs, out: seen.append(out)) for block in blocks]
    network.forward_features(x)
    for hook in hooks:
        hook.remove()
    grids = [(x.shape[2] // info["reduction"]) * (x.shape[3] // info["reduction"]) for info in network.feature_info]
    return [out[:, out.shape[1] - count :] for out, count in zip(seen, grids, strict=True)]


@BOTH
@FAMILIES
def test_forward_intermediates_are_layer_outputs(family, attention):
    """Also on an image of another size; the final features equal `forward_features` to the bit."""
    network = small(family, attention).eval()
    with torch.no_grad():
        for x in (images(network), torch.randn(1, 3, *SIZES[family])):
            expected = layer_outputs(network, x)
            final, outputs = network.forward_intermediates(x)
            assert torch.equal(final, network.forward_features(x))
            tokens = network.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
            for image, sequence, out, info in zip(outputs, tokens, expected, network.feature_info, strict=True):
                size = (x.shape[2] // info["reduction"], x.shape[3] // info["reduction"])
                assert image.shape == (len(x), info["num_chs"], *size)
                assert torch.equal(image.flatten(2).transpose(1, 2), out)
                assert torch.equal(sequence, out)
            assert all(map(torch.equal, network.get_intermediate_layers(x, 2), expected[-2:]))
            assert torch.equal(network.get_intermediate_layers(x, [0], reshape=True)[0], outputs[0])
    strides = [info["reduction"] for info in network.feature_info]
    assert strides == ([8, 8] if family == "deit" else [4, 8, 16, 32])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        network.forward_intermediates(x, output_fmt="NHWC")


@BOTH
@FAMILIES
def test_forward_intermediates_options(family, attention):
    network = small(family, attention).eval()
    x, last = images(network), len(network.layers) - 1
    with torch.no_grad():
        final, outputs = network.forward_intermediates(x, output_fmt="NLC")
        normed = network.forward_intermediates(x, norm=True, output_fmt="NLC", intermediates_only=True)
        assert torch.equal(normed[last], network.norm(outputs[last]))
        assert torch.equal(normed[0], network.norm(outputs[0]) if family == "deit" else outputs[0])
        early, first = network.forward_intermediates(x, indices=[0], stop_early=True, output_fmt="NLC")
        assert torch.equal(first[0], outputs[0])
        assert torch.equal(early[:, -first[0].shape[1] :], normed[0])
        named = network.forward_intermediates(x, [-1], return_prefix_tokens=True, output_fmt="NLC", output_dict=True)
        pairs = network.forward_intermediates(x, [-1], True, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(named["image_features"], final)
    assert torch.equal(named["image_intermediates"][0], outputs[last])
    if not network.num_prefix_tokens:
        assert set(named) == {"image_features", "image_intermediates"}
        assert torch.equal(pairs[0], outputs[last])
        return
    assert torch.equal(pairs[0][0], outputs[last])
    assert torch.equal(pairs[0][1], named["image_intermediates_prefix"][0])
    assert torch.equal(network.norm(pairs[0][1]), final[:, :1])


@pytest.mark.parametrize("theirs", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_forward_intermediates_equal_timm(theirs):
    """With timm's weights in the softmax twin."""
    deit = theirs.startswith("deit")
    fields = {"embed_dim": 32, "num_classes": 5}
    fields |= {"depth": 3, "num_heads": 2} if deit else {"depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4)}
    torch.manual_seed(0)
    original = timm.create_model(theirs, img_size=64, **fields).eval()
    family = models.deit if deit else models.swin
    ours = family.from_official(
        {"img_size": 64, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}},
        original.state_dict(),
    ).eval()
    assert [{**info} for info in ours.feature_info] == [
        {**info, "module": info["module"].replace("layers", "stages")} for info in original.feature_info
    ]
    for size, patch in ((64, None), (128, None), (128, 8 if deit else None)):
        options = {"img_size": (size, size)} | ({"patch_size": patch} if patch else {})
        for network in (ours, original):
            network.set_input_size(**options)
        x = torch.randn(1, 3, size, size)
        for norm in (False, True):
            with torch.no_grad():
                expected, seen = (m.forward_intermediates(x, [0, -1], norm=norm) for m in (original, ours))
            torch.testing.assert_close(seen[1], expected[1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(seen[0], expected[0].reshape(seen[0].shape), rtol=1e-4, atol=1e-4)
    assert ours.feature_info[0]["reduction"] == original.feature_info[0]["reduction"] or patch


@BOTH
@FAMILIES
def test_features_only_pyramid_strides(family, attention):
    """Default and negative `out_indices`; equal to the features of the whole model."""
    fields = {**FIELDS[family], "attention": attention}
    torch.manual_seed(0)
    whole = timm.create_model(NAMES[family], **fields).eval()
    x = images(whole)
    with torch.no_grad():
        expected = whole.forward_intermediates(x, intermediates_only=True)
    count = len(expected)
    for indices in (None, (-2, -1), (0,)):
        torch.manual_seed(0)
        getter = timm.create_model(NAMES[family], features_only=True, out_indices=indices, **fields).eval()
        default = range(count - 3, count) if family == "deit" else range(count)
        chosen = list(default) if indices is None else [range(count)[index] for index in indices]
        outputs = getter(x)
        assert getter.feature_info.reduction() == [[4, 8, 16, 32][i] if family != "deit" else 8 for i in chosen]
        assert getter.feature_info.channels() == [out.shape[1] for out in outputs]
        assert all(torch.equal(out, expected[index]) for out, index in zip(outputs, chosen, strict=True))
        sum(out.mean() for out in outputs).backward()
        assert all(parameter.grad is not None for parameter in getter.parameters())  # none is unused
        assert not hasattr(getter.model.head, "weight")


@BOTH
@FAMILIES
def test_prune_intermediate_layers_keeps_features(family, attention):
    network = small(family, attention).eval()
    x, last = images(network), len(network.layers) - 1
    with torch.no_grad():
        logits, outputs = network(x), network.forward_intermediates(x, intermediates_only=True)
        same = copy.deepcopy(network)
        assert same.prune_intermediate_layers([-1], prune_head=False) == [last]
        assert torch.equal(same(x), logits)
        cut = copy.deepcopy(network)
        assert cut.prune_intermediate_layers([0]) == [0]
        assert len(cut.layers) == 1
        assert torch.equal(cut.forward_intermediates(x, intermediates_only=True)[0], outputs[0])
        cut.reset_classifier(3)
        assert cut(x).shape == (2, 3)
        cut.set_input_size(SIZES[family])
        assert cut(torch.randn(1, 3, *SIZES[family])).shape == (1, 3)
    assert cut.num_features == network.feature_info[0]["num_chs"]


@pytest.mark.parametrize("attention", ["vca", "softmax", "agent", "depthwise"])
@FAMILIES
def test_set_input_size_equals_model_built_at_size(family, attention):
    """Same parameters, shapes and output as a model built at the size, given the resampled weights."""

    def build(**fields):
        torch.manual_seed(0)
        config_class, module = CLASSIFIERS[family]
        kind = VCAConfig(pooling="depthwise") if attention == "depthwise" else ATTENTIONS[attention][0]()
        return module(config_class(**{**SMALL[family], **fields}), kind).eval()

    size = SIZES[family]
    network, original = build(), build()
    options = network.config
    network.set_input_size(size)
    assert options.size != size  # the caller's config is not changed
    window = {"window_size": 2} if family == "swin" else {}  # it is scaled with the image: 4 at 128 px
    other = build(img_size=size, **window)
    assert network.config == other.config
    other.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert torch.equal(network(x), other(x))
        if family not in ("swin", "cswin") and attention != "depthwise":  # forward interpolates in the same way
            torch.testing.assert_close(network(x), original(x))
    for name, module in other.named_modules():
        if isinstance(getattr(module, "grid", None), tuple):
            assert network.get_submodule(name).grid == module.grid
    for name, parameter in network.named_parameters():
        if parameter.shape == (before := original.get_parameter(name)).shape:
            assert torch.equal(parameter, before), name


@FAMILIES
def test_set_input_size_resamples_as_loading(family):
    """From a square size: equal to `adapt`, which loads a checkpoint of another size; there and back keeps windows."""
    network = small(family, "softmax").requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.set_input_size(2 * network.config.size[0])
    changed = 0
    for name, parameter in network.named_parameters():
        assert not parameter.requires_grad
        if parameter.shape != before[name].shape:
            changed += 1
            torch.testing.assert_close(parameter, network.adapt(name, before[name]))
    assert changed == {"deit": 1, "pvt": 4, "swin": 8, "cswin": 0}[family]
    traits = timm.models.get_model_input_config(network)
    assert traits["input_size"] == (3, *network.config.size)
    network.set_input_size()
    with pytest.raises(ValueError, match=r"img_size must be a multiple of \d+, such as"):
        network.set_input_size((33, 64))
    assert network.config.size == traits["input_size"][1:]


def test_set_input_size_swin_windows():
    network = small("swin", "softmax")
    for size, window in ((96, 3), (128, 4), (384, 12), (128, 4)):
        network.set_input_size(size)
        assert network.config.window_size == window
    with pytest.raises(
        ValueError, match=r"window_size must be given for another aspect ratio, got img_size \(128, 256"
    ):
        network.set_input_size((128, 256))
    network.set_input_size((128, 256), window_size=2)
    assert {m.window for m in network.modules() if hasattr(m, "window")} == {(2, 2)}
    network.set_input_size((256, 512))
    assert network.config.window_size == 4
    with pytest.raises(ValueError, match="window_size must be >= 1, got 0"):
        network.set_input_size(window_size=0)


def test_set_input_size_resamples_parameters_of_attentions():
    """The kernel of learned pooling keeps its sum; the position bias of agents its values."""
    network = models.deit.DeiT(
        models.deit.DeiTConfig(**SMALL["deit"], contrast_grid=[2, 2]), VCAConfig(pooling="depthwise")
    )
    weight = network.blocks[0].attn.pool_weight
    assert weight.shape == (16, 1, 2, 2)
    nn.init.uniform_(weight)
    network.set_input_size((64, 96))
    resized = network.blocks[0].attn.pool_weight
    assert resized.shape == (16, 1, 4, 6)
    torch.testing.assert_close(resized.sum(dim=(2, 3)), weight.sum(dim=(2, 3)), rtol=1e-4, atol=1e-4)
    bias = PositionBias(2, 4, (4, 4), 1)
    expected = bias((8, 6))
    bias.set_grid((8, 6))
    assert (bias.rows.shape[2], bias.columns.shape[3]) == (8, 6)
    torch.testing.assert_close(bias((8, 6)), expected)


@FAMILIES
def test_features_only_checkpointing_exact(family):
    """Features and gradients to the bit."""
    network = timm.create_model(NAMES[family], features_only=True, **FIELDS[family]).train()
    x, seen = torch.randn(2, 3, *network.model.config.size), []
    for enable in (False, True):
        network.model.set_grad_checkpointing(enable)
        network.zero_grad(set_to_none=True)
        torch.manual_seed(1)  # stochastic depth
        outputs = network(x)
        sum(out.square().mean() for out in outputs).backward()
        seen.append([*outputs, *(parameter.grad for parameter in network.parameters())])
    assert all(map(torch.equal, *seen))


@pytest.mark.parametrize("theirs", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_create_optimizer_layer_decay_equals_timm(theirs):
    """Learning-rate scale and weight decay of each parameter of the softmax twin, as `train.py --layer-decay`."""
    found = []
    for name, options in ((f"vca_{theirs}", {"attention": "softmax"}), (theirs, {})):
        with torch.device("meta"):
            network = timm.create_model(name, **options)
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        optimizer = create_optimizer_v2(network, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.75)
        settings = {
            names[id(parameter)]: torch.tensor([group["lr_scale"], group["weight_decay"]], dtype=torch.float64)
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        found.append(settings)
        if options:
            twin = network
    expected = twin.convert_official(found[1])
    assert set(expected) == set(found[0])
    assert all(torch.equal(found[0][name], expected[name]) for name in expected)


@FAMILIES
def test_create_model_arguments_of_timm(family):
    network = timm.create_model(NAMES[family], device="meta", dtype=torch.bfloat16, **SMALL[family]).eval()
    assert {(p.device.type, p.dtype) for p in network.parameters()} == {("meta", torch.bfloat16)}
    network.reset_classifier(4)
    assert not any(module.training for module in network.modules())
    with pytest.raises(TypeError, match="has no key 'windows'"):
        timm.create_model(NAMES[family], windows=3)


def test_python_m_models_runs_script_with_our_names(tmp_path, monkeypatch, capsys):
    script = tmp_path / "train.py"
    script.write_text("import sys, timm\nprint(timm.is_model(sys.argv[1]), __name__, sys.argv)\n")
    monkeypatch.setattr(sys, "argv", ["models", str(script), NAMES["pvt"]])
    runpy.run_module("models", run_name="__main__")
    assert capsys.readouterr().out == f"True __main__ {[str(script), NAMES['pvt']]}\n"
    monkeypatch.setattr(sys, "argv", ["models"])
    with pytest.raises(SystemExit, match=r"usage: python -m models SCRIPT\.py"):
        runpy.run_module("models", run_name="__main__")
