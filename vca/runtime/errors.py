"""Errors that are the user's to mend: one line that names key, value and remedy, no traceback."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A wrong input. The root scripts print it as one line, `config error: ...`, and exit with code 2."""


class NonFiniteError(RuntimeError):
    """A loss or a gradient that is NaN or infinite; raised on every rank at the same step."""


class ImageError(RuntimeError):
    """An image that cannot be read in the middle of a run; its last line names the file."""


class PreemptedError(RuntimeError):
    """A signal asked the training to stop, and it has saved; raised on every rank after the same step."""


def check(condition: bool, key: str, rule: str, value: object) -> None:
    """Raise `ConfigError("<key> must be <rule>, got <value>")` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} must be {rule}, got {value!r}")


def check_path(key: str, path: str) -> None:
    """Raise `ConfigError` unless a file or folder can have that path, and names derived from it too.

    A file name has at most 255 bytes; what is derived from the name of a run, such as a log, adds to it. A path cannot
    contain a NUL, and a line break breaks every log that names it.
    """
    check(all(ord(letter) >= 32 and letter != "\x7f" for letter in path), key, "without control characters", path)
    longest = max(len(os.fsencode(part)) for part in path.split("/"))
    check(longest <= 200, key, "made of names of at most 200 bytes", f"{longest} bytes in {path}")


def known_cause(error: Exception) -> str | None:
    """One line about an error that is no mistake in a config, None for an unknown one, which needs its traceback.

    A loader worker's error arrives as its traceback, whose last line is its message.
    """
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    if isinstance(error, ImageError):
        return lines[-1].removeprefix(f"{ImageError.__module__}.{ImageError.__qualname__}: ")
    if isinstance(error, OSError) and error.filename is not None:
        return text
    if not isinstance(error, RuntimeError):
        return None
    if text.startswith("rank 0 failed: "):  # World.from_main
        return lines[0]
    if re.search("Bus error|shared memory|/torch_", text):
        return "a loader worker found /dev/shm full; give the container a larger --shm-size, or take fewer workers"
    if text.startswith("DataLoader worker"):
        reason = re.search(r"signal: (\w+)", text)
        how = f"by {reason[1]}" if reason else "from outside"
        return f"a loader worker was killed {how}, as where memory runs out; rerun the command to resume"
    # torch's DistNetworkError, DistStoreError and so on are RuntimeErrors; gloo and NCCL also raise bare ones.
    if type(error).__name__.startswith("Dist") or re.search("gloo|by peer|NCCL", text):
        what = "did not answer in time" if re.search("[Tt]imed out|timeout", text) else "has ended or is out of reach"
        said = re.sub(r"^\[\S+\] ", "", lines[0])[:200]  # without the place in torch's source
        return f"another rank {what} ({said}); its own output has the reason, rerun the command to resume"
    return None


@contextmanager
def config_errors() -> Iterator[None]:
    """Turn a `ValueError` of building something from its config into a `ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
