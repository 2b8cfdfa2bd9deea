"""Loggers: a failing or hanging one stops no run, TensorBoard's files equal `metrics.jsonl`, names are checked."""

import json
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_cls
import train_gen
from tests.support import SMALL_DIT, TINY, metrics, untimed
from vca.config import compose
from vca.runtime import loggers
from vca.runtime.errors import ConfigError
from vca.runtime.loggers import Backend, LoggedRun, LoggerThread, Table, WandbConfig, start_loggers, table_of
from vca.runtime.metrics_log import Reporter
from vca.runtime.rundir import RunDirectory


class Working(Backend):
    """A logger that works."""

    def __init__(self, of=None):
        self.calls = []

    def record(self, record):
        self.calls.append(("record", record))

    def picture(self, step, key, file):
        self.calls.append(("picture", step, key, file.name))

    def table(self, step, key, table):
        self.calls.append(("table", step, key, table))

    def close(self):
        self.calls.append(("close",))


def raises(*_):
    raise OSError("no space")


def hangs(*_):
    threading.Event().wait()


BROKEN = {
    f"{method} {how.__name__}": type("Broken", (Working,), {method: how})
    for method in ("__init__", "record", "picture", "table", "close")
    for how in (raises, hangs)
}


def logged(tmp_path, backend):
    """Write a report, an evaluation and a picture with this logger and a working one; return the seconds and calls."""
    start, working = time.monotonic(), Working()
    reporter = Reporter(RunDirectory(tmp_path))
    reporter.loggers = [LoggerThread("broken", backend, 0.2), LoggerThread("working", lambda: working, 5.0)]
    reporter.write({"step": 1, "loss": 2.0, "lr": 0.1})
    reporter.picture(1, "grid", tmp_path / "a.png")
    reporter.write({"step": 1, "val/top1": 50.0})
    reporter.close()
    return time.monotonic() - start, working.calls


@pytest.mark.parametrize("how", BROKEN)
def test_logger_failure_affects_neither_file_nor_other_loggers(how, tmp_path):
    with pytest.warns(UserWarning, match=r"^broken (is off .*: OSError|did not finish within 0.2)"):
        seconds, calls = logged(tmp_path, BROKEN[how])
    assert seconds < 4
    assert metrics(tmp_path) == [{"step": 1, "loss": 2.0, "lr": 0.1}, {"step": 1, "val/top1": 50.0}]
    assert [call[0] for call in calls] == ["record", "picture", "record", "table", "close"]
    assert calls[3][1:] == (1, "evaluations", Table(["step", "val/top1"], [[1, 50.0]]))


def test_hanging_loggers_share_one_wait(tmp_path):
    reporter = Reporter(RunDirectory(tmp_path))
    reporter.loggers = [LoggerThread(name, BROKEN["record hangs"], 1.0) for name in ("one", "other")]
    reporter.write({"step": 1, "loss": 2.0, "lr": 0.1})
    start = time.monotonic()
    with pytest.warns(UserWarning, match=r"did not finish within 1 s") as warned:
        reporter.close()
    assert 0.9 < time.monotonic() - start < 1.8
    assert [str(one.message).split()[0] for one in warned] == ["one", "other"]


def test_logger_missing_package_is_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    of = LoggedRun(tmp_path, "run", {}, 0, WandbConfig())
    with pytest.warns(UserWarning, match="^broken is off for the rest of this run: ModuleNotFoundError"):
        _, calls = logged(tmp_path, partial(loggers.TensorBoard, of))
    assert len(calls) == 5


class StubRun:
    """A run of wandb that keeps what it is sent."""

    def __init__(self):
        self.rows, self.summary = [], {}

    def define_metric(self, *_, **__):
        pass

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        pass


