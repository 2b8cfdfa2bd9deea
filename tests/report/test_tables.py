"""`scripts/table.py`: rows by what a run was, seeds with their spread, nothing beside what was not measured alike."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from tests.processes import ROOT, run_script
from vca.config import compose, read_protocol
from vca.evaluation.compare import Metrics
from vca.evaluation.features import FeatureSet, Moments
from vca.evaluation.record import make_record, seal
from vca.generation.objective import SamplerConfig
from vca.report.tables import TABLES, gather, lines_of
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError
from vca.runtime.rundir import to_dict

EXTRACTOR = {"name": "inception", "sha256": "i", "published": True, "dtype": "float32", "tf32": False}
ONE = World(0, 0, 1, torch.device("cpu"))
EXPERIMENTS = ROOT / "configs" / "experiment"


def trained(folder, experiment, top1, *overrides, epoch=300, **more):
    """A run of `train_cls.py` as its directory tells it."""
    config = compose("train_cls", [f"experiment=table1/{experiment}", "data.root=somewhere", *overrides])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    last = {"step": 1251 * epoch, "val/top1": top1, "val/loss": 1.0, "val/images": 50_000, "ema/top1": top1 + 1}
    lines = [{"step": 1251 * epoch, "epoch": float(epoch), "loss": 2.0}, {**last, **more}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def measured(
    folder, experiment, fid, *overrides, count=50_000, published=True, made=None, reference="r", run=None, **more
):
    """A record of `eval_fid.py` for a row of Table 2, complete and sealed."""
    config = to_dict(compose("train_gen", [f"experiment=table2/{experiment}", "data.root=somewhere", *overrides]))
    protocol = "dit_table" if config["objective"]["name"] == "diffusion" else "sit_sde250"
    fixed = read_protocol(protocol)
    origin = {"run": folder.name, "step": 400_000, "weights": "ema", "weights_sha256": folder.name}
    autoencoder = {"name": "diffusers", "sha256": "a", "channels": 4, "factor": 8, "scale": 0.18215, "shift": 0.0}
    how = {
        "protocol": protocol,
        "seed": 0,
        "labels": "random",
        "sampler": to_dict(SamplerConfig(**{**fixed["sampler"], "method": config["sampler"]["method"]}))
        | fixed["sampler"],
        "precision": "fp32",
        "tf32": False,
        "compute_batch_size": 32,
        "device": "a GPU",
        "torch": "2.15",
        "origin": {**origin, "training": {key: config[key] for key in ("seed", "data", "augment", "optim", "trainer")}},
        **{key: config[key] for key in ("model", "attention", "objective")},
        "autoencoder": {"source": "sd-vae-ft-mse", **autoencoder},
        "nfe": {"mean": 250.0, "min": 250, "max": 250},
        **(made or {}),
    }
    size = config["data"]["img_size"]
    sides = [
        FeatureSet(name, count, (size, size, 3), name, Moments(np.zeros(2), np.eye(2))) for name in ("s", reference)
    ]
    identity = {"name": "inception", "sha256": "i", "published": published}
    extractor = SimpleNamespace(identity=lambda: identity)
    settings = {"kid": None, "inception_score_split": 5000, "neighbours": None}
    record = {**make_record(Metrics(fid), settings, *sides, extractor, how, [], 32, ONE, run), **more}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evaluation-inception-50000-0.json"
    path.write_text(json.dumps({**record, "sha256": seal(record)}))
    return path


def table(name, folder, **options):
    return {line["row"]: line for line in lines_of(TABLES[name], gather([folder], **options).measured)}


def test_tables_table1_rows_from_runs(tmp_path):
    for seed, top1 in enumerate((75.0, 75.5, 76.3)):
        trained(tmp_path / "a" / f"whatever{seed}", "deit_tiny_vca", top1, f"seed={seed}")
    trained(tmp_path / "b", "deit_tiny_softmax", 72.25)
    trained(tmp_path / "c", "cswin_tiny_vca", 83.0, epoch=310)
    trained(tmp_path / "d", "swin_tiny_vca", 50.0, epoch=299)
    rows = table("table1", tmp_path, weights="raw")
    tiny = rows["DeiT-Tiny"]
    assert (tiny["softmax paper"], tiny["softmax measured"], tiny["softmax std"]) == ("72.2", "72.25", "")
    assert [tiny[f"VCA {key}"] for key in ("paper", "measured", "std", "seeds")] == ["75.6", "75.60", "0.66", "3"]
    assert tiny["VCA runs"] == " ".join(str(tmp_path / "a" / f"whatever{seed}") for seed in range(3))
    assert rows["CSwin-Tiny"]["VCA measured"] == "83.00"
    assert rows["Swin-Tiny"]["VCA measured"] == ""
    assert gather([tmp_path]).left_out == [f"{tmp_path / 'd'}: not finished (step {1251 * 299})"]
    assert table("table1", tmp_path)["DeiT-Tiny"]["softmax measured"] == "73.25"


def test_tables_table2_rows_from_records(tmp_path):
    for seed, fid in enumerate((62.0, 63.0)):
        measured(tmp_path / f"v{seed}", "dit_s_2_vca", fid, f"seed={seed}")
    measured(tmp_path / "s", "dit_s_2_softmax", 67.0, "trainer.workers=3")
    measured(tmp_path / "sit", "sit_s_2_vca", 53.5)  # another protocol, as the paper's
    measured(tmp_path / "512", "dit_s_2_512_vca", 90.0)
    measured(tmp_path / "few", "dit_s_4_vca", 1.0, count=10_000)
    measured(tmp_path / "guided", "dit_s_4_vca", 2.0, made={"protocol": "dit_best"})
    rows = table("table2", tmp_path)
    assert [rows["DiT-S/2"][f"{column} measured"] for column in ("softmax", "VCA")] == ["67.00", "62.50"]
    assert rows["DiT-S/2"]["VCA seeds"] == "2"
    assert rows["SiT-S/2"]["VCA measured"] == "53.50"
    assert (rows["DiT-S/2 at 512 px"]["VCA measured"], rows["DiT-S/2 at 512 px"]["VCA paper"]) == ("90.00", "")
    assert rows["DiT-S/4"]["VCA measured"] == ""
    left_out = gather([tmp_path]).left_out
    assert any(
        "1.00 of 10,000 samples, protocol dit_table; the tables need FID-50K with protocol=dit_table" in line
        for line in left_out
    )
    assert any("protocol dit_best" in line for line in left_out)


def test_tables_skip_other_steps_and_decays(tmp_path):
    """The records of `eval_fid.py step=all ema=all` do not compete with that of the last step and first decay."""
    decays = "trainer.ema_decay=[0.9999,0.99]"
    for number, (step, decay) in enumerate([(400_000, 0.9999), (200_000, 0.9999), (400_000, 0.99)]):
        path = measured(tmp_path / str(number), "dit_s_2_vca", 60.0 + number, decays)
        record = json.loads(path.read_text())
        record["samples"]["made"]["origin"] |= {"step": step, "ema_decay": decay}
        path.write_text(json.dumps({**record, "sha256": seal(record)}))
    assert table("table2", tmp_path)["DiT-S/2"]["VCA measured"] == "60.00"
    left_out = gather([tmp_path]).left_out
    assert left_out[0].endswith("step 200000 of 400000")
    assert left_out[1].endswith("EMA decay 0.99, the tables use the first one, 0.9999")


def test_tables_repeated_evaluations_count_as_one_seed(tmp_path):
    path = measured(tmp_path / "a" / "v0", "dit_s_2_vca", 62.0)
    (tmp_path / "a" / "copy.json").write_text(path.read_text())  # by another name, too
    (tmp_path / "b").mkdir()
    measured(tmp_path / "b" / "v0", "dit_s_2_vca", 64.0, made={"seed": 5})  # other samples of the same weights
    trained(tmp_path / "c", "deit_tiny_vca", 75.0)
    found = gather([tmp_path, tmp_path / "c"]).measured
    (line,) = (line for line in lines_of(TABLES["table2"], found) if line["row"] == "DiT-S/2")
    assert [line[f"VCA {key}"] for key in ("measured", "std", "seeds")] == ["62.67", "", "1"]
    assert lines_of(TABLES["table1"], found)[0]["VCA seeds"] == "1"


def test_tables_foreign_configs_and_samples_skipped(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    path = measured(tmp_path / "a", "dit_s_2_vca", 62.0)
    record = json.loads(path.read_text())
    record["samples"]["made"] = None
    path.write_text(json.dumps({**record, "sha256": seal(record)}))
    found = gather([tmp_path])
    assert (found.measured, found.left_out) == ([], [f"{path}: sampling settings unknown (not a sample.py folder)"])
    del record["samples"]["made"]
    path.write_text(json.dumps({**record, "sha256": seal(record)}))
    with pytest.raises(ConfigError, match=r"has no field samples\.made and \d+ more"):
        gather([tmp_path])


def test_tables_unused_runs_named_with_reason(tmp_path):
    """A run on other data, a generator without a record, and an EMA with a horizon longer than the run."""
    trained(tmp_path / "small", "deit_tiny_vca", 50.0, "data=cifar10", "data.root=x")
    ema = trained(tmp_path / "ema", "deit_tiny_vca", 75.0, **{"ema/top1": 5.8})
    config = to_dict(compose("train_gen", ["experiment=table2/dit_s_2_vca", "data.root=somewhere"]))
    (tmp_path / "gen").mkdir()
    (tmp_path / "gen" / "config.json").write_text(json.dumps({**config, "inputs": {}}))
    found = gather([tmp_path])
    assert found.left_out[0] == f"{tmp_path / 'small'}: data is not ImageNet-1K, got cifar10"
    assert found.left_out[1].startswith(f"{tmp_path / 'gen'}: no FID-50K record")
    assert found.warnings[0].startswith(f"{ema}: top-1 of the EMA, 5.80 %, is below that of the raw weights, 75.00 %")


def test_tables_irrelevant_differences_accepted(tmp_path):
    """Device, micro-batches, logging, place of the weights, and other metrics."""
    measured(tmp_path / "a", "dit_s_2_vca", 62.0)
    other = {"kid": None, "inception_score_split": None, "neighbours": None}
    measured(
        tmp_path / "b", "dit_s_2_softmax", 67.0, "trainer.micro_batch_size=32", "trainer.log_every=7", settings=other
    )
    assert table("table2", tmp_path)["DiT-S/2"]["softmax measured"] == "67.00"


def test_tables_table3_and_table4_ablation_rows(tmp_path):
    """An ablation is known by its options; the whole of VCA stands in both tables."""
    for name, option in (("one", "stage2=plain"), ("two", "stage1=plain")):
        trained(tmp_path / name, "deit_tiny_vca", {"one": 75.2, "two": 75.3}[name], f"attention.{option}")
        measured(tmp_path / name, "dit_s_2_vca", {"one": 64.0, "two": 65.0}[name], f"attention.{option}")
    streams = ("attention.positive_stream=embedding", "attention.negative_stream=embedding")
    trained(tmp_path / "embedding", "deit_tiny_vca", 75.0, *streams)
    trained(tmp_path / "all", "deit_tiny_vca", 75.7)
    trained(tmp_path / "other", "deit_tiny_vca", 10.0, "attention.contrast_grid=[8,8]")
    three, four = (table(name, tmp_path, weights="raw") for name in ("table3", "table4"))
    assert gather([tmp_path]).left_out[0].endswith("vca-contrast_grid_8x8 at 224 px")
    accuracy, fid = (f"{column} measured" for column in TABLES["table3"].columns)
    assert [three[row][accuracy] for row in ("Stage I only", "Stage II only", "VCA")] == ["75.20", "75.30", "75.70"]
    assert [three[row][fid] for row in ("Stage I only", "Stage II only", "VCA")] == ["64.00", "65.00", ""]
    assert [four[row][accuracy] for row in ("embedding only", "pool + embedding")] == ["75.00", "75.70"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "other"}, "reference.sha256: 'r' -> 'other'"),
        ({"made": {"precision": "bf16"}}, "samples.made.precision: 'fp32' -> 'bf16'"),
        ({"made": {"labels": "balanced"}}, "samples.made.labels"),
        ({"extractor": {**EXTRACTOR, "sha256": "j"}}, "extractor.sha256: 'i' -> 'j'"),
    ],
)
def test_tables_different_measurements_refused(change, message, tmp_path):
    measured(tmp_path / "a", "dit_s_2_vca", 62.0)
    measured(tmp_path / "b", "dit_b_2_softmax", 42.0, **change)
    with pytest.raises(ConfigError, match=f"a/.* and .*b/.* must have the same settings \\(.*{message}"):
        table("table2", tmp_path)


def test_tables_different_run_configs_refused(tmp_path):
    measured(tmp_path / "a", "dit_s_2_vca", 62.0)
    measured(tmp_path / "b", "dit_s_2_softmax", 62.0, "optim.lr=3e-4")
    with pytest.raises(ConfigError, match=r"origin\.training\.optim\.lr: 0.0003 -> 0.0001"):
        table("table2", tmp_path)
    trained(tmp_path / "c", "deit_tiny_vca", 75.0)
    trained(tmp_path / "d", "deit_tiny_softmax", 72.0, "trainer.global_batch_size=512")
    with pytest.raises(ConfigError, match=r"trainer.global_batch_size: 512 -> 1024"):
        table("table1", tmp_path)
    trained(tmp_path / "e" / "1", "pvt_tiny_vca", 75.0)
    trained(tmp_path / "e" / "2", "swin_tiny_vca", 75.0, **{"val/images": 49_999})
    with pytest.raises(ConfigError, match=r"images: 50000 -> 49999"):
        table("table1", tmp_path / "e")


def test_tables_paper_figures_equal_experiments():
    """Each row of Tables 1 and 2 is an experiment, whose first lines say what to expect."""
    for name in ("table1", "table2"):
        for label, cells in TABLES[name].rows:
            for cell, attention in zip(cells, ("softmax", "vca"), strict=True):
                stem = cell.model if name == "table1" else cell.model.replace("dit", label[:3].lower())
                size = "_512" if cell.size == 512 else ""
                text = (EXPERIMENTS / name / f"{stem}{size}_{attention}.yaml").read_text()
                assert label in text
                wanted = "is unknown" if cell.paper is None else f": {cell.paper}"
                assert wanted in text.splitlines()[1], text
        files = len(list((EXPERIMENTS / name).glob("*.yaml")))
        assert files == 2 * len(TABLES[name].rows)
        assert yaml.safe_load(text)


@pytest.mark.process
def test_table_script_writes_markdown_and_csv(tmp_path):
    def run(*arguments):
        return run_script("scripts/table.py", *map(str, arguments))

    runs = tmp_path / "runs"
    trained(runs / "a", "deit_tiny_vca", 75.0, "seed=0")
    trained(runs / "b", "deit_tiny_vca", 76.0, "seed=1")
    path = measured(runs / "c", "dit_s_2_vca", 62.5)
    done = run(runs, "--out", tmp_path / "tables")
    assert done.returncode == 0, done.stderr
    assert "| DeiT-Tiny | 72.2 | - | 75.6 | 76.50 +- 0.71 (2 seeds) |" in done.stdout
    assert (tmp_path / "tables" / "table2.md").read_text() in done.stdout
    with open(tmp_path / "tables" / "table2.csv") as file:
        lines = list(csv.DictReader(file))
    assert (lines[0]["row"], lines[0]["VCA measured"], lines[0]["VCA paper"]) == ("DiT-S/2", "62.50", "62.3")
    record = json.loads(path.read_text())
    del record["samples"]["made"]["sampler"]["cfg_scale"]
    path.write_text(json.dumps(record))
    done = run(runs)
    assert done.returncode == 2
    assert done.stderr.strip() == f"config error: {path} has no field samples.made.sampler.cfg_scale; evaluate again"
    assert run(tmp_path / "none").stderr.strip() == f"config error: not a directory: {tmp_path / 'none'}"
