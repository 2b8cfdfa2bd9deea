"""Print the paper's Tables 1 to 4 with published and measured values, or a table or plot of any runs.

    python scripts/table.py outputs/                            Tables 1 to 4 as Markdown
    python scripts/table.py outputs/ --out tables               also tables/table1.md, tables/table1.csv, ...
    python scripts/table.py outputs/ --runs                     one row per config of all runs below a folder
    python scripts/table.py outputs/sweeps/... --runs           the same for a sweep, and its failed jobs
    python scripts/table.py outputs/A outputs/B --curves AB.png the curves of several runs in one plot
    python scripts/table.py outputs/A outputs/B --update        accept the records of runs as published results
    python scripts/table.py --update                            rewrite the tables of published results

Runs of `train_cls.py` and records of `eval_fid.py` are searched in all subfolders and matched to rows by their config.
Seeds give mean ± std. Different settings within a table and incomplete records are errors. Each run in no table is
listed with the reason. For one sweep, `--runs` exits with code 1 if a job failed. `--update` copies the records to
`docs/results/` and rewrites the tables of README.md, docs/results.md and docs/attentions.md from all records there.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from vca.cli import exit_on_user_error
from vca.config.composition import CONFIGS
from vca.report.results import Experiments, accept, stale_documents
from vca.report.sweep_table import sweep_table
from vca.report.tables import TABLES, as_csv, as_markdown, gather, lines_of
from vca.runtime.errors import ConfigError, check
from vca.runtime.files import write_text
from vca.runtime.rundir import RunDirectory, to_dict
from vca.sweep.summary import report
from vca.training.curves import plot_curves


def runs_below(folders: list[Path]) -> list[Path]:
    """Return the run directories in some folders and their subfolders."""
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"not a directory: {folder}")
    runs = sorted({path.parent for folder in folders for path in folder.rglob("config.json")})
    if not runs:
        raise ConfigError(f"no run in {', '.join(map(str, folders))}")
    return runs


def experiment_config(name: str, *overrides: str) -> Any:
    """Return the resolved config of an experiment, such as `table1/deit_tiny_vca`."""
    import train_cls
    import train_gen
    from vca.config import compose

    train_cls.register_configs()
    train_gen.register_configs()
    script = "train_gen" if name.startswith("table2/") or "_dit_" in name else "train_cls"
    return to_dict(compose(script, [f"experiment={name}", "data.root=-", *overrides]))


def gpu_hours(name: str) -> int:
    """Return the estimate in the header of an experiment's file."""
    header = (CONFIGS / "experiment" / f"{name}.yaml").read_text().splitlines()[1]
    found = re.search(r"About (\d+) GPU-hours", header)
    if found is None:
        raise ConfigError(f"configs/experiment/{name}.yaml: line 2 must contain 'About N GPU-hours', got '{header}'")
    return int(found[1])


EXPERIMENTS = Experiments(experiment_config, gpu_hours)


def update(folders: list[Path]) -> None:
    """Accept the records in some folders, and rewrite the tables of published results."""
    for path in accept(folders, ROOT, EXPERIMENTS):
        print(f"accepted: {path.relative_to(ROOT)}")
    for path, text in stale_documents(ROOT, EXPERIMENTS).items():
        write_text(path, text)
        print(f"written: {path.relative_to(ROOT)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="folders with runs and records, such as outputs/")
    parser.add_argument("--out", type=Path, help="output folder for table1.md, table1.csv, ...")
    parser.add_argument("--weights", choices=("raw", "ema"), help="of classifiers; default: EMA if the run has one")
    parser.add_argument("--runs", action="store_true", help="one row per config instead of the paper's tables")
    parser.add_argument("--curves", type=Path, metavar="FILE.png", help="plot the curves of all runs, no table")
    parser.add_argument("--update", action="store_true", help="accept records, rewrite the tables of README and docs")
    options = parser.parse_args()
    with exit_on_user_error():
        if options.update:
            update(options.folders)
            return
        check(bool(options.folders), "folders", "set, such as outputs/", None)
        if options.curves:
            runs = runs_below(options.folders)
            names = [run.name for run in runs]
            labels = names if len(set(names)) == len(names) else [str(run) for run in runs]
            records = {label: RunDirectory(run).records() for label, run in zip(labels, runs, strict=True)}
            plot_curves(records, options.curves)
            print(f"curves of {len(runs)} runs: {options.curves}")
            return
        if options.runs:
            check(options.out is None, "--out", "omitted with --runs", str(options.out))
            if [(folder / "jobs.json").exists() for folder in options.folders] == [True]:
                sys.exit(report(options.folders[0]))
            print(sweep_table(runs_below(options.folders)))
            return
        found = gather(options.folders, options.weights)
        tables = {name: lines_of(table, found.measured) for name, table in TABLES.items()}
        for name, lines in tables.items():
            text = as_markdown(TABLES[name], lines)
            print(text)
            if options.out is not None:
                options.out.mkdir(parents=True, exist_ok=True)
                write_text(options.out / f"{name}.md", text)
                write_text(options.out / f"{name}.csv", as_csv(lines))
        weights = {"raw": "raw", "ema": "EMA"}.get(options.weights, "EMA if the run has one, else raw")
        print(f"weights of the top-1 values: {weights}")
        for line in found.warnings:
            print(f"warning: {line}")
        for line in found.left_out:
            print(f"in no table: {line}")


if __name__ == "__main__":
    main()
