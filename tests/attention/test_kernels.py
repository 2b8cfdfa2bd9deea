"""The Triton kernels, on a GPU if available, else in the interpreter, which has no bfloat16 arithmetic."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.utils.checkpoint

from benchmarks.timing import saved_bytes
from tests.attention.test_contrast import (
    ARGUMENTS,
    CONFIGS,
    OPTIONS,
    contrast_attention,
    given_to_function,
    random_arguments,
    reference_attention,
    shape_id,
)
from tests.data.test_loader import write_image_folder
from tests.host_reads import HostReads
from tests.processes import ROOT, environment, run_script
from vca import VCAConfig, VisualContrastAttention
from vca.attention import SoftmaxConfig, build_attention, kernels
from vca.attention.kernels import Backend, unsupported_reason, use_triton

pytest.importorskip("triton")
import triton.language as tl
from triton.runtime import interpreter

from vca.attention.kernels import block_sizes, launch, operator
from vca.attention.kernels.block_sizes import BlockSizes

pytestmark = pytest.mark.process
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = [torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float16]

# (grid, pool, prefix tokens, heads, head dim): every head dim's tiles, from 4 to 256 contrast tokens, ragged bins, more
# bins than cells, blocks of contrast tokens, a single row
SHAPES = [
    ((6, 6), (3, 3), 1, 2, 32),
    ((7, 9), (3, 4), 2, 1, 72),
    ((4, 4), (5, 6), 0, 2, 64),
    ((14, 14), (7, 7), 1, 1, 64),
    ((12, 12), (12, 12), 0, 1, 40),
    ((5, 8), (16, 16), 1, 1, 32),
    ((5, 5), (2, 2), 0, 1, 128),
    ((1, 11), (1, 4), 1, 3, 96),
    ((4, 5), (2, 2), 1, 1, 24),
]
TWO_BLOCKS = ((6, 9), (6, 6), 1, 1, 40)  # of contrast tokens, four of tokens


@pytest.fixture(autouse=True, scope="module")
def _interpreter_patches_once():
    """Let the interpreter replace `tl`'s functions once per kernel, not per helper call: a third of its time."""
    patch = interpreter._patch_lang

    def patch_once(function):
        modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        return patch(function) if any(tl.core.is_builtin(module.load) for module in modules) else None

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        yield


def both(shape, dtype=torch.float32, options=None, seed=0):
    """Arguments in float64, and for the kernels: q, k, v in `dtype` with the strides of a projection."""
    many = shape[1][0] * shape[1][1] > 100  # seconds per image in the interpreter
    exact = random_arguments(shape, seed=seed, batch=1 if many or shape is SHAPES[-1] else 2)
    for place in range(3):
        exact[place] = exact[place].detach().to(dtype).double().requires_grad_()
    given, keywords = given_to_function(exact, options or {})

    def for_kernels(place, value):
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().to(DEVICE, dtype if place < 3 else torch.float32)
        if place < 3:
            value = value.transpose(1, 2).contiguous().transpose(1, 2)
        return value.requires_grad_()

    return given, [for_kernels(place, value) for place, value in enumerate(given)], keywords


def with_gradients(function, arguments, **keywords):
    """Return the output and the gradients of a weighted sum of it, by name."""
    out = function(*arguments, **keywords)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.device, out.dtype)
    named = [(name, x) for name, x in zip(ARGUMENTS, arguments, strict=False) if isinstance(x, torch.Tensor)]
    grads = torch.autograd.grad((out * weight).sum(), [x for _, x in named], allow_unused=True)
    return {"out": out, **{f"d {name}": grad for (name, _), grad in zip(named, grads, strict=True)}}


