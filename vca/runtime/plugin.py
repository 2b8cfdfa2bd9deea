"""Python files outside the project that make something for it: an autoencoder, a feature extractor."""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vca.runtime.digest import file_sha256
from vca.runtime.errors import check


def load_function(path: Path, name: str, key: str) -> Callable[..., Any]:
    """The function `name` of a Python file, which is run; `key` is what the user calls the file.

    Raises:
        ConfigError: if there is no such file.
        AttributeError: if it defines no such function; and whatever else its code raises.
    """
    check(path.is_file() and path.suffix == ".py", key, "a Python file", str(path))
    module_name = f"{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec: Any = importlib.util.spec_from_file_location(module_name, path)
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def describe_weights(weights: str | None) -> str:
    """What a name of weights adds to an identity: the content of a file; a folder is known by the parameters."""
    if weights is None or Path(weights).is_dir():
        return ""
    return file_sha256(Path(weights)) if Path(weights).is_file() else weights