@pytest.fixture
def wandb(monkeypatch):
    """A module whose `started` lists the options and the run of each `init`."""
    module = SimpleNamespace(started=[], Image=str, Table=lambda columns, data: (columns, data))

    def init(**options):
        module.started.append((options, StubRun()))
        return module.started[-1][1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_loggers_wandb_and_its_mode_imply_each_other(tmp_path, wandb):
    """`wandb.mode=offline` alone starts wandb; `logger=[wandb]` alone is online; neither starts nothing."""
    names = []
    for options in (["wandb.mode=offline"], ["logger=[wandb]"], ["logger=[wandb]", "wandb.mode=offline"], []):
        config = compose("train_cls", options)
        threads = start_loggers(config.logger, LoggedRun(tmp_path, "run", {}, 0, config.wandb))
        loggers.close_loggers(threads)
        names.append([thread.name for thread in threads])
    assert names == [["wandb"], ["wandb"], ["wandb"], []]
    assert [options["mode"] for options, _ in wandb.started] == ["offline", "online", "offline"]


def test_loggers_wrong_names_refused():
    for value, message in (
        ("[tensorbord]", r"names of wandb, tensorboard, got \['tensorbord'\]"),
        ("[wandb,wandb]", r"a list of different names .* got \['wandb', 'wandb'\]"),
        ("wandb", "logger must be a list"),
    ):
        with pytest.raises(ConfigError, match=message):
            compose("train_cls", [f"logger={value}"])


def test_table_of_records_and_markdown():
    table = table_of([{"step": 1, "a": 0.123456}, {"step": 2, "b": None}])
    assert table == Table(["step", "a", "b"], [[1, 0.123456, None], [2, None, None]])
    assert table.markdown() == "| step | a | b |\n| --- | --- | --- |\n| 1 | 0.1235 |  |\n| 2 |  |  |"


def read_events(run):
    """Return all scalars as `key -> [(step, value)]`, and the accumulator."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}, events


def scalars_of(records):
    """Return the numbers of `metrics.jsonl` as float32, in the form of `read_events`."""
    found = {}
    for record in records:
        for key, value in record.items():
            if value is not None and key not in ("step", "consumed"):
                found.setdefault(key, []).append((record["step"], float(np.float32(value))))
    return found


@pytest.mark.process
def test_tensorboard_equals_metrics_file_after_resume(tmp_path):
    """A resume from an earlier checkpoint, with fewer reports: the later points of the first process are gone."""
    options = [*TINY, "trainer.steps=6", "trainer.checkpoint_every=3", "trainer.ema_decay=0.5", f"out_dir={tmp_path}"]
    train_cls.run(compose("train_cls", [*options, "name=plain"]))
    options += ["name=run", "logger=[tensorboard]"]
    train_cls.run(compose("train_cls", options))
    run = tmp_path / "run"
    assert untimed(run) == untimed(tmp_path / "plain")
    scalars, events = read_events(run)
    assert scalars == scalars_of(metrics(run))
    assert [step for step, _ in scalars["loss"]] == [1, 2, 3, 4, 5, 6]
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    text = "".join(line.removeprefix("    ") for line in config.splitlines())
    assert json.loads(text) == json.loads((run / "config.json").read_text())

    (run / "checkpoints" / "step_00000006.pt").unlink()
    train_cls.run(compose("train_cls", [*options, "trainer.log_every=6"]))
    scalars, events = read_events(run)
    assert scalars == scalars_of(metrics(run))
    assert [step for step, _ in scalars["loss"]] == [1, 2, 3, 6]
    table = events.Tensors("evaluations/text_summary")[-1]
    last = metrics(run)[-1]
    assert table.tensor_proto.string_val[0].decode() == table_of([last]).markdown()
    assert last["val/images"] == 359


@pytest.mark.process
def test_loggers_get_sample_grids(tmp_path, wandb):
    """The grids of a generator: in TensorBoard pixel by pixel, in wandb as files, the numbers as a table."""
    options = [*SMALL_DIT, "trainer.steps=2", "trainer.eval_every=1", "trainer.log_every=1", "trainer.ema_decay=0.5"]
    options += [f"out_dir={tmp_path}", "name=run", "logger=[tensorboard,wandb]"]
    train_gen.run(compose("train_gen", options))
    run = tmp_path / "run"
    scalars, events = read_events(run)
    assert scalars == scalars_of(metrics(run))
    images = events.Images("sample_grid")
    files = [run / "samples" / f"step_{step:08d}.png" for step in (1, 2)]
    assert [image.step for image in images] == [1, 2]
    for image, file in zip(images, files, strict=True):
        (tmp_path / "image.png").write_bytes(image.encoded_image_string)
        shown, saved = (np.asarray(Image.open(path).convert("RGB")) for path in (tmp_path / "image.png", file))
        assert np.array_equal(shown, saved)
        assert saved.std() > 0
    ((_, sent),) = wandb.started
    grids = [row for row in sent.rows if "sample_grid" in row]
    assert grids == [{"step": step, "sample_grid": str(file)} for step, file in zip((1, 2), files, strict=True)]
    assert [row for row in sent.rows if "sample_grid" not in row] == metrics(run)
    columns, rows = sent.summary["evaluations"]
    assert [dict(zip(columns, row, strict=True)) for row in rows] == [r for r in metrics(run) if "samples" in r]
