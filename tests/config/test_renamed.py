"""Renamed config keys, options and values: errors that give the new name; configs of earlier runs still load."""

import json

import pytest

from vca.config import compose
from vca.runtime.errors import ConfigError
from vca.runtime.renamed import ADDED, RENAMED
from vca.runtime.rundir import RunDirectory, read_config, to_dict


@pytest.mark.parametrize("old", RENAMED)
def test_renamed_old_name_is_error_with_new_name(old):
    for override in [old] if "=" in old else [f"{old}=1", f"+{old}=1"]:
        with pytest.raises(ConfigError) as refused:
            compose("train_gen", [override])
        assert str(refused.value).endswith(("was renamed to " + RENAMED[old], f"was renamed to '{RENAMED[old]}'"))
        assert old in str(refused.value)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("schedule", ["per_step", "per_epoch", "per_epoch_late", "constant"])
@pytest.mark.parametrize("script", ["train_cls", "train_gen"])
def test_renamed_run_with_old_keys_can_be_resumed(script, schedule, compiled, tmp_path):
    unit = "step" if schedule == "constant" else schedule.removeprefix("per_")
    kind = "constant" if schedule == "constant" else "cosine"
    options = [f"optim.schedule={kind}", f"optim.schedule_unit={unit}"]
    now = to_dict(compose(script, [*options, f"trainer.compile={'default' if compiled else 'off'}"]))
    before = json.loads(json.dumps(now))
    for old, new in RENAMED.items():
        group, _, key = new.partition(".")
        if "=" not in old and key in before.get(group, {}):
            before[group][old.partition(".")[2]] = before[group].pop(key)
    for (group, kind), added in ADDED.items():
        if kind in (None, before[group]["name"], before[group].get("family")):
            before[group] = {key: value for key, value in before[group].items() if key not in added}
    before["optim"] |= {"schedule": schedule}
    del before["optim"]["schedule_unit"]
    before["trainer"]["compile"] = compiled
    if script == "train_gen":  # keys of train_cls.py that train_gen.py once had
        before["trainer"] |= {"eval_batch_size": 250, "init_from": None, "init_weights": "ema", "eval_only": False}
    assert "global_batch" in before["trainer"]
    assert "gate" not in before["attention"]
    assert "conditional_position" not in before["model"]
    (tmp_path / "config.json").write_text(json.dumps(before))
    assert read_config(tmp_path) == json.loads(json.dumps(now))
    RunDirectory(tmp_path).check(now)
