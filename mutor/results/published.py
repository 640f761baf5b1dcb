"""The published values, config/reported.csv, and which of them stands beside a cell."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from mutor.config.schema import Table
from mutor.files import read_text
from mutor.results.numbers import is_missing

REPORTED = (
    *("artifact", "role", "method", "variant", "train_data", "benchmark", "metric", "value", "unit", "d_max", "a"),
    *("registers", "placement", "iterations", "epochs", "register_embedding", "added_params", "seeds", "source"),
    "std_error",  # of the value, where the source tells it
)
# columns that name what was measured; the others that a cell may state are settings of it
IDENTITY = ("role", "method", "variant", "train_data", "metric", "iterations")


def read_reported(file: Path) -> pd.DataFrame:
    """The published values, config/reported.csv, as texts.

    Raises ValueError naming the file, and the line, where a column or a part of a line is missing.
    """
    text = read_text(file)
    rows = list(csv.reader(io.StringIO(text)))
    missing = [column for column in REPORTED if not rows or column not in rows[0]]
    if missing:
        raise ValueError(f"{file}: column {missing[0]!r} is missing")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]) or (number == len(rows) and not text.endswith("\n")):
            raise ValueError(f"{file}: row {number} is cut: it has {len(row)} fields of {len(rows[0])}, or no line end")
    return pd.DataFrame(rows[1:], columns=rows[0], dtype=str)


def half_width(error: Any) -> float:
    """Half the width of a published value's 95% interval, from its standard error; 0 where the source tells none."""
    return 0.0 if is_missing(error) else 1.96 * float(error)


class Published:
    """The published values that belong to a table, those of the artifacts that it names in `reported`.

    Published(read_reported(file), table).beside({"role": ["gemma-2b"], "metric": ["ratio"], ...})
    """

    def __init__(self, reported: pd.DataFrame, table: Table) -> None:
        self.frame = reported[reported["artifact"].isin(table.reported)]
        self._rows: list[dict[str, str]] = self.frame.to_dict("records")  # type: ignore[assignment]
        roles = {*(row.model for row in table.rows), *table.shapes, *table.models}
        known = {row["artifact"] for row in self._rows if row["role"] in roles}
        self._own_models = {row["artifact"] for row in self._rows} - known

    def beside(self, cell: Mapping[str, Collection[str]], budget_factor: float = 1.0) -> float | None:
        """The published value of the same cell, see `row_beside`."""
        found = self.row_beside(cell, budget_factor)
        return None if found is None else float(found["value"])

    def row_beside(self, cell: Mapping[str, Collection[str]], budget_factor: float = 1.0) -> Mapping[str, str] | None:
        """The published row of the same cell: equal in all that both the source and the cell state.

        cell: column -> texts that mean the cell's own; an empty text says that it has no such setting. A column that
        the source leaves empty fits every cell. `variant` has the settings that no column has, "default" where they are
        defaults. A source with none of the table's models is a reference on a model of its own, which is not compared.
        A cell trained `budget_factor` times as long as its dataset's recipe says stands beside the value published for
        as much longer training.
        """
        found = [row for row in self._rows if self._fits(row, cell, IDENTITY)]
        if found and all(row["epochs"] for row in found):
            shortest = min(float(row["epochs"]) for row in found)
            found = [row for row in found if abs(float(row["epochs"]) / shortest - budget_factor) < 0.1]
        settings = cell.keys() - {*IDENTITY}
        return next((row for row in found if self._fits(row, cell, settings)), None)

    def _fits(self, row: Mapping[str, str], cell: Mapping[str, Collection[str]], columns: Collection[str]) -> bool:
        return all(
            row[column] in ("", *cell[column]) or (column == "role" and row["artifact"] in self._own_models)
            for column in columns
            if column in cell
        )
