"""Documents: their length, links, commands, snippets, and the figures that they repeat from the configs."""

import json
import math
import re
import shlex
import statistics
import subprocess
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from benchmarks.attention import SHAPES, relative_to_mhsa
from benchmarks.gpu.runner import read_rows
from scripts.complexity import complexity_of
from tests.processes import ROOT, run_script
from vca.config import compose
from vca.config.composition import CONFIGS
from vca.sweep.plan import search_path

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *ROOT.glob("docs/*.md")]
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
# Root scripts, and those of scripts/ that Hydra composes.
SCRIPTS = {f"{path.stem}.py" for path in CONFIGS.glob("*.yaml")}
GENERATED = "keys/"  # docs/keys/, which a command writes
EXAMPLES = {
    "experiment=flowers",
    "ablation=my_grids",
    "attention=sharp",
}  # files that a document asks the reader to write


def commands_of(path) -> list[tuple[str, list[str]]]:
    """The root scripts' commands in the code blocks of a document: script and arguments, without placeholders."""
    lines = re.sub(r"\\\n\s*", " ", path.read_text()).splitlines()
    variables, commands = {}, []
    for line in (line.strip() for line in lines if line.startswith("    ")):
        if assignment := re.fullmatch(r'(\w+)="(.*)"', line):
            variables[assignment[1]] = assignment[2]
        if line.startswith(("python ", "torchrun ")):
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            script = next((word for word in words if word.endswith(".py")), "-m")
            if script.removeprefix("scripts/") in SCRIPTS:
                name = "train_cls" if "--cluster" in words else Path(script).stem
                commands.append((name, words[words.index(script) + 1 :]))
    return commands


COMMANDS = [(name, *command) for path, name in zip(DOCUMENTS, IDS, strict=True) for command in commands_of(path)]


@pytest.mark.parametrize(("document", "script", "arguments"), COMMANDS, ids=lambda value: str(value)[:60])
def test_documents_command_composes(document, script, arguments):
    """The first job of a sweep, for `-m`."""
    overrides = [word for word in arguments if "=" in word]
    if EXAMPLES & set(overrides):
        pytest.skip("of a file that the reader writes")
    if any("glob(" in word for word in overrides):
        pytest.skip("a glob")
    if "-m" in arguments:
        ablation = next((word.partition("=")[2] for word in overrides if word.startswith("ablation=")), None)
        assert ablation is None or (CONFIGS / "ablation" / f"{ablation}.yaml").exists()
        parsed = OverridesParser.create().parse_overrides(overrides)
        overrides = list(BasicSweeper.split_arguments(parsed, None)[0][0])
    compose(script, overrides)


def test_documents_experiment_example_composes(tmp_path):
    """The complete experiment file of docs/configuration.md, behind `--config-dir`, with two attentions."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    example = next(block for block in re.findall(r"(?s)```yaml\n(.*?)```", text) if "flowers" in block)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "flowers.yaml").write_text(example)
    for attention in ("vca", "softmax"):
        config = compose("train_cls", ["experiment=flowers", f"attention={attention}", *search_path(tmp_path)])
        assert config.name == f"flowers-deit_small-{attention}-seed0"
        assert config.data.num_classes == 102
        assert config.optim.lr == pytest.approx(2e-4)


def test_documents_reproduction_table():
    """Every figure and estimate in README's table is the one in the experiment's file."""
    rows = re.findall(
        r"(?m)^\| \d \| .*\| `(table\d/\w+)` \| ([\d.]+)[ %]* \| [^|]+ \| (\d+) \|", (ROOT / "README.md").read_text()
    )
    assert len(rows) == 20
    for config, figure, hours in rows:
        header = (CONFIGS / "experiment" / f"{config}.yaml").read_text().splitlines()[1]
        assert f": {figure}" in header, config
        assert f" {hours} GPU-hours" in header, config


def test_documents_attention_benchmark_table():
    """The rows that `python -m benchmarks attention --json` prints for the stored results."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "cpu-attention.json").read_text())["rows"]
    printed = [line for line in relative_to_mhsa(rows) if re.match(r"\| \d.* VCA eager ", line)]
    text = (ROOT / "docs" / "performance.md").read_text()
    assert len(printed) == 5
    assert [line for line in printed if line not in text] == []


