"""Published results: the tables of README.md and docs/results.md are those of the accepted records."""

import copy
import json
import shutil
from functools import cache

import pytest
import torch

from scripts.table import EXPERIMENTS, gpu_hours
from tests.processes import ROOT
from tests.report.test_tables import measured
from vca.config import compose
from vca.evaluation.accuracy_record import accuracy_record_name, make_accuracy_record
from vca.evaluation.record import log_identity, read_record, seal
from vca.report.results import (
    DOCUMENTS,
    FOLDER,
    REFERENCE,
    Experiments,
    accept,
    read_results,
    records_table,
    render,
    rewrite,
    stale_documents,
)
from vca.report.tables import TABLES, gather, lines_of
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError
from vca.runtime.rundir import RunDirectory, to_dict

ONE = World(0, 0, 1, torch.device("cpu"))
LAUNCH = {"command": "train_cls.py seed=0", "commit": "abcdef0123", "ranks": 8, "device": "H100", "threads": 4}


@cache
def config_of(script, *overrides):
    return to_dict(compose(script, overrides))


def accuracy(folder, top1, *overrides, weights="ema", images=359, launch=LAUNCH, **changes):
    """Write a run's log and an accuracy record of committed code; `changes` are of the record."""
    config = {**config_of("train_cls", *overrides), "name": folder.name}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 9, "name": folder.name}) + "\n")
    (folder / "launches.jsonl").write_text(json.dumps(launch) + "\n")
    of = {"name": weights, "source": folder.name, "step": 9, "steps": 9, "sha256": f"{weights}{folder.name}"}
    result = {"top1": top1, "loss": 1.0, "images": images}
    data = {"name": config["data"]["name"], "sha256": "d"}
    (folder / "config.json").write_text(json.dumps(config))
    record = make_accuracy_record(result, of, data, RunDirectory(folder), 250, ONE)
    (folder / "config.json").unlink()  # an accepted record has none
    return write(folder, committed(record) | changes)


def committed(record):
    return {**record, "compute": {**record["compute"], "commit": "abcdef0123", "uncommitted": False}}


def write(folder, record):
    path = folder / accuracy_record_name(record)
    path.write_text(json.dumps({**record, "sha256": seal(record)}))
    return path


