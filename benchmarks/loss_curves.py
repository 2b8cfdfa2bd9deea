"""Plot the smoothed training losses of several runs, for a figure in the documents.

python -m benchmarks.loss_curves benchmarks/results/cifar10-dit.png benchmarks/results/cifar10-dit-{softmax,vca}.jsonl
"""

import json
import sys
from pathlib import Path

import numpy as np

WINDOW = 9  # records of the running mean


def main() -> None:
    """Plot loss and running mean over the steps; the y range is that of the means after the first window."""
    from matplotlib.figure import Figure

    out, *files = map(Path, sys.argv[1:])
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    lows, highs = [], []
    for index, file in enumerate(files):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        steps, losses = np.array([(record["step"], record["loss"]) for record in records if "loss" in record]).T
        means = np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")
        middle = steps[WINDOW // 2 : -(WINDOW // 2)]
        axis.plot(steps, losses, color=f"C{index}", alpha=0.25, linewidth=0.8)
        axis.plot(middle, means, color=f"C{index}", label=f"{file.stem.split('-')[-1]} (last: {means[-1]:.4f})")
        later = means[middle > steps[-1] / 8]
        lows.append(later.min())
        highs.append(later.max())
    margin = 0.15 * (max(highs) - min(lows))
    axis.set(xlabel="step", ylabel=f"training loss, running mean of {WINDOW} records")
    axis.set(xlim=(0, steps[-1]), ylim=(min(lows) - margin, max(highs) + margin))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
