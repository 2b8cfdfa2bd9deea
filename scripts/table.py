"""The paper's tables from what was run: Tables 1 to 4, the paper's figure beside the measured one.

    python scripts/table.py outputs/                  on the screen, as Markdown
    python scripts/table.py outputs/ --out tables     and as tables/table1.md, tables/table1.csv, ...
    python scripts/table.py outputs/ --sweep          instead a row for each config there is, whatever it is
    python scripts/table.py outputs/sweeps/... --sweep      the same of one sweep, and which of its jobs failed

Runs of `train_cls.py` and records of `eval_fid.py` are found wherever they lie in the folders, and a row by what a run
was, whatever its name. Seeds make one row with a spread. Figures that were not measured alike, and records that lack a
field of their protocol, are refused; what belongs into no table, or is not finished, is named below them.

The table of `--sweep` is the one that a sweep ends with: rows are told apart by what differs between their configs.
Of one sweep the exit code is 1 if a job failed.
"""

import argparse
import sys
from pathlib import Path

from vca.cli import exit_on_user_error
from vca.sweep.summary import report

sys.path.insert(0, str(Path(__file__).parents[1]))

from vca.report.sweep_table import sweep_table
from vca.report.tables import TABLES, as_csv, as_markdown, gather, lines_of
from vca.runtime.errors import ConfigError, check
from vca.runtime.files import write_text


def runs_below(folders: list[Path]) -> list[Path]:
    """Run directories, wherever they lie in some folders."""
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder")
    found = sorted(path.parent for folder in folders for path in folder.rglob("config.json"))
    if not found:
        raise ConfigError(f"no run lies in {', '.join(map(str, folders))}")
    return found


def main() -> None:
    """Print the tables, and write them where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="where runs and records lie, such as outputs/")
    parser.add_argument("--out", type=Path, help="folder for table1.md, table1.csv and so on")
    parser.add_argument("--weights", choices=("raw", "ema"), default="raw", help="of classifiers (default raw)")
    parser.add_argument("--sweep", action="store_true", help="a row for each config instead of the paper's tables")
    options = parser.parse_args()
    with exit_on_user_error():
        if options.sweep:
            check(options.out is None, "--out", "left out with --sweep, which prints", options.out)
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
        for line in found.left_out:
            print(f"left out: {line}")


if __name__ == "__main__":
    main()
