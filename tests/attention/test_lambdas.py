"""Token lambdas and stages without norm: against the reference, options, precision, refusals."""

import re

import pytest
import torch

from tests.attention import test_contrast
from tests.attention.test_contrast import SHAPES, contrast_attention, plain_formula, random_arguments, shape_id
from vca import VCAConfig, VisualContrastAttention
from vca.attention.reference import reference_attention, reference_token_lambdas

COMBINATIONS = [(form, norm) for form in ("scalar", "token") for norm in (True, False)]
over_combinations = pytest.mark.parametrize(("form", "norm"), COMBINATIONS)


def arguments_of(shape, form, norm, batch=2):
    """`random_arguments` with lambdas of tokens, and without norm weights."""
    given = random_arguments(shape, batch=batch)
    (height, width), (h, w), prefix, heads, _ = shape
    if form == "token":
        generator = torch.Generator().manual_seed(1)
        for place, tokens in ((5, h * w), (6, prefix + height * width)):
            size = (batch, heads, tokens, 1)
            given[place] = torch.rand(size, generator=generator, dtype=torch.float64).requires_grad_()
    if not norm:
        given[8] = given[9] = None
    return given


def with_gradients(function, given, **options):
    out = function(*given, **options)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    tensors = [x for x in given if isinstance(x, torch.Tensor)]
    return out, *torch.autograd.grad((out * weight).sum(), tensors, allow_unused=True)


def assert_close(found, expected, tolerance=1e-9):
    """Relative to the largest entry of each tensor."""
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert (one is None) == (other is None), index
        if one is not None:
            assert one.shape == other.shape
            assert (one - other).abs().max() <= tolerance * other.abs().max(), index


@over_combinations
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_contrast_attention_v2_equals_reference(shape, form, norm):
    given = arguments_of(shape, form, norm)
    expected = with_gradients(test_contrast.reference_attention, given)
    assert_close(with_gradients(contrast_attention, given), expected)


@over_combinations
@pytest.mark.parametrize("options", [{"joint": True}, {"plain1": True}, {"plain2": True}], ids=str)
def test_contrast_attention_v2_options_equal_formula(options, form, norm, monkeypatch):
    """Of one head of one image, for which the lambdas of the tokens broadcast in the formula."""
    given = arguments_of(SHAPES[1], form, norm, batch=1)
    formula = list(given)
    if form == "token":
        formula[5:7] = given[5][0, 0], given[6][0, 0]
    if not norm:
        formula[7] = 0.0
        monkeypatch.setattr(test_contrast, "rms_norm", lambda x, weight, eps: x)
    used, keywords = test_contrast.given_to_function(given, options)
    tensors = [x for x in used if isinstance(x, torch.Tensor)]
    expected, out = plain_formula(formula, **options), contrast_attention(*used, **keywords)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    grads = [torch.autograd.grad((x * weight).sum(), tensors, allow_unused=True) for x in (out, expected)]
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@over_combinations
@pytest.mark.parametrize("part", [1, 37, 100, 1000])
def test_contrast_attention_v2_chunked_stage2_equals_whole(part, form, norm, monkeypatch):
    given = arguments_of(SHAPES[0], form, norm)
    expected = with_gradients(contrast_attention, given)
    monkeypatch.setattr("vca.attention.stages.CPU_CHUNK", part)
    assert_close(with_gradients(contrast_attention, given), expected, 1e-12)


def module_of(form, norm, grid=(5, 7), module_class=VisualContrastAttention, prefix=2, **options):
    torch.manual_seed(0)
    config = VCAConfig(lambda_form=form, norm=norm, **options)
    return module_class(24, 3, grid, (2, 3), prefix, layer_index=2, config=config)


def reference_module(module, x):
    """The module by the reference: value and lambdas."""
    prefix, grid = module.num_prefix_tokens, module.grid
    q, k, v = module.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    if isinstance(module.lambda1, torch.nn.Linear):
        weights = module.lambda1.weight, module.lambda2.weight
        lambdas = reference_token_lambdas(x, *weights, grid, module.contrast_grid, prefix)
    else:
        lambdas = module.lambda1(), module.lambda2()
    parameters = VisualContrastAttention.contrast_parameters(module, x)._replace(lambda1=lambdas[0], lambda2=lambdas[1])
    out = reference_attention(q, k, v, parameters, grid, module.contrast_grid, prefix).transpose(1, 2).flatten(2)
    local = module.local_branch(v.transpose(1, 2).flatten(2), grid)
    return module.proj(out + torch.nn.functional.pad(local, (0, 0, prefix, 0)))


