"""Stage 1: values and gradients of the kernels against float64, in the cases of `tests/attention/test_kernels.py`.

Without a GPU, TRITON_INTERPRET=1 must be set before Triton is imported; the interpreter has no bfloat16 arithmetic.
"""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.runner import Context, Row
from benchmarks.timing import graphed

# DeiT-S at 224 px, DiT-S/2, DiT-XL/2, DeiT-S at 1024 px: (grid, contrast grid, prefix tokens, heads, head dim)
TRAINING = [
    ((14, 14), (7, 7), 1, 6, 64),
    ((16, 16), (8, 8), 0, 6, 64),
    ((16, 16), (8, 8), 0, 16, 72),
    ((64, 64), (7, 7), 1, 6, 64),
]
Case = tuple[Any, torch.dtype, dict[str, Any]]  # shape, dtype, options
CASES = "tests.attention.test_kernels"
LIMITS = {"float32": 3e-5, "float16": 5e-3, "bfloat16": 4e-2}  # errors relative to the largest value, as in the tests


def dtypes(context: Context) -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16, torch.float32] if context.device.type == "cuda" else [torch.float32]


def training_shapes(context: Context) -> Iterator[Row]:
    """Yield the errors at shapes of training."""
    shapes = [((4, 4), (2, 2), 1, 1, 16)] if context.tiny else TRAINING
    yield from errors(context, [(shape, dtype, {}) for dtype in dtypes(context) for shape in shapes])


def head_dims(context: Context) -> Iterator[Row]:
    """Yield the errors at every head dim's tiles, with ragged bins and one to 256 contrast tokens."""
    shapes = import_module(CASES).SHAPES[-1:] if context.tiny else import_module(CASES).SHAPES
    yield from errors(context, [(shape, dtype, {}) for dtype in dtypes(context) for shape in shapes])


def options(context: Context) -> Iterator[Row]:
    """Yield the errors with each ablation option."""
    cases = import_module(CASES)
    shape, chosen = (cases.SHAPES[-1], cases.OPTIONS[3:4]) if context.tiny else (cases.SHAPES[1], cases.OPTIONS)
    yield from errors(context, [(shape, dtype, option) for dtype in dtypes(context) for option in chosen])


def captured(context: Context) -> Iterator[Row]:
    """Yield whether forward and backward, captured in a CUDA graph and replayed on other data, have eager's bits."""
    cases = import_module(CASES)
    wrong = []
    for dtype, shape in product(dtypes(context), [cases.SHAPES[-1]] if context.tiny else TRAINING):
        _, given, keywords = cases.both(shape, dtype)
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        results: list[Tensor] = []

        def run(given: Any = given, tensors: Any = tensors, keywords: Any = keywords, results: Any = results) -> None:
            out = cases.contrast_attention(*given, backend="triton", **keywords)
            results[:] = [out, *torch.autograd.grad(out, tensors, out.detach())]

        replay = graphed(run, context.device)
        with torch.no_grad():
            for x in tensors:
                x.copy_(x.flip(0) if x.ndim else x / 2)
        replay()
        replayed = [x.clone() for x in results]
        run()
        equal = [torch.equal(one, other) for one, other in zip(replayed, results, strict=True)]
        name = f"CUDA graph, {cases.shape_id(shape)}, {str(dtype).removeprefix('torch.')}"
        if not all(equal):
            wrong.append(name)
        yield {"check": name, "passed": all(equal), "failed": f"{equal.count(False)} of {len(equal)} results differ"}
    if wrong:
        raise AssertionError(f"replays differ from eager: {'; '.join(wrong)}")


def errors(context: Context, cases: list[Case]) -> Iterator[Row]:
    """Yield a row for each case; raise if a case is not within its limit."""
    wrong = []
    for row in context.parallel(case_errors, cases):
        if not row["within"]:
            wrong.append(f"{row['shape']} {row['dtype']} {row['options']}: {row.get('failed') or row['worst']}")
        yield row
    if wrong:
        raise AssertionError(f"{len(wrong)} of {len(cases)} cases not within the limit: {'; '.join(wrong)}")


def case_errors(case: Case) -> Row:
    """Compare the kernels and plain PyTorch in one dtype with float64.

    The errors are those of output and gradients, relative to the largest value. A gradient of lambda is a small sum of
    large terms: its limit is added to 1.5 times eager's error.
    """
    shape, dtype, option = case
    cases = import_module(CASES)
    row: Row = {
        "shape": cases.shape_id(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "options": str(option or ""),
    }
    try:
        exact, given, keywords = cases.both(shape, dtype, option)
        compute = partial(cases.with_gradients, cases.contrast_attention)
        expected = compute(exact, **keywords)
        fused, eager = (compute(given, backend=name, **keywords) for name in ("triton", "eager"))
    except Exception as error:  # of the compiler or the driver; the other cases run
        return {**row, "within": False, "failed": f"{type(error).__name__}: {error}"[:500]}
    sizes, limit = {}, LIMITS[row["dtype"]]
    for name, value in expected.items():
        if value is not None:
            scale = value.abs().max().clamp_min(1e-6)
            found = [((x[name].double().cpu() - value).abs().max() / scale).item() for x in (fused, eager)]
            allowed = 1.5 * found[1] + limit if "lambda" in name else limit
            sizes[name] = (*found, found[0] <= allowed)  # false for NaN
    worst = max(sizes, key=lambda name: (not sizes[name][2], sizes[name][0]))
    row |= {"worst": worst, "largest_error": sizes[worst][0], "eager_error": sizes[worst][1]}
    return {**row, "within": all(good for *_, good in sizes.values())}
