"""`scripts/report.py`: one HTML file for runs and sweeps, complete for whole runs and readable for broken ones."""

import json
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import report
from tests.report.test_tables import measured, trained
from vca.config import compose
from vca.evaluation.record import ACCURACY_FORMAT
from vca.report.page import build_page, render, without_urls
from vca.report.page_plots import MAX_POINTS, Style, panels_of, thin
from vca.report.page_results import beside, differences
from vca.report.page_run import PageRun, find_runs, read_page_run
from vca.report.record_summary import summarize_record
from vca.runtime.errors import ConfigError
from vca.runtime.rundir import to_dict

SIZE = 3_000_000  # bytes of a page
COMMAND = "train_cls.py data.root=https://host/<b>&"


@cache
def config_of(script, *overrides):
    return to_dict(compose(script, overrides))


def write_run(folder, *overrides, script="train_cls", steps=20, records=20, extra=()):
    """A run directory with `records` records of a run of `steps` steps."""
    config = {**config_of(script, *overrides), "name": folder.name, "out_dir": str(folder.parent)}
    config["trainer"] = {**config["trainer"], "steps": steps}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, **({"inputs": {}} if script == "train_gen" else {})}))
    lines = []
    for index in range(records):
        step = (index + 1) * steps // records
        lines.append(
            {"step": step, "epoch": step / 10, "loss": 2 / (index + 1), "lr": 1e-3, "images_per_second": 100.0}
        )
        if script == "train_cls" and index % 5 == 4:
            lines.append({"step": step, "val/top1": 50.0 + index, "val/loss": 1.0, "ema/top1": 51.0 + index})
    lines[-1]["device_hours"] = 0.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *extra]))
    launch = {"time": "2026-11-25", "command": COMMAND, "first_step": 0, "ranks": 8, "device": "NVIDIA H100"}
    (folder / "launches.jsonl").write_text(json.dumps({**launch, "commit": "0123456789abcdef", "torch": "2.15"}) + "\n")
    (folder / "uncommitted.diff").write_text("")
    return folder


def section(html, name):
    return re.search(rf'(?s)<section id="{name}">.*?</section>', html)[0]


def test_page_of_two_runs_names_the_one_key_that_differs(tmp_path):
    """Name, folder and the keys that the config derives from the difference are not named."""
    cases = {
        "attention": ("attention=softmax",),
        "data.img_size": ("data.img_size=16",),
        "seed": ("seed=3",),
    }
    for key, overrides in cases.items():
        runs = [write_run(tmp_path / key / "a"), write_run(tmp_path / key / "elsewhere" / "b", *overrides)]
        page = build_page(runs)
        assert list(page.differences) == [key]
    rows = re.findall(r"<tr><td><code>(.*?)</code></td>", section(render(page), "config"))
    assert rows == ["seed"]


def test_page_of_both_trainers_compares_shared_keys(tmp_path):
    """Keys of one trainer, such as the sampler, are not listed as null in the runs of the other."""
    runs = [PageRun(tmp_path, name, to_dict(compose(name, ["name=run"]))) for name in ("train_cls", "train_gen")]
    named = differences(runs)
    assert named["model.name"] == ["deit_mini", "dit_mini"]
    assert not [key for key in named if key.startswith(("sampler", "objective", "autoencoder", "model.embed_dim"))]


def test_page_of_a_classifier(tmp_path, monkeypatch, capsys):
    """Through the script: every section, no URL, a size below the limit, escaped commands."""
    run = write_run(tmp_path / "run")
    (run / "attention_maps").mkdir()
    Image.new("RGB", (30, 20)).save(run / "attention_maps" / "layer_00.png")
    monkeypatch.setattr(sys, "argv", ["report.py", str(run)])
    report.main()
    file = run / "report.html"
    assert str(file) in capsys.readouterr().out
    html = file.read_text()
    assert "http" not in html
    assert len(html.encode()) < SIZE
    for name in ("results", "config", "curves", "paper", "evaluations", "maps", "cost", "provenance", "failures"):
        assert f'<section id="{name}">' in html
    assert "finished" in section(html, "results")
    assert "69.00" in section(html, "results")
    assert "8 x NVIDIA H100" in section(html, "cost")
    assert re.search(r"0\.\d{3} M", section(html, "cost"))  # parameters
    assert "&#104;ttps://host/&lt;b&gt;&amp;" in section(html, "provenance")
    assert "no uncommitted changes" in section(html, "provenance")
    assert html.count('<div aria-label="') == 4  # loss, learning rate, accuracy, throughput
    assert "None." in section(html, "failures")


