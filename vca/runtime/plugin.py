"""User's Python files that define an autoencoder or a feature extractor."""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vca.runtime.digest import file_sha256
from vca.runtime.errors import check


def load_function(path: Path, name: str, key: str) -> Callable[..., Any]:
    """Import a Python file and return its function `name`; `key` is the config key of the file.

    Raises:
        ConfigError: if the file does not exist or is not a `.py` file.
        AttributeError: if it does not define the function. Errors of its own code are passed on.
    """
    check(path.is_file() and path.suffix == ".py", key, "a Python file", str(path))
    module_name = f"{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec: Any = importlib.util.spec_from_file_location(module_name, path)
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def describe_weights(weights: str | None) -> str:
    """Return the part of an identity that names weights: the sha256 of a file, a hub name, or `""` for a folder.

    The weights of a folder are identified by the sha256 of the loaded parameters.
    """
    if weights is None or Path(weights).is_dir():
        return ""
    return file_sha256(Path(weights)) if Path(weights).is_file() else weights
