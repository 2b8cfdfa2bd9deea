"""The files of a run directory: intact, corrupt, or on a full disk."""

import json
import warnings
from contextlib import suppress

import pytest
import torch

from vca.evaluation.record import training_section
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError
from vca.runtime.files import append_line, write_text
from vca.runtime.metrics_log import Reporter
from vca.runtime.rundir import RESUME_IGNORED_KEYS, RunDirectory, diff_configs, read_config


def test_compare_names_every_difference():
    here = {"a": 1, "b": {"c": 2, "d": [1]}, "out_dir": "x", "trainer": {"workers": 1}}
    there = {"a": 1, "b": {"c": 3, "e": 0}, "out_dir": "y", "trainer": {"workers": 2}}
    assert diff_configs(there, here, RESUME_IGNORED_KEYS) == [
        "b.c: 3 -> 2",
        "b.d: None -> [1]",
        "b.e: 0 -> None",
    ]


def test_run_directory_rewind_drops_later_records(tmp_path):
    folder = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        folder.append({"step": step})
    with open(folder.metrics_file, "a") as file:
        file.write('{"step": 4, "lo')  # a kill in mid-line
    folder.rewind(2)
    assert folder.records() == [{"step": 1}, {"step": 2}]
    assert RunDirectory(tmp_path / "new").records() == []


def test_launches_keep_uncommitted_changes_of_earlier_starts(tmp_path, monkeypatch):
    """A clean resume overwrites `uncommitted.diff`; accuracy records get the flag of each start."""
    for diff in ("a change", ""):
        monkeypatch.setattr("vca.runtime.rundir.provenance", lambda diff=diff: ("abcdef0", diff))
        RunDirectory(tmp_path).record_launch(World(0, 0, 1, torch.device("cpu")), 0, 0.0)
    training = training_section(tmp_path)
    assert [launch["uncommitted"] for launch in training["launches"]] == [True, False]
    assert training["uncommitted"] is False


DAMAGES = {
    "a block of NUL bytes": lambda lines: [*lines[:2], b"\0" * 4096 + lines[2], *lines[3:]],
    "a broken line in the middle": lambda lines: [*lines[:2], lines[2][:7], *lines[3:]],
    "a line of another encoding": lambda lines: [*lines[:2], "\N{SNOWMAN}".encode("utf-16"), *lines[3:]],
    "a line that is no record": lambda lines: [*lines[:2], b"5", *lines[3:]],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_run_directory_corrupt_line_dropped_and_kept_as_copy(tmp_path, damage):
    folder = RunDirectory(tmp_path)
    lines = [json.dumps({"step": step}).encode() for step in range(1, 6)]
    corrupt = b"".join(line + b"\n" for line in DAMAGES[damage](lines))
    folder.metrics_file.write_bytes(corrupt)
    assert folder.records() == [{"step": step} for step in (1, 2, 4, 5)]
    with pytest.warns(UserWarning, match=r"1 corrupt line\(s\); old file saved as metrics.jsonl.1"):
        folder.rewind(4)
    assert folder.metrics_file.read_text().splitlines() == [json.dumps({"step": step}) for step in (1, 2, 4)]
    assert (tmp_path / "metrics.jsonl.1").read_bytes() == corrupt


def test_run_directory_restart_at_step_0_keeps_copies(tmp_path):
    folder = RunDirectory(tmp_path)
    for number in (1, 2):
        folder.append({"step": 7 + number})
        with pytest.warns(UserWarning, match=rf"restarts at step 0; old file saved as metrics.jsonl.{number}"):
            folder.rewind(0)
        assert folder.records() == []
    assert (tmp_path / "metrics.jsonl.1").read_text() == '{"step": 8}\n'
    assert (tmp_path / "metrics.jsonl.2").read_text() == '{"step": 9}\n'
    (tmp_path / "metrics.jsonl.1").unlink()
    folder.append({"step": 10})
    with pytest.warns(UserWarning, match="metrics.jsonl.1"):
        folder.rewind(0)
    assert (tmp_path / "metrics.jsonl.2").read_text() == '{"step": 9}\n', "a copy was overwritten"


@pytest.mark.parametrize("content", [b"", b'{"seed": ', b"[1]", b"\xff\xfe{", b"\0" * 100])
def test_run_directory_corrupt_config_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config.json .*; remove it to resume this run") as refused:
        RunDirectory(tmp_path).check({"seed": 0})
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"config.json "):
        read_config(tmp_path)


def test_run_directory_removes_interrupted_files(tmp_path):
    folder = RunDirectory(tmp_path)
    folder.checkpoints.mkdir()
    for file in (tmp_path / "config.tmp", folder.checkpoints / "step_00000003.tmp"):
        file.write_bytes(b"half")
    folder.create({"seed": 0})
    assert not list(tmp_path.rglob("*.tmp"))


def fill(disk):
    """Write until no byte is free."""
    with open(disk / "filler", "wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            pass


@pytest.mark.process
def test_write_full_disk_says_space_and_leaves_old_file(small_disk):
    file = small_disk / "state.pt"
    write_text(file, "old")
    with pytest.raises(OSError, match=r"No space left on device, 3.0 MB needed, 2.1 MB free: '.*state.pt'"):
        write_text(file, "x" * 3_000_000)
    assert file.read_text() == "old"
    assert [path.name for path in small_disk.iterdir()] == ["state.pt"]


@pytest.mark.process
def test_append_full_disk_leaves_whole_lines(small_disk):
    file = small_disk / "metrics.jsonl"
    append_line(file, "first")
    fill(small_disk)
    with pytest.raises(OSError, match=r"No space left on device, 0.0 MB needed, 0.0 MB free: '.*metrics.jsonl'"):
        append_line(file, "y" * 10_000)
    assert file.read_text() == "first\n"
    append_line(file, "second")
    assert file.read_text() == "first\nsecond\n"


@pytest.mark.process
def test_reporter_full_disk_warns_once(small_disk, capsys):
    reporter = Reporter(RunDirectory(small_disk), total_steps=9)
    fill(small_disk)
    with pytest.warns(UserWarning, match=r"metrics.jsonl cannot be written .*; the run continues without it"):
        reporter.write({"step": 1, "loss": 0.5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reporter.write({"step": 2, "loss": 0.5})
    assert capsys.readouterr().out.splitlines() == ["step 1/9  loss 0.5", "step 2/9  loss 0.5"]


def test_write_folder_gone_is_one_line(tmp_path):
    with pytest.raises(OSError, match=r"No such file or directory, 0.0 MB needed, unknown space free") as refused:
        write_text(tmp_path / "gone" / "file", "x")
    assert "\n" not in str(refused.value)
