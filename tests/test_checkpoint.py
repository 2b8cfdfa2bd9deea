"""Checkpoints: complete or absent, whatever happens while they are written."""

import multiprocessing
import os
import signal
import time
from contextlib import nullcontext

import pytest
import torch

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


def test_kill_while_saving(tmp_path):
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
def test_damaged_newest_is_passed_over(saved, damage):
    path = list_checkpoints(saved)[-1]
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        middle = content.find(torch.full((4,), 3.0).numpy().tobytes())
        content[middle + 2] ^= 0xFF
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "flipped": content}[damage])
    with pytest.warns(UserWarning, match=r"step_00000003.pt is damaged .*; taking the one before it"):
        state = load_latest(saved)
    assert state["step"] == 2


def test_all_damaged_is_none(saved):
    for path in list_checkpoints(saved):
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        assert load_latest(saved) is None


def test_keeps_the_newest(saved):
    save_checkpoint(saved, 4, {"step": 4}, keep=2)
    assert [path.name for path in list_checkpoints(saved)] == ["step_00000003.pt", "step_00000004.pt"]
    assert sorted(path.name for path in saved.iterdir()) == ["step_00000003.pt", "step_00000004.pt"]


@pytest.mark.parametrize("failures", [1, 2])
def test_an_oserror_is_retried_once(saved, monkeypatch, failures):
    write, calls = checkpoint.write_atomically, []

    def flaky(path, state):
        calls.append(path)
        if len(calls) <= failures:
            raise OSError(28, "No space left on device")
        write(path, state)

    monkeypatch.setattr(checkpoint, "write_atomically", flaky)
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)
    twice = pytest.raises(OSError, match="No space left") if failures == 2 else nullcontext()
    with pytest.warns(UserWarning, match="trying once more"), twice:
        save_checkpoint(saved, 4, {"step": 4})
    assert load_latest(saved)["step"] == (4 if failures == 1 else 3)


def test_numbers_not_names_or_times_decide(saved):
    save_checkpoint(saved, 100_000_000, {"step": 100_000_000}, keep=4)
    os.utime(saved / "step_00000001.pt")
    assert load_latest(saved)["step"] == 100_000_000