def assert_close(found, expected, ratio):
    """Check that errors are within `ratio` of the largest expected value; lists all that are not."""
    errors = {}
    for name, reference in expected.items():
        if reference is None:
            assert found[name] is None or not found[name].any(), name
            continue
        assert found[name].isfinite().all(), name
        error = (found[name].double().cpu() - reference).abs().max() / reference.abs().max().clamp_min(1e-6)
        errors[name] = error.item()
    wrong = {name: error for name, error in errors.items() if error > ratio}
    assert not wrong, f"errors above {ratio}: {wrong}"


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_kernels_equal_reference(shape):
    exact, given, _ = both(shape)
    expected = with_gradients(reference_attention, exact)
    assert_close(with_gradients(contrast_attention, given, backend="triton"), expected, 3e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[1], TWO_BLOCKS], ids=shape_id)
def test_kernels_options_equal_eager(options, shape):
    exact, given, keywords = both(shape, options=options)
    expected = with_gradients(contrast_attention, exact, **keywords)
    assert_close(with_gradients(contrast_attention, given, backend="triton", **keywords), expected, 1e-5)


@pytest.mark.parametrize("pooling", ["maximum", "depthwise"])
def test_kernels_other_poolings_equal_eager(pooling):
    """Queries that are pooled outside the kernels, with gradients through the pooling."""
    exact, given, _ = both(SHAPES[0])
    weight = torch.randn(64, 1, 2, 2, dtype=torch.float64) if pooling == "depthwise" else None
    expected = with_gradients(contrast_attention, exact, pooling=pooling, pool_weight=weight)
    weight = None if weight is None else weight.to(DEVICE, torch.float32)
    found = with_gradients(contrast_attention, given, backend="triton", pooling=pooling, pool_weight=weight)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("options", [{}, OPTIONS[3]], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]], ids=shape_id)
def test_kernels_half_precision_as_accurate_as_eager(dtype, options, shape):
    """Errors are bounded, and not larger than those of plain PyTorch in the same dtype."""
    exact, given, keywords = both(shape, dtype, options)
    expected = with_gradients(contrast_attention, exact, **keywords)
    found = with_gradients(contrast_attention, given, backend="triton", **keywords)
    lambdas = {name: expected.pop(name) for name in ("d lambda1", "d lambda2")}  # small sums of terms that cancel
    assert_close(found, expected, 5e-3 if dtype is torch.float16 else 4e-2)
    eager = with_gradients(contrast_attention, given, backend="eager", **keywords)
    for name, reference in {**expected, **lambdas}.items():
        error, eager_error = ((x[name].double().cpu() - reference).abs().max() for x in (found, eager))
        assert error <= 1.5 * eager_error + 2e-3 * reference.abs().max().clamp_min(1), name


