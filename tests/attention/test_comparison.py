"""Comparison attentions against literal implementations, in value and every gradient."""

import math

import pytest
import torch

from vca.attention import ATTENTIONS, build_attention
from vca.attention.base import Tokens
from vca.attention.comparison import differential_v2
from vca.attention.reference import adaptive_bins, rms_norm


def batch_and_head_indices(q):
    return [(b, m) for b in range(q.shape[0]) for m in range(q.shape[1])]


LAYER = 2
LAMBDA_INIT = 0.8 - 0.6 * math.exp(-0.3 * LAYER)


def lambda_of(vectors):
    first, second = torch.dot(vectors.q1, vectors.k1), torch.dot(vectors.q2, vectors.k2)
    return torch.exp(first) - torch.exp(second) + LAMBDA_INIT


def differential_oracle(module, q, k, v, grid):
    half, out = q.shape[-1] // 2, torch.empty_like(v)
    for b, m in batch_and_head_indices(q):
        first = torch.softmax(q[b, m, :, :half] @ k[b, m, :, :half].T / half**0.5, -1)
        second = torch.softmax(q[b, m, :, half:] @ k[b, m, :, half:].T / half**0.5, -1)
        seen = (first - lambda_of(module.lambda1) * second) @ v[b, m]
        out[b, m] = (1 - LAMBDA_INIT) * rms_norm(seen, module.norm1_weight, 1e-5)
    return out


def differential_stages_oracle(module, q, k, v, grid):
    half, out = q.shape[-1] // 2, torch.empty_like(v)
    for b, m in batch_and_head_indices(q):
        t = averaged(q[b, m, module.num_prefix_tokens :], grid, module.contrast_grid)
        halves = [(x[:, :half], x[:, half:]) for x in (q[b, m], k[b, m], t)]
        (q1, q2), (k1, k2), (t1, t2) = halves
        seen = torch.softmax(t1 @ k1.T / half**0.5, -1) @ v[b, m]
        seen = seen - lambda_of(module.lambda1) * torch.softmax(t2 @ k2.T / half**0.5, -1) @ v[b, m]
        v_hat = (1 - LAMBDA_INIT) * rms_norm(seen, module.norm1_weight, 1e-5)
        weights = torch.softmax(q1 @ t1.T / half**0.5, -1) - lambda_of(module.lambda2) * torch.softmax(
            q2 @ t2.T / half**0.5, -1
        )
        out[b, m] = (1 - LAMBDA_INIT) * rms_norm(weights @ v_hat, module.norm2_weight, 1e-5)
    return out


def agent_oracle(module, q, k, v, grid):
    scale, out = q.shape[-1] ** -0.5, torch.empty_like(v)
    prefix, agents = module.num_prefix_tokens, module.contrast_grid[0] * module.contrast_grid[1]

    def bias(of, m):
        cells = torch.nn.functional.interpolate(of.cells, grid, mode="bilinear")[m]
        table = torch.empty(agents, prefix + grid[0] * grid[1], dtype=q.dtype)
        for a in range(agents):
            for p in range(prefix):
                table[a, p] = of.prefix[m, a, p]
            for y in range(grid[0]):
                for x in range(grid[1]):
                    position = prefix + y * grid[1] + x
                    table[a, position] = cells[a, y, x] + of.rows[m, a, y, 0] + of.columns[m, a, 0, x]
        return table

    for b, m in batch_and_head_indices(q):
        t = averaged(q[b, m, prefix:], grid, module.contrast_grid)
        seen = torch.softmax(t @ k[b, m].T * scale + bias(module.bias1, m), -1) @ v[b, m]
        out[b, m] = torch.softmax(q[b, m] @ t.T * scale + bias(module.bias2, m).T, -1) @ seen
    return out


