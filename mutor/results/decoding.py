"""What a table of decoding prints of its cells: a row a method, with as many drafts as the method makes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from mutor.config.schema import Table
from mutor.results.stats import summarise

SHOWN = {  # metric, without the number of drafts -> its name in .md and .tex
    "acceptance_length": "acceptance length",
    "passes_per_token": "passes a token",
    "flops_ratio": "FLOPs a token, times those without",
    "speedup": "speed-up",
    "identical": "same text",
}


def printed(frame: pd.DataFrame, table: Table) -> pd.DataFrame:
    """Of each row the cells with the most drafts, and how many these are; FLOPs as a ratio to those without drafts."""
    rows = []
    for (data, _, label), own in frame.groupby(["data", "ran", "label"], sort=False):
        cells = {row["metric"]: row for row in own.to_dict("records")}
        head = {"label": f"{data}: {label}", "data": ""}
        rows += [row | head for row in _row(cells)]
    return pd.DataFrame(rows, columns=frame.columns, dtype=object)


def drafts(frame: pd.DataFrame) -> list[int]:
    """The numbers of drafts k that a metric of its cells is measured for, ascending."""
    named = frame[frame["metric"].str.startswith("speedup_draft_") & (frame["n_seeds"] > 0)]["metric"]
    return sorted({int(name.rpartition("_")[2]) for name in named})


def _row(cells: dict[str, dict[Any, Any]]) -> Iterator[dict[Any, Any]]:
    most = max(drafts(pd.DataFrame(cells.values())), default=0)
    found = {name: cells.get(f"{name}_draft_{most or 1}") for name in SHOWN if name != "flops_ratio"}
    first = found["acceptance_length"]
    assert first is not None
    yield first | {"metric": "drafts", "mean": most, "unit": "tokens", "n_seeds": None if most else 0, "std": None}
    for name, words in SHOWN.items():
        cell = _flops_ratio(cells, most) if name == "flops_ratio" else found[name]
        if cell is not None:
            yield cell | {"metric": words}


def _flops_ratio(cells: dict[str, dict[Any, Any]], most: int) -> dict[Any, Any]:
    """FLOPs of a token with drafts, times those without, seed by seed."""
    plain, with_drafts = cells["flops_per_token_draft_0"], cells[f"flops_per_token_draft_{most or 1}"]
    values = [a / b for a, b in zip(with_drafts["values"], plain["values"], strict=True)] if most else []
    summary = summarise(values, possible=(0, math.inf))
    return with_drafts | {"values": values, "mean": summary.mean, "std": summary.std, "unit": "times"}
