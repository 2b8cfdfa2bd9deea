"""Compile the Triton kernels for sm_80 and sm_90 without a GPU; print registers, spills and shared memory.

    python scripts/kernel_resources.py
    python scripts/kernel_resources.py --dims 64 --contrast 64 256 --dtypes float32
    python scripts/kernel_resources.py --json benchmarks/results/kernels.json

A thread has 255 registers; more values are spilled to memory. Compilation uses the ptxas that comes with Triton. A FILE
that is up to date (same sha256 of the kernel sources, same Triton release) is not rewritten.
"""

import argparse
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from vca.attention.kernels import launch
from vca.attention.kernels.operator import contrast_attention, contrast_attention_backward

TARGETS = (80, 90)  # A100, H100
LETTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # kernel, arguments, constants and options


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record kernel launches within the context instead of running them."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        launches.append((kernel, arguments, constants))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


# Variants with code paths or constants that the default arguments do not reach: name -> arguments of `launches_of`.
VARIANTS: dict[str, dict[str, Any]] = {
    "one head and contrast token": {"heads": 1, "num_contrast": 1},
    "joint softmax": {"joint": True},
    "plain Stage I": {"lambdas": (False, True)},
    "plain Stage II": {"lambdas": (True, False)},
    "plain Stage II, blocks of contrast tokens": {"lambdas": (True, False), "num_contrast": 256},
    "plain stages, one stream": {"lambdas": (False, False), "streams": 1},
    "given contrast tokens": {"given": True},
    "split tokens": {"splits": 3},
}


def launches_of(
    dim: int = 64,
    num_contrast: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    prefix: int = 0,
    heads: int = 6,
    streams: int = 2,
    joint: bool = False,
    lambdas: tuple[bool, bool] = (True, True),
    given: bool = False,
    splits: int = 1,
) -> list[Launch]:
    """Return the launches of forward and backward for 2 images on a 32 x 32 grid, with the options of an ablation."""
    launch.num_splits = lambda *_: splits
    side = math.isqrt(num_contrast)
    q, k, v = (x.transpose(1, 2) for x in torch.zeros(2, prefix + 1024, 3, heads, dim, dtype=dtype).unbind(2))
    e, weight = torch.zeros(heads, side * side, dim), torch.zeros(dim)
    tokens = torch.zeros(2, heads, side * side, dim, dtype=dtype) if given else None
    lambda1, lambda2 = (torch.zeros(()) if contrast else None for contrast in lambdas)
    arguments = (q, k, v, tokens, e, e if streams == 2 else None, lambda1, lambda2, weight, weight)
    options = (0.2, (32, 32), (side, side), prefix, 1e-5, (True, streams == 2), joint)
    with recording() as launches:
        out, *saved = contrast_attention(*arguments, *options)
        contrast_attention_backward(out, *saved, *arguments, *options)
    return launches


def name_of(one: Launch) -> str:
    """Return the name of the kernel of a launch."""
    return one[0].__name__.replace("_kernel", "")


def resources(one: Launch, capability: int) -> dict[str, Any]:
    """Compile one launch for a compute capability (times ten) and return its resources."""
    kernel, arguments, constants = one
    signature: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for place, (name, argument) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(argument, torch.Tensor):
            signature[name] = LETTERS[argument.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(argument, int) and argument == 1:  # a constant, as in Triton's launcher
            signature[name], values[(place,)] = "constexpr", 1
        elif isinstance(argument, int):
            signature[name] = "i32"
            if argument % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    for name in kernel.arg_names[len(arguments) :]:
        signature[name], values[(kernel.arg_names.index(name),)] = "constexpr", constants[name]
    source = ASTSource(kernel, signature, values, attributes)
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump output must contain REG and STACK, got: {usage}")
    return {
        "kernel": name_of(one),
        "capability": capability,
        "registers": int(match[1]),
        "spilled_bytes": int(match[2]),
        "shared_bytes": compiled.metadata.shared,
        "products": len(re.findall(r"= (?:tt\.dot|ttng\.warp_group_dot) ", compiled.asm["ttgir"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", nargs="+", type=int, default=[32, 64, 72, 128], metavar="D")
    parser.add_argument(
        "--contrast", nargs="+", type=int, default=[64], metavar="n", help="numbers of contrast tokens, square numbers"
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    sources = b"".join(path.read_bytes() for path in sorted(Path(launch.__file__).parent.glob("*.py")))
    about = {"what": "kernel resources", "triton": triton.__version__, "sources": hashlib.sha256(sources).hexdigest()}
    about |= {"dims": options.dims, "contrast_tokens": options.contrast, "dtypes": options.dtypes}
    if options.json and options.json.exists() and about.items() <= json.loads(options.json.read_text()).items():
        print(f"{options.json} is up to date")
        return
    print(f"triton {triton.__version__}")
    print(f"{'kernel':22}{'D':>5}{'n':>5}  {'type':10}{'target':>7}{'registers':>11}{'spilled':>9}{'shared':>9}")
    rows = []
    for dim, contrast, dtype in product(options.dims, options.contrast, options.dtypes):
        launches: dict[str, Launch] = {}
        for one in launches_of(dim, contrast, getattr(torch, dtype)):
            launches.setdefault(name_of(one), one)  # backward recomputes the contrast tokens
        for one, capability in product(launches.values(), TARGETS):
            row = {"dim": dim, "contrast_tokens": contrast, "dtype": dtype, **resources(one, capability)}
            rows.append(row)
            print(
                f"{row['kernel']:22}{dim:>5}{contrast:>5}  {dtype:10}{'sm_' + str(capability):>7}"
                f"{row['registers']:>11}{row['spilled_bytes']:>9}{row['shared_bytes']:>9}",
                flush=True,
            )
    variants = {}
    for variant, arguments in VARIANTS.items():
        compiled = [resources(one, TARGETS[-1])["kernel"] for one in launches_of(prefix=1, **arguments)]
        variants[variant] = sorted(set(compiled))
        print(f"{variant}: compiled {len(variants[variant])} kernels", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**about, "rows": rows, "variants": variants}, indent=1) + "\n")


if __name__ == "__main__":
    main()
