"""Circulant Attention, ViT3's test-time training and PolaFormer against literal implementations, and their details."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from vca.attention import ATTENTIONS, build_attention
from vca.attention.base import Tokens

NAMES = ("circulant", "ttt", "polaformer")


def circulant_oracle(module, q, k, v, grid):
    """Displacement by displacement, with rolled images."""
    out, displacements = torch.empty_like(v), [(dy, dx) for dy in range(grid[0]) for dx in range(grid[1])]
    for b, m in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[1])).tolist():
        query, key, value = (x[b, m].unflatten(0, grid) for x in (q, k, v))  # (H, W, D)
        scores = [(query * key.roll((-dy, -dx), (0, 1))).sum((0, 1)) for dy, dx in displacements]  # of each channel
        weights = torch.softmax(torch.stack(scores) / q.shape[2] ** 0.5, 0)
        rolled = [value.roll((-dy, -dx), (0, 1)) for dy, dx in displacements]
        out[b, m] = sum(w * x for w, x in zip(weights, rolled, strict=True)).flatten(0, 1)
    return out


def ttt_oracle(module, q, k, v, grid):
    """The gradients of the inner losses by autograd."""

    def fitted(loss, weights, dim):
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        return [w - g / (g.norm(dim=dim, keepdim=True) + 1) for w, g in zip(weights, grads, strict=True)]

    def glu(x, w1, w2):
        return (x @ w1) * F.silu(x @ w2)

    def convolved(x, kernels):
        padded = F.pad(x.T.unflatten(1, grid), (1, 1, 1, 1))  # (D, H + 2, W + 2)
        shifted = [padded[:, y : y + grid[0], x : x + grid[1]] for y in range(3) for x in range(3)]
        return sum(w[:, None, None] * x for w, x in zip(kernels.T, shifted, strict=True)).flatten(1).T

    out, scale = torch.empty_like(v), 1 / (3 * q.shape[2])
    for b in range(q.shape[0]):
        for m in range(module.num_heads):
            start = [module.w1[0, m], module.w2[0, m]]
            out[b, m] = glu(q[b, m], *fitted(-scale * (v[b, m] * glu(k[b, m], *start)).sum(), start, 0))
        start = module.w3.flatten(1)  # (D, 9)
        (kernels,) = fitted(-scale * (v[b, -1] * convolved(k[b, -1], start)).sum(), [start], 1)
        out[b, -1] = convolved(q[b, -1], kernels)
    return out


def polaformer_oracle(module, q, k, v, grid):
    """Both polarities with the full N x N weights."""
    out, half = torch.empty_like(v), v.shape[3] // 2
    power, factors = 1 + module.config.alpha * torch.sigmoid(module.power[0, :, 0]), F.softplus(module.scale[0, 0])
    for b, m in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[1])).tolist():
        channels = slice(2 * m * half, 2 * (m + 1) * half)
        key = k[b, m] if module.position is None else k[b, m] + module.position[0, :, channels]
        signed = [[torch.relu(sign * x / factors[channels]) ** power[m] for sign in (1, -1)] for x in (q[b, m], key)]
        (q_pos, q_neg), (k_pos, k_neg) = signed
        same, opposite = q_pos @ k_pos.T + q_neg @ k_neg.T, q_neg @ k_pos.T + q_pos @ k_neg.T
        for pairs, part in ((same, slice(half)), (opposite, slice(half, None))):
            out[b, m, :, part] = pairs @ v[b, m, :, part] / len(key) / (pairs.mean(1, keepdim=True) + 1e-6)
    return out


def with_prefix(oracle):
    """The oracle of a grid, with softmax attention to all tokens for prefix tokens."""

    def full(module, q, k, v, grid):
        prefix = module.num_prefix_tokens
        weights = torch.softmax(q[:, :, :prefix] @ k.transpose(2, 3) / q.shape[3] ** 0.5, -1)
        return torch.cat((weights @ v, oracle(module, *(x[:, :, prefix:] for x in (q, k, v)), grid)), dim=2)

    return full


ORACLES = {
    "circulant": (with_prefix(circulant_oracle), {}),
    "ttt": (with_prefix(ttt_oracle), {}),
    "polaformer": (polaformer_oracle, {}),
    "polaformer, no position": (polaformer_oracle, {"positional": False, "alpha": 2.0}),
}


def build(name, grid=(4, 6), dim=16, prefix=1, **options):
    """A module in which no parameter is zero."""
    torch.manual_seed(0)
    module = build_attention(ATTENTIONS[name][0](**options), dim, 2, grid, num_prefix_tokens=prefix)
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter)
    return module


def random_tokens(module, grid, dtype=torch.float64, scale=1.0):
    heads, count = module.head_counts(), module.num_prefix_tokens + grid[0] * grid[1]
    sizes = [(2, number, count, module.head_dim) for number in (heads.q, heads.kv, heads.kv)]
    q, k, v = ((scale * torch.randn(size, dtype=torch.float64)).to(dtype).requires_grad_() for size in sizes)
    return Tokens(q, k, v, q, grid)


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (1, 7)], ids=str)
@pytest.mark.parametrize("name", ORACLES)
def test_attention_equals_oracle(name, grid):
    oracle, options = ORACLES[name]
    module = build(name.split(",")[0], grid, **options).double()
    tokens = random_tokens(module, grid)
    own = [p for n, p in module.named_parameters() if n.split(".")[0] not in ("qkv", "proj", "local", "gate")]
    results = []
    for out in (oracle(module, *tokens[:3], grid), module.attend(tokens)):
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append((out, *torch.autograd.grad((out * weight).sum(), [*tokens[:3], *own])))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_initial_values_and_parameters():
    """As in the originals: start weights of ViT3 with std 0.02; scale, power and positions of PolaFormer zero."""
    ttt = build_attention(ATTENTIONS["ttt"][0](), 256, 2, (3, 5))
    shapes = {name: tuple(parameter.shape) for name, parameter in ttt.named_parameters()}
    assert {name: shapes[name] for name in ("w1", "w2", "w3")} == {
        "w1": (1, 2, 128, 128),
        "w2": (1, 2, 128, 128),
        "w3": (128, 1, 3, 3),
    }
    assert (shapes["qkv.weight"], shapes["proj.weight"]) == ((3 * 384, 256), (256, 384))
    for weight in (ttt.w1, ttt.w2, ttt.w3):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert abs(weight.mean().item()) < 2e-3
    assert not torch.equal(ttt.w1, ttt.w2)
    pola = build_attention(ATTENTIONS["polaformer"][0](), 16, 2, (3, 5), num_prefix_tokens=1)
    own = {name: getattr(pola, name) for name in ("scale", "power", "position")}
    assert {name: tuple(p.shape) for name, p in own.items()} == {
        "scale": (1, 1, 16),
        "power": (1, 2, 1, 8),
        "position": (1, 16, 16),
    }
    assert not any(parameter.any() for parameter in own.values())
    assert tuple(pola.local.weight.shape) == (8, 1, 5, 5)
    assert build_attention(ATTENTIONS["polaformer"][0](positional=False), 16, 2, (3, 5)).position is None
    circulant = build_attention(ATTENTIONS["circulant"][0](), 16, 2, (3, 5), qkv_bias=False)
    names = {name for name, _ in circulant.named_parameters()}
    assert names == {"qkv.weight", "proj.weight", "proj.bias", "gate.weight", "gate.bias"}


def test_polaformer_positions_other_grid():
    """`forward` at another grid equals `set_grid`; positions of prefix tokens are not interpolated."""
    module, x = build("polaformer", (4, 6), prefix=2), torch.randn(1, 2 + 6 * 4, 16)
    old, requires_grad = module.position.detach().clone(), module.position.requires_grad
    expected = module(x, (6, 4))
    module.set_grid((6, 4))
    torch.testing.assert_close(module(x), expected)
    assert (module.position.requires_grad, module.grid) == (requires_grad, (6, 4))
    assert torch.equal(module.position[:, :2], old[:, :2])
    image = F.interpolate(old[:, 2:].transpose(1, 2).unflatten(2, (4, 6)), (6, 4), mode="bilinear")
    torch.testing.assert_close(module.position[:, 2:], image.flatten(2).transpose(1, 2))
    assert not torch.allclose(module.position[:, 2:], old[:, 2:])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_near_float64(name, dtype, scale):
    """Value and gradients at 32 x 32 tokens: nothing overflows, and a mean over the tokens does not underflow."""
    if (name, dtype, scale) == ("ttt", torch.float16, 30.0):
        scale = 10.0  # the output itself overflows: it is quadratic in q
    module = build(name, (32, 32), prefix=0)
    tokens = random_tokens(module, (32, 32), dtype, scale)
    expected = build(name, (32, 32), prefix=0).double()
    exact = Tokens(*(x.detach().double().requires_grad_() for x in tokens[:4]), (32, 32))
    weight = torch.randn(tokens.v.shape, dtype=torch.float64).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        out = module.attend(tokens)
    assert out.dtype is dtype
    reference = expected.attend(exact)
    (out * weight).sum().backward()
    (reference * weight.double()).sum().backward()
    rounding, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).eps * torch.finfo(dtype).smallest_normal
    assert (out - reference).norm() / reference.norm() < 4 * rounding
    for found, wanted in zip(tokens[:3], exact[:3], strict=True):
        assert found.grad.isfinite().all()
        allowed = 10 * rounding * wanted.grad.norm() + smallest * wanted.grad.numel() ** 0.5
        assert (found.grad - wanted.grad).norm() <= allowed


@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_polaformer_large_and_opposite_inputs_finite(dtype, opposite):
    """Powers of 1e4 exceed float32 at r = 5; if no key has the sign of the query, one half of the output is zero."""
    module = build("polaformer", (2, 2), prefix=0, positional=False)
    torch.nn.init.constant_(module.power, 20.0)
    q = torch.full((1, 2, 4, 8), 1e4, dtype=dtype, requires_grad=True)
    k = (-q if opposite else q).detach().requires_grad_()
    v = torch.randn(1, 2, 4, 8).to(dtype).requires_grad_()
    out = module.attend(Tokens(q, k, v, q, (2, 2)))
    halves = out.chunk(2, dim=3)[:: -1 if opposite else 1]
    means = v.detach().float().mean(2, keepdim=True).chunk(2, dim=3)[:: -1 if opposite else 1]
    torch.testing.assert_close(halves[0].float(), means[0].expand_as(halves[0]), rtol=1e-3, atol=1e-3)
    assert not halves[1].any()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v, module.power))


@pytest.mark.parametrize("name", NAMES)
def test_zero_inputs_finite_gradients(name):
    module = build(name, (3, 4))
    x = torch.zeros(1, 13, 16, requires_grad=True)
    torch.nn.init.zeros_(module.qkv.bias)
    module(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.process
@pytest.mark.parametrize("name", NAMES)
def test_compile_export_checkpoint_func_equal(name):
    """`torch.compile` with fullgraph and no warning per step, `torch.export`, checkpointing, gradients per image."""
    module, x = build(name, (4, 5), 32), torch.randn(2, 21, 32)
    parameters = dict(module.named_parameters())

    def gradients(run):
        out = run(x)
        return [out, *torch.autograd.grad(out.square().sum(), list(parameters.values()))]

    def loss(parameters, image):
        return functional_call(module, parameters, (image[None],)).square().sum()

    expected = gradients(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(compiled)
    torch.testing.assert_close(gradients(functools.partial(checkpoint, module, use_reentrant=False)), expected)
    exported = torch.export.export(module.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), expected[0])
    each = vmap(grad(loss), (None, 0))(parameters, x)
    for found, wanted in zip(each.values(), expected[1:], strict=True):
        torch.testing.assert_close(found.sum(0), wanted, rtol=1e-4, atol=1e-4)
