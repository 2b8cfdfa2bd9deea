"""The index as a file: where it is stored, what a second start reads, and how processes and ranks share it."""

import multiprocessing
import os
import pickle
import platform
import shutil
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.forms import ARCHIVES, CLASSES, photos
from tests.processes import run_script
from vca.data import load_dataset
from vca.data.config import DataConfig
from vca.data.formats import open_file
from vca.data.index import read_index
from vca.runtime.distributed import ONE, World
from vca.runtime.errors import ConfigError

opened: list[tuple[str, str]] | None = None  # audit events (event, path) while a test records them


def record(event, arguments):
    if opened is not None and event in ("open", "os.scandir", "os.listdir"):
        opened.append((event, os.fsdecode(arguments[0])))


sys.addaudithook(record)


def load(root, world=ONE, **options):
    config = DataConfig("imagefolder", str(root), **{"num_classes": len(CLASSES), **options})
    return load_dataset(config, True, world)


def stored(root):
    """The path of the one index of the training images."""
    (path,) = Path(root, ".vca_index").glob("train-????????????.json")
    return path


def contents(images):
    return [
        (images.index.name(index), int(images.labels[index]), images.index.read(index)) for index in range(len(images))
    ]


def second_start(root, monkeypatch):
    """Load the data again; return the audit events, and the paths of `stat` calls below the folder of the data.

    Those of the index's own files are left out.
    """
    global opened
    stats, stat = [], os.stat
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path, *rest, **more: (stats.append(path), stat(path, *rest, **more))[1])
        opened = []
        try:
            load(root)
        finally:
            events, opened = opened, None
    paths = [Path(os.fsdecode(path)) for path in stats if not isinstance(path, int)]
    return events, sorted(path for path in paths if root in path.parents and path.parent.name != ".vca_index")


def test_second_start_of_class_folders(tmp_path, monkeypatch, capsys):
    root = photos(tmp_path / "data", per_class=100, size=8)
    load(root)
    capsys.readouterr()
    events, stats = second_start(root, monkeypatch)
    assert capsys.readouterr().out == ""
    assert {event for event, _ in events} == {"open"}  # no folder is listed
    assert {Path(path).parent for _, path in events} == {root / ".vca_index"}
    folders = [root / "train", *(root / "train").iterdir()]
    images = [path for path in stats if path not in folders]
    assert sorted(folders + images) == stats  # each once
    assert 64 <= len(images) <= 75  # of 300
    assert all(path.parent in folders for path in images)


@pytest.mark.parametrize("form", ARCHIVES)
def test_second_start_of_archives(copy, monkeypatch, form):
    root = copy(form)
    files = sorted([*map(Path, load(root).index.files), *root.glob("classes.txt")])
    events, stats = second_start(root, monkeypatch)
    assert {event for event, _ in events} == {"open"}
    assert sorted(Path(path) for event, path in events if event == "open" and ".vca_index" not in path) == files
    assert stats == files


def test_index_beside_read_only_data(copy, tmp_path, capsys, monkeypatch):
    """A file with its name stands for a folder that cannot be created."""
    root = copy()
    expected = contents(load(root))
    shutil.rmtree(root / ".vca_index")
    (root / ".vca_index").touch()
    capsys.readouterr()
    assert contents(load(root)) == expected
    assert "not stored, since no folder can be written; set data.index" in capsys.readouterr().out
    cache = tmp_path / "cache"
    assert contents(load(root, index=str(cache))) == expected
    assert str(cache) in capsys.readouterr().out
    assert contents(load(root, index=str(cache))) == expected
    assert capsys.readouterr().out == ""


def test_index_on_read_only_disk(small_disk, tmp_path, capsys):
    root, cache = photos(small_disk / "data"), tmp_path / "cache"
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for _ in range(2):
        assert len(load(root, index=str(cache))) == 12
    assert capsys.readouterr().out.count("indexed") == 1
    assert len(list(cache.rglob("train-*.json"))) == 1


