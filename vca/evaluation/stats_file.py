"""Reference statistics as an npz: ours, and ADM's.

mu, sigma        mean `(D,)` and covariance `(D, D)` of the pooled features
mu_s, sigma_s    of the spatial features, where there are any
features         ours: pooled features of some of the images, for KID, precision and recall
about            ours: JSON: extractor, and source, count, shape and sha256 of the images
arr_0            ADM's: 10,000 of the images, which serve precision and recall alone
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from vca.evaluation.extractor import Extractor
from vca.evaluation.features import FeatureSet, Moments
from vca.evaluation.images import NpzImages, members, read_member
from vca.runtime.digest import file_sha256
from vca.runtime.errors import ConfigError
from vca.runtime.files import write_bytes
from vca.runtime.rundir import diff_configs

ROUNDING = 1e-6  # of the largest entry or eigenvalue: what a covariance computed in float32 may be off


class StatisticsFile:
    """Statistics that were made before, read and checked.

    Attributes:
        source: the file.
        count, shape: of the images; None where the file does not say.
        images: ADM's `arr_0`, if it is there.

    Raises:
        ConfigError: if the file is damaged; mean, covariance and features do not fit each other or are not finite; or a
            covariance is not symmetric or has a negative eigenvalue, which makes a distance below zero.
    """

    def __init__(self, file: Path, key: str) -> None:
        self.source, self.key, self.file = str(file), key, file
        there = members(file, key)
        self.about = read_about(file, key) if "about" in there else None
        self.images = NpzImages(file, key) if "arr_0" in there else None
        self.count: int | None = self.about["count"] if self.about else None
        self.shape: tuple[int, ...] | None = self.images.shape if self.images else None
        if self.about:
            self.shape = tuple(self.about["shape"])
        self.pool = self.moments("mu", "sigma")
        self.spatial = self.moments("mu_s", "sigma_s") if "mu_s" in there else None
        self.kept = read_member(file, "features", key) if "features" in there else None
        if self.kept is not None:
            wide = len(self.pool.mean)
            fits = self.kept.ndim == 2 and self.kept.shape[1] == wide and np.isfinite(self.kept).all()
            self.require(fits, f"features must be finite and (n, {wide}), got {self.kept.shape}")

    @property
    def sizes(self) -> dict[str, int]:
        """How many features there are of each kind."""
        spatial = {"spatial": len(self.spatial.mean)} if self.spatial is not None else {}
        return {"pool": len(self.pool.mean), **spatial}

    def check_extractor(self, extractor: Extractor) -> list[str]:
        """Warnings about the extractor.

        Raises:
            ConfigError: if the statistics were made with another one.
        """
        if self.about is None:
            ours = extractor.published
            return [] if ours else [f"nothing says that {self.file.name} was made with this extractor"]
        if differences := diff_configs(self.about["extractor"], extractor.identity(), key="extractor"):
            raise ConfigError(
                f"{self.key}: {self.file} was made with another extractor ({'; '.join(differences)}); name that one "
                f"here, or make the file again by scripts/reference_stats.py"
            )
        return []

    def read(self) -> FeatureSet:
        """The set."""
        digest = file_sha256(self.file)
        return FeatureSet(self.source, self.count, self.shape, digest, self.pool, self.spatial, self.kept)

    def moments(self, mean_name: str, covariance_name: str) -> Moments:
        """Mean and covariance in float64."""
        mean, covariance = (
            read_member(self.file, name, self.key).astype(np.float64) for name in (mean_name, covariance_name)
        )
        shapes = f"{mean.shape} and {covariance.shape}"
        fit = mean.ndim == 1 and len(mean) > 0 and covariance.shape == (len(mean), len(mean))
        self.require(fit, f"{mean_name} must be (D,) and {covariance_name} (D, D), got {shapes}")
        finite = bool(np.isfinite(mean).all() and np.isfinite(covariance).all())
        self.require(finite, f"{mean_name} or {covariance_name} is NaN or infinite")
        gaps = np.abs(covariance - covariance.T)
        row, column = divmod(int(gaps.argmax()), len(mean))
        where = f"entries ({row}, {column}) and ({column}, {row}) differ by {gaps[row, column]:.4g}"
        symmetric = bool(gaps[row, column] <= ROUNDING * np.abs(covariance).max())
        self.require(symmetric, f"{covariance_name} must be symmetric, but {where}")
        values = np.linalg.eigvalsh((covariance + covariance.T) / 2)
        least, most = float(values[0]), float(values[-1])
        problem = f"{covariance_name} must have no negative eigenvalue, got {least:.4g} (the largest is {most:.4g})"
        self.require(least >= -ROUNDING * most, problem)
        return Moments(mean, covariance)

    def require(self, condition: bool, problem: str) -> None:
        """Raise `ConfigError` with the problem unless `condition` holds."""
        if not condition:
            raise ConfigError(f"{self.key}: {self.file}: {problem}; make the file again")


def read_about(file: Path, key: str) -> dict[str, Any]:
    """What a file of ours says about itself."""
    try:
        about: dict[str, Any] = json.loads(str(read_member(file, "about", key)))
        return {name: about[name] for name in ("source", "count", "shape", "sha256", "extractor")}
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{key}: {file} is damaged ({error}); make it again") from error


def save_statistics(file: Path, found: FeatureSet, extractor: Extractor) -> None:
    """Write the statistics of a set; a kill leaves the old file or the new one."""
    about = {
        "source": found.source,
        "count": found.count,
        "shape": list(found.shape or ()),
        "sha256": found.sha256,
        "extractor": extractor.identity(),
    }
    arrays: dict[str, Any] = {"mu": found.pool.mean, "sigma": found.pool.covariance, "features": found.features}
    if found.spatial is not None:
        arrays |= {"mu_s": found.spatial.mean, "sigma_s": found.spatial.covariance}
    content = io.BytesIO()
    np.savez(content, about=np.array(json.dumps(about)), **arrays)
    write_bytes(file, content.getbuffer())
