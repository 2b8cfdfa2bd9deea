"""Markdown tables, plots and goals from the JSON lines of the stages. Rows of a CPU are not reported as GPU figures."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.attention import relative_to_mhsa
from benchmarks.gpu.runner import Row, read_rows
from benchmarks.gpu.search import TILES, fastest_of
from benchmarks.plot import plot_attention
from vca.attention.kernels.block_sizes import FILE, BlockSizes
from vca.report.sweep_table import mean_std, paired_cell
from vca.runtime.compute import Precision
from vca.runtime.devices import peak_flops
from vca.runtime.files import write_text
from vca.training.curves import plot_curves

ROOT = Path(__file__).parents[2]
GOALS = {197: 0.9, 256: 0.9, 1024: 2.5, 4096: 8.0, 16384: 30.0}  # N -> speed-up over the fastest SDPA backend
MEMORY_GOAL = 1.1  # of MHSA's
BOTH = "forward + backward"


def gpu_rows(folder: Path) -> list[Row]:
    """Return the rows of each measurement's last finished attempt, else of its last one, on a GPU."""
    rows = [row for file in sorted(folder.glob("stage*.jsonl")) for row in read_rows(file)]
    rows = [row for row in rows if not row["rehearsal"] and row["device"] != "cpu"]
    chosen: dict[tuple[str, str], tuple[bool, str]] = {}
    for row in rows:
        key = row["device"], row["measurement"]
        chosen[key] = max(chosen.get(key, (False, "")), ("finished" in row, row["started"]))
    return [row for row in rows if row["started"] == chosen[row["device"], row["measurement"]][1]]


def markdown(headings: list[str], lines: Iterable[list[Any]]) -> list[str]:
    """Format a table; an empty list without lines."""
    cells = [[format_cell(cell) for cell in line] for line in lines]
    head = [headings, ["---"] * len(headings)]
    return ["| " + " | ".join(line) + " |" for line in [*head, *cells]] if cells else []


def format_cell(cell: Any) -> str:
    """Format a number with three digits, or as many as it has before the point."""
    return (f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:.0f}") if isinstance(cell, float) else str(cell)


def goals(rows: list[Row]) -> list[tuple[str, str, str]]:
    """Return each goal, the measured value, and whether it is reached; if not, the gap and the slowest kernel."""
    found = []
    for tokens, goal in GOALS.items():
        here = [row for row in rows if row.get("level") == "core" and row["tokens"] == tokens]
        seconds = {row["name"]: row[BOTH]["seconds"] for row in here}
        sdpa = {name: value for name, value in seconds.items() if name.startswith("SDPA")}
        value, state = "not measured", "not measured"
        if sdpa and "VCA fused" in seconds:
            fastest = min(sdpa, key=sdpa.__getitem__)
            speedup = sdpa[fastest] / seconds["VCA fused"]
            value = f"{speedup:.2f} ({fastest} {1e6 * sdpa[fastest]:.0f} µs, VCA {1e6 * seconds['VCA fused']:.0f} µs)"
            state = "reached" if speedup >= goal else f"not reached: {speedup / goal:.2f} of it{slowest(rows, tokens)}"
        found.append((f"N = {tokens}: speed-up of the core >= {goal:g}", value, state))
    layers = {(row["tokens"], row["name"]): row for row in rows if row.get("level") == "layer"}
    ratios = [
        (layers[tokens, "VCA fused"][key] / layers[tokens, "timm Attention"][key], tokens, title)
        for tokens in GOALS
        for key, title in (("kept_bytes", "saved activations"), ("peak_bytes", "peak memory"))
        if (tokens, "VCA fused") in layers and (tokens, "timm Attention") in layers
    ]
    value, state = "not measured", "not measured"
    if ratios:
        worst, tokens, title = max(ratios)
        value = f"at most {worst:.2f} ({title} at N = {tokens})"
        state = "reached" if worst <= MEMORY_GOAL else f"not reached: {worst / MEMORY_GOAL:.2f} times it"
    return [*found, (f"training memory of a layer / MHSA's <= {MEMORY_GOAL}", value, state)]


def slowest(rows: list[Row], tokens: int) -> str:
    """Return the kernel with the largest share of the time at N, for a goal that is not reached."""
    seconds = {row["kernel"]: row["seconds"] for row in rows if "floor_share" in row and row["tokens"] == tokens}
    if not seconds:
        return ""
    kernel = max(seconds, key=seconds.__getitem__)
    return f"; {kernel} takes {100 * seconds[kernel] / sum(seconds.values()):.0f} % of the kernels' time"


