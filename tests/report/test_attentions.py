"""Table of attentions: reported and measured values are in different columns, and only like is subtracted from like."""

import json

import pytest

from scripts.table import experiment_config
from tests.report.test_results import accuracy, fid, row_config
from vca.attention import variant_name
from vca.config import compose
from vca.config.composition import CONFIGS
from vca.evaluation.record import seal
from vca.report.accepted import read_results
from vca.report.attentions import HEAD, attentions_table
from vca.report.paper import PAPER, REPORTED, T1
from vca.report.tables import row_of
from vca.runtime.rundir import to_dict

COLUMNS = HEAD.split(" | ")
DEIT = ("experiment=table1/deit_tiny_vca", "data.root=somewhere")


def rows(folder):
    """The rows of the table for the records in a folder, as dicts by column."""
    lines = attentions_table(read_results(folder), row_config).splitlines()
    return [dict(zip(COLUMNS, line[2:-2].split(" | "), strict=True)) for line in lines[2:]]


def found(folder, attention, model):
    """Reported value, measured value and difference of the measured rows of an attention and model."""
    return [
        (row["reported"], row["measured here"].partition(":")[0], row["difference"])
        for row in rows(folder)
        if (row["attention"], row["model"]) == (f"`{attention}`", model) and row["measured here"] != "not measured"
    ]


def test_attentions_without_records(tmp_path):
    """Every reported row is there, with its source and recipe, and nothing is measured."""
    table = rows(tmp_path)
    assert {row["measured here"] for row in table} == {"not measured"}
    assert {row["difference"] for row in table} == {"-"}
    key = ["attention", "model", "metric", "reported", "source", "recipe of the reported value"]
    shown = sorted([row[name] for name in key] for row in table)
    value = {row: "-" if row.value is None else str(row.value) for row in REPORTED}
    wanted = [[f"`{r.method}`", r.model, r.metric, value[r], r.source, r.recipe.text] for r in REPORTED]
    assert shown == sorted(wanted)
    (vca,) = (row for row in table if row["attention"] == "`vca`" and row["model"] == "deit_tiny")
    assert (vca["reported"], vca["reported params (M)"], vca["reported MACs (G)"]) == ("75.6", "6.0", "1.2")
    assert vca["source"] == "arXiv 2511.00833, NeurIPS 2025, Table 1"


def test_attentions_difference_of_the_same_recipe(tmp_path):
    """Mean ± std over two seeds, minus the reported value; Agent's figure needs Agent's recipe."""
    for seed, top1 in enumerate((75.0, 76.0)):
        accuracy(tmp_path / f"v{seed}", top1, *DEIT, f"seed={seed}", images=50_000)
    agent = ("attention=agent", "recipe=agent_deit_tiny")
    accuracy(tmp_path / "agent", 75.5, *DEIT, *agent, images=50_000, weights="raw")
    assert found(tmp_path, "vca", "deit_tiny") == [("75.6", "75.50 ± 0.71 (2 seeds)", "-0.10")]
    assert found(tmp_path, "agent", "deit_tiny") == [("74.9", "75.50 (1 seed)", "+0.60")]


def test_attentions_difference_of_a_published_experiment(tmp_path):
    """Circulant Attention's model has no class token; DeiT's model with its attention is another one."""
    published = ("experiment=published/circulant_deit_tiny", "data.root=somewhere")
    accuracy(tmp_path / "a", 74.5, *published, images=50_000, weights="raw")
    assert found(tmp_path, "circulant", "deit_tiny") == [("75.0", "74.50 (1 seed)", "-0.50")]
    accuracy(tmp_path / "b", 74.0, *published, "model.conditional_position=false", images=50_000, weights="raw")
    assert ("75.0", "74.00 (1 seed)", "-") in found(tmp_path, "circulant", "deit_tiny")


@pytest.mark.parametrize(
    ("overrides", "length"),
    [
        (["attention=agent"], "300 epochs"),  # DeiT's recipe
        (["attention=agent", "recipe=agent_deit_tiny", "optim.clip_grad=1"], "300 epochs"),
        (["attention=agent", "recipe=agent_deit_tiny", "trainer.epochs=100"], "100 epochs"),
        (["attention=agent", "recipe=agent_deit_tiny", "model.num_heads=6"], "300 epochs"),
    ],
    ids=str,
)
def test_attentions_other_recipe_or_model_has_no_difference(overrides, length, tmp_path):
    accuracy(tmp_path / "a", 75.5, *DEIT, *overrides, images=50_000)
    assert found(tmp_path, "agent", "deit_tiny") == [("74.9", "75.50 (1 seed)", "-")]
    (row,) = (row for row in rows(tmp_path) if row["measured here"] != "not measured")
    assert row["measured here"] == f"75.50 (1 seed): imagefolder, deit_tiny, {length}"