def focused_linear_oracle(module, q, k, v, grid):
    """Focused linear attention with the full N x N weights."""
    power = module.config.power

    def focused(x):
        x = torch.relu(x) + 1e-6
        return x.norm(dim=-1, keepdim=True) * x**power / (x**power).norm(dim=-1, keepdim=True)

    out = torch.empty_like(v)
    for b, m in batch_and_head_indices(q):
        pairs = focused(q[b, m]) @ focused(k[b, m]).T
        out[b, m] = pairs / pairs.sum(-1, keepdim=True) @ v[b, m]
    return out


def linear_oracle(module, q, k, v, grid):
    """Linear attention with the full N x N weights."""
    kind, out = module.config.feature_map.value, torch.empty_like(v)
    for b, m in batch_and_head_indices(q):
        if kind == "softmax":
            out[b, m] = torch.softmax(q[b, m], 1) @ torch.softmax(k[b, m], 0).T @ v[b, m]
            continue
        features = {"relu": torch.relu, "elu": lambda x: torch.where(x > 0, x + 1, torch.exp(x))}[kind]
        pairs = features(q[b, m]) @ features(k[b, m]).T
        out[b, m] = pairs / (pairs.sum(-1, keepdim=True) + 1e-6) @ v[b, m]
    return out


def averaged(tokens, grid, contrast_grid):
    """Adaptive average pooling of `(H W, D)`, bin by bin."""
    image = tokens.unflatten(0, grid)
    return torch.stack(
        [
            image[top:bottom, left:right].mean(dim=(0, 1))
            for top, bottom in adaptive_bins(grid[0], contrast_grid[0])
            for left, right in adaptive_bins(grid[1], contrast_grid[1])
        ]
    )


ORACLES = {
    "differential": (differential_oracle, {}),
    "differential_stages": (differential_stages_oracle, {}),
    "agent": (agent_oracle, {}),
    "focused_linear": (focused_linear_oracle, {"power": 3}),
    "focused_linear, power 5": (focused_linear_oracle, {"power": 5}),
    "linear, elu": (linear_oracle, {}),
    "linear, relu": (linear_oracle, {"feature_map": "relu"}),
    "linear, softmax": (linear_oracle, {"feature_map": "softmax"}),
}


