"""Checkpoints: complete or absent, whatever happens while they are written."""

import multiprocessing
import os
import resource
import signal
import time
from contextlib import nullcontext

import pytest
import torch

from vca.runtime.errors import ConfigError
from vca.training import checkpoint
from vca.training.checkpoint import list_checkpoints, load_checkpoint, load_latest, save_checkpoint


def save_forever(folder, first, ready):
    """Body of the process to be killed."""
    ready.send(True)
    for step in range(first, first + 100_000):
        save_checkpoint(folder, step, {"step": step, "x": torch.full((200_000,), float(step))})


@pytest.fixture
def saved(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"step": step, "x": torch.full((1000,), float(step))}, keep=3)
    return tmp_path


@pytest.mark.process
def test_checkpoint_kill_during_save_keeps_newest(tmp_path):
    """`kill -9` inside save, 50 times: the newest checkpoint always loads, and none is lost."""
    newest, context = 0, multiprocessing.get_context("fork")
    for attempt in range(50):
        here, there = context.Pipe()
        writer = context.Process(target=save_forever, args=(tmp_path, newest + 1, there))
        writer.start()
        here.recv()
        time.sleep(0.002 * (1 + attempt))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        found = list_checkpoints(tmp_path)
        if not found:
            continue
        state = load_checkpoint(found[-1])
        assert torch.equal(state["x"], torch.full((200_000,), float(state["step"])))
        assert state["step"] >= newest
        newest = state["step"]
    assert newest > 50


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_checkpoint_damaged_newest_skipped(saved, damage):
    path = list_checkpoints(saved)[-1]
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        middle = content.find(torch.full((4,), 3.0).numpy().tobytes())
        content[middle + 2] ^= 0xFF
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "flipped": content}[damage])
    with pytest.warns(UserWarning, match=r"step_00000003.pt is damaged .*; passing it over"):
        state = load_latest(saved)
    assert state["step"] == 2


def test_checkpoint_all_damaged_refused(saved):
    """Starting over would write over what is left of the run."""
    for path in list_checkpoints(saved):
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ConfigError, match="all checkpoints in"):
        load_latest(saved)


def test_checkpoint_empty_folder_gives_none(tmp_path):
    assert load_latest(tmp_path) is None


@pytest.mark.parametrize("keep", [1, 2])
def test_checkpoint_damaged_file_set_aside_not_kept(saved, keep):
    """A damaged newer file is set aside; what is written next is kept, whatever its number."""
    list_checkpoints(saved)[-1].write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        assert load_latest(saved)["step"] == 2
    assert (saved / "step_00000003.pt.damaged").exists()
    save_checkpoint(saved, 3, {"step": 3}, keep=keep)
    assert load_latest(saved)["step"] == 3


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 8])
def test_checkpoint_keep_bounds_number_of_files(tmp_path, keep):
    for step in range(1, 11):
        save_checkpoint(tmp_path, step, {"step": step}, keep=keep)
        assert len(list_checkpoints(tmp_path)) == min(step, keep)


def test_checkpoint_keep_retains_newest(saved):
    save_checkpoint(saved, 4, {"step": 4}, keep=2)
    assert [path.name for path in list_checkpoints(saved)] == ["step_00000003.pt", "step_00000004.pt"]
    assert sorted(path.name for path in saved.iterdir()) == ["step_00000003.pt", "step_00000004.pt"]


@pytest.mark.parametrize("failures", [1, 2])
def test_checkpoint_oserror_retried_once(saved, monkeypatch, failures):
    """The disk refuses the bytes, once or twice."""
    fsync, calls = os.fsync, []

    def flaky(descriptor):
        calls.append(descriptor)
        if len(calls) <= failures:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flaky)
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)
    twice = pytest.raises(OSError, match="No space left") if failures == 2 else nullcontext()
    with pytest.warns(UserWarning, match="trying once more"), twice:
        save_checkpoint(saved, 4, {"step": 4})
    assert load_latest(saved)["step"] == (4 if failures == 1 else 3)


def test_checkpoint_full_disk_raises_oserror(tmp_path):
    """Really: a limit on the size of files."""

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            checkpoint.write_checkpoint(tmp_path / "step_00000001.pt", {"x": torch.zeros(100_000)})
        except OSError:
            os._exit(7)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 7
    assert list_checkpoints(tmp_path) == []


def test_checkpoint_newest_by_step_number(saved):
    save_checkpoint(saved, 100_000_000, {"step": 100_000_000}, keep=4)
    os.utime(saved / "step_00000001.pt")
    assert load_latest(saved)["step"] == 100_000_000
