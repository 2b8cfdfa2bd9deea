"""Reference statistics as an npz, written by this project or by ADM.

mu, sigma        mean `(D,)` and covariance `(D, D)` of the pooled features
mu_s, sigma_s    mean and covariance of the spatial features (optional)
features         this project: pooled features of some images, for KID, precision and recall
about            this project, JSON: extractor, and source, count, shape and sha256 of the images
arr_0            ADM: 10,000 of the images, for precision and recall only
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

ROUNDING = 1e-6  # float32 error of a covariance, relative to its largest entry or eigenvalue


class StatisticsFile:
    """Read and check a statistics file.

    Attributes:
        source: the file.
        count, shape: number and shape of the images; None if the file does not record them.
        sizes: number of features of each kind.
        images: ADM's `arr_0`, or None.

    Raises:
        ConfigError: if the file is corrupt; shapes of mean, covariance and features do not match or values are not
            finite; or a covariance is not symmetric or has a negative eigenvalue, which gives negative distances.
    """

    def __init__(self, file: Path, key: str) -> None:
        self.source, self.key, self.file = str(file), key, file
        names = members(file, key)
        self.about = read_about(file, key) if "about" in names else None
        self.images = NpzImages(file, key) if "arr_0" in names else None
        self.count: int | None = self.about["count"] if self.about else None
        self.shape: tuple[int, ...] | None = self.images.shape if self.images else None
        if self.about:
            self.shape = tuple(self.about["shape"])
        self.pooled = self.moments("mu", "sigma")
        self.spatial = self.moments("mu_s", "sigma_s") if "mu_s" in names else None
        self.sizes = {"pooled": len(self.pooled.mean)}
        if self.spatial is not None:
            self.sizes["spatial"] = len(self.spatial.mean)
        self.kept = read_member(file, "features", key) if "features" in names else None
        if self.kept is not None:
            size = self.sizes["pooled"]
            fits = self.kept.ndim == 2 and self.kept.shape[1] == size and np.isfinite(self.kept).all()
            self.require(fits, f"features must be finite and (n, {size}), got {self.kept.shape}")

    def check_extractor(self, extractor: Extractor) -> list[str]:
        """Check that the statistics were computed with this extractor, and return warnings.

        Raises:
            ConfigError: if another extractor was used.
        """
        if self.about is None:
            known = extractor.published  # ADM's files use the standard Inception
            return [] if known else [f"{self.file.name} does not record its extractor; it must be this one"]
        if differences := diff_configs(self.about["extractor"], extractor.identity(), key="extractor"):
            raise ConfigError(
                f"{self.key}: {self.file} was computed with another extractor ({'; '.join(differences)}); use that "
                f"one, or recreate the file with scripts/reference_stats.py"
            )
        return []

    def read(self) -> FeatureSet:
        """Return the statistics as a `FeatureSet`."""
        digest = file_sha256(self.file)
        return FeatureSet(self.source, self.count, self.shape, digest, self.pooled, self.spatial, self.kept)

    def moments(self, mean_name: str, covariance_name: str) -> Moments:
        """Read and check mean and covariance, in float64."""
        mean, covariance = (
            read_member(self.file, name, self.key).astype(np.float64) for name in (mean_name, covariance_name)
        )
        shapes = f"{mean.shape} and {covariance.shape}"
        fit = mean.ndim == 1 and len(mean) > 0 and covariance.shape == (len(mean), len(mean))
        self.require(fit, f"{mean_name} must be (D,) and {covariance_name} (D, D), got {shapes}")
        finite = bool(np.isfinite(mean).all() and np.isfinite(covariance).all())
        self.require(finite, f"{mean_name} or {covariance_name} must be finite")
        gaps = np.abs(covariance - covariance.T)
        row, column = divmod(int(gaps.argmax()), len(mean))
        difference = f"entries ({row}, {column}) and ({column}, {row}) differ by {gaps[row, column]:.4g}"
        symmetric = bool(gaps[row, column] <= ROUNDING * np.abs(covariance).max())
        self.require(symmetric, f"{covariance_name} must be symmetric, but {difference}")
        values = np.linalg.eigvalsh((covariance + covariance.T) / 2)
        smallest, largest = float(values[0]), float(values[-1])
        rule = f"{covariance_name} must have no negative eigenvalue, got {smallest:.4g} (largest {largest:.4g})"
        self.require(smallest >= -ROUNDING * largest, rule)
        return Moments(mean, covariance)

    def require(self, condition: bool, problem: str) -> None:
        """Raise `ConfigError` with the problem unless `condition` is true."""
        if not condition:
            raise ConfigError(f"{self.key}: {self.file}: {problem}; recreate the file")


def read_about(file: Path, key: str) -> dict[str, Any]:
    """Read `about` of a file of this project."""
    try:
        about: dict[str, Any] = json.loads(str(read_member(file, "about", key)))
        return {name: about[name] for name in ("source", "count", "shape", "sha256", "extractor")}
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{key}: {file} is corrupt ({error}); recreate it") from error


def save_statistics(file: Path, features: FeatureSet, extractor: Extractor) -> None:
    """Write the statistics of a set atomically."""
    about = {
        "source": features.source,
        "count": features.count,
        "shape": list(features.shape or ()),
        "sha256": features.sha256,
        "extractor": extractor.identity(),
    }
    arrays: dict[str, Any] = {"mu": features.pooled.mean, "sigma": features.pooled.covariance}
    arrays["features"] = features.features
    if features.spatial is not None:
        arrays |= {"mu_s": features.spatial.mean, "sigma_s": features.spatial.covariance}
    content = io.BytesIO()
    np.savez(content, about=np.array(json.dumps(about)), **arrays)
    write_bytes(file, content.getbuffer())