@pytest.mark.parametrize("shape", [SHAPES[1], TWO_BLOCKS], ids=shape_id)
@pytest.mark.parametrize("splits", [2, 100])
def test_kernels_split_tokens_equal_eager(shape, splits, monkeypatch):
    """Split N, as for few heads and long inputs."""
    exact, given, _ = both(shape)
    monkeypatch.setattr(launch, "num_splits", lambda programs, tokens, rows, device: min(splits, -(-tokens // rows)))
    expected = with_gradients(contrast_attention, exact)
    assert_close(with_gradients(contrast_attention, given, backend="triton"), expected, 1e-5)


def test_kernels_large_scores_no_overflow():
    """Softmaxes concentrated on one token do not overflow, also in padded rows and tokens."""
    for sign in (1, -1):
        exact, given, _ = both(SHAPES[1])
        for arguments in (exact, given):
            with torch.no_grad():
                arguments[0] += 20 * sign
                arguments[1] += 3
        expected = with_gradients(contrast_attention, exact)
        assert_close(with_gradients(contrast_attention, given, backend="triton"), expected, 0.1)


def test_kernels_unusual_strides_equal_eager():
    """Strided channels, v with other strides than k, embeddings and weights with gaps."""
    exact, given, _ = both(SHAPES[0])

    def otherwise(place, value):
        if place in (0, 2, 3):
            value = value.detach().transpose(-1, -2).contiguous().transpose(-1, -2)
        elif place in (8, 9):
            value = torch.stack((value.detach(), torch.zeros_like(value)), dim=-1)[:, 0]
        return value.requires_grad_() if isinstance(value, torch.Tensor) and not value.requires_grad else value

    given = [otherwise(place, value) for place, value in enumerate(given)]
    assert given[0].stride(-1) > 1
    assert given[8].stride() == (2,)
    expected = with_gradients(contrast_attention, exact)
    assert_close(with_gradients(contrast_attention, given, backend="triton"), expected, 1e-5)
    q, _, _, e_pos, e_neg, *rest = (x.detach() if isinstance(x, torch.Tensor) else x for x in given)
    lambda1, lambda2, lambda_init, norm1, norm2, grid, contrast_grid, prefix = rest
    t = torch.randn(2, 2, 32, 9, device=DEVICE).transpose(-1, -2)
    options = (lambda_init, grid, contrast_grid, prefix, 1e-5, [True, True], False)
    parameters = (e_pos, e_neg, lambda1, lambda2, norm1, norm2)
    found, wanted = (operator.contrast_attention(q, q, q, x, *parameters, *options)[0] for x in (t, t.contiguous()))
    assert torch.equal(found, wanted)


def test_kernels_deterministic():
    _, given, _ = both(SHAPES[1])
    one, other = (with_gradients(contrast_attention, given, backend="triton") for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def entry_of(**changes):
    """An entry of `tiles.json` for a CPU."""
    entry = {
        "device": "cpu",
        "capability": 0,
        "kernel": "stage1_fwd",
        "head_dim": 40,
        "dtype": "float32",
        "tokens": 197,
    }
    entry |= {"contrast_tokens": 49, "BLOCK_C": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    return {**entry, **changes}


@pytest.fixture
def tiles(tmp_path, monkeypatch):
    """Install other entries."""
    file = tmp_path / "tiles.json"
    monkeypatch.setattr(block_sizes, "FILE", file)

    def write(content):
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        block_sizes.read_entries.cache_clear()
        block_sizes.block_sizes.cache_clear()

    yield write
    write([])


def test_kernels_use_measured_block_sizes(tiles, monkeypatch):
    """Each kernel is launched with its own entry, and results equal eager's; without entries, with the defaults."""
    sizes = {"stage1_fwd": (16, 64, 4, 2), "stage2_fwd": (16, 32, 2, 1)}
    sizes |= {"stage1_bwd": (32, 32, 8, 2), "stage2_bwd": (64, 16, 4, 3)}
    fields = BlockSizes._fields
    capability = block_sizes.capability_of(DEVICE)
    tiles([entry_of(kernel=k, capability=capability, **dict(zip(fields, v, strict=True))) for k, v in sizes.items()])
    launched, run = {}, type(launch.forward.stage1_fwd_kernel).run

    def recorded(kernel, *arguments, **constants):
        name = (getattr(kernel, "fn", None) or kernel).__name__
        launched[name] = tuple(constants.get(field) for field in fields)
        return run(kernel, *arguments, **constants)

    monkeypatch.setattr(type(launch.forward.stage1_fwd_kernel), "run", recorded)
    exact, given, _ = both(TWO_BLOCKS)
    found = with_gradients(contrast_attention, given, backend="triton")
    assert_close(found, with_gradients(contrast_attention, exact), 1e-5)
    assert {kernel: launched[f"{kernel}_kernel"] for kernel in sizes} == sizes
    assert launched["stage2_bwd_kernel_preprocess"] == sizes["stage2_fwd"]
    tiles([])
    with_gradients(contrast_attention, given, backend="triton")
    assert launched["stage1_fwd_kernel"] == launched["stage2_bwd_kernel"] == (32, 16, 8, 3)


def test_kernels_nearest_measured_block_sizes(tiles):
    """The nearest tokens on a logarithmic scale; only this capability, head dim and dtype; BLOCK_C is capped."""
    capability = block_sizes.capability_of(DEVICE)
    few, many = entry_of(BLOCK_C=128, capability=capability), entry_of(tokens=4096, BLOCK_N=32, capability=capability)
    others = [entry_of(capability=1), entry_of(head_dim=72), entry_of(dtype="float16")]
    tiles([few, many, *[{**other, "tokens": 800, "num_warps": 1} for other in others]])

    def sizes(tokens, contrast=49, dim=40, dtype=torch.float32):
        return block_sizes.block_sizes(tokens, contrast, dim, dtype, DEVICE)

    assert sizes(800).stage1_fwd == (64, 64, 4, 2)
    assert sizes(1000).stage1_fwd == (16, 32, 4, 2)
    assert sizes(196, 9).stage1_fwd == (16, 64, 4, 2)
    assert sizes(800).stage2_bwd == (32, 16, 8, 3)
    assert sizes(800, dim=24).stage1_fwd == (32, 16, 8, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "must be JSON (Expecting value: line 1 column 2 (char 1))"),
        ({}, "must be a list, got dict"),
        ([3], "entry 0 must have keys and values, got 3"),
        ([entry_of(), entry_of(kernel="bwd")], "kernel of entry 1 is missing or wrong, got 'bwd'"),
        ([entry_of(BLOCK_N=48)], "BLOCK_N of entry 0 is missing or wrong, got 48"),
        ([entry_of(num_stages=0)], "num_stages of entry 0 is missing or wrong, got 0"),
        ([entry_of(tokens=None)], "tokens of entry 0 is missing or wrong, got None"),
    ],
    ids=str,
)
def test_kernels_malformed_block_sizes_refused(content, message, tiles):
    tiles(content)
    _, given, _ = both(SHAPES[-1])
    remedy = "; write it again with `python -m benchmarks gpu --stage 2`, or write []"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{block_sizes.FILE}: {message}{remedy}')}$"):
        contrast_attention(*given, backend="triton")


class LaunchReads(HostReads):
    """Counts every read, and lists the operations."""

    def __init__(self, monkeypatch):
        super().__init__(monkeypatch)
        self.seen = set()

    @property
    def place(self):
        return "launch"

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.seen.add(function.overloadpacket.__name__)
        return super().__torch_dispatch__(function, types, arguments, options)


@pytest.mark.parametrize("name", ["vca", "both plain", "learned pooling"])
@pytest.mark.parametrize("splits", [1, 2])
def test_kernels_launch_without_host_reads(name, splits, monkeypatch):
    """Forward and backward read no value and copy nothing from or to the host, as a CUDA graph requires."""
    module, x = module_of(CONFIGS[name], "triton"), torch.randn(1, 21, 64, device=DEVICE, requires_grad=True)
    monkeypatch.setattr(launch, "num_splits", lambda *_: splits)
    if DEVICE.type == "cpu":  # the interpreter itself copies its arguments
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)
    with LaunchReads(monkeypatch) as reads:
        assert operator.needs_operator([x])  # a mode sees the operator; here it must see what that does
        monkeypatch.setattr(operator, "is_in_torch_dispatch_mode", lambda: False)
        out = module(x)
        torch.autograd.grad(out, [x, *module.parameters()], out.detach())
    assert {"new_empty_strided", "empty", "sum"} <= reads.seen
    assert not reads.counts


def test_kernels_output_may_be_changed_in_place(monkeypatch):
    """The output is no view of another tensor, in eager mode and as an operator."""
    _, given, _ = both(SHAPES[-1])
    expected = contrast_attention(*given, backend="triton")
    with LaunchReads(monkeypatch) as reads:
        through_operator = contrast_attention(*given, backend="triton")
    assert "contrast_attention" in reads.seen
    assert torch.equal(expected, through_operator)
    for out in (expected, through_operator):
        (grad,) = torch.autograd.grad(out.mul_(2).sum(), given[2])
        assert grad.any()


def test_kernels_operators_pass_opcheck():
    """Schema, fake tensors with the true strides, tracing."""
    for options in ({}, {"plain1": True, "plain2": True, "streams": ("pool", "pool")}):
        _, given, keywords = both(SHAPES[-1], options=options)
        q, k, v, e_pos, e_neg, lambda1, lambda2, lambda_init, norm1, norm2, grid, contrast_grid, prefix = given
        pooled = ["pool" in stream for stream in keywords["streams"]]
        e_pos, e_neg = (
            e if "embedding" in stream else None for e, stream in zip((e_pos, e_neg), keywords["streams"], strict=True)
        )
        if options.get("plain1") and options.get("plain2"):
            e_neg, pooled[1] = None, False
        tensors = (q, k, v, None, e_pos, e_neg, lambda1, lambda2, norm1, norm2)
        rest = (lambda_init, list(grid), list(contrast_grid), prefix, 1e-5, pooled, False)
        torch.library.opcheck(operator.contrast_attention, (*tensors, *rest))
        detached = [x if x is None else x.detach() for x in tensors]
        out, *found = operator.contrast_attention(*detached, *rest)
        torch.library.opcheck(operator.contrast_attention_backward, (torch.ones_like(out), *found, *detached, *rest))


def module_of(config, backend):
    torch.manual_seed(0)
    module = VisualContrastAttention(64, 2, (4, 5), (2, 2), num_prefix_tokens=1, config=config)
    module.config.backend = Backend(backend)
    return module.to(DEVICE)


def gradients_of(module, run, x):
    out = run(x)
    return [out, *torch.autograd.grad(out.float().square().sum(), list(module.parameters()))]


@pytest.mark.parametrize("name", ["vca", "both plain", "learned pooling"])
def test_kernels_compile_export_checkpoint_equal_eager(name):
    """Compiled with fullgraph, exported and with activation checkpointing."""
    module, x = module_of(CONFIGS[name], "triton"), torch.randn(1, 21, 64, device=DEVICE)
    eager = module_of(CONFIGS[name], "eager")
    expected = gradients_of(eager, eager, x)
    module.config.backend = Backend.triton  # the two share their config

    def close(found):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4 * other.abs().max().item())

    close(gradients_of(module, module, x))
    torch._dynamo.reset()
    close(gradients_of(module, torch.compile(module, fullgraph=True, backend="aot_eager"), x))
    close(gradients_of(module, lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False), x))
    exported = torch.export.export(module.eval(), (x,))
    assert any("vca.contrast_attention" in str(node.target) for node in exported.graph.nodes)
    close([exported.module()(x), *expected[1:]])


