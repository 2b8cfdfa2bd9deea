"""Accuracy of the raw and EMA weights of a run, from its `metrics.jsonl`.

One rule for every default: the EMA if the run has one, else raw.
"""

from typing import Any

CLEARLY_WORSE = 1.0  # percentage points


def accuracy_at(records: list[dict[str, Any]], step: int, ema: str = "ema") -> dict[str, float]:
    """Return top-1 by weights, `raw` and `ema`, of the last evaluation at `step`; empty if there is none.

    `ema` is the prefix of the EMA's values: `ema` for the first decay of the run, `ema_<decay>` for the others.
    """
    keys = {"raw": "val/top1", "ema": f"{ema}/top1"}
    evaluated = [record for record in records if record["step"] == step and keys["raw"] in record]
    record = evaluated[-1] if evaluated else {}
    return {weights: record[key] for weights, key in keys.items() if key in record}


def ema_warning(top1: dict[str, float]) -> str | None:
    """Return a warning if the EMA is clearly worse than the raw weights: its horizon is longer than the run."""
    if "ema" not in top1 or top1["ema"] >= top1["raw"] - CLEARLY_WORSE:
        return None
    return (
        f"top-1 of the EMA, {top1['ema']:.2f} %, is below that of the raw weights, {top1['raw']:.2f} %: the run is too "
        f"short for trainer.ema_decay; use raw weights"
    )
