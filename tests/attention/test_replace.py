"""`replace_attention` on timm models: the grid of each input, copies, `torch.compile`; rejected models."""

import copy
import pickle
import textwrap

import pytest
import timm
import torch
from torch import nn

import vca
from vca.attention import SoftmaxAttention, replace

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 4, "num_classes": 5}


def vit(size: tuple[int, int] = (32, 32), **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=size, **{**SMALL, **options}).eval()


def replaced(size: tuple[int, int] = (32, 32), **options) -> nn.Module:
    network = vit(size, **options)
    torch.manual_seed(1)
    vca.replace_attention(network, contrast_grid=(2, 2))
    return network


def built_for(network: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Copy the weights to a model that is built for one other image size."""
    plain = replaced(size, pos_embed="none")
    plain.load_state_dict(network.state_dict())
    return plain


@pytest.mark.parametrize("options", [{}, {"dynamic_img_pad": True}], ids=["exact", "padded"])
def test_replace_attention_dynamic_img_size_takes_grid_of_each_input(options):
    """64 tokens as 8 x 8, 4 x 16 and 16 x 4, and other counts: equal to a model that is built for that grid."""
    network = replaced(dynamic_img_size=True, pos_embed="none", **options)
    for size in [(16, 64), (32, 32), (64, 16), (32, 32), (48, 32), (16, 64)]:
        images = torch.randn(2, 3, *size)
        cropped = images[:, :, :-1, :-2] if options else images
        expected = nn.functional.pad(cropped, (0, 2, 0, 1)) if options else images
        with torch.no_grad():
            assert torch.equal(network(cropped), built_for(network, size)(expected)), size


@pytest.mark.process
def test_replace_attention_dynamic_img_size_survives_copy_and_compile():
    """A copy (such as an EMA model) uses the grid of its own inputs."""
    network = replaced(dynamic_img_size=True, pos_embed="none")
    wide, tall = torch.randn(2, 3, 16, 64), torch.randn(2, 3, 64, 16)
    with torch.no_grad():
        expected = [built_for(network, images.shape[-2:])(images) for images in (wide, tall)]
        for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            network(wide)
            assert torch.equal(other(tall), expected[1])
            tokens = network.norm(network.blocks(network._pos_embed(network.patch_embed(wide))))
            assert torch.equal(network.forward_head(tokens), expected[0])
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        for images, out in ((wide, expected[0]), (tall, expected[1]), (wide, expected[0])):
            assert torch.equal(compiled(images), out)


def test_replace_attention_given_grid_kept():
    network = vit(dynamic_img_size=True, pos_embed="none")
    vca.replace_attention(network, contrast_grid=(2, 2), grid=(8, 8))
    with pytest.raises(
        ValueError, match=r"tokens must be 65 .* grid 8 x 8\), got 48; call replace_attention without grid"
    ):
        network.blocks[0](torch.zeros(1, 48 + 1, 32)[:, 1:])


def test_replace_attention_unknown_grid_refused():
    network = vit()
    network.patch_embed = nn.Identity()
    with pytest.raises(ValueError, match=r"must have grid_size and dynamic_feat_size; else pass grid=\(H, W\)"):
        vca.replace_attention(network)


def test_replace_attention_patch_drop_refused_with_remedy():
    network = vit(patch_drop_rate=0.5)
    with pytest.raises(ValueError, match=r"drop patches.*patch_drop_rate=0 or set model.patch_drop = nn.Identity\(\)"):
        vca.replace_attention(network)
    network.patch_drop = nn.Identity()
    assert vca.replace_attention(network, contrast_grid=(2, 2)) == 2
    assert network.train()(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_replace_attention_torchvision_vit_refused():
    from torchvision.models import VisionTransformer

    network = VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8)
    with pytest.raises(ValueError, match=r"must be timm's, got torchvision's VisionTransformer; .*timm.create_model\("):
        vca.replace_attention(network)


def test_replace_docstring_recipe_for_torchvision_keeps_projections():
    """With MHSA in place of VCA the recipe does not change the output; with VCA every parameter gets a gradient."""
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    original = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=5).eval()
    nn.init.normal_(original.heads.head.weight)
    images = torch.randn(2, 3, 32, 32)
    recipe = textwrap.dedent(replace.__doc__[replace.__doc__.index("    class Attention") :])
    for attention, equal in ((SoftmaxAttention, True), (vca.VisualContrastAttention, False)):
        network = copy.deepcopy(original)
        exec(recipe, {"VisualContrastAttention": attention, "model": network})
        assert torch.allclose(network(images), original(images), atol=1e-5) is equal
        network(images).square().sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        assert isinstance(network.encoder.layers[1].self_attention, attention)


def test_replace_attention_hugging_face_vit_refused():
    """Also a user's subclass."""
    theirs = type("ViTForImageClassification", (nn.Module,), {"__module__": "transformers.models.vit.modeling_vit"})
    for network in (theirs(), type("Mine", (theirs,), {"__module__": "mine"})()):
        with pytest.raises(ValueError, match=r"timm's, got Hugging Face's (ViTFor|Mine).*timm.create_model\("):
            vca.replace_attention(network)
