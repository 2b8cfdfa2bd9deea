"""Time and memory of VCA and other attentions over the number of tokens.

There are three levels: `layer`, VCA with projections and the local branch, and `variants`, every attention of the
project with its own options, both compared with timm's Attention; and `core`, from a packed projection `(B, N, 3 C)`
to `(B, N, C)`, compared with SDPA. Width 384, 6 heads; float32 on a CPU,
bfloat16 autocast on a GPU. The cores on a GPU run as CUDA graphs: their time has no launches on the host.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import Budget, graphed, peak_bytes, saved_bytes, take_turns

WIDTH, HEADS = 384, 6


class Shape(NamedTuple):
    """Input shape: token grid, number of prefix tokens, contrast grid."""

    grid: tuple[int, int]
    prefix: int
    contrast_grid: tuple[int, int]

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]


# The shapes of DeiT and of DiT, then longer inputs.
SHAPES = [
    Shape((14, 14), 1, (7, 7)),
    Shape((16, 16), 0, (8, 8)),
    Shape((32, 32), 0, (8, 8)),
    Shape((64, 64), 0, (8, 8)),
    Shape((128, 128), 0, (8, 8)),
]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
MAX_QUADRATIC_TOKENS = 4096  # larger N x N matrices do not fit in memory


def benchmark_attention(device: torch.device, budget: Budget, longest: int, levels: list[str]) -> list[dict]:
    """Measure time and memory of every attention at every N up to `longest`; prints a Markdown table."""
    print("| level | N (n) | attention | forward ms | ratio | forward + backward ms | ratio | saved MiB | peak MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    jobs = [(shape, level) for shape in SHAPES if shape.tokens <= longest for level in levels]
    rows = []
    for index, (shape, level) in enumerate(jobs):
        rows += at_shape(shape, level, device, budget.share(1 / (len(jobs) - index)))
    print("\n" + "\n".join(relative_to_mhsa(rows)))
    return rows


def at_shape(shape: Shape, level: str, device: torch.device, budget: Budget) -> list[dict]:
    """Return the rows of all attentions of a level at one N."""
    torch._dynamo.reset()
    contestants = {"layer": layers, "variants": variants, "core": cores}[level](shape, device)
    batch = max(1, (65_536 if device.type == "cuda" else 2048) // shape.tokens)
    width = 3 * WIDTH if level == "core" else WIDTH
    x = torch.randn(batch, shape.tokens, width, device=device, requires_grad=True)
    if device.type == "cuda" and level == "core":
        x = x.detach().bfloat16().requires_grad_()
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" and level != "core" else nullcontext()

    def forward(function: Callable[[Tensor], Tensor]) -> Tensor:
        with autocast:
            return function(x)

    def inference(function: Callable[[Tensor], Tensor]) -> None:
        with torch.no_grad():
            forward(function)

    def training(function: Callable[[Tensor], Tensor]) -> None:
        x.grad = None  # adding to it would take as long as a kernel
        out = forward(function)
        out.backward(torch.ones_like(out))

    def callable_of(run: Callable[[Callable[[Tensor], Tensor]], None], function: Any) -> Callable[[], object]:
        return graphed(partial(run, function), device) if level == "core" else partial(run, function)

    usable: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, function in contestants.items():
        try:
            callable_of(training, function)()
            usable[name] = function
        except (RuntimeError, torch.OutOfMemoryError) as error:  # unsupported by the backend, or out of memory
            print(f"<!-- {name} at N = {shape.tokens}: {str(error).splitlines()[0]} -->")
    baseline = None if level == "core" else "timm Attention"
    if baseline is None:  # the fastest SDPA backend
        sdpa = [name for name in usable if name.startswith("SDPA")]
        timings = take_turns({name: callable_of(training, usable[name]) for name in sdpa}, None, Budget(3), device)
        baseline = min(timings, key=lambda name: timings[name].seconds)
    times = {}
    for kind, run, share in (("forward", inference, 0.3), ("forward + backward", training, 1.0)):
        runs = {name: callable_of(run, function) for name, function in usable.items()}
        times[kind] = take_turns(runs, baseline, budget.share(share), device, 1)
        runs.clear()  # the memory of CUDA graphs
    rows = []
    for name, function in usable.items():
        row: dict[str, Any] = {
            "level": level,
            "tokens": shape.tokens,
            "contrast_tokens": math.prod(shape.contrast_grid),
        }
        row |= {"name": name, "baseline": baseline, "batch": batch}
        module = function if isinstance(function, nn.Module) else None
        row["kept_bytes"] = saved_bytes(partial(forward, function), module)
        row["peak_bytes"] = peak_bytes(partial(training, function), device)
        for kind in times:
            row[kind] = times[kind][name]._asdict()
        rows.append(row)
        print(table_row(row), flush=True)
    return rows


def table_row(row: dict[str, Any]) -> str:
    cells = [row["level"], f"{row['tokens']} ({row['contrast_tokens']})", row["name"]]
    for kind in ("forward", "forward + backward"):
        time = row[kind]
        cells += [f"{1e3 * time['seconds']:.2f}", f"{time['ratio']:.2f} ({time['low']:.2f} to {time['high']:.2f})"]
    cells += [f"{row['kept_bytes'] / 2**20:.1f}", f"{row['peak_bytes'] / 2**20:.1f}"]
    return "| " + " | ".join(cells) + " |"


def relative_to_mhsa(rows: list[dict[str, Any]]) -> list[str]:
    """Format a table of layers as ratios to timm's `Attention`."""
    layers = [row for row in rows if row["level"] != "core"]
    base = {row["tokens"]: row for row in layers if row["name"] == "timm Attention"}
    table = [
        "| N (n) | | forward | forward + backward | saved activations | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in layers:
        others = row["level"] == "layer" and not row["name"].startswith("VCA")
        if others or row["name"] == "timm Attention" or row["tokens"] not in base:
            continue
        times = [row[kind] for kind in ("forward", "forward + backward")]
        cells = [f"{row['tokens']} ({row['contrast_tokens']})", row["name"]]
        cells += [f"{time['ratio']:.2f} ({time['low']:.2f} to {time['high']:.2f})" for time in times]
        cells += [f"{row[key] / base[row['tokens']][key]:.2f}" for key in ("kept_bytes", "peak_bytes")]
        table.append("| " + " | ".join(cells) + " |")
    return table


def built(name: str, shape: Shape, device: torch.device, **options: Any) -> nn.Module:
    """Build a layer of the project."""
    from vca.attention import ATTENTIONS, build_attention

    config = ATTENTIONS[name][0](**options)
    layer = build_attention(config, WIDTH, HEADS, shape.grid, shape.contrast_grid, num_prefix_tokens=shape.prefix)
    return layer.to(device)


def timm_attention(device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the baseline of whole layers."""
    from timm.layers import Attention

    return {"timm Attention": Attention(WIDTH, HEADS, qkv_bias=True).to(device)}


def layers(shape: Shape, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return layers by name: the baseline, VCA with each backend, Agent and Differential Attention."""
    modules = timm_attention(device) | {
        "VCA eager": built("vca", shape, device, backend="eager"),
        "VCA compiled": torch.compile(built("vca", shape, device, backend="eager")),
        "Agent Attention": built("agent", shape, device),
    }
    if device.type == "cuda":
        modules["VCA fused"] = built("vca", shape, device, backend="triton")
    if quadratic_fits(shape, device):
        modules["Differential Attention"] = built("differential", shape, device)
    return modules


def variants(shape: Shape, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return layers by name: the baseline, and every attention of the project that fits in memory."""
    from vca.attention import ATTENTIONS

    left_out = {"softmax"} if quadratic_fits(shape, device) else {"softmax", "differential", "differential_v2"}
    return timm_attention(device) | {name: built(name, shape, device) for name in ATTENTIONS if name not in left_out}


def quadratic_fits(shape: Shape, device: torch.device) -> bool:
    """Return whether attentions that are quadratic in N fit in memory."""
    return device.type == "cuda" or shape.tokens <= MAX_QUADRATIC_TOKENS


def cores(shape: Shape, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return functions from a packed projection `(B, N, 3 C)` to `(B, N, C)`: every SDPA backend, and VCA."""
    from vca import ContrastParameters, VCAConfig, visual_contrast_attention
    from vca.attention.kernels import Backend

    num_contrast, dim = shape.contrast_grid[0] * shape.contrast_grid[1], WIDTH // HEADS

    def parameter(*size: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(size, device=device))

    e_pos, e_neg = parameter(HEADS, num_contrast, dim), parameter(HEADS, num_contrast, dim)
    lambda1, lambda2, norm1, norm2 = parameter(), parameter(), parameter(dim), parameter(dim)

    def heads(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = packed.unflatten(-1, (3, HEADS, dim)).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def sdpa(backend: SDPBackend, packed: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*heads(packed)).transpose(1, 2).flatten(2)

    def vca(backend: str, packed: Tensor) -> Tensor:
        q, k, v = heads(packed)
        parameters = ContrastParameters(e_pos, e_neg, lambda1, lambda2, 0.2, norm1, norm2)
        config = VCAConfig(backend=Backend(backend))
        out = visual_contrast_attention(q, k, v, parameters, shape.grid, shape.contrast_grid, shape.prefix, config)
        return out.transpose(1, 2).flatten(2)

    functions: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, backend in BACKENDS.items():
        available = device.type == "cuda" or name in ("flash", "math")
        if available and (backend is not SDPBackend.MATH or shape.tokens <= MAX_QUADRATIC_TOKENS):
            functions[f"SDPA {name}"] = partial(sdpa, backend)
    functions["VCA eager"] = partial(vca, "eager")
    if device.type == "cuda":
        functions["VCA fused"] = partial(vca, "triton")
    return functions
