"""Insert faults into a copy of the project, one at a time, and check that a test fails for each.

python tests/mutate.py              all faults, three minutes
python tests/mutate.py ema lr       these faults
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Fault(NamedTuple):
    """A text in a file, its replacement, and the tests of which at least one must fail."""

    file: str
    right: str
    wrong: str
    tests: str


# In order: resume does not load the EMA; a rank reads another rank's share; the last SDE step has no score; an unknown
# key behind + is accepted; lambda has the wrong sign; a checkpoint is not synced; the covariance is biased; statistics
# of another extractor are accepted; label drop and noise depend on the rank; the learning rate is one step early;
# prefix tokens are pooled; a signal to another rank is ignored.
FAULTS = {
    "ema": Fault(
        "vca/training/step.py",
        "ema.module.load_state_dict(ema_weights(state, ema.decay, self.trainer.ema_decays))",
        "pass",
        "tests/runs/test_resume.py",
    ),
    "share": Fault(
        "vca/data/loader.py",
        "(self.world.rank * self",
        "(max(self.world.rank - 1, 0) * self",
        "tests/data/test_loader.py",
    ),
    "last_step": Fault(
        "vca/generation/samplers.py",
        "x + rest * (velocity + w * score)",
        "x + rest * velocity",
        "tests/generation",
    ),
    "plus_key": Fault(
        "vca/config/composition.py",
        "for key in extra_keys(config):",
        "for key in ():",
        "tests/config/test_load.py",
    ),
    "lambda": Fault(
        "vca/attention/contrast.py",
        "second.exp() + self.init",
        "second.exp() - self.init",
        "tests/attention/test_contrast.py",
    ),
    "fsync": Fault(
        "vca/runtime/files.py",
        "os.fsync(file.fileno())",
        "pass",
        "tests/training/test_checkpoint.py",
    ),
    "ddof": Fault(
        "vca/evaluation/feature_stats.py",
        "/ (self.count - 1)",
        "/ self.count",
        "tests/evaluation",
    ),
    "statistics": Fault(
        "vca/evaluation/stats_file.py",
        "if differences := diff_configs(",
        "if differences := False and diff_configs(",
        "tests/runs/test_eval_fid_input.py",
    ),
    "label_drop": Fault(
        "vca/training/generation.py",
        '"generation", fingerprint)',
        '"generation", fingerprint, __import__("os").getenv("RANK", 0))',
        "tests/runs/test_train_gen.py",
    ),
    "lr": Fault(
        "vca/training/step.py",
        "learning_rate(self.optim, self.step, ",
        "learning_rate(self.optim, self.step + 1, ",
        "tests/training",
    ),
    "prefix": Fault(
        "vca/attention/pooling.py",
        "flatten(2), grid, num_prefix_tokens)",
        "flatten(2)[:, : grid[0] * grid[1]], grid, 0)",
        "tests/attention/test_contrast.py",
    ),
    "stop": Fault(
        "vca/training/run.py",
        "self.world.start_sum(self.stop.received is not None)",
        "lambda: int(self.stop.received is not None)",
        "tests/runs/test_kills.py -k sigusr1",
    ),
}


def copy_project(folder: Path) -> None:
    """Copy the working tree's versions of the files that git tracks."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def failing_test(fault: Fault, folder: Path) -> str | None:
    """Return the first test that fails with the fault, or None if all pass.

    Raises:
        ValueError: if the file does not contain the text exactly once.
    """
    file = folder / fault.file
    text = file.read_text()
    if text.count(fault.right) != 1:
        raise ValueError(f"{fault.file} must contain '{fault.right}' once, got {text.count(fault.right)} times")
    file.write_text(text.replace(fault.right, fault.wrong))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *fault.tests.split()]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    file.write_text(text)
    if done.returncode not in (0, 1):
        raise ValueError(
            f"pytest {fault.tests} exited with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else None


def main() -> int:
    """Print the failing test of each fault; returns 1 if a fault is not detected."""
    undetected = 0
    with tempfile.TemporaryDirectory() as folder:
        copy_project(Path(folder))
        for name in sys.argv[1:] or FAULTS:
            test = failing_test(FAULTS[name], Path(folder))
            undetected += test is None
            print(f"{name:12}{test or 'NOT DETECTED by ' + FAULTS[name].tests}", flush=True)
    return int(undetected > 0)


if __name__ == "__main__":
    sys.exit(main())
