"""Tables of a page: config differences, results, the paper's figures beside ours, and evaluation records."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vca.attention import variant_name
from vca.evaluation.record import read_record
from vca.report.page_run import PageRun
from vca.report.record_summary import RecordSummary, summarize_record
from vca.report.sweep_table import COLUMNS, FinishedRun, final_value, flatten_config, read_finished_run, result_tables
from vca.report.tables import TABLES, Cell, Measurement, gather, lines_of
from vca.runtime.errors import ConfigError
from vca.runtime.rundir import config_lines, diff_configs

NUMBER = re.compile(r"[\d,.]+( ± [\d.]+| %| M| G| GiB)?$")
FREE_KEYS = ("name", "out_dir")  # where a run is stored
# Keys that the config computes from keys of `data` and `autoencoder`, and identities of the data.
DERIVED_GROUPS = ("data_files", "inputs")
DERIVED_KEYS = tuple(f"model.{key}" for key in ("img_size", "in_chans", "num_classes", "input_size", "in_channels"))


class PageTable(NamedTuple):
    """Cells as text; the first cell of a row is its name."""

    head: list[str]
    rows: list[list[str]]
    title: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Whether each column has only numbers, which are aligned to the right."""
        columns = [[row[index] for row in self.rows if row[index]] for index in range(len(self.head))]
        return [bool(cells) and all(map(NUMBER.match, cells)) for cells in columns]


def differences(runs: Sequence[PageRun]) -> dict[str, list[str]]:
    """Return the value in each run by config key, for the keys that differ.

    Keys that follow from another difference are left out. Attention variants are compared by name. Between runs of both
    trainers, only keys that every config has are compared.
    """
    configs = [run.config for run in runs if run.config]
    lines = [line for config in configs[1:] for line in diff_configs(configs[0], config, FREE_KEYS)]
    keys = sorted({line.partition(": ")[0] for line in lines})
    chosen = [key for key in keys if key not in DERIVED_KEYS and key.split(".")[0] not in DERIVED_GROUPS]
    chosen = chosen or keys
    if len({"objective" in config for config in configs}) > 1:
        shared = set.intersection(*({key for key, _ in config_lines(config)} for config in configs))
        chosen = [key for key in chosen if key in shared]
    if len({run.get("attention.name") for run in runs if run.config}) > 1:
        chosen = ["attention", *(key for key in chosen if not key.startswith("attention"))]
    return {key: [format_value(key, run.get(key)) if run.config else "unknown" for run in runs] for key in chosen}


def format_value(key: str, value: Any) -> str:
    """Format a config value; an attention by the name of its variant."""
    if key == "attention" and isinstance(value, dict):
        try:
            return variant_name(value)
        except (KeyError, TypeError):
            return str(value.get("name"))
    return value if isinstance(value, str) else json.dumps(value)


def by_value(values: Sequence[str], runs: Sequence[PageRun]) -> dict[str, list[PageRun]]:
    """Return the runs with each value."""
    groups: dict[str, list[PageRun]] = {}
    for value, run in zip(values, runs, strict=True):
        groups.setdefault(value, []).append(run)
    return groups


def config_groups(runs: Sequence[PageRun]) -> list[int]:
    """Return the number of each run's config, seeds and places apart; runs without a config are groups of one."""
    keys = [json.dumps(safe_flatten(run), sort_keys=True) if run.config else str(run.path) for run in runs]
    order = list(dict.fromkeys(keys))
    return [order.index(key) for key in keys]


def safe_flatten(run: PageRun) -> Any:
    """Return the leaves of a config without the seed; the config as it is if it is of another version."""
    try:
        return flatten_config(run.config)
    except (AttributeError, KeyError, TypeError):
        return run.config


def results_by_run(runs: Sequence[PageRun]) -> PageTable:
    """Return status and last values of each run, beside the paper's figure for its config."""
    columns = {name: rule for name, rule in COLUMNS.items() if any(run.values(rule[0]) for run in runs)}
    published = [paper_figure(run) for run in runs]
    head = ["run", *columns, *(["paper"] if any(published) else []), "status"]
    rows = []
    for run, figure in zip(runs, published, strict=True):
        values = [(final_value(run.records, key), decimals) for key, decimals in columns.values()]
        cells = ["" if value is None else f"{value:.{decimals}f}" for value, decimals in values]
        rows.append([run.label, *cells, *([figure] if any(published) else []), run.status])
    return PageTable(head, rows)


