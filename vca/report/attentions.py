"""Table of attentions: the figures that their authors reported, those measured here, and the difference.

Reported and measured values are in separate columns. A difference needs the same model, data, recipe and evaluation.
"""

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vca.report.accepted import REFERENCE, Result, by_config, different_options, label_of, with_seeds
from vca.report.paper import REPORTED, Recipe, Reported
from vca.report.tables import IMAGENET_IMAGES, PROTOCOLS, row_of

HEAD = (
    "attention | model | metric | reported | measured here | difference | reported params (M) | reported MACs (G) | "
    "source | recipe of the reported value"
)


def attentions_table(results: list[Result], config: Callable[..., Mapping[str, Any]]) -> str:
    """Return a row per reported figure and per measured config, by attention.

    `config(experiment, *overrides)` returns the config of an experiment, such as `table1/deit_tiny_softmax`.
    """
    groups = by_config(results)
    rows = [(row, group) for row in REPORTED for group in [one for one in groups if measures(one[0], row)] or [[]]]
    compared = [id(group) for _, group in rows]
    rows += [(not_reported(group[0]), group) for group in groups if id(group) not in compared]
    methods = list(dict.fromkeys(row.method for row, _ in rows))
    lines = [f"| {HEAD} |", "|---" * 10 + "|"]
    for row, group in sorted(rows, key=lambda one: methods.index(one[0].method)):
        measured, difference = "not measured", "-"
        if group:
            values = [one.value for one in group]
            measured = f"{with_seeds(values)}: {label_of(group[0], results, attention=False)}"
            if row.value is not None and all(trained_alike(one, row, config) for one in group):
                difference = f"{statistics.mean(values) - row.value:+.2f}"
        value, params, macs = ("-" if one is None else str(one) for one in (row.value, row.params, row.macs))
        cells = [f"`{row.method}`", row.model, row.metric, value, measured, difference, params, macs]
        lines.append(f"| {' | '.join([*cells, row.source, row.recipe.text])} |")
    return "\n".join(lines) + "\n"


def measures(result: Result, row: Reported) -> bool:
    """Whether a result is of the attention, model, data and metric of a reported figure, with any recipe."""
    config, objective = result.config, result.config.get("objective.name")
    if config["data.num_classes"] != 1000 or config["data.name"] not in ("imagefolder", "latents"):
        return False
    if objective is None:
        published = config["measured.images"] == IMAGENET_IMAGES
    else:
        published = config["sampling.protocol"] == PROTOCOLS.get(objective)
    model = row_of(config["model.name"], objective, config["data.img_size"])
    return published and (config["attention"], model, result.metric) == (row.method, row.model, row.metric)


def not_reported(result: Result) -> Reported:
    """Return the row of a config without a reported figure."""
    return Reported(
        result.config["attention"], result.config["model.name"], None, None, result.metric, None, "-", Recipe("-")
    )


def trained_alike(result: Result, row: Reported, config: Callable[..., Mapping[str, Any]]) -> bool:
    """Whether a result that measures a reported figure has its recipe, and for FID its reference."""
    if not row.recipe.same:
        return False
    record = result.any_record()
    if "reference" in record and Path(record["reference"]["source"]).name != REFERENCE:
        return False
    if "/" in row.recipe.same:
        return not different_options(config(row.recipe.same), result.config)
    table = "table2" if "reference" in record else "table1"
    wanted = dict(config(f"{table}/{row.model}_softmax", f"recipe={row.recipe.same}"))
    del wanted["attention"]
    return not different_options(wanted, result.config)