def test_page_of_a_generator(tmp_path):
    """Sample grids over the steps, the curve of the online FID, and the record with its protocol."""
    extra = [{"step": step, "frechet": 50.0 - step, "frechet_samples": 100} for step in (10, 20)]
    run = write_run(tmp_path / "dit", script="train_gen", extra=[*extra, {"step": 20, "frechet": None}])
    (run / "samples").mkdir()
    for step in range(6):
        Image.fromarray(np.full((9, 9), 40 * step, np.uint8)).save(run / "samples" / f"step_{step:08d}.png")
    record = measured(tmp_path / "records" / "dit", "dit_s_2_vca", 62.5)
    html = render(build_page([run], folders=[tmp_path]))
    assert re.findall(r"<figcaption>(.*?)</figcaption>", html) == [f"dit, step {step}" for step in (0, 2, 3, 5)]
    assert 'class="sharp"' in section(html, "samples")
    assert "Frechet distance" in section(html, "curves")
    assert "frechet is not finite in 1 record(s)" in section(html, "failures")
    assert record.name in section(html, "evaluations")
    for text in ("62.5", "dit_table", "guidance scale 1.0", "NFE 250", "(FID network)"):
        assert text in section(html, "evaluations")
    row = section(html, "paper")
    assert "DiT-S/2" in row
    assert re.search(r"62\.3</td><td class=.num.>62\.50", row)


def test_page_of_a_sweep_with_a_failed_job(tmp_path):
    """The page has the runs that the sweep started, means over seeds, and the reason of the failure."""
    folder = tmp_path / "sweeps" / "now"
    jobs = []
    for number, seed in enumerate((0, 1, 2, 3)):
        run = write_run(tmp_path / f"seed{seed}", f"seed={seed}", records=20 if seed < 2 else 5)
        (run / "launches.jsonl").write_text(json.dumps({"command": f"{folder}/code/train_cls.py"}) + "\n")
        jobs.append({"number": number, "name": run.name, "run": str(run), "overrides": [f"seed={seed}"]})
    (tmp_path / "seed3" / "launches.jsonl").write_text('{"command": "train_cls.py"}\n')  # of another sweep
    for name in ("logs", "ends"):
        (folder / name).mkdir(parents=True)
    (folder / "jobs.json").write_text(json.dumps({"command": "train_cls.py -m", "commit": "c" * 40, "jobs": jobs}))
    for number, code in enumerate((0, 0, 3, 1)):
        (folder / "ends" / f"{number}.json").write_text(json.dumps({"exit_code": code}))
        (folder / "logs" / f"seed{number}.log").write_text("### started now\nstopped: <i>gradient norm nan</i>\n")
    (tmp_path / "seed2" / "metrics.jsonl").write_text('{"step": 5, "loss": NaN}\n')
    (tmp_path / "seed2" / "nonfinite_rank0.json").write_text('{"step": 5, "grad_norm": "nan", "loss": "nan"}')

    out = tmp_path / "sweep.html"
    assert "page of 3 runs" in report.write_report([folder], out)
    html = out.read_text()
    assert "<h1>Sweep now</h1>" in html
    assert "4 jobs, 2 failed" in html
    assert "69.00 ± 0.00" in section(html, "results")
    assert "step 5 of 20, non-finite gradient" in section(html, "results")
    failures = section(html, "failures")
    assert "failed: seed2: exit code 3; stopped: &lt;i&gt;gradient norm nan&lt;/i&gt;" in failures
    assert "failed: seed3: exit code 1" in failures
    assert "nonfinite_rank0.json: step 5 has gradient norm nan" in failures
    (folder / "jobs.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"jobs\.json is corrupt"):
        report.write_report([folder], out)


def test_page_of_broken_runs(tmp_path):
    """Missing and corrupt files are lines of the page; the other runs are complete."""
    whole = write_run(tmp_path / "whole")
    for name in ("config.json", "metrics.jsonl", "launches.jsonl"):
        (write_run(tmp_path / f"no-{name}") / name).unlink()
    torn = write_run(tmp_path / "torn", extra=["text", {"no": "step"}, {"step": 21, "loss": "x", "val/top1": None}])
    (torn / "config.json").write_text("{")
    (torn / "launches.jsonl").write_bytes(b"\xff\n{}\n[]\n")
    (torn / "evaluation-x-1-1.json").write_text("{}")
    (torn / "samples").mkdir()
    (torn / "samples" / "step_x.png").write_bytes(b"no picture")
    (torn / "checkpoints").mkdir()
    (torn / "checkpoints" / "step_00000005.pt.damaged").touch()
    old = write_run(tmp_path / "old")
    (old / "config.json").write_text(json.dumps({"model": 3, "data": None, "attention": [], "trainer": {}, "seed": 0}))
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text('{"architecture": "vca"}')

    runs = find_runs([tmp_path])
    assert tmp_path / "export" not in runs
    assert len(runs) == 6
    html = render(build_page(runs, folders=[tmp_path], count=report.count_complexity))
    failures = section(html, "failures")
    for line in (
        "launches.jsonl is missing",
        "metrics.jsonl has 2 corrupt line(s)",
        "loss is not finite in 1 record(s)",
        "launches.jsonl has 2 corrupt line(s)",
        "corrupt checkpoint: step_00000005.pt.damaged",
        "evaluation-x-1-1.json has no field format",
        "step_x.png cannot be read",
        "config.json cannot be read",
        "old: parameters cannot be counted",
        "not finished: step 0 of 20",
    ):
        assert line in failures, line
    assert "69.00" in section(html, "results")
    assert f"<h3>{whole.name}</h3>" not in failures


def test_page_invalid_arguments_are_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    for path, message in (("none", "not a directory: none"), (str(tmp_path / "empty"), "no run in ")):
        monkeypatch.setattr(sys, "argv", ["report.py", path])
        with pytest.raises(SystemExit) as stopped:
            report.main()
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith(f"config error: {message}")


def test_page_of_fifty_long_runs_is_small(tmp_path):
    """Curves are thinned to their extremes, seeds share a color, and the file stays below the limit."""
    records = [{"step": step, "loss": 1 / (step + 1), "lr": 1e-3, "images_per_second": 1.0} for step in range(1000)]
    records[777]["loss"] = 1e3
    runs = [PageRun(Path(f"run{number}"), f"run{number}", {}, records) for number in range(50)]
    panels = panels_of(runs, [Style(0, "#000000")] * 50)
    assert all(curve.values.size <= 300 and curve.values.max() == 1e3 for curve in panels["training loss"])
    first = write_run(tmp_path / "0")
    (first / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:600]))
    others = [write_run(tmp_path / str(number), f"seed={number}") for number in range(1, 12)]
    page = build_page([first, *others])
    assert len({style.color for style in page.styles.values()}) == 1
    page.runs = [PageRun(one.path, one.label, page.runs[0].config, records) for one in page.runs for _ in range(4)]
    html = render(page)
    assert "reduced to 312 points" in html
    assert len(html.encode()) < SIZE