def build(name, grid=(4, 6), dim=16, **options):
    torch.manual_seed(0)
    config = ATTENTIONS[name][0](**options)
    return build_attention(config, dim, 2, grid, (2, 3), num_prefix_tokens=1, layer_index=LAYER).double()


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (1, 7)], ids=str)
@pytest.mark.parametrize("name", ORACLES)
def test_comparison_attention_equals_oracle(name, grid):
    oracle, options = ORACLES[name]
    module = build(name.split(",")[0], grid, **options)
    for parameter_name, parameter in module.named_parameters():
        if parameter_name.startswith("norm"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    q, k, v = (torch.randn(2, 2, 1 + grid[0] * grid[1], 8, dtype=torch.float64).requires_grad_() for _ in range(3))
    inside = [p for n, p in module.named_parameters() if n.split(".")[0] not in ("qkv", "proj", "local")]
    results = []
    for function in (lambda: oracle(module, q, k, v, grid), lambda: module.attend(Tokens(q, k, v, q, grid))):
        out = function()
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append((out, torch.autograd.grad((out * weight).sum(), [q, k, v, *inside])))
    (expected, expected_grads), (out, grads) = results
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    for grad, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_differential_v2_equals_oracle(kv_heads):
    """Differences of two heads that share k and v, with lambda from the token; value and every gradient."""
    torch.manual_seed(0)
    config = ATTENTIONS["differential_v2"][0](kv_heads=kv_heads)
    module = build_attention(config, 32, 4, (3, 5), num_prefix_tokens=1).double()
    x = torch.randn(2, 16, 32, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (differential_v2_oracle, lambda module, x: module(x)):
        out = function(module, x)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append((out, *torch.autograd.grad((out * weight).sum(), [x, *module.parameters()])))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def differential_v2_oracle(module, x):
    heads, kv_heads, dim = 4, module.config.kv_heads or 4, 8
    q, k, v = (x @ module.qkv.weight.T + module.qkv.bias).split([64, 8 * kv_heads, 8 * kv_heads], dim=-1)
    weights = torch.sigmoid(x @ module.lambda_proj.weight.T)
    rows = []
    for b in range(x.shape[0]):
        both = []
        for m in range(2 * heads):
            group = slice(m * kv_heads // (2 * heads) * dim, (m * kv_heads // (2 * heads) + 1) * dim)
            scores = q[b, :, m * dim : (m + 1) * dim] @ k[b, :, group].T / dim**0.5
            both.append(torch.softmax(scores, -1) @ v[b, :, group])
        out = [both[2 * m] - weights[b, :, m : m + 1] * both[2 * m + 1] for m in range(heads)]
        rows.append(torch.cat(out, -1) @ module.proj.weight.T + module.proj.bias)
    return torch.stack(rows)


def test_differential_v2_sdpa_with_heads_inside_tokens(monkeypatch):
    """SDPA for float32 on a GPU returns the heads of a token contiguous in memory."""
    module = build("differential_v2")
    x = torch.randn(2, 25, 16, dtype=torch.float64)
    expected = module(x)
    real = differential_v2.softmax_attention
    monkeypatch.setattr(
        differential_v2, "softmax_attention", lambda *heads: real(*heads).transpose(1, 2).contiguous().transpose(1, 2)
    )
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


def test_differential_v2_wrong_kv_heads_one_line():
    with pytest.raises(ValueError, match="kv_heads must divide the number of heads 4, got 3"):
        build_attention(ATTENTIONS["differential_v2"][0](kv_heads=3), 32, 4, (3, 5))
    with pytest.raises(
        ValueError, match=r"local_branch must be false unless v has as many heads as the result, 4, got 2"
    ):
        build_attention(ATTENTIONS["differential_v2"][0](kv_heads=2, local_branch=True), 32, 4, (3, 5))


def test_attention_variants_initial_values():
    """Initial values, checked by their standard deviation in large layers."""
    for std in (1.0, 0.02, 0.0):
        vca = build("vca", dim=512, embedding_init_std=std)
        for embedding in (vca.e_pos, vca.e_neg):
            assert embedding.std().item() == pytest.approx(std, rel=0.05)
            assert abs(embedding.mean().item()) <= 0.1 * std
        assert std == 0 or not torch.equal(vca.e_pos, vca.e_neg)
    for name in ("vca", "differential", "differential_stages"):
        module = build(name, dim=2048)
        lambdas = [module.lambda1] if name == "differential" else [module.lambda1, module.lambda2]
        vectors = [vector for one in lambdas for vector in one.parameters()]
        assert len(vectors) == 4 * len(lambdas)
        for vector in vectors:
            assert vector.std().item() == pytest.approx(0.1, rel=0.15)
        assert len({vector[0].item() for vector in vectors}) == len(vectors)
        assert all((p == 1).all() for n, p in module.named_parameters() if n.startswith("norm"))
    agent = build("agent", (20, 30))
    for bias in (agent.bias1, agent.bias2):
        assert {name: tuple(p.shape) for name, p in bias.named_parameters()} == {
            "cells": (2, 6, 7, 7),
            "rows": (2, 6, 20, 1),
            "columns": (2, 6, 1, 30),
            "prefix": (2, 6, 1),
        }
        for parameter in (bias.cells, bias.rows, bias.columns):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15)
    assert not torch.equal(agent.bias1.cells, agent.bias2.cells)


@pytest.mark.parametrize("name", ["vca", "differential_stages", "differential"])
def test_attention_variants_autocast_difference_float32(name, monkeypatch):
    """The differences run in float32 although the products run in bfloat16."""
    recorded = []

    def spy(input, first, second, real=torch.addcmul):
        recorded.append((input.dtype, first.dtype, second.dtype))
        return real(input, first, second)

    monkeypatch.setattr(torch, "addcmul", spy)
    module = build(name).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(torch.randn(1, 25, 16)).dtype is torch.bfloat16
    assert recorded == [(torch.float32,) * 3] * (1 if name == "differential" else 2)
