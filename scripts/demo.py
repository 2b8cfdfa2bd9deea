"""The demo behind `make demo`: VCA and softmax attention on handwritten digits, by the same recipe.

    python scripts/demo.py

Trains the two variants of a small DeiT on 1,438 real 8 x 8 digits, evaluates both on the 359 held out, and draws their
curves. Running it again continues where it was stopped, or only shows the result.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from vca.runtime.rundir import RunDirectory
from vca.training.curves import draw_curves


def main() -> None:
    """Train both variants and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="outputs/demo", help="where the runs go (default outputs/demo)")
    parser.add_argument("overrides", nargs="*", help="overrides of train_cls.py's config, such as trainer.epochs=5")
    options = parser.parse_args()

    print("Training a small Vision Transformer on handwritten digits twice: with VCA and with softmax attention.")
    print("On two CPU cores this takes two to four minutes; nothing is downloaded.", flush=True)
    start = time.perf_counter()
    folders = {}
    for attention in ("vca", "softmax"):
        overrides = [f"attention={attention}", f"name={attention}", f"out_dir={options.out}", "trainer.log_every=110"]
        command = [sys.executable, str(ROOT / "train_cls.py"), *overrides, *options.overrides]
        print(f"\n$ python train_cls.py {' '.join(command[2:])}", flush=True)
        if subprocess.run(command, check=False).returncode != 0:
            sys.exit(f"the run with {attention} attention failed; see above")
        folders[attention] = RunDirectory(Path(options.out) / attention)
    records = {attention: folder.records() for attention, folder in folders.items()}
    curves = Path(options.out) / "curves.png"
    draw_curves(records, curves)

    print(f"\n{'attention':<10} top-1 on the held-out digits")
    for attention, lines in records.items():
        last = next(line for line in reversed(lines) if "val/top1" in line)
        print(f"{attention:<10} {last['val/top1']:.2f} % of {last['val/images']}")
    print(f"\ncurves: {curves}   ({time.perf_counter() - start:.0f} s in all)")


if __name__ == "__main__":
    main()
