"""A page for runs and sweeps: one HTML file with curves, results, samples, cost, provenance and failures.

The page loads nothing from a network: bokeh's JavaScript, the style sheet and the pictures are part of it. The letters
`http` are escaped, so that a search can verify it, see `without_urls`.
"""

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vca.evaluation.complexity import Complexity
from vca.report.page_pictures import Picture, embed, map_sources, sample_sources
from vca.report.page_plots import Style, bokeh_script, interactive, max_points, panels_of, static
from vca.report.page_results import (
    Evaluations,
    PageTable,
    by_value,
    config_groups,
    differences,
    paper_comparison,
    read_evaluations,
    results_by_config,
    results_by_run,
)
from vca.report.page_run import PageRun, cost_of, devices_of, labels_of, read_page_run
from vca.runtime.digest import file_sha256
from vca.runtime.provenance import provenance
from vca.runtime.rundir import config_lines

COLORS = ["#0b62a8", "#d1495b", "#2a9d63", "#e08e00", "#7b4fa3", "#159aa8", "#8a5a35", "#d667b0", "#6b7280", "#93a11f"]
FEW_RUNS = 4  # up to which the config difference has a column for each run


@dataclass
class Sweep:
    """A sweep folder: its command and commit, the number of its jobs, and a line for each failed job."""

    path: Path
    command: str
    commit: str | None
    jobs: int
    failed: list[str]


@dataclass
class Page:
    """Everything that the template shows.

    Attributes:
        legend: color and label of each group of runs with one color.
        differences: config key -> the value in each run.
        grouped: config key -> value -> the runs with it.
        failures: a title and its lines; empty if there is no failure.
    """

    title: str
    runs: list[PageRun]
    sweeps: list[Sweep]
    styles: dict[str, Style]
    legend: list[tuple[Style, str]]
    differences: dict[str, list[str]]
    grouped: dict[str, dict[str, list[PageRun]]]
    results: PageTable
    by_config: list[PageTable]
    paper: list[PageTable]
    paper_notes: list[str]
    evaluations: list[Evaluations]
    samples: list[Picture]
    maps: list[Picture]
    cost: PageTable
    failures: list[tuple[str, list[str]]] = field(default_factory=list)


def build_page(
    runs: Sequence[Path],
    sweeps: Sequence[Sweep] = (),
    folders: Sequence[Path] = (),
    count: Callable[[dict[str, Any]], Complexity] | None = None,
) -> Page:
    """Read everything that a page shows.

    Args:
        runs: run directories.
        sweeps: the sweeps that they belong to.
        folders: where sample folders and evaluation records are searched, besides the runs.
        count: counts parameters and MACs of the network of a config.
    """
    read = [read_page_run(path, label) for path, label in zip(runs, labels_of(list(runs)), strict=True)]
    roots = [*folders, *runs]
    records = without_copies(files_below(roots, "evaluation-*.json"), runs)
    grids = [file for file in files_below(roots, "grid.png") if (file.parent / "manifest.json").exists()]
    problems: list[str] = []
    styles, legend = styles_of(read)
    differing = differences(read)
    outside = {file.parent for file in records if not any(file.is_relative_to(run) for run in runs)}
    tables, notes = paper_comparison([*runs, *sorted(outside)])
    page = Page(
        title=title_of(read, sweeps),
        runs=read,
        sweeps=list(sweeps),
        styles=styles,
        legend=legend,
        differences=differing,
        grouped={key: by_value(values, read) for key, values in differing.items()},
        results=results_by_run(read),
        by_config=results_by_config(read),
        paper=tables,
        paper_notes=notes,
        evaluations=read_evaluations(records, problems),
        samples=embed(sample_sources(read, grids, records), problems),
        maps=embed(map_sources(read), problems),
        cost=cost_table(read, count, problems),
    )
    page.failures = [(f"sweep {sweep.path.name}", sweep.failed) for sweep in sweeps if sweep.failed]
    page.failures += [(run.label, run.failures) for run in read if run.failures]
    page.failures += [("records and pictures", problems)] if problems else []
    return page


def files_below(folders: Sequence[Path], pattern: str) -> list[Path]:
    """Return the files of some folders and their subfolders by a pattern of names, each once."""
    found = {file.resolve(): file for folder in folders for file in sorted(folder.rglob(pattern))}
    return list(found.values())