def results_by_config(runs: Sequence[PageRun]) -> list[PageTable]:
    """Return mean ± std over the seeds of each config, of the finished runs; nothing if no config has two seeds."""
    finished = [run for one in runs if isinstance(run := read_finished_run(one.path), FinishedRun)]
    tables = []
    for title, (head, *rows), _ in result_tables(finished):
        cells = [[cell.replace("+-", "±") for cell in row[:-1]] for row in rows]
        tables.append(PageTable(["config", *head[1:-1]], cells, title))
    repeated = any(row[-1] != "1" for table in tables for row in table.rows)
    return tables if repeated else []


def paper_figure(run: PageRun) -> str:
    """Return the paper's figures for the config of a run, such as `75.6 (Table 1)`; empty if no table has it."""
    if run.get("data.num_classes") != 1000 or run.get("data.name") not in ("imagefolder", "latents"):
        return ""
    names = (run.get("model.name"), run.get("attention"), run.get("objective.name"), run.get("data.img_size"))
    figures: dict[str, list[str]] = {}
    for table in TABLES.values():
        for cell in (cell for _, cells in table.rows for cell in cells):
            if cell._replace(paper=None) == Cell(*names) and cell.paper is not None:
                figures.setdefault(f"{cell.paper:.1f}", []).append(table.title.partition(":")[0])
    return ", ".join(f"{figure} ({', '.join(tables)})" for figure, tables in figures.items())


def paper_comparison(folders: Iterable[Path]) -> tuple[list[PageTable], list[str]]:
    """Return the rows of the paper's tables that some runs and records measure, and why others are in none.

    A folder that cannot be read is a line; it does not affect the others.
    """
    measured: list[Measurement] = []
    notes: list[str] = []
    for folder in folders:
        try:
            found = gather([folder])
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            notes.append(f"{folder}: {error}" if isinstance(error, ConfigError) else f"{folder}: not readable")
            continue
        measured += found.measured
        without_record = tuple(f"{run}: no FID" for run in found.generators)  # records may be in other folders
        notes += [line for line in found.left_out if not line.startswith(without_record)]
    tables = []
    for table in TABLES.values():
        try:
            lines = lines_of(table, measured)
        except ConfigError as error:
            notes.append(f"{table.title}: {error}")
            continue
        rows = [
            [line["row"], column, line[f"{column} paper"], with_std(line, column), line[f"{column} seeds"]]
            for line in lines
            for column in table.columns
            if line[f"{column} measured"]
        ]
        if rows:
            tables.append(PageTable(["row", "column", "paper", "ours", "seeds"], rows, table.title))
    return tables, notes


def with_std(line: dict[str, str], column: str) -> str:
    """Format the measured value of a column as mean ± std."""
    mean, std = line[f"{column} measured"], line[f"{column} std"]
    return f"{mean} ± {std}" if std else mean


class Evaluations(NamedTuple):
    """Records with the same metrics: a row each, the settings that they share, and notes."""

    table: PageTable
    shared: dict[str, str]
    notes: list[str]


def read_evaluations(files: Iterable[Path], failures: list[str]) -> list[Evaluations]:
    """Read evaluation records, grouped by their metrics; a damaged or edited one is a line in `failures`."""
    groups: dict[tuple[str, ...], list[RecordSummary]] = {}
    for file in files:
        try:
            one = summarize_record(file, read_record(file))
            groups.setdefault(tuple(one.metrics), []).append(one)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            failures.append(str(error) if isinstance(error, ConfigError) else f"{file} cannot be read ({error!r})")
    return [beside(ones) for ones in groups.values()]


def beside(ones: list[RecordSummary]) -> Evaluations:
    """Return the table of some records: metrics, and the settings that differ."""
    labels = list(dict.fromkeys(label for one in ones for label in one.protocol))
    shared = {label: ones[0].protocol.get(label) for label in labels}
    differing = [label for label in labels if any(one.protocol.get(label) != shared[label] for one in ones)]
    rows = [
        [f"{one.file.parent.name}/{one.file.name}", *one.metrics.values()]
        + [one.protocol.get(label, "") for label in differing]
        for one in ones
    ]
    common = {label: str(value) for label, value in shared.items() if label not in differing}
    notes = list(dict.fromkeys(note for one in ones for note in one.notes))
    return Evaluations(PageTable(["record", *ones[0].metrics, *differing], rows), common, notes)