def test_stale_index_beside_data_that_became_read_only(copy, tmp_path, capsys, monkeypatch):
    """The newer index in `data.index` is used."""
    root, cache = copy(), str(tmp_path / "cache")
    load(root)
    shutil.copy(next((root / "train").rglob("*_0.JPEG")), root / "train" / CLASSES[0] / "new.JPEG")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != root / ".vca_index")
    assert len(load(root, index=cache)) == 13
    assert "indexing train again" in capsys.readouterr().out
    assert len(load(root, index=cache)) == 13
    assert capsys.readouterr().out == ""


def test_two_data_sets_in_one_data_index(tmp_path, capsys):
    cache, roots = str(tmp_path / "cache"), [tmp_path / "a" / "data", tmp_path / "b" / "data"]
    for number, root in enumerate(roots):
        photos(root, per_class=2 + number)
        (root / ".vca_index").touch()
    for expected in ([6, 9], [6, 9]):
        assert [len(load(root, index=cache)) for root in roots] == expected
    assert capsys.readouterr().out.count("indexed") == 2


def test_changed_num_classes_with_index_refused(copy):
    root = copy()
    load(root)
    with pytest.raises(ConfigError, match=r"data\.num_classes is 7, but .*train has 3 classes"):
        load(root, num_classes=7)


def test_pickled_images_share_the_index(copy):
    """Loader workers that are spawned read the file; its arrays are not sent."""
    root = copy()
    first = load(root)
    for images in (first, load(root)):
        message = pickle.dumps(images)
        assert len(message) < 2000
        received = pickle.loads(message)
        assert contents(received) == contents(images)
        assert isinstance(received.index.rows.base, np.memmap)
        assert isinstance(received.index.names.base, np.memmap)
    assert read_index(stored(root), root).meta == first.index.meta


def test_index_of_a_root_in_the_home_folder(copy, monkeypatch, capsys):
    root = copy()
    load(root)
    capsys.readouterr()
    monkeypatch.setenv("HOME", str(root.parent))
    assert len(load(f"~/{root.name}")) == 12
    assert capsys.readouterr().out == ""


