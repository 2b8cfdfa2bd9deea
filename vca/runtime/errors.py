"""User errors, printed as one line without a traceback."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """Invalid input. The root scripts print it as one line, `config error: ...`, and exit with code 2."""


class RankZeroError(RuntimeError):
    """Work of rank 0 failed; raised on the other ranks, which wait for its result."""


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; raised on every rank at the same step."""


class ImageError(RuntimeError):
    """An image cannot be read during a run; the last line of the message names the file."""


class PreemptedError(RuntimeError):
    """A signal stopped the run after a checkpoint was saved; raised on every rank after the same step."""


def check(condition: bool, key: str, rule: str, value: object) -> None:
    """Raise `ConfigError("<key> must be <rule>, got <value>")` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} must be {rule}, got {value!r}")


def check_path(key: str, path: str) -> None:
    """Raise `ConfigError` unless the path is a valid file or folder name.

    File names have at most 255 bytes, of which suffixes such as that of a log need some. A path cannot contain a NUL,
    and a line break would split log lines.
    """
    check(all(ord(letter) >= 32 and letter != "\x7f" for letter in path), key, "without control characters", path)
    longest = max(len(os.fsencode(part)) for part in path.split("/"))
    check(longest <= 200, key, "a path of names of at most 200 bytes", f"{longest} bytes in {path}")


def known_cause(error: Exception) -> str | None:
    """Explain a known runtime error in one line; return None for an unknown one, whose traceback is needed.

    A loader worker's error is its traceback as text; the last line is the message.
    """
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    if isinstance(error, ImageError):
        return lines[-1].removeprefix(f"{ImageError.__module__}.{ImageError.__qualname__}: ")
    if isinstance(error, OSError) and error.filename is not None:
        return text
    if not isinstance(error, RuntimeError):
        return None
    text += f" {error.__cause__ or ''}"  # the signal that ended a loader worker
    if re.search("Bus error|shared memory|/torch_", text):
        return "/dev/shm is full; start the container with a larger --shm-size, or reduce trainer.workers"
    if text.startswith("DataLoader worker"):
        reason = re.search(r"signal: (\w+)", text)
        how = f"by {reason[1]}" if reason else "by another process"
        return f"a loader worker was killed {how}, probably out of memory; rerun the command to resume"
    if type(error).__name__ == "BrokenProcessPool":
        return "a worker process was killed, probably out of memory; rerun the command to resume"
    # torch's DistNetworkError, DistStoreError and so on are RuntimeErrors; gloo and NCCL also raise bare ones.
    if type(error).__name__.startswith("Dist") or re.search("gloo|by peer|pair closure|NCCL", text):
        what = "timed out" if re.search("[Tt]imed out|timeout", text) else "exited or is unreachable"
        detail = re.sub(r"^\[\S+\] ", "", lines[0])[:200]  # without the line of torch's source
        return f"another rank {what} ({detail}); its own output has the reason, rerun the command to resume"
    return None


@contextmanager
def config_errors() -> Iterator[None]:
    """Convert a `ValueError` raised while something is built from its config to a `ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