@pytest.mark.parametrize(
    ("overrides", "images", "model"),
    [
        ([*DEIT, "data.num_classes=100"], 50_000, "deit_tiny"),  # other data
        (DEIT, 1000, "deit_tiny"),  # a part of the validation split
        ([*DEIT, "data.img_size=160"], 50_000, "deit_tiny"),
        ([*DEIT, "attention=vca_no_local"], 50_000, "deit_tiny"),
        ([], 359, "deit_mini"),  # a smaller model on digits
    ],
    ids=str,
)
def test_attentions_other_data_or_variant_is_its_own_row(overrides, images, model, tmp_path):
    accuracy(tmp_path / "a", 90.0, *overrides, images=images)
    (row,) = (row for row in rows(tmp_path) if row["measured here"] != "not measured")
    assert (row["model"], row["reported"], row["difference"], row["source"]) == (model, "-", "-", "-")
    assert len(rows(tmp_path)) == len(REPORTED) + 1


def test_attentions_fid(tmp_path):
    """FID needs the protocol and reference of Table 2; MHLA's figure for softmax has another recipe."""
    fid(tmp_path / "a", 67.0)
    both = [("67.2", "67.00 (1 seed)", "-0.20"), ("68.4", "67.00 (1 seed)", "-")]
    assert found(tmp_path, "softmax", "dit_s_2") == both
    fid(tmp_path / "b", 66.0, reference="own.npz")
    assert ("67.2", "66.00 (1 seed)", "-") in found(tmp_path, "softmax", "dit_s_2")
    path = fid(tmp_path / "c", 2.0)
    record = json.loads(path.read_text())
    record["samples"]["made"]["protocol"] = "dit_best"
    path.write_text(json.dumps(record | {"sha256": seal(record)}))
    assert found(tmp_path, "softmax", "dit_s_2")[-1] == ("-", "2.00 (1 seed)", "-")
    fid(tmp_path / "d", 57.0, "experiment=table2/sit_s_2_softmax")
    assert found(tmp_path, "softmax", "sit_s_2") == [("57.3", "57.00 (1 seed)", "-0.30")]


def test_attentions_reported_once():
    keys = [(row.method, row.model, row.metric, row.source) for row in REPORTED]
    assert len(set(keys)) == len(keys)
    assert len(PAPER) == sum(row.source.startswith(T1.partition(", Table")[0]) for row in REPORTED)
    assert {row.method for row in REPORTED} >= {"softmax", "vca", "agent", "mhla", "circulant", "ttt", "inline", "mala"}
    assert all(row.source and row.recipe.text for row in REPORTED)


@pytest.mark.process
def test_attentions_methods_are_variants_of_a_config_file():
    files = (CONFIGS / "attention").glob("*.yaml")
    chosen = [("table1/deit_tiny_softmax", f"attention={file.stem}") for file in files]
    chosen.append(("published/mhla_deit_tiny",))
    variants = {variant_name(experiment_config(*words)["attention"]) for words in chosen}
    variants.add(variant_name(to_dict(compose("train_gen", ["experiment=published/mhla_dit_s_2"]))["attention"]))
    assert {row.method for row in REPORTED} <= variants


SAME = sorted({(row.model, row.recipe.same) for row in REPORTED if row.recipe.same and row.value})


@pytest.mark.process
@pytest.mark.parametrize(("model", "recipe"), SAME)
def test_attentions_recipe_of_a_reported_figure_composes(model, recipe):
    """The experiment with the recipe is of the row's model; for the paper's figures, the recipe is the experiment's."""
    name = recipe if "/" in recipe else f"table{2 if recipe == 'dit' else 1}/{model}_softmax"
    config = experiment_config(name) if "/" in recipe else experiment_config(name, f"recipe={recipe}")
    objective = config.get("objective", {}).get("name")
    assert row_of(config["model"]["name"], objective, config["data"]["img_size"]) == model
    if not recipe.startswith("agent"):
        assert config == experiment_config(name)
