"""Which evaluation records can be published results: of a finished run's final weights, with log, of committed code."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vca.evaluation.record import ACCURACY_FORMAT
from vca.runtime.digest import file_sha256
from vca.runtime.errors import ConfigError
from vca.runtime.rundir import RunDirectory


def not_of_tables(path: Path, record: Mapping[str, Any]) -> str | None:
    """Return why a record of samples is not of a run's last step and first EMA decay; None if it is, or is unknown."""
    if record["format"] == ACCURACY_FORMAT or record.get("log") is None or not (made := record["samples"]["made"]):
        return None
    return not_final(made["origin"], RunDirectory(log_of(path, record).parent).records())


def check_acceptable(path: Path, record: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless a record identifies its weights, command and committed code, and its log is there."""
    compute = record["compute"]
    if "command" not in compute or "log" not in record:
        raise ConfigError(f"{path} has no command and log, which earlier versions did not record; evaluate again")
    if record["log"] is None:
        raise ConfigError(f"{path} has no log of its run; evaluate again with run=... or a sample folder in the run")
    training = record.get("training") or {"launches": []}
    if record["format"] == ACCURACY_FORMAT:
        step, steps = record["weights"]["step"], record["weights"]["steps"]
        if step != steps:
            raise ConfigError(f"{path} must be of a finished run, got step {step} of {steps}")
    else:
        if (record["samples"]["made"] or {}).get("origin", {}).get("training") is None:
            raise ConfigError(f"{path} must be of samples of a run; its sampling settings or its run are unknown")
        if (reason := not_of_tables(path, record)) is not None:
            raise ConfigError(f"{path} must be of the last step and the first EMA decay of a run, got {reason}")
    codes = [compute, training, *training["launches"]]
    if any(code.get("uncommitted") or code.get("commit", "") is None for code in codes):
        raise ConfigError(f"{path} must be of committed code; commit, run and evaluate again")
    log_of(path, record)


def log_of(path: Path, record: Mapping[str, Any]) -> Path:
    """Return the log of a record's run, from the folder of the record or its parent.

    Raises:
        ConfigError: if it is missing or has changed.
    """
    log = record["log"]
    files = [folder / log["file"] for folder in (path.parent, path.parent.parent)]
    found = next((file for file in files if file.is_file() and file_sha256(file) == log["sha256"]), None)
    if found is None:
        raise ConfigError(f"{path} needs {files[0]} with sha256 {log['sha256']}; copy it from the run")
    return found


def accepted_name(record: Mapping[str, Any]) -> str:
    """Return the folder of a record in `docs/results/`: name of the run, and digits of its log's or weights' sha256."""
    if record["format"] == ACCURACY_FORMAT:
        return f"{record['weights']['source']}-{record['log']['sha256'][:8]}"
    origin = record["samples"]["made"]["origin"]
    return f"{origin.get('run') or 'weights'}-{origin['weights_sha256'][:8]}"


def not_final(origin: dict[str, Any], log: list[dict[str, Any]] | None = None) -> str | None:
    """Return why the weights of a record are not the ones of the tables: the last step and the first EMA decay.

    A run whose length is in epochs needs the records of its `log`; without them its step is not checked.
    """
    trainer = (origin["training"] or {}).get("trainer", {})
    step, steps, decay = origin["step"], trainer.get("steps"), origin.get("ema_decay")
    if steps is None and trainer and log is not None:
        steps = total_steps(origin["training"], log)
    if None not in (step, steps) and step < steps:
        return f"step {step} of {steps}"
    if decay is not None and decay != trainer["ema_decay"][0]:
        return f"EMA decay {decay}, the tables use the first one, {trainer['ema_decay'][0]}"
    return None


def total_steps(config: Mapping[str, Any], records: list[dict[str, Any]]) -> float:
    """Return the steps of a whole run, from its config and its records."""
    if config["trainer"]["steps"] is not None:
        return config["trainer"]["steps"]
    report = next((record for record in reversed(records) if record.get("epoch")), None)
    return round(config["trainer"]["epochs"] * report["step"] / report["epoch"]) if report else math.inf
