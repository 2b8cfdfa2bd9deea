"""Snapshots measured by the root scripts: every step and every EMA decay in one table and one curve."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

import eval_fid
import sample
import train_cls
import train_gen
from tests.support import SMALL_DIT, TINY, metrics, one_line
from vca.config import compose
from vca.evaluation.record import read_record
from vca.report.snapshots import SnapshotFigure, snapshot_table
from vca.runtime.digest import tensors_sha256
from vca.runtime.errors import ConfigError
from vca.training.snapshots import load_snapshot, snapshot_path

pytestmark = pytest.mark.process

SNAPSHOTS = ("trainer.steps=20", "trainer.snapshot_every=5", "trainer.ema_decay=[0.9,0.5]")
STEPS, DECAYS, COUNT = (5, 10, 15, 20), (0.9, 0.5), 12
DRAW = ("sampler=ddpm", "sampler.steps=2", f"count={COUNT}", "device=cpu")
REFERENCE = ("data=digits", "reference=data:test")


@pytest.fixture(scope="module")
def generator(artefact):
    def build(folder):
        options = (*SMALL_DIT, *SNAPSHOTS, "trainer.global_batch_size=16", "sampler.steps=1", "sampled_classes=1")
        train_gen.run(compose("train_gen", [*options, "optim.lr=3e-2", f"out_dir={folder}", "name=run"]))

    return artefact("generator-snapshots", build) / "run"


@pytest.fixture(scope="module")
def classifier(artefact):
    def build(folder):
        train_cls.run(compose("train_cls", [*TINY, *SNAPSHOTS, f"out_dir={folder}", "name=run"]))

    return artefact("classifier-snapshots", build) / "run"


def evaluate(run, use, *overrides):
    return eval_fid.run(compose("eval_fid", [f"run={run}", *DRAW, *REFERENCE, *use, *overrides]))


def sha256_of(snapshot):
    return tensors_sha256(load_snapshot(snapshot))


def columns(table):
    """Return the rows of a Markdown table by step."""
    rows = [re.split(r" *\| *", line.strip("| ")) for line in table.splitlines() if re.match(r"\| \d", line)]
    return {int(step): values for step, *values in rows}


def test_eval_fid_all_snapshots_in_one_table_and_curve(generator, use, monkeypatch, capsys):
    """4 x 2 figures, each that of its own command; the reference is measured once; a repeated command measures none."""
    read_features, measured = eval_fid.read_features, []

    def counted(source, *arguments):
        measured.append(source.source)
        return read_features(source, *arguments)

    monkeypatch.setattr(eval_fid, "read_features", counted)
    records = evaluate(generator, use, "step=all", "ema=all")
    printed = capsys.readouterr().out
    assert sorted(measured) == ["digits (data:test)", *["run"] * 8]
    assert len(records) == len(list(generator.glob(f"evaluation-file-{COUNT}-*.json"))) == 8
    by_weights = {}
    for name, record in records.items():
        assert read_record(generator / name) == record
        origin = record["samples"]["made"]["origin"]
        snapshot = snapshot_path(generator / "snapshots", origin["step"], origin["ema_decay"])
        by_weights[origin["step"], origin["ema_decay"]] = record["metrics"]["frechet"]
        assert origin["weights_sha256"] == sha256_of(snapshot)
    assert len({*by_weights.values()}) == 8
    assert columns(printed) == {step: [f"{by_weights[step, decay]:.4g}" for decay in DECAYS] for step in STEPS}
    assert f"Frechet distance (N = {COUNT})\n\n| step | EMA 0.9 | EMA 0.5 |" in printed

    (file,) = generator.glob(f"snapshots-file-{COUNT}-*.json")
    figures = json.loads(file.read_text())["figures"]
    assert {(figure["step"], figure["ema_decay"]): figure["value"] for figure in figures} == by_weights
    with Image.open(file.with_suffix(".png")) as picture:
        assert min(picture.size) > 300

    one = evaluate(generator, use, "step=10", "ema=0.5", f"out={generator}/one.json")
    assert one["metrics"]["frechet"] == by_weights[10, 0.5]
    first = evaluate(generator, use, f"out={generator}/newest.json")
    assert first["metrics"]["frechet"] == by_weights[20, 0.9]

    lost = next(name for name, record in records.items() if record["metrics"]["frechet"] == by_weights[15, 0.9])
    (generator / lost).unlink()
    measured.clear()
    capsys.readouterr()
    assert evaluate(generator, use, "step=all", "ema=all").keys() == records.keys()
    printed = capsys.readouterr().out
    assert sorted(measured) == ["digits (data:test)", "run"]
    assert printed.count("evaluated before, record: ") == 7
    assert columns(printed) == {step: [f"{by_weights[step, decay]:.4g}" for decay in DECAYS] for step in STEPS}


def test_sample_from_snapshot(generator, tmp_path):
    """The checkpoint of step 10 was deleted, its snapshots were not."""
    assert not (generator / "checkpoints" / "step_00000010.pt").exists()
    command = [f"run={generator}", *DRAW[:2], "device=cpu", "count=2"]
    sample.run(compose("sample", [*command, "step=10", "ema=0.5", f"out={tmp_path}/set"]))
    origin = json.loads((tmp_path / "set" / "manifest.json").read_text())["origin"]
    assert (origin["step"], origin["weights"], origin["ema_decay"]) == (10, "ema", 0.5)
    assert origin["weights_sha256"] == sha256_of(snapshot_path(generator / "snapshots", 10, 0.5))


def test_eval_snapshots_accuracy_in_one_table_and_curve(classifier, capsys):
    options = [*TINY, *SNAPSHOTS, f"out_dir={classifier.parent}", "name=run", "trainer.eval_only=true"]
    before = (classifier / "metrics.jsonl").read_bytes()
    result = train_cls.run(compose("train_cls", [*options, "trainer.eval_snapshots=true"]))
    printed = capsys.readouterr().out
    content = json.loads((classifier / "snapshots.json").read_text())
    assert content["metric"] == "top-1 (%)"
    assert content["settings"]["data"]["name"] == "digits"
    top1 = {(figure["step"], figure["ema_decay"]): figure["value"] for figure in content["figures"]}
    assert list(top1) == [(step, decay) for step in STEPS for decay in DECAYS]
    assert columns(printed) == {step: [f"{top1[step, decay]:.4g}" for decay in DECAYS] for step in STEPS}
    assert result == {f"step_{step:08d}_ema_{decay}": value for (step, decay), value in top1.items()}
    last = metrics(classifier)[-1]
    assert (last["step"], last["ema/top1"], last["ema_0.5/top1"]) == (20, top1[20, 0.9], top1[20, 0.5])
    assert {**content["figures"][-1]["details"]} == {
        key: last[f"ema_0.5/{key}"] for key in ("top1", "top5", "loss", "images")
    }
    with Image.open(classifier / "snapshots.png") as picture:
        assert min(picture.size) > 300
    assert (classifier / "metrics.jsonl").read_bytes() == before


def test_eval_snapshots_marks_missing_one(classifier, tmp_path, capsys):
    """One missing file does not stop the evaluation of the others."""
    shutil.copytree(classifier, tmp_path / "run")
    snapshot_path(tmp_path / "run" / "snapshots", 15, 0.5).unlink()
    options = [*TINY, *SNAPSHOTS, f"out_dir={tmp_path}", "name=run", "trainer.eval_only=true"]
    result = train_cls.run(compose("train_cls", [*options, "trainer.eval_snapshots=true"]))
    assert len(result) == 7
    table = columns(capsys.readouterr().out)
    assert table[15] == [f"{result['step_00000015_ema_0.9']:.4g}", "-"]


def test_snapshots_missing_is_an_error(generator, use, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "checkpoints"):
        (folder / name).symlink_to(generator / name)
    with pytest.raises(ConfigError, match=r"step=all: \S+ contains no snapshot; train with trainer.snapshot_every"):
        evaluate(folder, use, "step=all")
    (folder / "snapshots").mkdir()
    for step in STEPS:
        path = snapshot_path(folder / "snapshots", step, 0.9)
        path.symlink_to(snapshot_path(generator / "snapshots", step, 0.9))
    with pytest.raises(ConfigError, match=r"step=all: \S+ lacks step_00000005_ema_0.5.safetensors, .*; restore one"):
        evaluate(folder, use, "step=all", "ema=0.5")
    with pytest.raises(ConfigError, match=r"no checkpoint of step 7; available: 20; snapshots of EMA weights: 5, 10"):
        evaluate(folder, use, "step=7")
    options = [*TINY, f"out_dir={tmp_path}", "name=other", "trainer.eval_only=true", "trainer.eval_snapshots=true"]
    with pytest.raises(ConfigError, match=r"trainer.eval_snapshots=true: \S+ contains no snapshot; train with"):
        train_cls.run(compose("train_cls", options))


WRONG = {
    "eval_fid ema=0.7": r"ema must be a decay of \S+, one of \[0.9, 0.5\], got 0.7",
    "eval_fid ema=2": r"ema must be a decay in \[0, 1\), all or null, got 2",
    "eval_fid step=last": r"step must be a step, all or null, got 'last'",
    "eval_fid step=-1": r"step must be a step, all or null, got -1",
    "eval_fid step=all weights=raw": "step must be a step or null with weights=raw, as snapshots contain EMA weights",
    "eval_fid ema=0.9 weights=raw": "ema must be null with weights=raw, got 0.9",
    "eval_fid step=all out=x.json": "out must be null with step=all or ema=all, which write several records, got 'x",
    "sample step=all": "step must be a step or null, got 'all'",
    "sample ema=all": r"ema must be a decay in \[0, 1\) or null, got 'all'",
}


@pytest.mark.parametrize("line", WRONG)
def test_selection_wrong_input_refused(generator, use, line, tmp_path, monkeypatch, capsys):
    script, *arguments = line.split()
    module = {"eval_fid": eval_fid, "sample": sample}[script]
    more = [*REFERENCE, *use] if script == "eval_fid" else [f"out={tmp_path}/out"]
    command = [f"run={generator}", *DRAW, *more, *arguments]
    assert re.search(WRONG[line], one_line(script, module.run, command, monkeypatch, capsys))


def test_eval_snapshots_needs_eval_only():
    with pytest.raises(ConfigError, match=r"trainer.eval_snapshots must be false without trainer.eval_only, got True"):
        compose("train_cls", [*TINY, "trainer.eval_snapshots=true"])


def test_ema_without_one_is_an_error(generator_run, use, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    config = json.loads((generator_run / "config.json").read_text())
    config["trainer"]["ema_decay"] = None
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "checkpoints").mkdir()
    saved = torch.load(generator_run / "checkpoints" / "step_00000002.pt", weights_only=True)
    torch.save({**saved, "ema": None}, folder / "checkpoints" / "step_00000002.pt")
    for ema in ("all", "0.9"):
        with pytest.raises(ConfigError, match=r"ema must be null for \S+, which has no EMA, got"):
            evaluate(folder, use, f"ema={ema}")
    record = evaluate(folder, use, "ema=null")
    assert record["samples"]["made"]["origin"]["weights"] == "raw"


def test_snapshot_table_marks_missing_figures():
    figures = [SnapshotFigure(step, decay, 10.0 * step, "", {}) for step, decay in ((5, 0.9), (10, 0.9), (10, 0.5))]
    assert snapshot_table("FID-50K", figures).splitlines() == [
        "FID-50K",
        "",
        "| step | EMA 0.9 | EMA 0.5 |",
        "| --- | --- | --- |",
        "| 5 | 50 | - |",
        "| 10 | 100 | 100 |",
    ]