def test_kernels_second_derivative_refused():
    module, x = module_of(VCAConfig(), "triton"), torch.randn(1, 21, 64, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backend=triton does not support second derivatives; use .*eager"):
        torch.autograd.grad(grad.square().sum(), x)


def test_kernels_left_out_of_traces_onnx_and_transforms():
    """Exported files load without Triton; `torch.func` is an error."""
    module, x = module_of(VCAConfig(), "triton").eval(), torch.randn(2, 21, 64, device=DEVICE)
    traced = torch.jit.trace(module, x)
    assert "contrast_attention" not in str(traced.inlined_graph)
    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    assert "contrast_attention" not in str(program.model_proto.graph.node)
    message = "^attention.backend must be auto or eager under torch.func and forward-mode differentiation, got triton$"
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(module)(x[:, None])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_kernels_autocast_close_to_eager(dtype):
    """Half-precision products and float32 parameters; q, k and v may be float32."""
    results = []
    for backend in ("triton", "eager"):
        module, x = module_of(VCAConfig(), backend), torch.randn(2, 21, 64, device=DEVICE)
        torch.manual_seed(1)
        x = torch.randn(2, 21, 64).to(DEVICE)
        with torch.autocast(DEVICE.type, dtype=dtype):
            results.append(gradients_of(module, module, x))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).float().norm() <= 0.05 * other.float().norm() + 1e-4

    _, given, _ = both(SHAPES[0])
    expected = with_gradients(contrast_attention, given, backend="triton")
    with torch.autocast(DEVICE.type, dtype=dtype):
        found = with_gradients(contrast_attention, given, backend="triton")
    assert found["out"].dtype is torch.float32
    assert not torch.equal(found["out"], expected["out"])
    torch.testing.assert_close(found["out"], expected["out"], rtol=0.05, atol=0.05)


