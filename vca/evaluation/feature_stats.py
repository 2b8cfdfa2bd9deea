"""Mean and covariance of features in one pass, in float64, over any batches and ranks.

The state is the number of rows, their sum, and the sum of their outer products.

Shape letters: B batch, D features.
"""

import numpy as np
import torch
from torch import Tensor

from vca.runtime.distributed import World


class FeatureStatistics:
    """Running sums over rows `(B, D)`."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.total = torch.zeros(features, dtype=torch.float64, device=device)
        self.outer = torch.zeros(features, features, dtype=torch.float64, device=device)

    def update(self, rows: Tensor) -> None:
        """Add rows `(B, D)`.

        Raises:
            ValueError: if the shape differs, or a value is NaN or infinite.
        """
        if rows.ndim != 2 or rows.shape[1] != len(self.total):
            raise ValueError(f"features must be (B, {len(self.total)}), got {tuple(rows.shape)}")
        rows = rows.to(self.total)
        if not torch.isfinite(rows).all():
            raise ValueError("features are NaN or infinite")
        self.count += len(rows)
        self.total += rows.sum(dim=0)
        self.outer += rows.T @ rows

    def reduce(self, world: World) -> "FeatureStatistics":
        """Return the statistics over all ranks, on every rank."""
        total = FeatureStatistics(len(self.total), self.total.device)
        total.count = int(world.sum(torch.tensor(self.count, device=self.total.device)))
        total.total, total.outer = world.sum(self.total.clone()), world.sum(self.outer.clone())
        return total

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean `(D,)` and unbiased covariance `(D, D)` (divided by count - 1), as `numpy.cov`.

        Raises:
            ValueError: if there are fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        mean = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean.cpu().numpy(), covariance.cpu().numpy()
