"""Comparison attentions against figures of the original implementations: output and every gradient of whole modules.

Each file of `tests/golden/attentions/` has cases with an input, all parameters under the original's names, the output,
and the gradients of sum(out * w), in float64.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.support import GOLDEN
from vca.attention import ATTENTIONS, build_attention


class Original(NamedTuple):
    """How the parameters of an original map onto a module of ours."""

    variant: str  # registry key
    options: Callable[[dict[str, Any]], dict[str, Any]]  # meta -> options of the config
    parts: dict[str, list[str]]  # our parameter -> the original's that the case has, concatenated on axis 0
    absent: tuple[str, ...] = ()  # parameters of ours that the original lacks; they are zero
    arrange: Callable[[str, torch.Tensor, dict[str, Any]], torch.Tensor] = lambda name, tensor, meta: (
        tensor
    )  # to our layout
    qkv_bias: bool = True


def regroup_heads(name, tensor, meta):
    """Rows [q k v | q' k' v'] of a qkv projection to [q q' | k k' | v v']."""
    if not name.startswith("qkv"):
        return tensor
    heads, extra = tensor.split([3 * meta["dim"], 3 * meta["dim"] // meta["heads"]])
    return torch.cat([part for pair in zip(heads.chunk(3), extra.chunk(3), strict=True) for part in pair])


def split_gate(name, tensor, meta):
    """Take rows [q k v] of [q gate k v], or the gate's of [q gate]."""
    dim = meta["dim"]
    if name.startswith("gate"):
        return tensor[dim:]
    return torch.cat((tensor[:dim], tensor[2 * dim :])) if name.startswith("qkv") else tensor


