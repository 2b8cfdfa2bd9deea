"""The samples that are farthest from the reference, and those that are nearest to it with what they are nearest to."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vca.evaluation.features import FeatureSet, chosen_numbers
from vca.generation.pipeline import save_image_grid
from vca.metrics.precision_recall import BLOCK, squared_distances

SHOWN = 10


def plot_nearest_neighbours(samples: Any, reference: Any, found: FeatureSet, there: FeatureSet, path: Path) -> None:
    """Three rows: the farthest samples, the nearest samples, and under these the reference images they are nearest to.

    A sample that equals its neighbour is a copy; samples far from everything show what a model cannot do.

    Args:
        samples, reference: sources; the images of both must be at hand.
        found, there: their features.
        path: of the PNG.
    """
    assert found.features is not None
    assert there.features is not None
    centre = there.features.mean(axis=0)
    x, y = (torch.from_numpy((part - centre).astype(np.float64)) for part in (found.features, there.features))
    nearest = [squared_distances(part, y).min(dim=1) for part in x.split(max(1, BLOCK // len(y)))]
    distances, neighbours = (torch.cat([part[index] for part in nearest]) for index in (0, 1))
    order, shown = distances.argsort(), min(SHOWN, len(x))
    numbers = chosen_numbers(samples.count, len(x))
    of_reference = chosen_numbers(reference.count, len(y))
    rows = [samples.read([numbers[index]]) for index in [*order.flip(0)[:shown].tolist(), *order[:shown].tolist()]]
    rows += [reference.read([of_reference[int(neighbours[index])]]) for index in order[:shown].tolist()]
    pictures = torch.from_numpy(np.concatenate(rows)).permute(0, 3, 1, 2)
    save_image_grid(pictures, path, columns=shown, zoom=max(1, 48 // pictures.shape[2]))
    print(f"picture: {path} (farthest from the reference; nearest to it; and what these are nearest to)", flush=True)