def test_thin_keeps_ends_and_extremes():
    values = np.sin(np.arange(10_000.0))
    values[5000] = 9
    kept = thin(values, MAX_POINTS)
    assert len(kept) <= MAX_POINTS
    assert (kept[0], kept[-1]) == (0, 9999)
    assert 5000 in kept
    assert (np.diff(kept) > 0).all()
    assert thin(values[:3], MAX_POINTS).tolist() == [0, 1, 2]


def test_without_urls_keeps_meaning():
    """In a script the letter is an escape that strings and names may have; elsewhere an entity."""
    html = without_urls('<p title="https://a">http</p><script>const http_x = "http://b";</script>')
    assert html == ('<p title="&#104;ttps://a">&#104;ttp</p><script>const \\u0068ttp_x = "\\u0068ttp://b";</script>')


def test_page_escapes_names(tmp_path):
    """A run name with HTML is text in the page, and cannot end the script of the plots."""
    runs = [write_run(tmp_path / "<img src=x>"), write_run(tmp_path / "'&quot", "seed=1")]
    html = render(build_page(runs))
    assert "<img src=x>" not in html.replace("&lt;img", "")
    assert "&lt;img src=x&gt;" in section(html, "results")
    assert len(re.findall(r"<script>", html)) == 3


def test_evaluations_side_by_side(tmp_path):
    """Records of one kind are rows of one table; shared settings are listed once. Accuracy records have their own."""
    paths = [measured(tmp_path / name, "dit_s_2_vca", fid) for name, fid in (("a", 62.0), ("b", 63.0))]
    both = beside([summarize_record(path, json.loads(path.read_text())) for path in paths])
    assert both.table.head[:2] == ["record", "FID-50K"]
    assert [row[1] for row in both.table.rows] == ["62", "63"]
    assert both.table.head[-1] == "weights"
    assert both.shared["protocol"] == "dit_table"
    accuracy = {
        "format": ACCURACY_FORMAT,
        "config": {"data": {"img_size": 8, "crop_pct": 1.0}},
        "count": 359,
        "metrics": {"top1": 98.6, "top5": 100.0, "loss": 0.1},
        "weights": {"name": "ema", "source": "run", "step": 10, "sha256": ""},
        "data": {"name": "digits"},
        "compute": {"ranks": 1, "device": "cpu", "versions": {"torch": "2.15"}, "commit": None, "uncommitted": False},
    }
    one = summarize_record(Path("x.json"), accuracy)
    assert one.metrics == {"top-1 (%)": "98.60", "top-5 (%)": "100.00"}
    assert one.protocol["weights"] == "run, step 10, ema"


def test_page_lists_copies_of_records_once(tmp_path):
    """An export has copies of a run's records; the page lists those of the run, also if the export is elsewhere."""
    run = write_run(tmp_path / "run", script="train_gen")
    record = measured(run, "dit_s_2_vca", 62.0)
    for folder in (run / "export", tmp_path / "exported"):
        folder.mkdir()
        (folder / record.name).write_bytes(record.read_bytes())
    (group,) = build_page([run], folders=[tmp_path]).evaluations
    assert [row[0] for row in group.table.rows] == [f"{record.parent.name}/{record.name}"]


def test_page_paper_figure_beside_unfinished_run(tmp_path):
    """The config of a row of Table 1 has the paper's figure also before the run is finished."""
    run = trained(tmp_path / "run", "deit_tiny_vca", 60.0, epoch=100)
    page = build_page([run])
    assert page.results.rows[0][page.results.head.index("paper")] == "75.6 (Table 1, Table 3, Table 4)"
    assert page.paper == []
    assert read_page_run(run, "run").status == "step 125,100 of 375,300"
    assert differences([read_page_run(run, "run")]) == {}
