"""Log-log plot of time and memory over the number of tokens, with the slopes of O(N) and O(N^2)."""

from pathlib import Path
from typing import Any

STYLES = {
    "timm Attention": ("MHSA (timm)", "tab:gray", "-o"),
    "VCA eager": ("VCA, plain PyTorch", "tab:blue", "-o"),
    "VCA compiled": ("VCA, torch.compile", "tab:cyan", "--s"),
    "VCA fused": ("VCA, fused kernels", "tab:red", "-o"),
    "Agent Attention": ("Agent Attention", "tab:green", ":^"),
    "Differential Attention": ("Differential Attention", "tab:orange", ":v"),
}


def plot_attention(rows: list[dict[str, Any]], device: str, file: Path) -> None:
    """Plot time and saved activations per image of the layers measured by `benchmark_attention`."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["level"] == "layer"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, title, value in (
        (axes[0], "forward + backward, ms per image", lambda row: 1e3 * row["forward + backward"]["seconds"]),
        (axes[1], "saved activations, MiB per image", lambda row: row["kept_bytes"] / 2**20),
    ):
        for name, (label, color, style) in STYLES.items():
            line = [(row["tokens"], value(row) / row["batch"]) for row in rows if row["name"] == name]
            if line:
                axis.plot(*zip(*line, strict=True), style, label=label, color=color, markersize=4, linewidth=1.2)
        tokens = sorted({row["tokens"] for row in rows})
        start = min(value(row) / row["batch"] for row in rows if row["tokens"] == tokens[0])
        for power, label in ((1, "O(N)"), (2, "O(N²)")):
            slope = [0.6 * start * (n / tokens[0]) ** power for n in tokens]
            axis.plot(tokens, slope, color="black", linewidth=0.6, linestyle=(0, (1, 3)))
            axis.annotate(label, (tokens[-1], slope[-1]), fontsize=8, va="top", ha="right")
        axis.set(xscale="log", yscale="log", xlabel="tokens N", title=title)
        axis.set_xticks(tokens, [str(n) for n in tokens], fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"one attention layer, width 384, 6 heads, {device}", fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
