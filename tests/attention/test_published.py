"""Attentions with published code against literal implementations, and what is particular to each of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

from tests.attention.test_golden import cases_of
from vca.attention import ATTENTIONS, build_attention
from vca.attention.base import Tokens

OUTSIDE = ("qkv", "proj", "local", "gate", "norm", "q_norm", "k_norm")  # modules that `attend` does not use
PIECES = {(4, 6): [2, 3], (3, 5): [3, 1], (1, 7): [1, 7]}


def inline_oracle(module, tokens):
    q, k, v, x, (height, width) = tokens
    count, dim = q.shape[2:]
    first, _, second = module.predictor if module.predictor is not None else (None,) * 3
    out = []
    for b in range(q.shape[0]):
        for m in range(q.shape[1]):
            scores = torch.stack([(k[b, m] @ q[b, m, i]) / (dim**0.5 * count) for i in range(count)])
            head = (scores - scores.mean(1, keepdim=True) + 1 / count) @ v[b, m]
            if first is not None:
                own, nine = slice(m * dim, (m + 1) * dim), slice(9 * m * dim, 9 * (m + 1) * dim)
                hidden = F.gelu(first.weight[own, :, 0] @ x[b, :, own].mean(0) + first.bias[own])
                kernels = (second.weight[nine, :, 0] @ hidden + second.bias[nine]).view(dim, 3, 3)
                residual = [torch.zeros(dim, dtype=q.dtype)] * module.num_prefix_tokens
                for row in range(height):
                    for column in range(width):
                        value = torch.zeros(dim, dtype=q.dtype)
                        for y in range(max(row - 1, 0), min(row + 2, height)):
                            for z in range(max(column - 1, 0), min(column + 2, width)):
                                at = module.num_prefix_tokens + y * width + z
                                value = value + kernels[:, y - row + 1, z - column + 1] * v[b, m, at]
                        residual.append(value)
                head = head + torch.stack(residual)
            out.append(head)
    return torch.stack(out).view(q.shape)


def mala_oracle(module, tokens):
    q, k, v, _, (_, width) = tokens
    count, dim, prefix = *q.shape[2:], module.num_prefix_tokens
    frequencies = 1.0 / 10_000 ** torch.linspace(0, 1, dim // 4)  # float32, as the original
    for i in range(dim // 4):
        assert frequencies[i].item() == pytest.approx(10_000 ** -(i / max(dim // 4 - 1, 1)), rel=1e-6)

    def rotated(vector, token):
        if token < prefix:
            return vector
        parts, (row, column) = [], divmod(token - prefix, width)
        for pair in range(dim // 2):
            angle = (row if pair < dim // 4 else column) * frequencies[pair % (dim // 4)].item()
            one, two = vector[2 * pair], vector[2 * pair + 1]
            parts += [
                one * math.cos(angle) - two * math.sin(angle),
                one * math.sin(angle) + two * math.cos(angle),
            ]
        return torch.stack(parts)

    out = []
    for b in range(q.shape[0]):
        for m in range(q.shape[1]):
            features = [F.elu(y[b, m]) + 1 for y in (q, k)]
            turned = [torch.stack([rotated(y[i], i) for i in range(count)]) for y in features]
            for i in range(count):
                z = features[0][i] @ features[1].mean(0) / dim**0.5
                total = sum((turned[0][i] @ turned[1][j]) * v[b, m, j] for j in range(count)) / (count * dim**0.5)
                out.append((1 + 1 / (z + 1e-6)) * total - z * v[b, m].mean(0))
    return torch.stack(out).view(q.shape)


def mhla_oracle(module, tokens):
    q, k, v, _, (height, width) = tokens
    ph, pw = module.config.pieces
    tall, wide = height // ph, width // pw
    pieces = [
        [(r * tall + y) * width + c * wide + x for y in range(tall) for x in range(wide)]
        for r in range(ph)
        for c in range(pw)
    ]
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for m in range(q.shape[1]):
            queries, keys = torch.relu(q[b, m]) + 1e-6, torch.relu(k[b, m]) + 1e-6
            summaries = [sum(torch.outer(keys[j], v[b, m, j]) for j in piece) for piece in pieces]
            lengths = [sum(keys[j] for j in piece) for piece in pieces]
            for a, piece in enumerate(pieces):
                weights = module.mixing[a]
                mixed = sum(weight * summary for weight, summary in zip(weights, summaries, strict=True))
                for place, i in enumerate(piece):
                    owner = [i] * len(pieces) if module.config.denominator.value == "normalized" else None
                    rows = owner or [other[place] for other in pieces]
                    divisor = sum(
                        weight * (queries[row] @ z) for weight, row, z in zip(weights, rows, lengths, strict=True)
                    )
                    out[b, m, i] = queries[i] @ mixed / (divisor + 1e-6)
    return out


ORACLES = {
    "inline": (inline_oracle, {}),
    "inline, no kernels": (inline_oracle, {"predicted_kernels": False}),
    "mala": (mala_oracle, {}),
    "mhla": (mhla_oracle, {}),
    "mhla, normalized": (mhla_oracle, {"denominator": "normalized"}),
}
NAMES = ["inline", "mala", "mhla"]


def build(name, grid=(4, 6), dim=16, random=False, **options):
    """Build a module of two heads, with a prefix token where supported; `random` draws every parameter in (0.1, 1)."""
    torch.manual_seed(0)
    config = ATTENTIONS[name][0]
    if name == "mhla":
        options = {"pieces": PIECES.get(grid, [2, 2]), **options}
    module = build_attention(config(**options), dim, 2, grid, num_prefix_tokens=0 if name == "mhla" else 1)
    if random:
        for parameter in module.parameters():
            torch.nn.init.uniform_(parameter, 0.1, 1.0)
    return module


def inputs(module, batch=2, grid=(4, 6)):
    return torch.randn(batch, module.num_prefix_tokens + grid[0] * grid[1], module.dim)


@pytest.mark.parametrize("grid", PIECES, ids=str)
@pytest.mark.parametrize("name", ORACLES)
def test_published_attention_equals_oracle(name, grid):
    oracle, options = ORACLES[name]
    module = build(name.split(",")[0], grid, random=True, **options).double()
    x = inputs(module, grid=grid).double().requires_grad_()
    q, k, v = (torch.randn(2, 2, x.shape[1], 8, dtype=torch.float64).requires_grad_() for _ in range(3))
    inside = [p for n, p in module.named_parameters() if n.split(".")[0] not in OUTSIDE]
    results, tokens = [], Tokens(q, k, v, x, grid)
    for out in (oracle(module, tokens), module.attend(tokens)):
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        uses_x = [x] if name == "inline" else []
        results.append((out, *torch.autograd.grad((out * weight).sum(), [q, k, v, *uses_x, *inside])))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.process
@pytest.mark.parametrize("name", NAMES)
def test_published_attention_compile_export_checkpoint_vmap_equal(name):
    """Also with a symbolic batch size and gradients of each image."""
    module = build(name)
    x = inputs(module, 3)

    def gradients(run):
        out = run(x)
        return [out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))]

    expected = gradients(module)
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        torch.testing.assert_close(gradients(compiled), expected)
    checkpointed = torch.utils.checkpoint.checkpoint
    torch.testing.assert_close(gradients(lambda x: checkpointed(module, x, use_reentrant=False)), expected)
    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(module.eval(), (x,), dynamic_shapes=(batch,)).module()
    torch.testing.assert_close(exported(x[:2]), expected[0][:2])

    parameters = dict(module.named_parameters())

    def loss(parameters, image):
        return functional_call(module, parameters, (image[None],)).square().sum()

    per_image = vmap(grad(loss), in_dims=(None, 0))({n: p.detach() for n, p in parameters.items()}, x)
    for one, reference in zip(parameters, expected[1:], strict=True):
        torch.testing.assert_close(per_image[one].sum(0), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", cases_of("mhla"))
def test_mhla_initial_mixing_equals_original(case):
    arrays, meta = cases_of("mhla")[case]
    pieces = [side // meta["piece_side"] for side in meta["grid"]]
    module = build("mhla", tuple(meta["grid"]), pieces=pieces, mixing=meta["transform"])
    torch.testing.assert_close(module.mixing.double(), arrays["mixing_init"].flatten(1), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("mixing", "sigma", "function"),
    [
        ("linear", 3, lambda d, d_max: 1 - d / d_max),
        ("cos", 3, lambda d, d_max: math.cos(math.pi / 4 * d / d_max)),
        ("exp", 3, lambda d, d_max: math.exp(-d / 3)),
        ("exp", 1, lambda d, d_max: math.exp(-d)),
        ("local", 3, lambda d, d_max: float(d <= 1.5)),
        ("gaussian", 3, lambda d, d_max: math.exp(-(d**2) / (2 * (d_max / 3) ** 2))),
    ],
)
def test_mhla_initial_mixing_equals_formula(mixing, sigma, function):
    """On 2 x 4 pieces; all but the Gaussian have columns that sum to one."""
    module = build("mhla", (4, 8), pieces=[2, 4], mixing=mixing, sigma=sigma)
    places = [(row, column) for row in range(2) for column in range(4)]
    expected = torch.tensor([[function(math.dist(a, b), math.dist((0, 0), (1, 3))) for b in places] for a in places])
    if mixing != "gaussian":
        expected = expected / expected.sum(0)
    torch.testing.assert_close(module.mixing.detach(), expected)
    assert build("mhla", pieces=[1, 1], mixing=mixing).mixing.tolist() == [[1.0]]


def test_published_attentions_initial_values():
    mhla = build("mhla", dim=512)
    assert mhla.q_norm.eps is None
    assert mhla.norm.eps == 1e-5
    for kernel, parameter in ((5, mhla.local.weight), (None, build("inline", dim=512).predictor[2].weight)):
        fan_in = kernel**2 if kernel else 256
        assert parameter.abs().max().item() == pytest.approx(fan_in**-0.5, rel=0.01)  # PyTorch's default
    identity = build("mhla", local_kernel=3, local_identity=True)
    v = torch.randn(2, 24, 16)
    torch.testing.assert_close(identity.local_branch(v, (4, 6)), v)
    mala = build("mala", dim=512)
    assert mala.local.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not mala.local.bias.any()
    assert (mala.local.kernel_size, mala.config.gate.value) == ((5, 5), "linear")


def test_mhla_weights_of_a_token_sum_to_one_if_normalized():
    """Values of one give one; with the released denominator they do not."""
    grid = (4, 6)
    for denominator, expected in (("normalized", True), ("released", False)):
        module = build("mhla", random=True, denominator=denominator)
        q, k = torch.randn(2, 2, 2, 24, 8)
        out = module.attend(Tokens(q, k, torch.ones(2, 2, 24, 8), q, grid))
        assert torch.allclose(out, torch.ones_like(out), atol=1e-3) is expected


def test_mhla_other_grids_keep_the_matrix():
    """Also after `set_grid`; a grid that the pieces do not divide is one clear line everywhere."""
    module = build("mhla", (4, 4))
    x = torch.randn(1, 48, 16)
    out, mixing = module(x, (8, 6)), module.mixing
    module.set_grid((8, 6))
    assert module.mixing is mixing
    assert torch.equal(module(x), out)
    message = r"attention=mhla: 2 x 2 pieces must divide the token grid, got 5 x 4; set attention.pieces=\[ph,pw\]"
    for call in (
        lambda: module(torch.randn(1, 20, 16), (5, 4)),
        lambda: module.set_grid((5, 4)),
        lambda: build("mhla", (5, 4)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    backbone = ATTENTIONS["mhla"][1](16, 2, (4, 6), (4, 3))
    assert backbone.mixing.shape == (12, 12)  # the contrast grid


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: build("mhla", pieces=[2]), r"attention.pieces must be two integers >= 1 or null, got \[2\]"),
        (lambda: build("mhla", sigma=0.0), "attention.sigma must be > 0 and finite, got 0.0"),
        (lambda: build("mhla", mixing="near"), r"attention.mixing must be one of \['linear', .*, got 'near'"),
        (lambda: build("mhla", denominator="none"), r"attention.denominator must be one of .*, got 'none'"),
        (
            lambda: build("mala", dim=12),
            r"attention=mala: the head dim must be divisible by 4, got 6 \(width 12, 2 heads",
        ),
    ],
)
def test_published_attention_wrong_options_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize(("name", "limit"), [("inline", 4e-4), ("mala", 4e-4), ("mhla", 8e-4)])
def test_published_attention_float16_near_float64(name, limit):
    """Values with a mean: the formulas as written give 7e-4 (InLine) and 3e-3 (MALA), because large terms cancel."""
    options = {"predicted_kernels": False} if name == "inline" else {}
    module = build(name, (14, 14), 128, **options)
    q, k, v = torch.randn(3, 2, 2, module.num_prefix_tokens + 196, 64)
    if name == "mhla":
        q, k = 200 * q, 200 * k  # their products overflow
    half = [x.half() for x in (2 * q, 2 * k + 0.5, v + 2)]
    with torch.no_grad():
        out = module.attend(Tokens(*half, half[0], (14, 14)))
        expected = module.double().attend(Tokens(*(x.double() for x in half), half[0], (14, 14)))
    assert out.dtype is torch.float16
    assert (out - expected).norm() / expected.norm() < limit