def fid(folder, value, *overrides, log=({"step": 9},), launch=LAUNCH, reference=REFERENCE, number=0, **changes):
    """Write a run's log and an FID record of committed code; `changes` are of the origin of its weights."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (folder / "launches.jsonl").write_text(json.dumps(launch) + "\n")
    path = measured(folder, "dit_s_2_softmax", value, *overrides, reference=reference, run=str(folder))
    record = committed(json.loads(path.read_text()))
    record["samples"]["made"]["origin"] |= changes
    path.unlink()
    path = folder / f"evaluation-inception-50000-{number}.json"
    path.write_text(json.dumps(record | {"sha256": seal(record)}))
    return path


@pytest.fixture
def checkout(tmp_path):
    """The documents, without records."""
    (tmp_path / "root" / "docs").mkdir(parents=True)
    for name in DOCUMENTS:
        shutil.copy(ROOT / name, tmp_path / "root" / name)
    return tmp_path / "root"


def test_results_documents_equal_records():
    """`python scripts/table.py --update` changes nothing: no figure of a table is without a record."""
    assert stale_documents(ROOT, EXPERIMENTS) == {}
    text = "".join((ROOT / name).read_text() for name in DOCUMENTS)
    assert all(f"<!-- results: {name} -->" in text for name in render(ROOT, EXPERIMENTS))


def test_results_edited_figure_is_stale(checkout):
    shutil.copytree(ROOT / FOLDER, checkout / FOLDER)
    assert stale_documents(checkout, EXPERIMENTS) == {}
    readme = checkout / "README.md"
    text = readme.read_text()
    readme.write_text(text.replace("| 72.2 % | not run |", "| 72.2 % | 75.6 % |"))
    assert readme.read_text() != text
    assert stale_documents(checkout, EXPERIMENTS) == {readme: text}
    readme.write_text(text)
    record = next((checkout / FOLDER).rglob("evaluation-*.json"))
    record.write_text(record.read_text().replace('"top1": ', '"top1": 1'))
    with pytest.raises(ConfigError, match="has changed since it was written"):
        stale_documents(checkout, EXPERIMENTS)


def test_results_accepted_rows(checkout, tmp_path):
    """Seeds of VCA and softmax attention: both documents have mean ± std, links, hardware, commit and command."""
    for seed, (ema, raw) in enumerate(((98.0, 97.0), (99.0, 98.0))):
        accuracy(tmp_path / f"v{seed}", ema, f"seed={seed}")
        accuracy(tmp_path / f"v{seed}", raw, f"seed={seed}", weights="raw")
    accuracy(tmp_path / "s", 91.0, "attention=softmax", "wandb.project=other")
    accuracy(tmp_path / "long", 92.0, "attention=softmax", "trainer.epochs=200")
    accuracy(tmp_path / "lr", 93.0, "attention=softmax", "trainer.epochs=200", "optim.lr=5e-4", weights="raw")
    files = accept([tmp_path / name for name in ("v0", "v1", "s", "long", "lr")], checkout, EXPERIMENTS)
    assert len(files) == 7 + 5  # records and logs
    blocks = render(checkout, EXPERIMENTS)
    lines = blocks["measured"].splitlines()
    assert "| digits, deit_mini, 60 epochs: top-1 (%) | 98.50 ± 0.71 (2 seeds) | 91.00 (1 seed) |" in lines
    assert "| digits, deit_mini, 200 epochs, optim.lr=0.0005: top-1 (%) | not run | 93.00 (1 seed) |" in lines
    (row,) = (line for line in blocks["records"].splitlines() if ", vca, " in line)
    assert row.startswith("| digits, deit_mini, vca, 60 epochs | top-1 (%) | 98.50 ± 0.71 | 97.50 ± 0.71 | 2 |")
    assert "| H100, 8 ranks | abcdef0 | `python train_cls.py seed=0` | seed 0: [ema emav0](results/v0-" in row
    for link in (part.partition(")")[0] for part in row.split("](")[1:]):
        assert (checkout / "docs" / link).is_file()
    for path, text in stale_documents(checkout, EXPERIMENTS).items():
        path.write_text(text)
    assert stale_documents(checkout, EXPERIMENTS) == {}
    shutil.copytree(next((checkout / FOLDER).glob("s-*")), checkout / FOLDER / "again")
    with pytest.raises(ConfigError, match="have the same config, seed and weights; remove one of them"):
        read_results(checkout / FOLDER)


def test_results_rows_of_the_paper(checkout, tmp_path):
    """A figure of Table 1 and one of Table 2; a run with another config than the row's experiment is refused."""
    row = ("experiment=table1/deit_tiny_vca", "data.root=somewhere")
    for seed, top1 in enumerate((75.0, 76.0)):
        accuracy(tmp_path / f"v{seed}", top1, *row, f"seed={seed}", images=50_000)
        accuracy(tmp_path / f"v{seed}", 10.0, *row, f"seed={seed}", images=50_000, weights="raw")
    fid(tmp_path / "dit", 67.0)
    experiments = Experiments(row_config, gpu_hours)
    accept([tmp_path / name for name in ("v0", "v1", "dit")], checkout, experiments)
    blocks = render(checkout, experiments)
    table = blocks["reproduction"]
    assert "| 1 | DeiT-Tiny, VCA | `table1/deit_tiny_vca` | 75.6 % | 75.50 ± 0.71 % (2 seeds) | 20 |" in table
    assert "| 2 | DiT-S/2, softmax | `table2/dit_s_2_softmax` | 67.2 | 67.00 (1 seed) | 26 |" in table
    assert table.count("not run") == 18
    assert blocks["measured"] == "No record has been accepted yet.\n"
    assert "### Table 1: ImageNet-1K" in blocks["tables"]
    assert str(tmp_path) not in "".join(blocks.values())
    raw = gather([checkout / FOLDER], weights="raw").measured
    assert lines_of(TABLES["table1"], raw)[0]["VCA measured"] == "10.00"
    (tmp_path / "v0" / "config.json").write_text("{}")  # in a run directory, metrics.jsonl has the accuracy
    assert gather([tmp_path / "v0"]).measured == []

    accuracy(tmp_path / "short", 74.0, *row, "seed=2", "trainer.epochs=100", images=50_000)
    shutil.rmtree(checkout / FOLDER)
    with pytest.raises(ConfigError, match=r"trainer\.epochs=300 for table1/deit_tiny_vca, got 100"):
        accept([tmp_path / "short"], checkout, experiments)
    fid(tmp_path / "dirty", 60.0, launch={**LAUNCH, "uncommitted": True})
    with pytest.raises(ConfigError, match="must be of committed code"):
        accept([tmp_path / "dirty"], checkout, experiments)
    fid(tmp_path / "own", 60.0, reference="own.npz")
    with pytest.raises(ConfigError, match=f"must have reference={REFERENCE} for table2/dit_s_2_softmax, got own.npz"):
        accept([tmp_path / "own"], checkout, experiments)
    assert not (checkout / FOLDER).exists()


