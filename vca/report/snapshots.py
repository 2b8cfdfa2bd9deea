"""A metric over the snapshots of a run: a table with a row per step and a column per EMA decay, and its curves."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vca.runtime.errors import ConfigError
from vca.runtime.files import write_bytes, write_text
from vca.runtime.loggers import Table


@dataclass(frozen=True)
class SnapshotFigure:
    """The metric of one snapshot.

    Attributes:
        step, ema_decay: step and EMA decay of the weights.
        value: value of the metric.
        weights_sha256: sha256 of the weights.
        details: other metrics, or the file name of the record.
    """

    step: int
    ema_decay: float
    value: float
    weights_sha256: str
    details: dict[str, Any]


def decays_of(figures: Sequence[SnapshotFigure]) -> list[float]:
    """Return the decays, largest first."""
    return sorted({figure.ema_decay for figure in figures}, reverse=True)


def snapshot_table(metric: str, figures: Sequence[SnapshotFigure]) -> str:
    """Return Markdown with a row per step and a column per decay; `-` for a snapshot without a figure."""
    values = {(figure.step, figure.ema_decay): figure.value for figure in figures}
    decays = decays_of(figures)
    steps = sorted({figure.step for figure in figures})
    rows = [[step, *(values.get((step, decay), "-") for decay in decays)] for step in steps]
    return f"{metric}\n\n{Table(['step', *(f'EMA {decay}' for decay in decays)], rows).markdown()}"


def plot_snapshots(metric: str, figures: Sequence[SnapshotFigure], path: Path) -> None:
    """Plot the metric over the steps as a PNG, one line per decay."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
    for decay in decays_of(figures):
        points = sorted((one.step, one.value) for one in figures if one.ema_decay == decay)
        axis.plot(*zip(*points, strict=True), marker="o", ms=3, label=f"EMA {decay}")
    axis.set(xlabel="step", ylabel=metric)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    plt.close(figure)
    write_bytes(path, content.getbuffer())


def write_figures(path: Path, metric: str, settings: dict[str, Any], figures: Sequence[SnapshotFigure]) -> None:
    """Write metric, settings and figures as JSON."""
    content = {"metric": metric, "settings": settings, "figures": [asdict(figure) for figure in figures]}
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_figures(path: Path) -> list[SnapshotFigure]:
    """Read the figures of an earlier command; none if the file does not exist.

    Raises:
        ConfigError: if it is corrupt.
    """
    if not path.exists():
        return []
    try:
        return [SnapshotFigure(**figure) for figure in json.loads(path.read_text())["figures"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is corrupt ({error}); remove it to evaluate again") from error


def report_snapshots(path: Path, metric: str, settings: dict[str, Any], figures: Sequence[SnapshotFigure]) -> None:
    """Print the table, and write the figures to a JSON file and their curves to a PNG beside it."""
    write_figures(path, metric, settings, figures)
    plot_snapshots(metric, figures, path.with_suffix(".png"))
    print(f"{snapshot_table(metric, figures)}\n\nfigures: {path}, {path.with_suffix('.png').name}", flush=True)
