"""Errors that are the user's to mend: one line that names key, value and remedy, no traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A wrong input. The root scripts print it as one line, `config error: ...`, and exit with code 2."""


class NonFiniteError(RuntimeError):
    """A loss or a gradient that is NaN or infinite; raised on every rank at the same step."""


class PreemptedError(RuntimeError):
    """A signal asked the training to stop, and it has saved; raised on every rank after the same step."""


def check(condition: bool, key: str, rule: str, value: object) -> None:
    """Raise `ConfigError("<key> must be <rule>, got <value>")` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} must be {rule}, got {value!r}")


@contextmanager
def config_errors() -> Iterator[None]:
    """Turn a `ValueError` of building something from its config into a `ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