def test_documents_gpu_tables():
    """Times of the cores, before and now, and images per second in docs/performance.md are the stored results."""
    folder, text = ROOT / "benchmarks" / "results" / "gpu", (ROOT / "docs" / "performance.md").read_text()
    runs: dict[tuple[int, str], list[tuple[float, float]]] = {}  # by N and core, in the order of the attempts
    for row in read_rows(folder / "stage2.jsonl"):
        if row.get("level") == "core":
            pair = row["forward"]["seconds"], row["forward + backward"]["seconds"]
            runs.setdefault((row["tokens"], row["name"]), []).append(pair)
    for tokens, contrast in ((shape.tokens, math.prod(shape.contrast_grid)) for shape in SHAPES):
        cells = [runs[tokens, name][-1] for name in ("SDPA cuDNN", "SDPA flash", "VCA eager")]
        cells += [runs[tokens, "VCA fused"][0], runs[tokens, "VCA fused"][-1]]
        printed = [f"{1e6 * forward:.0f} / {1e6 * both:.0f}" for forward, both in cells]
        assert f"| {tokens} ({contrast}) | {' | '.join(printed)} |" in text
    speeds: dict[str, list[str]] = {}
    for row in read_rows(folder / "stage3.jsonl"):
        if row["measurement"] == "models" and "name" in row:
            training, inference = (row["batch"] / row[key]["seconds"] for key in ("training", "inference"))
            speeds.setdefault(f"{row['batch']}", []).append(f"{training:.0f} ({inference:.0f})")
    for batch, cells in speeds.items():
        assert f"| {batch} | {' | '.join(cells)} |" in text


@pytest.mark.parametrize(("data", "page"), [("cifar10", "results.md"), ("digits", "attentions.md")])
def test_documents_attentions_table(data, page):
    """Accuracies and differences to softmax, with and without the local branch, are those of the stored runs."""
    runs = json.loads((ROOT / "benchmarks" / "results" / f"{data}-attentions.json").read_text())
    top1 = {(run["attention"], run["local_branch"], run["seed"]): run["top1"] for run in runs}
    text = (ROOT / "docs" / page).read_text()
    (section,) = re.findall(rf"(?s){data}-attentions\.json(.*?)(?:\n## |\Z)", text)
    for attention in {name for name, *_ in top1}:
        cells = []
        for local in (False, True):
            seeds = [seed for seed in range(3) if (attention, local, seed) in top1]
            values = [top1[attention, local, seed] for seed in seeds]
            differences = [value - top1["softmax", local, seed] for seed, value in zip(seeds, values, strict=True)]
            assert len(values) in (0, 3)
            spread = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" if values else "-"
            paired = f"{statistics.mean(differences):+.2f} ± {statistics.stdev(differences):.2f}" if values else "-"
            cells += [spread, "-" if attention == "softmax" else re.sub(r"^[+-]0\.00 ", "0.00 ", paired)]
        assert f"| `{attention}` | {' | '.join(cells)} |" in section


def test_documents_attentions_all_images():
    """Accuracies of softmax and VCA on all images of CIFAR-10 are the stored ones."""
    top1 = {}
    for row in read_rows(ROOT / "benchmarks" / "results" / "cifar10-all-images.jsonl"):
        top1.setdefault((row["attention"], row["step"]), []).append(f"{row['top1']:.2f}")
    for attention in ("softmax", "vca"):
        cells = [", ".join(top1[attention, step]) for step in (780, 1560, 2340)]
        assert f"| `{attention}` | {' | '.join(cells)} |" in (ROOT / "docs" / "results.md").read_text()


