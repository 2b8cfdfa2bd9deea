"""DiT and SiT: golden outputs, checkpoints, guidance, gradients, other input sizes."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import models.dit
import vca
from models.dit import DiT, DiTConfig, from_official
from tests.support import GOLDEN
from vca.attention import ATTENTIONS, SoftmaxConfig, VCAConfig

SMALL = {"input_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
XL = {"hidden_size": 1152, "depth": 28, "num_heads": 16}


def small(attention, **fields):
    """A small network without its zero initialisation."""
    torch.manual_seed(0)
    network = DiT(DiTConfig(**{**SMALL, **fields}), ATTENTIONS[attention][0]())
    for parameter in network.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return network


def inputs(batch=3, side=8):
    return torch.randn(batch, 4, side, side), torch.rand(batch), torch.arange(batch)


@pytest.mark.parametrize("name", ["dit", "sit"])
def test_dit_equals_original_code(name):
    """Forward and guidance; SiT drops the second half of the channels."""
    file = np.load(GOLDEN / f"{name}_forward.npz")
    golden = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files if key != "config"}
    state = {key[6:]: value for key, value in golden.items() if key.startswith("param/")}
    network = from_official(json.loads(str(file["config"])), state).eval()
    with torch.no_grad():
        out = network(golden["x"], golden["t"], golden["y"])
        half = len(golden["cfg_x"]) // 2  # the original is given every input twice
        x, t, y = (golden[key][:half] for key in ("cfg_x", "cfg_t", "cfg_y"))
        guided = network.forward_with_cfg(x, t, y, float(golden["cfg_scale"]))
    for ours, key in ((out, "out"), (guided, "cfg_out")):
        expected = golden[key][: len(ours)]
        assert (ours[:, : expected.shape[1]] - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "fields", "params"),
    [("DiT-S/2", {}, 32_963_360), ("DiT-XL/2", XL, 675_129_632), ("SiT-XL/2", XL, 675_129_632)],
)
def test_dit_state_dict_equals_official(name, fields, params):
    """Names and shapes of the published files, on the meta device."""
    contract = json.loads((GOLDEN / "state_dict_contracts.json").read_text())[f"{name} (official)"]
    with torch.device("meta"):
        network = DiT(DiTConfig(**fields), SoftmaxConfig())
    assert {name: list(p.shape) for name, p in network.state_dict().items()} == contract
    assert sum(p.numel() for p in network.parameters()) == params


def test_dit_from_official_trainer_checkpoints_load():
    network = small("softmax")
    state = network.state_dict()
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    for content in (state, {"ema": state, "model": other, "opt": {}}, {"model": state}):
        loaded = from_official(SMALL, content).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in state.items())
    with pytest.raises(ValueError, match="no key 'embed_dim'"):
        from_official({"embed_dim": 3}, state)


def test_dit_guidance_equals_formula():
    """Scale 1 is the class alone; the channels beyond those guided are the class's own."""
    network, (x, t, y) = small("vca").eval(), inputs()
    with torch.no_grad():
        cond, uncond = network(x, t, y), network(x, t, torch.full_like(y, network.null_label))
        torch.testing.assert_close(network.forward_with_cfg(x, t, y, 1.0), cond)
        for channels, guided in ((3, 3), (None, 4), (1, 1)):
            out = network.forward_with_cfg(x, t, y, 2.5, channels)
            torch.testing.assert_close(out[:, :guided], (uncond + 2.5 * (cond - uncond))[:, :guided])
            torch.testing.assert_close(out[:, guided:], cond[:, guided:])


def test_dit_initial_output_zero():
    network = DiT(DiTConfig(**SMALL), VCAConfig())
    assert not network(*inputs()).any()


@pytest.mark.parametrize("attention", sorted(ATTENTIONS))
def test_dit_every_parameter_gets_gradient(attention):
    network = small(attention)
    network(*inputs()).square().mean().backward()
    for name, parameter in network.named_parameters():
        if name == "pos_embed":
            assert not parameter.requires_grad
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("attention", sorted(ATTENTIONS))
def test_dit_gradient_checkpointing_exact(attention):
    network, batch, seen, calls = small(attention), inputs(), [], []
    network.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    for enable, expected in ((False, 1), (True, 2)):
        calls.clear()
        network.set_grad_checkpointing(enable)
        network.zero_grad(set_to_none=True)
        network(*batch).square().mean().backward()
        assert len(calls) == expected
        seen.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])


@pytest.mark.parametrize("attention", sorted(ATTENTIONS))
def test_dit_other_latent_sizes(attention):
    """Any latent, square or not; contrast tokens on half of the token grid unless the config says otherwise."""
    network = small(attention).eval()
    for size in ((8, 8), (16, 16), (4, 12 if attention == "mhla" else 10)):  # 2 x 2 pieces divide the token grid
        x, t, y = torch.randn(2, 4, *size), torch.rand(2), torch.tensor([0, 1])
        with torch.no_grad():
            assert network(x, t, y).shape == (2, 8, *size)
    with pytest.raises(ValueError, match="multiple of 2, such as 6 or 8, got 7"):
        network(torch.randn(1, 4, 7, 7), torch.rand(1), torch.tensor([0]))
    one = DiT(DiTConfig(**{**SMALL, "in_channels": 1, "learn_sigma": False, "input_size": [8, 12]}), VCAConfig())
    assert one(torch.randn(1, 1, 8, 12), torch.rand(1), torch.tensor([0])).shape == (1, 1, 8, 12)
    assert one.blocks[1].attn.contrast_grid == (2, 3)
    assert small("vca", contrast_grid=[1, 2]).blocks[0].attn.contrast_grid == (1, 2)


def test_dit_contrast_grids_equal_paper():
    for patch, side, contrast_grid in (
        (2, 32, (8, 8)),
        (4, 32, (4, 4)),
        (8, 32, (2, 2)),
        (2, 64, (8, 8)),
        (2, 128, (8, 8)),
    ):
        with torch.device("meta"):
            network = DiT(DiTConfig(patch_size=patch, input_size=side), VCAConfig())
        assert {block.attn.contrast_grid for block in network.blocks} == {contrast_grid}
        assert {block.attn.num_prefix_tokens for block in network.blocks} == {0}


def test_dit_shares_attention_core():
    assert models.dit.build_attention is vca.attention.build_attention


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 0}, r"model.depth must be >= 1, got 0"),
        ({"hidden_size": 30}, r"model.hidden_size must be divisible by 4 and by model.num_heads 2, got 30"),
        ({"input_size": 9}, r"model.input_size must be a multiple of 2, such as 8 or 10, got 9"),
        ({"class_dropout_prob": 1.0}, r"model.class_dropout_prob must be in \[0, 1\), got 1.0"),
        ({"contrast_grid": [0, 1]}, r"model.contrast_grid must be two integers >= 1 or null, got \[0, 1\]"),
    ],
)
def test_dit_wrong_config_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**{**SMALL, **fields})