def test_kernels_saved_memory_near_mhsa():
    """Saved activations relative to MHSA: 1.10 at 197 tokens; 1.35 in plain PyTorch."""
    layers = [
        VisualContrastAttention(128, 2, (14, 14), (7, 7), 1, config=VCAConfig(backend="triton")),
        build_attention(SoftmaxConfig(), 128, 2, (14, 14), num_prefix_tokens=1),
    ]
    x = torch.randn(1, 197, 128, device=DEVICE, requires_grad=True)
    ours, theirs = (saved_bytes(lambda layer=layer: layer(x), layer) for layer in (one.to(DEVICE) for one in layers))
    assert ours / theirs < 1.11


def test_kernels_two_rank_run_equals_eager(tmp_path):
    """`train_cls.py` on two DDP ranks has the losses of plain PyTorch; the log names the backend."""
    write_image_folder(tmp_path / "data")
    options = ["data=imagefolder", f"data.root={tmp_path / 'data'}", "data.num_classes=2", "data.img_size=8"]
    options += ["trainer.steps=2", "trainer.global_batch_size=4", "trainer.log_every=1", "trainer.eval_every=0"]
    options += ["model.embed_dim=32", "model.num_heads=1", "model.depth=1", "trainer.workers=0", "augment.mixup=0"]
    options += ["augment.cutmix=0", f"out_dir={tmp_path}", f"trainer.device={DEVICE.type}"]
    options += ["model.patch_size=4", "model.contrast_grid=[1,1]"]
    losses = {}
    for backend in ("triton", "eager"):
        done = run_script("train_cls.py", f"name={backend}", f"attention.backend={backend}", *options, ranks=2)
        assert done.returncode == 0, done.stderr[-3000:]
        where = {"triton": "fused kernels", "eager": "plain PyTorch"}[backend]
        assert f"deit_mini with vca in {where}, " in done.stdout, done.stdout
        lines = (tmp_path / backend / "metrics.jsonl").read_text().splitlines()
        losses[backend] = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    assert losses["triton"] == pytest.approx(losses["eager"], rel=1e-4)
    assert len(losses["eager"]) == 2


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (("cuda", torch.float64, 64, 49), "dtype must be float32, float16 or bfloat16, got float64"),
        (("cuda", torch.float32, 136, 49), "head dim must be <= 128, got 136"),
        (("cuda", torch.float32, 64, 257), "number of contrast tokens must be <= 256, got 257"),
        (("cpu", torch.float32, 64, 49), "device must be cuda, got cpu"),
        (("cuda", torch.bfloat16, 64, 49), None),
    ],
)
def test_kernels_supported_and_unsupported_inputs(place, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device, *rest = place
    assert unsupported_reason(torch.device(device), *rest) == reason
    assert not use_triton(Backend.eager, torch.device(device), *rest)
    if reason is None:
        assert use_triton(Backend.auto, torch.device(device), *rest)
        return
    with pytest.raises(ValueError, match=f"attention.backend=triton: {reason}"):
        use_triton(Backend.triton, torch.device(device), *rest)
    kernels.warn_once.cache_clear()
    if device == "cpu":  # no GPU: no warning
        assert not use_triton(Backend.auto, torch.device(device), *rest)
        return
    with pytest.warns(UserWarning, match=reason):
        assert not use_triton(Backend.auto, torch.device(device), *rest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warns once
        assert not use_triton(Backend.auto, torch.device(device), *rest)


@pytest.mark.parametrize(("dim", "contrast"), [(72, 64), (32, 64), (64, 65), (64, 32)])
def test_kernels_not_checked_on_a_gpu_only_on_request(dim, contrast, monkeypatch):
    """`auto` warns and uses plain PyTorch where the kernels were not compared with float64 on a GPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    place = torch.device("cuda"), torch.bfloat16, dim, contrast
    assert use_triton(Backend.triton, *place)
    kernels.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f"not for head dim {dim} and {contrast} contrast tokens; "):
        assert not use_triton(Backend.auto, *place)


def test_kernels_triton_missing_reported(monkeypatch):
    monkeypatch.setattr(kernels, "INSTALLED", False)
    assert unsupported_reason(torch.device("cuda"), torch.float32, 64, 49) == "triton is not installed"


def test_kernels_unknown_backend_refused():
    with pytest.raises(ValueError, match=r"attention.backend must be one of \['auto', 'eager', 'triton'\], got 'cuda'"):
        VCAConfig(backend="cuda")


# Bytes. On an H200 the tiles with spills were faster than smaller ones; the limit finds a tile that went to memory.
LARGEST_SPILL = 640


@pytest.fixture(scope="session")
def compiled(artefact):
    """Results of `scripts/kernel_resources.py`, which compiles for A100 and H100 without a GPU.

    Compilation takes minutes, so the script skips it if the sources and Triton match the committed file.
    """
    if sys.platform != "linux":
        pytest.skip("ptxas comes with Triton on Linux")
    recorded = ROOT / "benchmarks" / "results" / "kernels.json"
    command = [sys.executable, "scripts/kernel_resources.py", "--contrast", "64", "256", "--json"]

    def build(folder):
        shutil.copy(recorded, folder)
        without = {key: value for key, value in environment().items() if key != "TRITON_INTERPRET"}
        subprocess.run([*command, str(folder / "kernels.json")], cwd=ROOT, env=without, check=True)

    old, new = (json.loads(path.read_text()) for path in (recorded, artefact("kernels", build) / "kernels.json"))
    assert old == new or old["triton"] != new["triton"], f"kernels changed: {' '.join(command)} {recorded}"
    return new


def test_kernels_fit_a100_and_h100(compiled):
    """Shared memory and spills are within bounds."""
    rows = compiled["rows"]
    assert {(row["dim"], row["capability"]) for row in rows} == {(d, c) for d in (32, 64, 72, 128) for c in (80, 90)}
    assert {row["kernel"] for row in rows} == {
        "contrast_tokens_fwd", "stage1_fwd", "stage2_fwd", "stage2_bwd_preprocess", "stage2_bwd",
        "stage1_bwd_preprocess", "stage1_bwd", "avg_pool_bwd",
    }  # fmt: skip
    for row in rows:
        assert row["spilled_bytes"] <= LARGEST_SPILL, row
        assert row["shared_bytes"] <= (160 if row["capability"] == 80 else 224) * 1024, row
    products = {
        (row["kernel"], row["products"])
        for row in rows
        if row["kernel"].startswith("stage2") and row["dim"] == 64 and row["contrast_tokens"] == 64
    }
    # Two scores each, the product with v^, in the backward also dA; repeated computations are merged.
    assert products == {("stage2_fwd", 3), ("stage2_bwd_preprocess", 4), ("stage2_bwd", 3 + 5)}


def test_kernels_every_variant_compiles(compiled):
    """Compilation finds errors that the interpreter does not: types in loops, arguments equal to 1."""
    every = {row["kernel"] for row in compiled["rows"]}
    kernels = {name: set(names) for name, names in compiled["variants"].items()}
    assert kernels.pop("given contrast tokens") == every - {"avg_pool_bwd"}
    assert kernels.pop("split tokens") == every | {"stage1_fwd_combine"}
    assert len(kernels) == 6
    assert all(names == every for names in kernels.values())


def test_kernels_interpreted_without_gpu():
    assert torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1"