def test_documents_dit_losses():
    """Mean losses of the small DiT, and differences to softmax, are those of the stored losses."""
    rows = read_rows(ROOT / "benchmarks" / "results" / "cifar10-dit-attentions.jsonl")
    columns = [("softmax", True), ("inline", True), ("vca", True), ("softmax", False), ("inline", False)]
    table = re.findall(r"(?m)^\| (\d+) to (\d+) \| (0\..*) \|$", (ROOT / "docs" / "results.md").read_text())
    assert len(table) == 5
    for first, last, cells in table:
        losses = {}
        for row in rows:
            if int(first) <= row["step"] <= int(last):
                losses.setdefault((row["attention"], row["local_branch"], row["seed"]), []).append(row["loss"])
        mean = {key: statistics.mean(values) for key, values in losses.items()}
        for (attention, local), cell in zip(columns, cells.split(" | "), strict=True):
            pairs = [(mean[attention, local, seed], mean["softmax", local, seed]) for seed in (0, 1)]
            printed = [f"{a:.4f}" + (f" ({a / b - 1:+.1%})" if attention != "softmax" else "") for a, b in pairs]
            assert cell == ", ".join(printed).replace("%", " %")


def test_documents_forms_benchmark_table():
    """The pipeline's ratios of each form in benchmarks/README.md are the stored results."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "cpu-forms.json").read_text())["rows"]
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert len(rows) == 18
    for row in rows:
        (line,) = re.findall(rf"(?m)^\| {row['form']} \| .*$", text)
        others = {name: row[name] for name in row if name == "class folders" or row["stage"] == "pipeline"}
        for ratio in (value for value in others.values() if isinstance(value, dict)):
            assert "{ratio:.2f} ({low:.2f} to {high:.2f})".format(**ratio) in line


def test_documents_finetuning_table():
    """Every accuracy and CPU time in the table of docs/finetuning.md is the one in the log of its run."""
    results, logs = ROOT / "benchmarks" / "results", ("softmax", "vca", "scratch")
    rows = re.findall(
        r"(?m)^\| (\d+) \| [\d.]+ \|" + r" ([\d.]+) \(([\d.]+)\) \|" * 3 + "$",
        (ROOT / "docs" / "finetuning.md").read_text(),
    )
    assert len(rows) == 9
    seconds = json.loads((results / "finetuning-cpu-seconds.json").read_text())
    for column, log in enumerate(logs):
        lines = (results / f"finetuning-{log}.jsonl").read_text().splitlines()
        top1 = {record["step"]: record["val/top1"] for record in map(json.loads, lines) if "val/top1" in record}
        for row in rows:
            minutes = seconds[log][row[0]] / 60
            assert row[1 + 2 * column : 3 + 2 * column] == (f"{top1[int(row[0])]:.1f}", f"{minutes:.1f}"), (log, row[0])


@pytest.mark.process
def test_documents_parameter_table():
    """Parameters and multiply-adds of docs/attention.md are those that scripts/complexity.py counts."""
    rows = re.findall(
        r"(?m)^\| (\w+-\w+) \| (\S+) / (\S+) \| (\S+) / (\S+) \|", (ROOT / "docs" / "attention.md").read_text()
    )
    assert len(rows) == 5
    for label, *figures in rows:
        counts = [complexity_of(label.lower().replace("-", "_"), attention) for attention in ("softmax", "vca")]
        counted = [count.params / 1e6 for count in counts] + [count.macs / 1e9 for count in counts]
        assert [f"{figure:.3f}" for figure in counted] == figures, label


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_documents_length_and_links(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 150
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not link.startswith("http") and GENERATED not in link:
            assert (path.parent / link).exists(), f"{path}: {link}"


@pytest.mark.process
@pytest.mark.parametrize("name", ["README.md", "docs/attention.md"])
def test_documents_snippets_run(name, tmp_path):
    """The Python blocks of a document, one after the other."""
    code = "\n".join(re.findall(r"(?s)```python\n(.*?)```", (ROOT / name).read_text()))
    (tmp_path / "snippets.py").write_text(code)
    done = run_script(tmp_path / "snippets.py")
    assert done.returncode == 0, done.stderr[-3000:]


def test_documents_slurm_script_is_valid_bash():
    subprocess.run(["bash", "-n", str(ROOT / "examples" / "slurm_torchrun.sh")], check=True)