def tables(rows: list[Row]) -> dict[str, list[str]]:
    """Return the tables of one device by title; a table without rows is empty."""
    by_dtype: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "within" in row:
            by_dtype.setdefault((row["measurement"], row["dtype"]), []).append(row)
    errors = [
        [*key, len(cases), sum(row["within"] for row in cases), *largest(cases)] for key, cases in by_dtype.items()
    ]
    kernels = [row for row in rows if "floor_share" in row]
    best: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "default_seconds" in row:
            best.setdefault((row["head_dim"], row["dtype"], row["tokens"], row["kernel"]), []).append(row)
    cores = [row for row in rows if row.get("level") == "core"]
    layers = relative_to_mhsa([row for row in rows if row.get("level") == "layer"])
    measured = {
        "Errors of the kernels": markdown(
            ["measurement", "dtype", "cases", "within the limit", "largest error", "plain PyTorch"], errors
        ),
        "Kernels": markdown(
            ["N", "kernel", "µs", "GB/s", "share of the floor"],
            ([r["tokens"], r["kernel"], 1e6 * r["seconds"], 1e-9 * r["bandwidth"], r["floor_share"]] for r in kernels),
        ),
        "Fastest block sizes": markdown(
            ["head dim", "dtype", "N", "kernel", *BlockSizes._fields, "µs", "µs, default"],
            (
                [*key, *(r[name] for name in BlockSizes._fields), 1e6 * r["seconds"], 1e6 * r["default_seconds"]]
                for key, r in ((key, fastest_of(candidates)) for key, candidates in best.items())
            ),
        ),
        "Cores": markdown(
            ["N", "core", "forward µs", f"{BOTH} µs", "ratio to the fastest SDPA"],
            (
                [r["tokens"], r["name"], 1e6 * r["forward"]["seconds"], 1e6 * r[BOTH]["seconds"], r[BOTH]["ratio"]]
                for r in cores
            ),
        ),
        "Parts of a layer, forward + backward": markdown(
            ["N", "part", "µs"], ([r["tokens"], r["part"], 1e6 * r["seconds"]] for r in rows if "part" in r)
        ),
        "Layers, ratios to timm's Attention": layers if len(layers) > 2 else [],
        "Models": markdown(
            ["model", "px", "precision", "attention", "training images/s", "MFU", "inference images/s", "peak GiB"],
            (model_line(row) for row in rows if "macs" in row),
        ),
        "Time on the host": markdown(
            ["call", "name", "µs"], ([r["host"], r["name"], 1e6 * r["seconds"]] for r in rows if "host" in r)
        ),
        "Overhead of the trainer": markdown(
            ["model", "trainer / bare loop"], ([r["loop"], r["ratio"]] for r in rows if "loop" in r)
        ),
        "Sampling": markdown(
            ["model", "attention", "precision", "steps", "images/s"],
            (
                [r[k] for k in ("model", "name", "precision", "steps")] + [r["images"] / r["seconds"]]
                for r in rows
                if "steps" in r
            ),
        ),
        "Training": training_table(rows),
        "Training losses, kernels and plain PyTorch": markdown(
            ["task", "seed", "largest relative difference"], curve_differences(rows)
        ),
        "Runs and tests": markdown(
            ["measurement", "result"], ([r["measurement"], result] for r in rows if (result := outcome(r)))
        ),
        "Failed measurements": markdown(
            ["measurement", "error"],
            ([r["measurement"], " ".join(r["raised"].split())[:200]] for r in rows if "raised" in r),
        ),
    }
    return measured


def largest(cases: list[Row]) -> list[Any]:
    """Return the largest error of the kernels, and that of plain PyTorch in the same case."""
    compared = [row for row in cases if "largest_error" in row]
    worst = max(compared, key=lambda row: row["largest_error"], default=None)
    return [worst["largest_error"], worst["eager_error"]] if worst is not None else ["", ""]


def model_line(row: Row) -> list[Any]:
    """Return the cells of a model; MFU counts 6 FLOPs per multiply-add, against the peak of the data sheet."""
    images, peak = row["batch"] / row["training"]["seconds"], peak_flops(row["device"], Precision(row["precision"]))
    mfu = f"{600 * row['macs'] * images / peak:.1f} %" if peak and row["macs"] else ""
    cells = [row["model"], row["size"], row["precision"], row["name"], f"{images:.0f}", mfu]
    return [*cells, f"{row['batch'] / row['inference']['seconds']:.0f}", row["peak_bytes"] / 2**30]


def training_runs(rows: list[Row]) -> dict[tuple[Any, ...], dict[int, list[Row]]]:
    """Return the rows of each run of stage 4 by task, attention, local branch and backend, and by seed."""
    runs: dict[tuple[Any, ...], dict[int, list[Row]]] = {}
    for row in rows:
        if "local_branch" in row and "loss" in row:
            kind = row["task"], row["attention"], row["local_branch"], row["backend"]
            runs.setdefault(kind, {}).setdefault(row["seed"], []).append(row)
    return runs