PROJ = {"proj.weight": ["proj.weight"], "proj.bias": ["proj.bias"]}
QKV = {f"qkv.{kind}": [f"{name}.{kind}" for name in ("qkv", "q", "kv")] for kind in ("weight", "bias")}
ORIGINALS = {
    "linear_elu": Original("linear", lambda meta: {}, QKV | PROJ),
    "linear_relu": Original(
        "linear",
        lambda meta: {"feature_map": "relu", "qk_norm": True},
        {
            "qkv.weight": ["to_qkv.weight"],
            "q_norm.weight": ["q_norm.weight"],
            "k_norm.weight": ["k_norm.weight"],
            "proj.weight": ["to_out.0.weight"],
            "proj.bias": ["to_out.0.bias"],
        },
        qkv_bias=False,
    ),
    "linear_softmax": Original(
        "linear",
        lambda meta: {"feature_map": "softmax"},
        {
            f"{ours}.{kind}": [f"{name}.{kind}" for name in originals]
            for ours, originals in (("qkv", ["queries", "keys", "values"]), ("proj", ["reprojection"]))
            for kind in ("weight", "bias")
        },
    ),
    "differential_v2": Original(
        "differential_v2",
        lambda meta: {"kv_heads": meta["kv_heads"]},
        {
            "qkv.weight": ["q_proj.weight", "k_proj.weight", "v_proj.weight"],
            "proj.weight": ["o_proj.weight"],
            "lambda_proj.weight": ["lambda_proj.weight"],
        },
        absent=("proj.bias",),
        qkv_bias=False,
    ),
    "inline": Original(
        "inline",
        lambda meta: {},
        QKV
        | PROJ
        | {
            f"predictor.{layer}.{kind}": [f"residual.{layer}.{kind}"] for layer in (0, 2) for kind in ("weight", "bias")
        },
    ),
    "mala": Original(
        "mala",
        lambda meta: {},
        PROJ
        | {
            f"{ours}.{kind}": [f"{name}.{kind}"]
            for ours, name in (("qkv", "qkvo"), ("gate", "qkvo"), ("local", "lepe"))
            for kind in ("weight", "bias")
        },
        arrange=lambda name, tensor, meta: {
            "qkv": tensor[: 3 * meta["dim"]],
            "gate": tensor[3 * meta["dim"] :],
        }.get(name.partition(".")[0], tensor),
    ),
    "mhla": Original(
        "mhla",
        lambda meta: {
            "pieces": [side // meta["piece_side"] for side in meta["grid"]],
            "local_kernel": meta["lepe_kernel"],
            "qk_norm": meta["qk_norm"],
        },
        {
            f"{ours}.{kind}": [f"{name}.{kind}"]
            for ours, name in (("qkv", "to_qkv"), ("proj", "to_out.0"), ("local", "lepe"), ("norm", "norm"))
            for kind in ("weight", "bias")
        }
        | {f"{name}.weight": [f"{name}.weight"] for name in ("q_norm", "k_norm")}
        | {"mixing": ["piece_attn.conv.weight"]},
    ),
    "circulant": Original(
        "circulant",
        lambda meta: {},
        {"qkv.weight": ["qkv.weight"], "gate.weight": ["gate.0.weight"], "gate.bias": ["gate.0.bias"]} | PROJ,
        qkv_bias=False,
    ),
    "vittt": Original(
        "ttt",
        lambda meta: {},
        QKV | {name: [name] for name in ("w1", "w2", "w3")} | PROJ,
        arrange=regroup_heads,
    ),
    "polaformer": Original(
        "polaformer",
        lambda meta: {},
        {f"qkv.{kind}": [f"qg.{kind}", f"kv.{kind}"] for kind in ("weight", "bias")}
        | {f"gate.{kind}": [f"qg.{kind}"] for kind in ("weight", "bias")}
        | {f"local.{kind}": [f"dwc.{kind}"] for kind in ("weight", "bias")}
        | {"scale": ["scale"], "power": ["power"], "position": ["positional_encoding"]}
        | PROJ,
        arrange=split_gate,
    ),
}


def cases_of(name: str) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Return case -> (arrays, meta) of a file."""
    data = np.load(GOLDEN / "attentions" / f"{name}.npz")
    cases = {}
    for case in sorted({key.split("/")[0] for key in data.files}):
        arrays = {key.partition("/")[2]: data[key] for key in data.files if key.startswith(f"{case}/")}
        meta = json.loads(str(arrays.pop("meta")))
        cases[case] = ({key: torch.from_numpy(value) for key, value in arrays.items()}, meta)
    return cases


CASES = [(name, case) for name in ORIGINALS for case in cases_of(name)]


def test_golden_files_each_have_a_variant():
    assert set(ORIGINALS) == {path.stem for path in (GOLDEN / "attentions").glob("*.npz")}


def build(name, case):
    """Return the module with the original's parameters, the arrays, and the expected gradient of each parameter."""
    original, (arrays, meta) = ORIGINALS[name], cases_of(name)[case]
    config = ATTENTIONS[original.variant][0](**original.options(meta))
    module = build_attention(
        config,
        meta["dim"],
        meta["heads"] if isinstance(meta["heads"], int) else 1,
        tuple(meta["grid"]),
        num_prefix_tokens=meta["prefix_tokens"],
        qkv_bias=meta.get("qkv_bias", original.qkv_bias),
    ).double()
    theirs = {key.partition("/")[2] for key in arrays if key.startswith("param/")}
    present = {own: [name for name in names if name in theirs] for own, names in original.parts.items()}
    parts = {own: names for own, names in present.items() if names}
    assert {name for names in parts.values() for name in names} == theirs
    parameters = dict(module.named_parameters())
    assert set(parameters) == set(parts) | set(original.absent)

    def ours(kind: str, own: str) -> torch.Tensor:
        joined = torch.cat([arrays[f"{kind}/{name}"] for name in parts[own]])
        return original.arrange(own, joined, meta).reshape(parameters[own].shape)

    with torch.no_grad():
        for own, parameter in parameters.items():
            parameter.copy_(torch.zeros_like(parameter) if own in original.absent else ours("param", own))
    return module, arrays, {own: ours("grad", own) for own in parts}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_attention_equals_original(name, case):
    module, arrays, gradients = build(name, case)
    x = arrays["x"].clone().requires_grad_()
    out = module(x)
    close(out, arrays["out"])
    (out * arrays["w"]).sum().backward()
    close(x.grad, arrays["grad/x"])
    parameters = dict(module.named_parameters())
    for own, expected in gradients.items():
        close(parameters[own].grad, expected)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_attention_in_float32_near_original(name, case):
    module, arrays, _ = build(name, case)
    out = module.float()(arrays["x"].float())
    error = (out - arrays["out"]).abs().max() / arrays["out"].abs().max()
    assert error < 1e-5


def close(found, expected):
    """Relative to the largest entry: 1e-9."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max().clamp(min=1e-30)
