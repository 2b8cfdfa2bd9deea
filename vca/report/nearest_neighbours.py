"""Plot the samples farthest from the reference, and those nearest to it with their nearest neighbours."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vca.evaluation.features import FeatureSet, subset_numbers
from vca.generation.pipeline import save_image_grid
from vca.metrics.precision_recall import BLOCK, squared_distances

COLUMNS = 10


def plot_nearest_neighbours(samples: Any, reference: Any, x: FeatureSet, y: FeatureSet, path: Path) -> None:
    """Save three rows: the farthest samples, the nearest samples, and the reference images nearest to the latter.

    Equal images in rows two and three are copies; row one shows the worst samples. `x` and `y` are the features of the
    samples and of the reference.
    """
    assert x.features is not None
    assert y.features is not None
    centre = y.features.mean(axis=0)
    ours, theirs = (torch.from_numpy((part.features - centre).astype(np.float64)) for part in (x, y))
    nearest = [squared_distances(part, theirs).min(dim=1) for part in ours.split(max(1, BLOCK // len(theirs)))]
    distances, neighbours = (torch.cat([part[index] for part in nearest]) for index in (0, 1))
    order, columns = distances.argsort(), min(COLUMNS, len(ours))
    numbers = subset_numbers(samples.count, len(ours))
    reference_numbers = subset_numbers(reference.count, len(theirs))
    near, far = order[:columns].tolist(), order.flip(0)[:columns].tolist()
    rows = [samples.read([numbers[index]]) for index in [*far, *near]]
    rows += [reference.read([reference_numbers[int(neighbours[index])]]) for index in near]
    images = torch.from_numpy(np.concatenate(rows)).permute(0, 3, 1, 2)
    save_image_grid(images, path, columns, zoom=max(1, 48 // images.shape[2]))
    print(f"plot: {path} (rows: farthest from the reference; nearest to it; their nearest neighbours)", flush=True)