@over_combinations
def test_vca_module_v2_equals_reference(form, norm):
    """Output and the gradient of x and of every parameter, also with stages that call the original."""

    class SameStages(VisualContrastAttention):
        def stage1(self, *args):
            return super().stage1(*args)

        def stage2(self, *args):
            return super().stage2(*args)

    x = torch.randn(2, 37, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    results = []
    for module_class, run in (
        (VisualContrastAttention, reference_module),
        (VisualContrastAttention, lambda module, x: module(x)),
        (SameStages, lambda module, x: module(x)),
    ):
        module = module_of(form, norm, module_class=module_class).double()
        out = run(module, x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    assert all(gradient.abs().sum() > 0 for gradient in results[0])
    assert_close(results[1], results[0])
    assert_close(results[2], results[1], 0)


def test_vca_module_v2_parameters_and_initial_lambdas():
    """Projections with PyTorch's initial values: lambdas near 1/2; neither lambda vectors nor norm weights."""
    names = set(module_of("scalar", True).state_dict())
    vectors = {f"lambda{i}.{x}" for i in (1, 2) for x in ("q1", "k1", "q2", "k2")}
    norms = {"norm1_weight", "norm2_weight"}
    assert set(module_of("scalar", False).state_dict()) == names - norms
    module = module_of("token", True)
    assert set(module.state_dict()) == names - vectors | {"lambda1.weight", "lambda2.weight"}
    assert set(module_of("token", False).state_dict()) == names - vectors - norms | {"lambda1.weight", "lambda2.weight"}
    assert module.lambda1.weight.shape == (3, 24)
    assert 0.9 / 24**0.5 < module.lambda1.weight.abs().max() <= 1 / 24**0.5
    parameters = module.contrast_parameters(torch.randn(4, 37, 24))
    assert parameters.lambda1.shape == (4, 3, 6, 1)
    assert parameters.lambda2.shape == (4, 3, 37, 1)
    assert (parameters.lambda2 - 0.5).abs().mean() < 0.2
    with pytest.raises(ValueError, match=r"contrast_parameters needs x with attention.lambda_form=token"):
        module.contrast_parameters()


def test_vca_module_token_lambdas_use_average_of_given_grid():
    """Also where the queries have another pooling, and for a grid other than the built one."""
    module = module_of("token", True, pooling="maximum", prefix=1).double()
    x = torch.randn(1, 1 + 4 * 9, 24, dtype=torch.float64)
    found = module.contrast_parameters(x, (4, 9))
    cells = module.lambda1(x)[0, 1:].reshape(2, 2, 3, 3, 3).mean((1, 3)).flatten(0, 1).sigmoid()  # (n, M)
    torch.testing.assert_close(found.lambda1[0, :, :, 0], cells.T)
    torch.testing.assert_close(found.lambda2[0, :, :, 0], module.lambda2(x)[0].T.sigmoid())


@over_combinations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vca_module_v2_autocast_close_to_float32(form, norm, dtype):
    """Outputs and gradients; lambdas and v^ are float32."""
    module, x = module_of(form, norm), torch.randn(2, 37, 24)
    parameters = list(module.parameters())
    expected = module(x)
    expected_grads = torch.autograd.grad(expected.square().sum(), parameters)
    with torch.autocast("cpu", dtype=dtype):
        out = module(x)
        assert module.contrast_parameters(x).lambda2.dtype is torch.float32
        q, k, v = module.project(x, module.grid)[:3]
        v_hat = module.stage1(q[:, :, :12], k, v, *([torch.rand(2, 3, 6, 1)] if form == "token" else []))
        assert v_hat.dtype is torch.float32
    grads = torch.autograd.grad(out.float().square().sum(), parameters)
    for one, other in zip((out.float(), *grads), (expected, *expected_grads), strict=True):
        assert (one - other).norm() < 0.05 * other.norm()


def test_vca_v2_refused_by_kernels():
    """`triton` is an error that names the option; `auto` uses plain PyTorch without a warning."""
    cuda = torch.device("cuda")
    for form, norm, message in [
        ("token", True, "attention.lambda_form must be scalar, got token"),
        ("scalar", False, "attention.norm must be true, got false"),
        ("token", False, "attention.lambda_form must be scalar, got token"),
    ]:
        message = f"^attention.backend=triton: {message}; use attention.backend=auto$"
        module = module_of(form, norm, backend="triton", prefix=0)
        with pytest.raises(ValueError, match=message):
            module.fused(cuda, torch.float32)
        with pytest.raises(ValueError, match=message):
            module(torch.randn(1, 35, 24))
        given = arguments_of(((5, 7), (2, 3), 0, 1, 8), form, norm, batch=1)
        with pytest.raises(ValueError, match=message):
            contrast_attention(*given, backend="triton")
        assert not module_of(form, norm).fused(cuda, torch.float32)


def test_vca_v2_wrong_options_refused():
    with pytest.raises(ValueError, match=r"lambda_form must be one of \['scalar', 'token'\], got 'head'"):
        VCAConfig(lambda_form="head")
    with pytest.raises(ValueError, match="lambda_form must be scalar if both stages are plain, got token"):
        VCAConfig(lambda_form="token", stage1="plain", stage2="plain")
    given = arguments_of(SHAPES[1], "token", True)
    for place, size in ((5, (2, 1, 63, 1)), (5, (1, 1, 12, 1)), (6, (2, 1, 12, 1)), (6, (63,))):
        wrong = [*given[:place], torch.rand(size), *given[place + 1 :]]
        expected = f"lambda must be a scalar or have shape (2, 1, {12 if place == 5 else 63}, 1), got {size}"
        with pytest.raises(ValueError, match=re.escape(expected)):
            contrast_attention(*wrong)
    scalar = random_arguments(SHAPES[1])
    one = [*scalar[:5], *(x.reshape(1, 1, 1, 1) for x in scalar[5:7]), *scalar[7:]]
    assert torch.equal(contrast_attention(*one), contrast_attention(*scalar)), "one number of any shape is a scalar"
