"""What stops a run in its middle is one line on stderr, before anything else."""

import os
import signal

import pytest

from tests.data.test_loader import write_image_folder
from tests.processes import Launch, run_script
from tests.support import TINY, last_step

pytestmark = pytest.mark.process


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_stops_run_with_one_line(tmp_path, split, workers):
    write_image_folder(tmp_path)
    file = tmp_path / split / "dog" / "1.jpg"
    file.write_bytes(file.read_bytes()[:-300])
    options = ["data=imagefolder", f"data.root={tmp_path}", "data.num_classes=2", "data.check_seconds=0"]
    options += ["model=deit_mini", "augment=none", "data.img_size=8", "trainer.steps=8", "trainer.global_batch=2"]
    done = run_script("train_cls.py", *options, f"trainer.workers={workers}", f"out_dir={tmp_path}/out", timeout=60)
    assert done.returncode == 1
    line = done.stderr.splitlines()[0]
    assert line.startswith(f"stopped: {file} cannot be read (image file is truncated"), done.stderr
    assert line.endswith("); restore it, then rerun the command to resume")


@pytest.mark.parametrize(
    ("name", "line"),
    [("SIGKILL", "another rank has ended or is out of reach ("), ("SIGSTOP", "another rank did not answer in time (")],
)
def test_lost_rank_stops_others_with_one_line(tmp_path, name, line):
    options = [*TINY, f"out_dir={tmp_path}", "name=run", "trainer.steps=4000", "trainer.timeout_minutes=0.1"]
    launch = Launch("train_cls.py", *options, "data.check_seconds=0", ranks=2)
    launch.wait_until(lambda: last_step(tmp_path / "run") >= 3)
    os.kill(launch.processes[1].pid, getattr(signal, name))
    launch.processes[0].join(60)
    assert launch.processes[0].exitcode == 1
    assert launch.stderr.startswith(f"stopped: {line}"), launch.stderr[:3000]
    assert launch.stderr.splitlines()[0].endswith("); its own output has the reason, rerun the command to resume")
    launch.kill()