def without_copies(files: Sequence[Path], runs: Sequence[Path]) -> list[Path]:
    """Leave out the files with the sha256 of another one, such as the records in an export; those of a run are kept."""
    distinct: dict[str, Path] = {}
    for file in sorted(files, key=lambda file: file.parent not in runs):
        distinct.setdefault(file_sha256(file) if os.access(file, os.R_OK) else str(file), file)
    return list(distinct.values())


def title_of(runs: Sequence[PageRun], sweeps: Sequence[Sweep]) -> str:
    """Return the heading of a page."""
    if sweeps:
        return f"Sweep {', '.join(sweep.path.resolve().name for sweep in sweeps)}"
    return f"{len(runs)} runs" if len(runs) > FEW_RUNS else ", ".join(run.label for run in runs)


def styles_of(runs: Sequence[PageRun]) -> tuple[dict[str, Style], list[tuple[Style, str]]]:
    """Return the style of each run by label, and the legend.

    Up to ten runs have a color each. Of more runs, the seeds of a config have the same color.
    """
    numbers = list(range(len(runs))) if len(runs) <= len(COLORS) else config_groups(runs)
    members: dict[int, list[str]] = {}
    for number, run in zip(numbers, runs, strict=True):
        members.setdefault(number, []).append(run.label)
    styles = {number: Style(number, color) for number, color in zip(members, colors(len(members)), strict=True)}
    legend = []
    for number, labels in members.items():
        more = f" and {len(labels) - 1} more with this config" if len(labels) > 1 else ""
        legend.append((styles[number], f"{labels[0]}{more}"))
    return {run.label: styles[number] for number, run in zip(numbers, runs, strict=True)}, legend


def colors(count: int) -> list[str]:
    """Return distinct colors that are dark enough on white."""
    if count <= len(COLORS):
        return COLORS[:count]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["turbo"](number / (count - 1))) for number in range(count)]


def cost_table(runs: Sequence[PageRun], count: Callable[[Any], Complexity] | None, problems: list[str]) -> PageTable:
    """Return parameters and MACs, counted from the config, and the recorded cost of each run."""
    counted: dict[str, Complexity | None] = {}
    rows = []
    for run in runs:
        key = json.dumps([run.get("model"), run.get("attention")])
        if count is not None and run.config and key not in counted:
            try:
                counted[key] = count(run.config)
            except (AttributeError, KeyError, TypeError, ValueError, NotImplementedError, RuntimeError) as error:
                counted[key] = None
                problems.append(f"{run.label}: parameters cannot be counted ({error})")
        one = counted.get(key)
        size = {"parameters": f"{one.params / 1e6:.3f} M", "MACs": f"{one.macs / 1e9:.3f} G"} if one else {}
        rows.append({"parameters": "", "MACs": "", **size, **cost_of(run)})
    head = [name for name in rows[0] if any(row[name] for row in rows)]
    cells = [[run.label, *(row[name] for name in head)] for run, row in zip(runs, rows, strict=True)]
    return PageTable(["run", *head], cells)


def render(page: Page) -> str:
    """Return the HTML of a page."""
    import base64

    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("vca.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    panels = panels_of(page.runs, [page.styles[run.label] for run in page.runs])
    script, plots = interactive(panels)
    html = environment.get_template("page.html.j2").render(
        page=page,
        few_runs=FEW_RUNS,
        plots=plots,
        static=base64.b64encode(static(panels)).decode() if panels else "",
        bokeh=bokeh_script() if panels else "",
        script=script,
        max_points=max_points(len(page.runs)),
        longest=max((len(run.records) for run in page.runs), default=0),
        devices_of=devices_of,
        config=config_lines(page.runs[0].config) if page.runs else [],
        written=time.strftime("%Y-%m-%d %H:%M %z"),
        commit=str(provenance()[0] or "unknown")[:12],
    )
    return without_urls(html)


def without_urls(html: str) -> str:
    """Write the letters `http` differently, so that a search shows that the page has no link to a network.

    In scripts `\\u0068` is the letter h, in strings as well as in names. Elsewhere the entity `&#104;` is.
    """
    parts = re.split(r"(?s)(<script\b.*?</script>)", html)
    parts[::2] = [part.replace("http", "&#104;ttp") for part in parts[::2]]
    parts[1::2] = [part.replace("http", "\\u0068ttp") for part in parts[1::2]]
    return "".join(parts)