def rewrite_zip(root):
    """Write the training images in reverse order, as a copy of another node may have them."""
    with zipfile.ZipFile(root / "train.zip") as archive:
        images = [(info, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(root / "train.zip", "w") as archive:
        for info, content in reversed(images):
            archive.writestr(info, content)


def test_pickled_images_do_not_get_the_index_of_changed_files(copy):
    root = copy("zip")
    message = pickle.dumps(load(root))
    rewrite_zip(root)
    load(root)
    with pytest.raises(ValueError, match="was written again, since the images changed; rerun the command"):
        pickle.loads(message)


def build(root, barrier, results):
    barrier.wait(30)
    results.put(contents(load(root)))


@pytest.mark.process
def test_eight_processes_build_at_once(copy):
    root, context = copy(), multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()
    processes = [context.Process(target=build, args=(root, barrier, results)) for _ in range(8)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    expected = contents(load(root))
    assert all(images == expected for images in found)
    assert not list((root / ".vca_index").glob("*.tmp"))
    assert len(list((root / ".vca_index").iterdir())) == 3


@dataclass(frozen=True)
class OtherRank(World):
    """Rank 1 of two, which receives what rank 0 found."""

    identity: dict | None = None
    place: Path | None = None

    arrays: dict | None = None

    def wait_for_slowest(self):
        return nullcontext()

    def from_main(self, function):
        return self.place, self.arrays

    def broadcast(self, value):
        return self.identity

    def raise_first(self, error):
        if error is not None:
            raise error


def rank_1(main, local_rank, place):
    return OtherRank(
        1, local_rank, 2, torch.device("cpu"), None, main.index.meta.identity, place, main.index.meta.arrays
    )


@pytest.mark.parametrize("local_rank", [0, 1])
def test_rank_without_the_files_of_rank_0(copy, tmp_path, local_rank):
    """It opens its own copy of the same data."""
    main = load(copy())
    root = photos(tmp_path / "copy")
    images = load(root, rank_1(main, local_rank, tmp_path / "missing" / "train.json"))
    assert contents(images) == contents(main)
    assert images.index.files == [str(root / "train")]


def test_rank_of_same_node_reads_the_index_of_rank_0(copy, monkeypatch):
    root = copy()
    main = load(root)
    monkeypatch.setattr("vca.data.indexing.find_index", None)
    monkeypatch.setattr("vca.data.indexing.build_index", None)
    assert contents(load(root, rank_1(main, 1, main.index.place))) == contents(main)


def test_rank_of_other_node_checks_its_files(copy, tmp_path):
    """Its index is in the folder with the name of that of rank 0, but describes files that changed."""
    main = load(copy())
    root = photos(tmp_path / "copy")
    place = load(root).index.place
    shutil.copy(root / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG", root / "train" / CLASSES[0] / "new.JPEG")
    with pytest.raises(
        ConfigError, match=r"rank 1 on .* has other data \(13 images, not the 12 of rank 0\); copy it again"
    ):
        load(root, rank_1(main, 0, place))
    with pytest.raises(ConfigError, match=r"rank 1 on .*: data\.root must be a folder"):
        load(tmp_path / "missing", rank_1(main, 0, place))


def test_rank_does_not_read_the_index_of_another_nodes_copy(copy, tmp_path):
    """A node whose archive has another order stored its index in the shared `data.index` after rank 0 did."""
    root, cache = copy("zip"), str(tmp_path / "cache")
    (root / ".vca_index").touch()
    main = load(root, index=cache)
    place, expected = main.index.place, contents(main)
    shutil.copytree(root, tmp_path / "kept")
    rewrite_zip(root)
    assert load(root, index=cache).index.place == place
    shutil.copy2(tmp_path / "kept" / "train.zip", root / "train.zip")
    open_file.cache_clear()
    assert contents(load(root, rank_1(main, 1, place), index=cache)) == expected


# Each rank loads data of its own folder, as nodes with local disks do.
STARTS = """
import os, sys
from vca.data import load_dataset
from vca.data.config import DataConfig
from vca.runtime import distributed
from vca.runtime.errors import ConfigError

os.chdir(f"{sys.argv[1]}/rank{os.environ['RANK']}")
with distributed.start("cpu") as world:
    try:
        load_dataset(DataConfig("imagefolder", "data", num_classes=3), True, world)
    except ConfigError as error:
        sys.exit(f"on rank {world.rank}: {error}")
"""


@pytest.mark.process
def test_ranks_with_different_data_refused_on_all(tmp_path):
    for rank in (0, 1):
        photos(tmp_path / f"rank{rank}" / "data", per_class=3 + rank)
    script = tmp_path / "start.py"
    script.write_text(STARTS)
    done = run_script(script, str(tmp_path), ranks=2)
    assert done.returncode == 1
    for rank in (0, 1):
        assert (
            f"on rank {rank}: rank 1 on {platform.node()} has other data (12 images, not the 9 of rank 0)"
            in done.stderr
        )


SLOW_START = """
import sys, time
from vca.data import load_dataset
from vca.data.config import DataConfig
from vca.data.formats import FORMATS, scan_folder
from vca.runtime import distributed

FORMATS["folder"] = lambda paths, split: (time.sleep(7), scan_folder(paths, split))[1]
with distributed.start("cpu", timeout_minutes=5 / 60) as world:
    images = load_dataset(DataConfig("imagefolder", sys.argv[1], num_classes=3), True, world)
    print(f"rank {world.rank} has {len(images)} images")
"""


@pytest.mark.process
def test_ranks_wait_for_an_index_longer_than_for_a_collective(copy, tmp_path):
    script = tmp_path / "start.py"
    script.write_text(SLOW_START)
    done = run_script(script, str(copy()), ranks=2)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank} has 12 images" in done.stdout
