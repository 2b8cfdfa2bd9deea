"""Curves of a page: interactive with bokeh, and one static picture with matplotlib for print and without JavaScript."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vca.report.page_run import PageRun

MAX_POINTS = 500  # per curve
ALL_POINTS = 15_000  # per key over all runs
FEW = 25  # points of a curve, below which each has a marker
MANY_RUNS = 8  # runs, above which the tooltip names only the nearest curve

# Title -> pattern of the keys of `metrics.jsonl`.
PANELS = {
    "training loss": "loss",
    "learning rate": "lr",
    "top-1 accuracy (%)": r"(val|ema[^/]*)/top1",
    "Frechet distance": "frechet",
    "images per second": "images_per_second",
}


class Style(NamedTuple):
    """Number of the legend entry of a run, and its color."""

    entry: int
    color: str


@dataclass
class Curve:
    """Points of one key of one run; the weights are EMA if the key says so.

    Attributes:
        label: run and weights.
        style: of the run.
        steps, values: arrays of one length.
        ema: whether the curve is dashed.
    """

    label: str
    style: Style
    steps: np.ndarray
    values: np.ndarray
    ema: bool


def max_points(runs: int) -> int:
    """Return the largest number of points of a curve on a page of that many runs."""
    return max(20, min(MAX_POINTS, ALL_POINTS // max(1, runs)))


def panels_of(runs: Sequence[PageRun], styles: Sequence[Style]) -> dict[str, list[Curve]]:
    """Return the curves of all runs by the title of their panel, without empty panels."""
    limit = max_points(len(runs))
    panels: dict[str, list[Curve]] = {}
    for title, pattern in PANELS.items():
        for run, style in zip(runs, styles, strict=True):
            for key in dict.fromkeys(key for record in run.records for key in record if re.fullmatch(pattern, key)):
                points = [(record["step"], record[key]) for record in run.records if key in record]
                steps, values = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
                kept = thin(values, limit)
                weights = key.partition("/")[0] if key.startswith("ema") else ""
                label = f"{run.label} ({weights.replace('ema', 'EMA')})" if weights else run.label
                curve = Curve(
                    label, style, steps[kept].astype(np.int32), values[kept].astype(np.float32), weights != ""
                )
                panels.setdefault(title, []).append(curve)
    return panels


def thin(values: np.ndarray, limit: int) -> np.ndarray:
    """Return at most `limit` increasing indices: the first, the last, and the extremes of equal groups between."""
    if len(values) <= limit:
        return np.arange(len(values))
    groups = np.array_split(np.arange(1, len(values) - 1), (limit - 2) // 2)
    extremes = [group[picked] for group in groups for picked in (values[group].argmin(), values[group].argmax())]
    return np.unique([0, *extremes, len(values) - 1])


def interactive(panels: dict[str, list[Curve]]) -> tuple[str, dict[str, str]]:
    """Return the script that draws the panels, and the HTML element of each panel by title.

    All panels share the range of the steps and a vertical line at the pointer.
    """
    from bokeh.embed import components
    from bokeh.models import DataRange1d
    from bokeh.models.annotations import Span

    steps, line = DataRange1d(only_visible=True), Span(dimension="height", line_color="#999999", line_width=1)
    figures = {title: plot(title, curves, steps, line) for title, curves in panels.items()}
    return components(figures, wrap_script=False) if figures else ("", {})


def plot(title: str, curves: list[Curve], steps: Any, line: Any) -> Any:
    """Return the bokeh figure of a panel."""
    from bokeh.models import (
        BoxZoomTool,
        ColumnDataSource,
        CrosshairTool,
        DataRange1d,
        HoverTool,
        NumeralTickFormatter,
        PanTool,
        PrintfTickFormatter,
        ResetTool,
        WheelZoomTool,
    )
    from bokeh.plotting import figure

    mode: Any = "vline" if len({curve.style for curve in curves}) <= MANY_RUNS else "mouse"
    hover = HoverTool(
        tooltips=[("", "$name: @value{0.[0000]a} at step @step{0,0}")], mode=mode, renderers=[], visible=False
    )
    box = BoxZoomTool()
    axes: Any = figure(
        title=title,
        height=270,
        sizing_mode="stretch_width",
        x_range=steps,
        y_range=DataRange1d(only_visible=True),
        tools=[box, PanTool(), WheelZoomTool(), ResetTool(), hover, CrosshairTool(overlay=line, visible=False)],
        active_drag=box,
        active_scroll=None,
        toolbar_location="right",
        x_axis_label="step",
    )
    for curve in curves:
        source = ColumnDataSource({"step": curve.steps, "value": curve.values})
        options: Any = {"source": source, "line_color": curve.style.color, "name": curve.label}
        dash = "dashed" if curve.ema else "solid"
        drawn = [axes.line("step", "value", line_width=1.6, line_dash=dash, **options)]
        hover.renderers = [*hover.renderers, drawn[0]]
        if len(curve.steps) < FEW:
            fill = "white" if curve.ema else curve.style.color
            drawn.append(axes.scatter("step", "value", size=5, fill_color=fill, **options))
        for renderer in drawn:
            renderer.tags = [curve.style.entry]
    axes.toolbar.logo = None
    axes.xaxis.formatter = NumeralTickFormatter(format="0[.]0a")
    if title == "learning rate":
        axes.yaxis.formatter = PrintfTickFormatter(format="%.1e")
    axes.title.text_font_size, axes.title.text_font_style = "14px", "normal"
    for axis in axes.axis:
        axis.axis_label_text_font_style, axis.axis_line_color = "normal", "#888888"
        axis.major_tick_line_color, axis.minor_tick_line_color = "#888888", None
        axis.major_label_text_font_size = axis.axis_label_text_font_size = "12px"
    axes.grid.grid_line_color, axes.outline_line_color = "#eeeeee", None
    return axes


def static(panels: dict[str, list[Curve]]) -> bytes:
    """Return the panels as a PNG with two columns, for a page of paper."""
    from matplotlib.figure import Figure

    rows = -(-len(panels) // 2)
    picture = Figure(figsize=(7.2, 2.3 * rows), layout="constrained")
    axes = picture.subplots(rows, 2, squeeze=False).flat
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        for curve in curves:
            marker = "." if len(curve.steps) < FEW else None
            dash = "--" if curve.ema else "-"
            axis.plot(curve.steps, curve.values, dash, color=curve.style.color, lw=1, marker=marker, ms=4)
        axis.set_title(title, fontsize=8, loc="left")
        axis.set_xlabel("step", fontsize=7)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes):
        axis.set_axis_off()
    content = io.BytesIO()
    picture.savefig(content, format="png", dpi=140)
    return content.getvalue()


def bokeh_script() -> str:
    """Return bokeh's JavaScript: the part that draws plots, without its tables, widgets and WebGL."""
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)
