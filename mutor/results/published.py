"""The published values, config/reported.csv, and which of them stands beside a cell."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mutor.config.runs import Cell
from mutor.config.schema import Table


def read_reported(file: Path) -> pd.DataFrame:
    """The published values, config/reported.csv, as texts."""
    return pd.read_csv(file, dtype=str, keep_default_na=False)


def _published(reported: pd.DataFrame, table: Table, cell: Cell, name: str) -> float | None:
    """The published value of the same cell: equal in all that the source states.

    A model trained longer than its dataset's recipe says is compared with the published one trained as much longer.
    """
    spec = cell.spec
    rows = reported[
        reported["artifact"].isin(table.reported)
        & (reported["method"] == spec.method)
        & reported["train_data"].isin([name, cell.row.train_data])
        & (reported["metric"] == cell.metric)
    ]
    if cell.row.iterations is not None:
        rows = rows[rows["iterations"] == str(cell.row.iterations)]
    if spec.model_config.role in set(rows["model"]):
        rows = rows[rows["model"] == spec.model_config.role]
    if len(rows) and rows["epochs"].ne("").all():
        epochs = rows["epochs"].astype(float)
        rows = rows[(epochs / epochs.min() - spec.budget_factor).abs() < 0.1]
    for setting in ("d_max", "a", "register_embedding", "placement"):
        ours = getattr(spec.method_config, setting, "")
        words = {"all": "every_token", "every": "every_second_token"} if setting == "placement" else {}
        rows = rows[rows[setting].isin(["", words.get(ours, f"{ours}")])]
    return float(rows["value"].iloc[0]) if len(rows) else None


def published_rows(reported: pd.DataFrame, table: Table) -> pd.DataFrame:
    """All published values that belong to a table."""
    return reported[reported["artifact"].isin(table.reported)]