def test_results_other_steps_and_decays_skipped(checkout, tmp_path, capsys):
    """After `eval_fid.py step=all ema=all`, the last step and first decay are accepted; alone, others are refused."""
    experiments = Experiments(row_config, gpu_hours)
    decays = "trainer.ema_decay=[0.9999,0.99]"
    for number, step, decay in ((1, 200_000, 0.9999), (2, 400_000, 0.99), (0, 400_000, 0.9999)):
        fid(tmp_path / "a", 60.0 + number, decays, number=number, step=step, ema_decay=decay)
    with_decays = Experiments(lambda name, *more: row_config(name, *more, decays), gpu_hours)
    files = accept([tmp_path / "a"], checkout, with_decays)
    assert [file.name for file in files] == ["evaluation-inception-50000-0.json", "metrics.jsonl"]
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("50000-1.json: step 200000 of 400000")
    assert second.endswith("EMA decay 0.99, the tables use the first one, 0.9999")
    (result,) = read_results(checkout / FOLDER)
    assert "| H100, 8 ranks | abcdef0 | `python train_cls.py seed=0` |" in records_table([result], checkout / FOLDER)

    fid(tmp_path / "b", 61.0, step=200_000)
    epochs = ("trainer.steps=null", "trainer.epochs=80")
    fid(tmp_path / "c", 61.0, *epochs, step=9, log=[{"step": 9, "epoch": 40.0}])
    for name, steps in (("b", "200000 of 400000"), ("c", "9 of 18")):
        with pytest.raises(ConfigError, match=f"must be of the last step and .* of a run, got step {steps}"):
            accept([tmp_path / name], checkout, experiments)


def test_results_invalid_together_with_accepted_ones_not_written(checkout, tmp_path):
    """The same run with a longer log is a second result of its config and seed."""
    path = accuracy(tmp_path / "run", 98.0)
    accept([tmp_path / "run"], checkout, EXPERIMENTS)
    before = sorted((checkout / FOLDER).rglob("*"))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 9, "again": 1}\n')
    record = read_record(path) | {"log": log_identity(tmp_path / "run")}
    path.write_text(json.dumps({**record, "sha256": seal(record)}))
    with pytest.raises(ConfigError, match=f"{checkout}/docs/results/run-.* and .* have the same config, seed and"):
        accept([tmp_path / "run"], checkout, EXPERIMENTS)
    assert sorted((checkout / FOLDER).rglob("*")) == before


def test_results_measured_differently_are_other_rows(checkout, tmp_path):
    for seed, data in enumerate("dde"):
        accuracy(tmp_path / f"v{seed}", 98.0, f"seed={seed}", data={"name": "digits", "sha256": data})
    for seed, reference in enumerate(("a.npz", "b.npz")):
        path = fid(tmp_path / f"g{seed}", 60.0, f"seed={seed}", reference=reference)
        record = json.loads(path.read_text()) | {"count": 10_000}
        path.write_text(json.dumps(record | {"sha256": seal(record)}))
    accept([tmp_path / name for name in ("v0", "v1", "v2", "g0", "g1")], checkout, EXPERIMENTS)
    rows = [line.split(" | ") for line in render(checkout, EXPERIMENTS)["records"].splitlines()[2:]]
    assert [row[4] for row in rows] == ["2", "1", "1", "1"]
    assert [row[0].rpartition(", ")[2] for row in rows[:2]] == ["measured.data=d", "measured.data=e"]
    assert [row[0].rpartition(", ")[2] for row in rows[2:]] == ["measured.reference=a.npz", "measured.reference=b.npz"]


