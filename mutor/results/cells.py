"""Artifacts from run records: a tidy CSV (one row a cell, the same columns in all), Markdown, LaTeX, figures.

collect_artifact(load_table(root, "figure4"), scale, Records(runs), read_reported(file), folder)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from mutor.checks import choose
from mutor.config.runs import Cell, cells_of
from mutor.config.schema import Scale, Table
from mutor.registry import TASKS, load
from mutor.results import cost, records
from mutor.results.flops import attention_exceeds_feed_forward, layer_flops, tipping_point
from mutor.results.published import _published
from mutor.results.stats import summarise
from mutor.tasks.corpora import CORPORA

COLUMNS = [
    "artifact",
    "scale",
    "role",
    "model",
    "method",
    "train_data",
    "benchmark",
    "metric",
    "unit",
    "d_max",
    "a",
    "registers",
    "placement",
    "iterations",
    "epochs",
    "register_embedding",
    "added_params",
    "n_seeds",
    "mean",
    "std",
    "ci_low",
    "ci_high",
    "reported",
    "reported_difference",
    "stands_in_for",
]
PUBLISHED_SETTINGS = ("d_max", "a", "registers", "placement", "register_embedding")


def cell_frame(table: Table, scale: Scale, runs: records.Records, reported: pd.DataFrame) -> pd.DataFrame:
    """One row a cell, in the table's order, with COLUMNS and for drawing: label, values, chance, data, path."""
    if table.draw == "flops":
        rows = list(_flops_rows(table, scale, reported))
    elif table.draw == "cost":
        rows = list(cost.rows(table, scale, runs.runs, reported))
    else:
        found = cells_of(table, scale)
        if table.needs_runs:
            rows = [_cell_row(table, cell, runs, reported) for cell in found]
        else:
            rows = [_settings_row(table, cell) for cell in found]
        if not rows:
            roles = {f"{row.model} on {row.train_data}" for row in table.rows}
            raise ValueError(
                f"{table.name}: scale {scale.name!r} has nothing in the place of {', '.join(sorted(roles))}"
            )
    return pd.DataFrame(rows, columns=[*COLUMNS, "label", "values", "chance", "data", "path"])


def cell_records(cell: Cell, runs: records.Records) -> list[dict[str, Any]]:
    """The records that a cell is made of: all seeds there are, or as many as the source has."""
    return runs.of(cell.spec)[: cell.row.max_seeds]


def _cell_row(table: Table, cell: Cell, runs: records.Records, reported: pd.DataFrame) -> dict[str, Any]:
    spec = cell.spec
    task = load(TASKS, spec.dataset.task, "task")
    found = cell_records(cell, runs)
    measured = [records.checkpoint_metrics(record, cell.checkpoint) for record in found]
    for metrics in measured:
        choose(cell.measured, metrics, f"{table.name}: metric on {spec.data}")
    values = [metrics[cell.measured] for metrics in measured]
    scores = [records.problem_scores(record, cell.checkpoint, cell.measured) for record in found]
    summary = summarise(values, scores, rate=cell.unit == "percent")
    row = _described(table, cell)
    published = _published(reported, table, cell, row["train_data"])
    stands_in = spec.stands_in_for
    difference = None if published is None or summary.mean is None or stands_in else summary.mean - published
    return row | {
        "added_params": found[0]["added_parameters"] if found else "",
        "n_seeds": summary.n_seeds,
        "mean": summary.mean,
        "std": summary.std,
        "ci_low": summary.ci_low,
        "ci_high": summary.ci_high,
        "reported": published,
        "reported_difference": difference,
        "values": values,
        "chance": task.chance(spec.task_config) if hasattr(task, "chance") else None,
    }


def _described(table: Table, cell: Cell) -> dict[str, Any]:
    """A cell's columns without its numbers."""
    spec = cell.spec
    task = load(TASKS, spec.dataset.task, "task")
    settings = {key: getattr(spec.method_config, key, "") for key in PUBLISHED_SETTINGS}
    if settings["placement"] == "all":
        settings["registers"] = ""
    return {
        "artifact": table.name,
        "scale": spec.scale,
        "role": spec.model_config.role,
        "model": spec.model,
        "method": spec.method + (f" ({_extra(spec)})" if _extra(spec) else ""),
        "train_data": task.describe(spec.task_config),
        "benchmark": task.scored_on(spec.task_config),
        "metric": cell.measured,
        "unit": cell.unit,
        **settings,
        "iterations": cell.iterations,
        "epochs": spec.recipe.epochs,
        "stands_in_for": spec.stands_in_for,
        "label": cell.row.label or _label(spec),
        "data": spec.data,
        "path": spec.path,
    }


def _settings_row(table: Table, cell: Cell) -> dict[str, Any]:
    """One setting of a run, by name: of its recipe, its method or its task; nothing where it has none of that name."""
    spec = cell.spec
    places = (spec.recipe, spec.method_config, spec.task_config, CORPORA.get(getattr(spec.task_config, "corpus", "")))
    values = [getattr(place, cell.metric, None) for place in places]
    row = _described(table, cell)
    text = f"{row['label'].split(', d_max')[0]} on {row['train_data']}"
    value = next((v for v in values if v is not None), None)
    return row | {"mean": value, "n_seeds": "", "unit": "", "reported": None, "label": text}


def _flops_rows(table: Table, scale: Scale, reported: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Cells that are computed, not run: FLOPs of a layer by model and length, and both tipping points."""
    for role, shape in table.shapes.items():
        found = []
        for length in table.lengths:
            attention, feed_forward = layer_flops(shape, length)
            values = (attention, feed_forward, attention + feed_forward)
            found += [(f"{length} tokens", m, v / 1e9, "1e9 FLOP") for m, v in zip(table.metrics, values, strict=True)]
        for rule in (tipping_point, attention_exceeds_feed_forward):
            found.append(("tipping points", rule.__name__, rule(shape), "tokens"))
        for label, metric, value, unit in found:
            same = reported[
                reported["artifact"].isin(table.reported)
                & (reported["model"] == role)
                & (reported["metric"] == metric)
                & (reported["variant"] == f"sequence_length={label.removesuffix(' tokens')}")
            ]
            published = float(same["value"].iloc[0]) if len(same) else None
            yield dict.fromkeys(COLUMNS, "") | {
                "artifact": table.name,
                "scale": scale.name,
                "role": role,
                "model": role,
                "benchmark": label,
                "metric": metric,
                "unit": unit,
                "mean": value,
                "reported": published,
                "label": label,
                "reported_difference": None if published is None else value - published,
                "data": "",
                "path": "",
            }


def _extra(spec: Any) -> str:
    """Settings that have no column of their own."""
    rest = {k: v for k, v in spec.settings.items() if k not in PUBLISHED_SETTINGS and k != "d_min"}
    return ", ".join(f"{k}={v}" for k, v in sorted(rest.items()))


def _label(spec: Any) -> str:
    d_max = getattr(spec.method_config, "d_max", None)
    return spec.method if d_max is None else f"{spec.method}, d_max {d_max}"
