"""Snapshots: the EMA weights of a run at some steps, which are never deleted.

A snapshot is one safetensors file per decay, `step_00010000_ema_0.9999.safetensors`, with the parameters by name. Its
metadata has step, decay and the sha256 of the tensors, which evaluation records contain too. A resumed run that repeats
a step keeps its snapshots.
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from vca.runtime.digest import tensors_sha256
from vca.runtime.errors import ConfigError, check
from vca.runtime.files import write_bytes
from vca.runtime.rundir import read_config
from vca.training.checkpoint import list_checkpoints, retry_once
from vca.training.ema import list_decays

ALL = "all"  # value of `step` and `ema` in eval_fid.py
NAME = re.compile(r"step_(\d+)_ema_(.+)\.safetensors")


class Snapshot(NamedTuple):
    """A snapshot file; the order is by step and decay."""

    step: int
    decay: float
    path: Path


def snapshot_path(folder: Path, step: int, decay: float) -> Path:
    return folder / f"step_{step:08d}_ema_{decay}.safetensors"


def list_snapshots(folder: Path) -> list[Snapshot]:
    """List the snapshots in a folder, by step and decay."""
    found = ((NAME.fullmatch(path.name), path) for path in folder.glob("step_*_ema_*.safetensors"))
    return sorted(Snapshot(int(match[1]), float(match[2]), path) for match, path in found if match)


def save_snapshots(folder: Path, step: int, emas: Mapping[float, dict[str, Tensor]]) -> None:
    """Write the EMA weights of each decay atomically; retry once on `OSError`.

    An intact snapshot of this step and decay is kept, with a warning if its weights differ.

    Raises:
        OSError: if the second try fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for decay, weights in emas.items():
        tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
        about = {"step": step, "decay": decay, "sha256": tensors_sha256(tensors)}
        path = snapshot_path(folder, step, decay)
        if (kept := recorded_sha256(path)) is not None:
            if kept != about["sha256"]:
                text = f"{path} differs from the weights of the repeated step {step}; the first snapshot is kept"
                warnings.warn(text, stacklevel=2)
            continue
        content = save(tensors, {"snapshot": json.dumps(about)})  # one entry: safetensors does not order several
        retry_once(path, lambda path=path, content=content: write_bytes(path, content))  # type: ignore[misc]


def recorded_sha256(path: Path) -> str | None:
    """Return the sha256 in the metadata of a snapshot; None if the file is missing, truncated or has none."""
    try:
        with safe_open(path, "pt") as file:
            return str(json.loads(file.metadata()["snapshot"])["sha256"])
    except Exception:  # safetensors raises many kinds of errors on corrupt files
        return None


def load_snapshot(path: Path) -> dict[str, Tensor]:
    """Load the weights of a snapshot to the CPU.

    Raises:
        ConfigError: if the file is missing or corrupt, or its tensors do not have the sha256 of its metadata.
    """
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            about: dict[str, Any] = json.loads(file.metadata()["snapshot"])
        changed = about["sha256"] != tensors_sha256(weights)
    except Exception as error:  # safetensors raises many kinds of errors on corrupt files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{path} is not a readable snapshot ({reason})") from error
    if changed:
        raise ConfigError(f"{path} has changed since it was written; restore it, or choose another step=...")
    return weights


def run_decays(run: Path) -> list[float]:
    """Return the decays of a run's EMAs; empty without an EMA."""
    return list_decays(read_config(run)["trainer"]["ema_decay"])


def choose_decay(run: Path, decays: list[float], ema: float | None) -> float | None:
    """Return the decay that `ema` selects: None is the first one, or None without an EMA.

    Raises:
        ConfigError: if the run has no EMA of this decay.
    """
    if ema is None:
        return decays[0] if decays else None
    check(bool(decays), "ema", f"null for {run}, which has no EMA", ema)
    check(ema in decays, "ema", f"a decay of {run}, one of {decays}", ema)
    return ema


def select_weights(run: Path, step: Any, ema: Any, key: str = "step=all") -> list[tuple[Any, Any]]:
    """Return step and EMA decay of all weights that `step` and `ema` select; `all` is each snapshot and each decay.

    `key` is what selects all snapshots, for messages; missing ones are skipped and printed. With several decays, a step
    of None is that of the newest checkpoint.

    Raises:
        ConfigError: if there are none.
    """
    folder = run / "snapshots"
    steps = [step]
    if step == ALL:
        steps = sorted({snapshot.step for snapshot in list_snapshots(folder)})
        if not steps:
            raise ConfigError(f"{key}: {folder} contains no snapshot; train with trainer.snapshot_every=...")
    decays = run_decays(run)
    check(ema != ALL or bool(decays), "ema", f"null for {run}, which has no EMA", ema)
    chosen: list[Any] = decays if ema == ALL else [choose_decay(run, decays, ema)]
    if step is None and len(chosen) > 1:
        steps = [int(path.stem[5:]) for path in list_checkpoints(run / "checkpoints")[-1:]] or [None]
    selected = [(number, decay) for number in steps for decay in chosen]
    missing = [one for one in selected if step == ALL and not snapshot_path(folder, *one).is_file()]
    names = ", ".join(snapshot_path(folder, *one).name for one in missing)
    if missing and missing == selected:
        raise ConfigError(f"{key}: {folder} lacks {names}; restore one, or select another decay")
    if missing:
        print(f"{key}: {folder} lacks {names}; skipped", flush=True)
    return [one for one in selected if one not in missing]