def row_config(name, *overrides):
    script = "train_gen" if name.startswith("table2") else "train_cls"
    return config_of(script, f"experiment={name}", "data.root=elsewhere", *overrides)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["compute"].update(uncommitted=True), "must be of committed code"),
        (lambda r: r["compute"].update(commit=None), "must be of committed code"),
        (lambda r: r["training"].update(uncommitted=True), "must be of committed code"),
        (lambda r: r["training"]["launches"][0].update(commit=None), "must be of committed code"),
        (lambda r: r["training"]["launches"][0].update(uncommitted=True), "must be of committed code"),
        (lambda r: r.update(log=None), "has no log of its run"),
        (lambda r: r["weights"].update(step=8), "must be of a finished run, got step 8 of 9"),
        (lambda r: r["log"].update(sha256="0"), r"metrics\.jsonl with sha256 0; copy it from the run"),
        (lambda r: r.pop("config"), "has no field config"),
    ],
)
def test_results_unsuitable_record_refused(change, message, checkout, tmp_path):
    path = accuracy(tmp_path / "run", 98.0)
    record = copy.deepcopy(read_record(path))
    change(record)
    path.write_text(json.dumps({**record, "sha256": seal(record)}))
    with pytest.raises(ConfigError, match=message):
        accept([tmp_path / "run"], checkout, EXPERIMENTS)
    assert not (checkout / FOLDER).exists()


def test_results_record_without_command_refused(checkout, tmp_path):
    """Records of samples by earlier versions are readable, but not accepted."""
    path = measured(tmp_path / "old", "dit_s_2_vca", 62.0)
    record = committed(json.loads(path.read_text()))
    del record["compute"]["command"], record["log"]
    path.write_text(json.dumps(record | {"sha256": seal(record)}))
    assert read_record(path)["metrics"]["frechet"] == 62.0
    with pytest.raises(ConfigError, match="has no command and log, which earlier versions did not record"):
        accept([tmp_path / "old"], checkout, EXPERIMENTS)
    with pytest.raises(ConfigError, match=r"no evaluation-\*\.json in "):
        accept([checkout / "docs"], checkout, EXPERIMENTS)


def test_results_block_without_end_or_with_unknown_name_refused():
    blocks = {"a": "new\n"}
    assert rewrite("x\n<!-- results: a -->\nold\n<!-- end -->\ny\n", blocks) == (
        "x\n<!-- results: a -->\nnew\n<!-- end -->\ny\n"
    )
    with pytest.raises(ConfigError, match="a block must be one of a and have an end, got b"):
        rewrite("<!-- results: b -->\n<!-- end -->\n", blocks)
    with pytest.raises(ConfigError, match="a block must be '<!-- results: NAME -->'"):
        rewrite("<!-- results: a -->\nold\n", blocks)


def test_accuracy_record_missing_field_or_changed_value_refused(tmp_path):
    path = accuracy(tmp_path / "run", 98.0)
    record = read_record(path)
    assert record["log"] == log_identity(tmp_path / "run")
    assert record["training"]["launches"][0]["command"] == LAUNCH["command"]
    for section in (record, record["weights"], record["compute"], record["metrics"]):
        for key in section:
            less = copy.deepcopy(record)
            part = less if section is record else next(less[k] for k in record if record[k] is section)
            del part[key]
            path.write_text(json.dumps(less | ({"sha256": seal(less)} if key != "sha256" or part is not less else {})))
            with pytest.raises(ConfigError, match="has no field"):
                read_record(path)
    path.write_text(json.dumps({**record, "count": 1}))
    with pytest.raises(ConfigError, match="has changed since"):
        read_record(path)
