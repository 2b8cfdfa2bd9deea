"""Checkpoints: complete or absent, also after a kill or an error while they are written."""

import errno
import multiprocessing
import os
import resource
import signal
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tests.support import assert_same
from vca.runtime.errors import ConfigError
from vca.training import checkpoint
from vca.training.checkpoint import KEYS, list_checkpoints, load_checkpoint, load_latest, save_checkpoint


def state(step, size=1000):
    """State of a checkpoint at a step."""
    return {**dict.fromkeys(KEYS), "step": step, "model": {"x": torch.full((size,), float(step))}}


def save_forever(folder, first, ready):
    """Body of the process to be killed."""
    ready.send(True)
    for step in range(first, first + 100_000):
        save_checkpoint(folder, step, state(step, 200_000))


@pytest.fixture
def saved(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, state(step), keep=3)
    return tmp_path


@pytest.mark.process
def test_checkpoint_kill_during_save_keeps_newest(tmp_path):
    """After each of 50 `kill -9` during a save the newest checkpoint loads, and none is lost."""
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
        saved = load_checkpoint(found[-1])
        assert torch.equal(saved["model"]["x"], torch.full((200_000,), float(saved["step"])))
        assert saved["step"] >= newest
        newest = saved["step"]
    assert newest > 10  # saves finish between the kills, also on a loaded machine


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_weight(path):
    content = bytearray(path.read_bytes())
    content[content.find(torch.full((4,), 3.0).numpy().tobytes()) + 2] ^= 0xFF
    path.write_bytes(content)


def make_folder(path):
    path.unlink()
    path.mkdir()


def make_dangling_link(path):
    path.unlink()
    path.symlink_to("gone.pt")


DAMAGES = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "a weight flipped": flip_weight,
    "a list": lambda path: torch.save([1, 2], path),
    "a key missing": lambda path: torch.save({"step": 3, "model": {}}, path),
    "of another step": lambda path: torch.save(state(2), path),
    "a step that is no number": lambda path: torch.save(state(3) | {"step": "three"}, path),
    "another object": lambda path: torch.save(Path(), path),
    "text": lambda path: path.write_text("\N{SNOWMAN}"),
    "a folder": make_folder,
    "a dangling link": make_dangling_link,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_checkpoint_damaged_newest_skipped(saved, damage):
    DAMAGES[damage](list_checkpoints(saved)[-1])
    with pytest.warns(
        UserWarning, match=r"step_00000003.pt is .*\); falling back to the previous checkpoint"
    ) as caught:
        assert load_latest(saved)["step"] == 2
    assert "\n" not in str(caught[0].message)
    assert load_latest(saved)["step"] == 2
    assert (saved / "step_00000003.pt.damaged").is_symlink() or (saved / "step_00000003.pt.damaged").exists()


def test_checkpoint_flipped_byte_of_zip_directory_never_unseen(saved):
    """Flip each byte of the directory at the file's end: the checkpoint is skipped, or loads unchanged."""
    path, good = list_checkpoints(saved)[-1], state(3)
    content = path.read_bytes()
    skipped = 0
    for place in range(content.find(b"PK\x01\x02"), len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 0xFF
        path.write_bytes(flipped)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = load_latest(saved, set_aside=False)
        assert_same(found, state(2) if caught else good)
        skipped += bool(caught)
    assert skipped > 300


def test_checkpoint_all_damaged_refused_every_time(saved):
    """Starting at step 0 would overwrite the run."""
    for path in list_checkpoints(saved):
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="corrupt"), pytest.raises(ConfigError, match="all checkpoints in"):
        load_latest(saved)
    with pytest.raises(ConfigError, match=r"all checkpoints in .* are corrupt; restore one from a backup"):
        load_latest(saved)


def test_checkpoint_unreadable_disk_is_no_damage(saved, monkeypatch):
    """A file is not renamed after a transient read error."""

    def refuse(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint.zipfile, "ZipFile", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        load_latest(saved)
    assert len(list_checkpoints(saved)) == 3


def test_checkpoint_empty_folder_gives_none(tmp_path):
    assert load_latest(tmp_path) is None


@pytest.mark.parametrize("keep", [1, 2])
def test_checkpoint_damaged_file_set_aside_not_kept(saved, keep):
    """A corrupt file is renamed; the next checkpoint is kept, even with a lower or equal step."""
    list_checkpoints(saved)[-1].write_bytes(b"")
    with pytest.warns(UserWarning, match="corrupt"):
        assert load_latest(saved)["step"] == 2
    assert (saved / "step_00000003.pt.damaged").exists()
    save_checkpoint(saved, 3, state(3), keep=keep)
    assert load_latest(saved)["step"] == 3


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 8])
def test_checkpoint_keep_bounds_number_of_files(tmp_path, keep):
    for step in range(1, 11):
        save_checkpoint(tmp_path, step, state(step), keep=keep)
        assert len(list_checkpoints(tmp_path)) == min(step, keep)


def test_checkpoint_keep_retains_newest(saved):
    save_checkpoint(saved, 4, state(4), keep=2)
    assert [path.name for path in list_checkpoints(saved)] == ["step_00000003.pt", "step_00000004.pt"]
    assert sorted(path.name for path in saved.iterdir()) == ["step_00000003.pt", "step_00000004.pt"]


@pytest.mark.parametrize("failures", [1, 2])
def test_checkpoint_oserror_retried_once(saved, monkeypatch, failures):
    """Writing fails once or twice."""
    fsync, calls = os.fsync, []

    def flaky(descriptor):
        calls.append(descriptor)
        if len(calls) <= failures:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flaky)
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)
    twice = pytest.raises(OSError, match="No space left") if failures == 2 else nullcontext()
    with pytest.warns(UserWarning, match="retrying once"), twice:
        save_checkpoint(saved, 4, state(4))
    assert load_latest(saved)["step"] == (4 if failures == 1 else 3)


def test_checkpoint_full_disk_raises_oserror(tmp_path):
    """With a real limit on the size of files."""

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
    save_checkpoint(saved, 100_000_000, state(100_000_000), keep=4)
    os.utime(saved / "step_00000001.pt")
    assert load_latest(saved)["step"] == 100_000_000