def training_table(rows: list[Row]) -> list[str]:
    """Return mean ± std over seeds, and that of the differences to softmax of the same seed and local branch."""
    runs = {kind: {seed: own[-1] for seed, own in seeds.items()} for kind, seeds in training_runs(rows).items()}
    lines = []
    for (task, attention, local, backend), ends in runs.items():
        key, decimals = ("val/top1", 2) if any("val/top1" in row for row in ends.values()) else ("loss", 4)
        values = {seed: row[key] for seed, row in ends.items() if key in row}
        base = {seed: row[key] for seed, row in runs.get((task, "softmax", local, "eager"), {}).items() if key in row}
        differences = [value - base[seed] for seed, value in values.items() if seed in base]
        end = next(iter(ends.values()))
        length = f"{end['images']} images, batch {end['batch_size']}, {end['epoch']:g} epochs"
        name = f"`{attention}`" + (", kernels" if backend == "triton" else "")
        cells = [task, length, name, "yes" if local else "no", "top-1 (%)" if key == "val/top1" else "loss"]
        paired = "-" if attention == "softmax" or not differences else paired_cell(differences, decimals)
        lines.append([*cells, mean_std(list(values.values()), decimals), paired, len(values)])
    headings = ["task", "training", "attention", "local branch", "metric", "mean ± std", "difference to softmax"]
    return markdown([*headings, "seeds"], lines)


def curve_differences(rows: list[Row]) -> Iterable[list[Any]]:
    """Yield, for each task and seed, the largest relative difference of the losses of VCA with and without kernels."""
    runs = training_runs(rows)
    for (task, attention, local, backend), seeds in runs.items():
        eager = runs.get((task, attention, local, "eager"), {})
        for seed in seeds.keys() & eager.keys() if backend == "triton" else ():
            pairs = zip(seeds[seed], eager[seed], strict=False)
            yield [task, seed, max(abs(one["loss"] / other["loss"] - 1) for one, other in pairs)]


def outcome(row: Row) -> str:
    """Return the result of a row of stage 5, of a check or test of the kernels, or of an unfinished search, else ''."""
    if "suite" in row:
        end = "" if row["complete"] else ", interrupted"
        return f"{row['passed']} passed, {row['failed'] + row['error']} failed, {row['skipped']} skipped{end}"
    if "signal" in row:
        return f"{row['script']}: {row['signal']} after step {row['stopped_after']}, resumed bit-exactly"
    if "ranks" in row:
        return f"{row['ranks']}: {'equal' if row['equal'] else 'different'}"
    if "check" in row:
        return f"{row['check']}: {'passed' if row['passed'] else row['failed']}"
    if "left_out" in row:
        return f"left out: {row['left_out']}"
    return f"{row['test']}: {row['failed']}" if "test" in row else ""


def update_block(document: Path, name: str, lines: list[str]) -> None:
    """Replace what is between `<!-- name -->` and `<!-- end -->` in a document."""
    pattern, text = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", re.DOTALL), document.read_text()
    changed = pattern.sub(lambda _: "\n".join([*lines, ""]), text)
    if changed != text:
        write_text(document, changed)


def report(folder: Path, docs: Path, log: Callable[[str], None] = print) -> None:
    """Print tables and goals; write `report.md` and plots to `folder`, and the blocks of two pages of `docs`."""
    rows = gpu_rows(folder)
    devices = list(dict.fromkeys(row["device"] for row in rows))
    lines = ["# Measurements on a GPU", ""] if devices else ["# Measurements on a GPU", "", "Not measured.", ""]
    block = []
    for device in devices or [""]:
        own = [row for row in rows if row["device"] == device]
        found = markdown(["goal", device or "any GPU", "state"], [list(goal) for goal in goals(own)])
        block += [*found, ""]
        versions = sorted({f"torch {row['torch']}, commit {row['commit']}, code {row['code']}" for row in own})
        lines += [f"## {device}", "", *versions, ""] if device else []
        lines += [*found, ""]
        for title, table in tables(own).items():
            lines += [f"### {title}", "", *table, ""] if table else []
        if (folder / TILES).exists():
            lines += [f"Install the block sizes: `cp {folder / TILES} {FILE.relative_to(ROOT)}`", ""]
        draw(folder, device, own)
    write_text(folder / "report.md", "\n".join(lines))
    update_block(docs / "performance.md", "results: gpu", block[:-1])
    update_block(docs / "results.md", "gpu: training", training_table(rows) or ["Not measured."])
    log("\n".join(lines))


def draw(folder: Path, device: str, rows: list[Row]) -> None:
    """Plot the layers over N, and the training curves of each data set."""
    slug = re.sub(r"\W+", "-", device).strip("-").lower()
    if any(row.get("level") == "layer" for row in rows):
        plot_attention([row for row in rows if "level" in row], device, folder / f"{slug}-layers.png")
    curves: dict[str, dict[str, list[Row]]] = {}
    for (task, attention, local, backend), seeds in training_runs(rows).items():
        for seed, own in seeds.items():
            label = f"{attention}{'' if local else ', no local branch'}, {backend}, seed {seed}"
            curves.setdefault(task, {})[label] = own
    for task, runs in curves.items():
        plot_curves(runs, folder / f"{slug}-{re.sub(r'[^a-z0-9]+', '-', task.lower())}.png")
