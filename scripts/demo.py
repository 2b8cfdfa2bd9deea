"""The demo behind `make demo`: VCA and softmax attention on handwritten digits, by the same recipe.

    python scripts/demo.py

Trains the two variants of a small DeiT on 1,438 real 8 x 8 digits, evaluates both on the 359 held out, and draws their
curves. Running it again continues where it was stopped, or only shows the result.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_cls
from vca.config import compose
from vca.runtime.rundir import RunDirectory
from vca.training.curves import draw_curves


def main() -> None:
    """Train both variants and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="outputs/demo", help="where the runs go (default outputs/demo)")
    parser.add_argument("overrides", nargs="*", help="overrides of train_cls.py's config, such as trainer.epochs=5")
    options = parser.parse_args()

    print("Training a small Vision Transformer on handwritten digits twice: with VCA and with softmax attention.")
    print("On two CPU cores this takes about four minutes; nothing is downloaded.\n", flush=True)
    start = time.perf_counter()
    folders, results = {}, {}
    for attention in ("vca", "softmax"):
        name = f"digits-{attention}"
        overrides = [f"attention={attention}", f"name={name}", f"out_dir={options.out}", "trainer.log_every=220"]
        results[attention] = train_cls.run(compose("train_cls", [*overrides, *options.overrides]))
        folders[attention] = RunDirectory(Path(options.out) / name)
        print(flush=True)
    curves = Path(options.out) / "curves.png"
    draw_curves({attention: folder.records() for attention, folder in folders.items()}, curves)

    print(f"{'attention':<12} {'top-1':>8}   held-out digits")
    for attention, result in results.items():
        print(f"{attention:<12} {result['val/top1']:>6.2f} %   of {result['val/images']:.0f}")
    print(f"\ncurves: {curves}   ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
