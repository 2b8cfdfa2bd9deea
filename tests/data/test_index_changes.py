"""When an index is built again: it is corrupt, or the files changed since."""

import itertools
import json
import os
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.data.forms import CLASSES, photos
from tests.data.test_index import contents, load, stored
from vca.data.formats import FORMATS
from vca.runtime.errors import ConfigError


def edit_meta(**changes):
    def edit(path):
        content = json.loads(path.read_text())
        content["meta"] |= changes
        path.write_text(json.dumps(content))

    return edit


def edit_array(change):
    def edit(path):
        array = next(path.parent.glob("train-*.images.npy"))
        change(array)

    return edit


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


CORRUPT = {
    "empty meta data": lambda path: path.write_text(""),
    "truncated meta data": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "not an object": lambda path: path.write_text("[1]"),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
    "other version": edit_meta(version=999),
    "other number of images": edit_meta(identity={"files": 1, "bytes": 1, "sha256": ""}),
    "other class names": edit_meta(classes=list(CLASSES[::-1])),
    "unknown field": edit_meta(more=1),
    "no states": edit_meta(watched={}),
    "empty array": edit_array(lambda path: path.write_bytes(b"")),
    "truncated array": edit_array(lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "flipped bit": edit_array(lambda path: flip(path, -1)),
    "missing array": edit_array(Path.unlink),
    "other array": edit_array(lambda path: np.save(path, np.zeros(3))),
    "pickle": edit_array(lambda path: np.save(path, np.array([Trap(path.parents[2] / "trapped")]))),
}


@pytest.mark.parametrize("what", CORRUPT)
def test_corrupt_index_is_built_again(copy, capsys, what):
    root = copy()
    expected = contents(load(root))
    CORRUPT[what](stored(root))
    capsys.readouterr()
    assert contents(load(root)) == expected
    assert f"indexed {len(expected)} images of train" in capsys.readouterr().out
    assert not (root.parent / "trapped").exists()
    assert contents(load(root)) == expected
    assert capsys.readouterr().out == ""


def kill_at(number, moments):
    """Kill this process if it is the moment `number`."""
    if next(moments) == number:
        os.kill(os.getpid(), signal.SIGKILL)


def test_index_killed_at_each_write(copy, capfd):
    """A build that is killed before or after a rename leaves no index, or the complete one."""
    root, replace = copy(), os.replace
    expected = contents(load(root))
    for count in range(20):
        shutil.rmtree(root / ".vca_index", ignore_errors=True)
        pid = os.fork()
        if not pid:
            moments = itertools.count()
            os.replace = lambda *paths: (kill_at(count, moments), replace(*paths), kill_at(count, moments))  # noqa: B023
            load(root)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        complete = bool(list((root / ".vca_index").glob("train-????????????.json")))
        capfd.readouterr()
        assert contents(load(root)) == expected
        assert ("indexed" in capfd.readouterr().out) != complete
        if not status:
            break
    assert count == 12  # two renames for each of three files


def add_member(path):
    shutil.copy(path, path.with_suffix(".old"))
    with open(path, "ab") as file:
        file.write(b"\0" * 512)
    return f"{path} changed (size {path.with_suffix('.old').stat().st_size} -> {path.stat().st_size})"


def touch(path):
    os.utime(path, ns=(0, 0))
    return f"{path} changed since"


def same_size_and_time(path):
    """Change the name of the class in the zip, in all places, so that it remains a zip."""
    content, status = path.read_bytes(), path.stat()
    path.write_bytes(content.replace(b"n01440764", b"n01440765"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return f"{path} changed since"


ALTERED = {"size": add_member, "time": touch, "content": same_size_and_time}


@pytest.mark.parametrize("how", ALTERED)
def test_changed_archive_is_indexed_again(copy, capsys, how):
    root = copy("class tars" if how == "size" else "zip")
    before = load(root).index.meta.identity
    capsys.readouterr()
    said = ALTERED[how](next(root.glob("*train*")))
    after = load(root).index.meta.identity
    out = capsys.readouterr().out
    assert f"data: {said}" in out
    assert "indexing train again" in out
    assert (before == after) == (how != "content")


def test_new_shard_is_indexed(copy, capsys):
    root = copy("webdataset")
    load(root)
    capsys.readouterr()
    shutil.copy(root / "shards-train-000000.tar", root / "shards-train-000003.tar")
    with pytest.raises(ConfigError, match=r"shards-train-000003\.tar: .* exists twice; remove or rename it"):
        load(root)
    assert f"data: {root} changed since it was indexed" in capsys.readouterr().out


def test_new_class_tar_is_indexed(copy, tmp_path):
    """The first start was refused, since a class was missing."""
    folders, tars = copy() / "train", tmp_path / "tars" / "train"
    tars.mkdir(parents=True)

    def write_tar(name):
        with tarfile.open(tars / f"{name}.tar", "w") as archive:
            for file in sorted((folders / name).iterdir()):
                archive.add(file, file.name)

    write_tar(CLASSES[0])
    write_tar(CLASSES[1])
    with pytest.raises(ConfigError, match="has 2 classes"):
        load(tars.parent)
    write_tar(CLASSES[2])
    assert len(load(tars.parent)) == 12


def add_image(folder):
    shutil.copy(folder / f"{folder.name}_0.JPEG", folder / "new.JPEG")
    return 1, folder


def remove_image(folder):
    (folder / f"{folder.name}_0.JPEG").unlink()
    return -1, folder


def replace_image(folder):
    image = folder / f"{folder.name}_0.JPEG"
    image.write_bytes((folder / f"{folder.name}_3.JPEG").read_bytes())
    return 0, image


def add_class(folder):
    shutil.copytree(folder, folder.parent / "n99999999")
    return len(list(folder.iterdir())), folder.parent


@pytest.mark.parametrize("change", [add_image, remove_image, replace_image, add_class])
def test_changed_class_folder_is_indexed_again(copy, capsys, change):
    root = copy()
    before = load(root).index.meta.identity
    capsys.readouterr()
    more, changed = change(root / "train" / CLASSES[1])
    if change is add_class:
        shutil.copytree(root / "train" / "n99999999", root / "val" / "n99999999")
    after = load(root, num_classes=len(CLASSES) + (change is add_class)).index.meta.identity
    assert f"data: {changed} changed " in capsys.readouterr().out
    assert after["files"] == before["files"] + more
    assert after["sha256"] != before["sha256"]


@pytest.mark.parametrize("form", ["folder", "webdataset"])
def test_change_while_indexing_is_noticed(copy, capsys, monkeypatch, form):
    """The index has the state of the files before they were read."""
    root, scan = copy(form), FORMATS[form]

    def scan_and_change(paths, split):
        found = scan(paths, split)
        if form == "folder":
            add_image(root / "train" / CLASSES[0])
        else:
            (root / "shards-train-000000.tar").touch()
        return found

    with monkeypatch.context() as patch:
        patch.setitem(FORMATS, form, scan_and_change)
        assert len(load(root)) == 12
    assert len(load(root)) == (13 if form == "folder" else 12)
    assert "changed since it was indexed; indexing train again" in capsys.readouterr().out


def test_image_replaced_in_place_is_an_error_when_it_is_read(tmp_path):
    """A start compares the size of some images only."""
    root = photos(tmp_path / "data", per_class=100, size=8)
    images = load(root)
    read = {Path(name).name for name in images.index.meta.watched}
    index = next(index for index in range(len(images)) if Path(images.index.name(index)).name not in read)
    with open(images.index.source(index), "ab") as file:
        file.write(b"more")
    images = load(root)
    changed = rf"its size changed from (\d+) to \d+ bytes since .*{images.index.place} was written"
    with pytest.raises(ValueError, match=changed):
        images[index]


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_moved_data_keeps_its_index(copy, tmp_path, capsys, form):
    root = copy(form)
    expected = contents(load(root))
    capsys.readouterr()
    moved = shutil.copytree(root, tmp_path / "elsewhere" / "renamed")
    shutil.rmtree(root)
    assert contents(load(moved)) == expected
    assert capsys.readouterr().out == ""
    for path in moved.rglob("*"):
        os.utime(path)  # as a copy that does not keep times
    assert contents(load(moved)) == expected
    assert "indexing train again" in capsys.readouterr().out
