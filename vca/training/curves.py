"""Plot the records of `metrics.jsonl` as `curves.png`."""

import io
from pathlib import Path
from typing import Any

from vca.runtime.files import write_bytes

STYLES = ("-", "--", ":", "-.")  # of the raw weights, and of the EMAs


def plot_curves(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot loss, learning rate and, if recorded, accuracy and Frechet distance over the steps, one line per run.

    `runs` maps labels to records of `metrics.jsonl`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"loss": "training loss", "lr": "learning rate", "val/top1": "top-1 (%)", "frechet": "Frechet distance"}
    reported = {key for records in runs.values() for record in records for key in record}
    panels = {key: title for key, title in panels.items() if key in reported or key == "loss"}
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.4), layout="constrained", squeeze=False)
    for axis, (key, title) in zip(axes[0], panels.items(), strict=True):
        for index, (label, records) in enumerate(runs.items()):
            metric = key.partition("/")[2]
            names = sorted({name for record in records for name in record if name.startswith("ema")})
            emas = [name for name in names if metric and name.endswith(f"/{metric}")]
            for number, name in enumerate((key, *emas)):
                points = [(record["step"], record[name]) for record in records if name in record]
                if points:
                    average = name.split("/")[0].replace("ema", "EMA").replace("_", " ")
                    text = f"{label} ({average})" if number else label
                    style = STYLES[number % len(STYLES)]
                    marker = "o" if len(points) < 20 else None
                    axis.plot(*zip(*points, strict=True), style, color=f"C{index}", label=text, marker=marker, ms=3)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    if axes[0, -1].get_legend_handles_labels()[0]:
        axes[0, -1].legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    plt.close(figure)
    write_bytes(path, content.getbuffer())
