"""Table of a sweep over attentions: the paired difference, by hand."""

import json

from vca.report.sweep_table import sweep_table

NAME = "top-1 (%): difference to softmax (paired)"


def run(folder, attention, seed, top1, lr=0.001, **values):
    """A finished run with made-up values."""
    config = {
        "name": folder.name,
        "seed": seed,
        "attention": {"name": attention},
        "trainer": {"steps": 4, "epochs": 1},
        "data": {"name": "digits"},
        "optim": {"lr": lr},
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 4, "val/top1": top1, **values}) + "\n")
    return folder


def cells(runs):
    head, _, *rows = (line[2:-2].split(" | ") for line in sweep_table(runs).splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_sweep_table_paired_difference(tmp_path):
    """Differences 1.0, 2.0 and 3.0: mean 2, std 1, although each attention varies by more than that over the seeds.

    Agent has one seed of softmax and one of its own; only the common one counts.
    """
    softmax, vca, agent = (50.0, 60.0, 40.0), (51.0, 62.0, 43.0), {2: 39.5, 7: 99.0}
    runs = [run(tmp_path / f"s{seed}", "softmax", seed, top1) for seed, top1 in enumerate(softmax)]
    runs += [run(tmp_path / f"v{seed}", "vca", seed, top1) for seed, top1 in reversed(list(enumerate(vca)))]
    runs += [run(tmp_path / f"a{seed}", "agent", seed, top1) for seed, top1 in agent.items()]
    first, second, third = cells(runs)
    assert (first["top-1 (%)"], first[NAME]) == ("50.00 +- 10.00", "-")
    assert (second["top-1 (%)"], second[NAME]) == ("52.00 +- 9.54", "+2.00 +- 1.00 (3 seeds)")
    assert third[NAME] == "-0.50 (1 seed)"
    assert [row["seeds"] for row in (first, second, third)] == ["3", "3", "2"]


def test_sweep_table_pairs_differ_only_in_the_attention(tmp_path):
    """Each learning rate has its own baseline; the config without one has no difference."""
    runs = [run(tmp_path / f"s{lr}", "softmax", 0, 10.0 * lr, lr=lr) for lr in (1, 2)]
    runs += [run(tmp_path / f"v{lr}", "vca", 0, 10.0 * lr + lr, lr=lr) for lr in (1, 2, 3)]
    assert [row[NAME] for row in cells(runs)] == ["-", "-", "+1.00 (1 seed)", "+2.00 (1 seed)", "-"]


def test_sweep_table_without_pairs_has_no_column(tmp_path):
    one = [run(tmp_path / "v", "vca", 0, 50.0), run(tmp_path / "a", "agent", 0, 51.0)]
    other_seed = run(tmp_path / "s", "softmax", 1, 50.0)
    alone = run(tmp_path / "s0", "softmax", 0, 50.0)
    assert "paired" not in sweep_table(one)
    assert "paired" not in sweep_table([*one, other_seed])
    assert "paired" not in sweep_table([alone, other_seed])
    assert NAME in sweep_table([*one, alone])


def test_sweep_table_paired_difference_of_the_ema_if_all_runs_have_one(tmp_path):
    runs = [
        run(tmp_path / name, name, 0, 50.0, **{"ema/top1": ema}) for name, ema in (("softmax", 60.0), ("vca", 64.5))
    ]
    assert cells(runs)[1][f"EMA {NAME}"] == "+4.50 (1 seed)"
    runs.append(run(tmp_path / "agent", "agent", 0, 49.0))
    assert [row[NAME] for row in cells(runs)] == ["-", "+0.00 (1 seed)", "-1.00 (1 seed)"]
