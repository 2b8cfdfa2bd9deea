"""The stages of `python -m benchmarks gpu`: rehearsed on a CPU, interrupted, continued and reported."""

import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch

from benchmarks.gpu.command import DOCS, parse
from benchmarks.gpu.report import GOALS, report
from benchmarks.gpu.runner import Context, Measurement, Stage, read_rows, run_stage
from benchmarks.gpu.system import LINE
from scripts.gpu_bundle import FILTERS, pack_images, unpack_images
from tests.processes import ROOT, environment, run_command
from vca.attention.kernels import block_sizes
from vca.attention.kernels.block_sizes import FILE, KernelBlocks, read_entries
from vca.sweep.plan import rows_of_ablation

H100 = "NVIDIA H100 80GB HBM3"
PAGES = ("performance.md", "results.md")


@pytest.fixture(scope="session")
def rehearsal(artefact):
    """A rehearsal that was killed in stage 2 and run again, with its output."""

    def build(folder):
        command = [sys.executable, "-m", "benchmarks", "gpu", "--rehearse", "--out", str(folder)]
        killed = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while not any("finished" in row for row in read_rows(folder / "stage2.jsonl")):
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        with (folder / "stage2.jsonl").open("a") as file:
            file.write('{"stage": 2, "measurement": "co')  # a line that was cut off
        done = run_command(*command, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        (folder / "stdout").write_text(done.stdout)

    return artefact("rehearsal", build)


@pytest.mark.process
def test_gpu_rehearsal_runs_every_measurement_and_continues(rehearsal):
    """Each measurement of each stage has rows and one end; what was finished before the kill is not run again."""
    from benchmarks.gpu.plan import STAGES

    for number, stage in STAGES.items():
        rows = read_rows(rehearsal / f"stage{number}.jsonl")
        assert not [row for row in rows if "raised" in row or not row["rehearsal"] or row["device"] != "cpu"]
        for one in stage.measurements:
            if not one.rehearsed:
                continue
            own = [row for row in rows if row["measurement"] == one.name]
            assert sum("finished" in row for row in own) == 1, one.name
            assert len(own) > 1, one.name
    printed = (rehearsal / "stdout").read_text()
    assert "stage 1: correctness of the kernels; 0 of 5 left" in printed
    assert "stage 2: time of the kernels; 4 of 5 left" in printed
    entries = [entry for entry in read_entries(rehearsal / "tiles.json") if entry["device"] == "cpu"]
    found = {(entry["kernel"], entry["dtype"], entry["capability"]) for entry in entries}
    assert found == {(kernel, dtype, 0) for kernel in KernelBlocks._fields for dtype in ("float32", "float16")}


@pytest.mark.process
def test_gpu_report_of_rehearsal_not_measured(rehearsal, tmp_path):
    """No row of a CPU is reported: both blocks of the documents say that nothing is measured."""
    shutil.copytree(rehearsal, tmp_path / "out", ignore=shutil.ignore_patterns("runs"))
    lines = []
    for page in PAGES:
        shutil.copy(DOCS / page, tmp_path)
    report(tmp_path / "out", tmp_path, lines.append)
    assert lines[0].count("| not measured | not measured |") == len(GOALS) + 1
    assert "###" not in lines[0]
    performance, results = ((tmp_path / page).read_text() for page in PAGES)
    assert performance.count("| not measured | not measured |") == len(GOALS) + 1
    assert "<!-- gpu: training -->\nNot measured.\n<!-- end -->" in results


@pytest.mark.process
def test_gpu_report_tables_and_goals(rehearsal, tmp_path):
    """All tables, from rows of a rehearsal relabelled as those of a GPU, and goals that are and are not reached."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(rehearsal / "tiles.json", out)
    for file in rehearsal.glob("stage*.jsonl"):
        rows = [{**row, "rehearsal": False, "device": H100} for row in read_rows(file)]
        (out / file.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {"rehearsal": False, "device": H100, "torch": "2", "commit": None, "code": "", "started": "2", "stage": 2}
    times = {197: (500, 400), 1024: (1000, 500)}  # N -> microseconds of SDPA and of VCA
    more = []
    for tokens, pair in times.items():
        for name, value in zip(("SDPA flash", "VCA fused"), pair, strict=True):
            timing = {"seconds": 1e-6 * value, "ratio": 1.0}
            row = {"level": "core", "tokens": tokens, "name": name, "forward": timing, "forward + backward": timing}
            more.append({**about, "measurement": "more", **row})
    for kernel, seconds in (("stage2_fwd", 1e-4), ("stage2_bwd", 3e-4)):
        row = {"tokens": 1024, "kernel": kernel, "seconds": seconds, "bandwidth": 1e12, "floor_share": 0.5}
        more.append({**about, "measurement": "more", **row})
    for name, size in (("timm Attention", 100), ("VCA fused", 108)):
        row = {"level": "layer", "tokens": 256, "contrast_tokens": 64, "batch": 1, "name": name, "kept_bytes": size}
        row |= {"peak_bytes": 100, "forward": timing, "forward + backward": {**timing, "low": 1, "high": 1}}
        row["forward"] = row["forward + backward"]
        more.append({**about, "measurement": "more", **row})
    more.append({**about, "measurement": "broken", "raised": "RuntimeError: out of luck"})
    (out / "stage6.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    for page in PAGES:
        shutil.copy(DOCS / page, tmp_path)
    lines = []
    report(out, tmp_path, lines.append)
    text = (out / "report.md").read_text()
    assert text == lines[0]
    assert "speed-up of the core >= 0.9 | 1.25 (SDPA flash 500 µs, VCA 400 µs) | reached |" in text
    gap = "not reached: 0.80 of it; stage2_bwd takes 75 % of the kernels' time"
    assert f"speed-up of the core >= 2.5 | 2.00 (SDPA flash 1000 µs, VCA 500 µs) | {gap} |" in text
    assert (
        "| training memory of a layer / MHSA's <= 1.1 | at most 1.08 (saved activations at N = 256) | reached |" in text
    )
    titles = [line.removeprefix("### ") for line in text.splitlines() if line.startswith("###")]
    assert titles == [
        "Errors of the kernels",
        "Kernels",
        "Fastest block sizes",
        "Cores",
        "Parts of a layer, forward + backward",
        "Layers, ratios to timm's Attention",
        "Models",
        "Time on the host",
        "Overhead of the trainer",
        "Sampling",
        "Training",
        "Training losses, kernels and plain PyTorch",
        "Runs and tests",
        "Failed measurements",
    ]
    assert "| broken | RuntimeError: out of luck |" in text
    assert "resumed bit-exactly" in text
    assert f"Install the block sizes: `cp {out / 'tiles.json'} {FILE.relative_to(ROOT)}`" in text
    assert gap in (tmp_path / "performance.md").read_text()
    table = (tmp_path / "results.md").read_text()
    number, spread = r"[\d.]+", r"[\d.]+ \+- [\d.]+"
    about = r"64 images, batch 32, 1 epochs"
    for name in ("`vca`, kernels", "`vca`"):
        difference = rf"[+-]{spread} \(3 seeds\)"
        assert re.search(
            rf"\| CIFAR-10 \| {about} \| {name} \| yes \| top-1 \(%\) \| {spread} \| {difference} \| 3 \|", table
        )
    assert re.search(rf"\| CIFAR-10, DiT \| {about} \| `softmax` \| no \| loss \| {spread} \| - \| 2 \|", table)
    assert re.search(
        rf"\| Imagenette \| {about} \| `vca`, kernels \| yes \| top-1 \(%\) \| {number} \| - \| 1 \|", table
    )
    assert "| CIFAR-10 | 2 | 0 |" in text  # on a CPU, both are plain PyTorch
    assert len(list(out.glob("*.png"))) == 4


def test_gpu_training_has_every_attention_of_the_ablations():
    """Stage 4 trains those of ablation=attentions and ablation=v2, each once per seed and local branch."""
    from benchmarks.gpu.curves import cases

    every = {case for case in cases() if case.task == "CIFAR-10"}
    for name in ("attentions", "v2"):
        assert {case.attention for case in every} >= {row[0] for row in rows_of_ablation(name)}
    assert {(case.attention, case.seed) for case in every if case.local_branch} == {
        (case.attention, seed) for case in every for seed in range(3)
    }
    assert len(list(cases())) == len(set(cases()))


@pytest.mark.process
def test_gpu_training_process_crash_ends_one_run(tmp_path):
    """A killed process is an error of its run; the next run starts another process."""
    from benchmarks.gpu.curves import cases, measure, worker

    context, case = Context(torch.device("cpu"), tmp_path, tiny=True), next(cases())
    pid = worker().submit(os.getpid).result()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(BrokenProcessPool):
        measure(context, case)
    assert [row["step"] for row in measure(context, case)] == [1, 2]
    worker().shutdown()
    worker.cache_clear()


def stage_of(**functions):
    return Stage("test", [Measurement(name, function, 0.1) for name, function in functions.items()])


def test_gpu_stage_errors_and_budget(tmp_path, capsys):
    """An error is a row, the next measurement runs; a failed one is run again, last; no time left: left out."""

    def fails(context):
        yield {"part": 1}
        raise ValueError("broken")

    context = Context(torch.device("cpu"), tmp_path, tiny=True)
    stage = stage_of(fails=fails, works=lambda context: [{"value": 2}])
    assert not run_stage(1, stage, context)
    rows = read_rows(tmp_path / "stage1.jsonl")
    ends = [(row["measurement"], row.get("raised", "finished" in row)) for row in rows]
    assert ends == [("fails", False), ("fails", "ValueError: broken"), ("works", False), ("works", True)]
    assert {"device", "torch", "commit", "code", "started", "rehearsal"} <= set(rows[0])

    order = []
    stage = stage_of(fails=lambda c: order.append("fails") or [], new=lambda c: order.append("new") or [])
    assert run_stage(1, stage, context)
    assert order == ["new", "fails"]
    assert run_stage(1, stage_of(late=fails), Context(context.device, tmp_path, tiny=True, end=0.0))
    assert "late: left out, 0.1 min expected" in capsys.readouterr().out


def test_gpu_search_without_time_keeps_its_entries(tmp_path, monkeypatch):
    """What is left out is a row; entries of an earlier attempt stay, and replace installed ones."""
    from benchmarks.gpu.search import BlockSizes, fastest_of, read_best, search

    entry = {
        "capability": 90,
        "kernel": "stage2_bwd",
        "head_dim": 64,
        "dtype": "bfloat16",
        "tokens": 256,
        "contrast_tokens": 64,
    }
    entry |= {"contrast_tokens": 64, **BlockSizes(64, 32)._asdict(), "seconds": 1e-4, "default_seconds": 2e-4}
    content = json.dumps([entry])
    monkeypatch.setattr(block_sizes, "FILE", tmp_path / "installed.json")
    (tmp_path / "installed.json").write_text(json.dumps([{**entry, "num_warps": 4}]))
    (tmp_path / "tiles.json").write_text(content)
    rows = list(search(Context(torch.device("cpu"), tmp_path, tiny=True, end=0.0)))
    assert rows == [{"left_out": f"head dim 64, torch.{name}, 17 tokens"} for name in ("float32", "float16")]
    assert (tmp_path / "tiles.json").read_text() == content
    assert list(read_best(tmp_path).values()) == [entry]

    close, fast = ({**entry, "seconds": factor * 2e-4} for factor in (0.99, 0.9))
    default, failed = {**entry, "seconds": 2e-4}, {"failed": "RuntimeError: out of resources"}
    assert fastest_of([default, failed, close]) is default
    assert fastest_of([default, close, failed, fast]) is fast


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "1"], "--out must be set, a folder for the results"),
        (["--stage", "6", "--out", "x"], "argument --stage: invalid choice: 6"),
        (["--report", "nowhere"], "--report must be a folder with stage1.jsonl, ..., got nowhere"),
    ],
    ids=str,
)
def test_gpu_command_wrong_options_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_gpu_bundle_images_roundtrip():
    """Packed images are exact, for all differences modulo 256."""
    random = np.random.default_rng(0)
    splits = [(random.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), np.arange(n) % 10) for n in (20, 3)]
    data = pack_images(splits)
    for (images, labels), (other, others) in zip(splits, unpack_images(data), strict=True):
        assert np.array_equal(images, other)
        assert np.array_equal(labels, others)
    assert lzma.decompress(lzma.compress(data, filters=FILTERS)) == data


@pytest.mark.parametrize(
    ("line", "name", "outcome"),
    [
        ("tests/a/test_b.py::test_c[1-x y] PASSED [ 50%]", "tests/a/test_b.py::test_c[1-x y]", "PASSED"),
        ("[gw12] [  3%] FAILED tests/a/test_b.py::test_c ", "tests/a/test_b.py::test_c", "FAILED"),
    ],
)
def test_gpu_suite_reads_lines_of_pytest(line, name, outcome):
    match = LINE.match(line)
    assert (match["x"] or match["y"], match["a"] or match["b"]) == (name, outcome)
