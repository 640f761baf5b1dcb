"""What the runs of a scale say, cell by cell, each number computed once.

    evidence = Evidence(root, scale, Records(runs))
    evidence.frame(evidence.table("figure4"))  # one row a cell, the same columns in all tables

Tables, figures, claims, report and README read from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from mutor.checks import choose
from mutor.config.load import config_folder, load_table, results_folder
from mutor.config.runs import Cell, Spec, cells_of, possible, settings_name
from mutor.config.schema import Scale, Table
from mutor.registry import TASKS, load, resolve
from mutor.results.published import Published, read_reported
from mutor.results.records import Records, checkpoint_metrics, problem_scores, same_problems
from mutor.results.stats import summarise
from mutor.tasks.corpora import CORPORA

T = TypeVar("T")
COLUMNS = {  # of every table's .csv, and what they say
    "artifact": "the table or figure",
    "scale": "the scale, a file of config/scales; with `path only` where nothing follows from the numbers",
    "role": "the published model whose place is taken, as in config/reported.csv",
    "model": "the model that ran",
    "method": "the training method, a name of `python -m mutor methods`",
    "train_data": "what it was trained on",
    "benchmark": "what it was scored on",
    "metric": "what was measured; a name with a checkpoint's name before it is of that checkpoint",
    "unit": "of the numbers",
    "d_max": "furthest offset that is trained",
    "a": "weight of the auxiliary loss",
    "registers": "registers a sequence, where that is set",
    "placement": "where registers stand",
    "iterations": "training steps after which it was scored, where a table has several",
    "epochs": "passes over the training data",
    "register_embedding": "one vector for all offsets, or one each",
    "added_params": "parameters that the method adds in training",
    "n_seeds": "seeded runs behind the number; 0: not run",
    "mean": "over seeds",
    "std": "sample standard deviation over seeds",
    "ci_low": "lower end of the mean's 95% interval, for other seeds and other problems; none where seeds are counted",
    "ci_high": "its upper end",
    "reported": "the published value",
    "reported_difference": "mean - reported, where nothing stands in for the published model or data",
    "stands_in_for": "what stands in for which published model and data; empty: nothing",
    "settings": "all settings of the method that are not its defaults, key=value",
    "n_solved": "seeds that solve the task, where it is learned wholly or not at all and seeds are counted",
    "solved_low": "lower end of the exact 95% interval of their share, in percent",
    "solved_high": "its upper end",
}
PUBLISHED_SETTINGS = ("d_max", "a", "registers", "placement", "register_embedding")
NUMBERS = (
    *("mean", "std", "ci_low", "ci_high", "reported", "reported_difference", "chance"),
    *("n_solved", "solved_low", "solved_high", "solved_at", "reported_error"),
)
# for drawing, not in the .csv: name in figures, with and without the steps; the method with the settings that no column
# has; every seed's number; what ran, for which role; the training data, as a stand-in where they have the published
# name; of cost tables, a section with what ran for it, what is swept over and its value
FOR_DRAWING = [
    "label",
    "line",
    "kind",
    "values",
    "chance",
    "solved_at",
    "reported_error",
    "ran",
    "data",
    "panel",
    "sweep",
    "x",
]


class Evidence:
    """A scale's tables, cells, runs and published values, from which all artifacts are made.

    Each table is read, expanded and computed when it is first asked for, and then kept. seeds: of every run, in the
    place of the scale's, as in config.yaml; they decide which runs are wanted, not which are shown.
    """

    def __init__(self, root: Path, scale: Scale, runs: Records, seeds: tuple[int, ...] | None = None) -> None:
        self.root, self.scale, self.runs, self.seeds = root, scale, runs, seeds
        self._kept: dict[tuple[str, str], Any] = {}

    def once(self, what: str, name: str, compute: Callable[[], T]) -> T:
        """What `compute` returns, called the first time alone."""
        if (what, name) not in self._kept:
            self._kept[what, name] = compute()
        return self._kept[what, name]

    @cached_property
    def reported(self) -> pd.DataFrame:
        """The published values, config/reported.csv."""
        return read_reported(config_folder(self.root) / "reported.csv")

    @cached_property
    def home(self) -> str:
        """The folder that the scale's artifacts are asked of, results or results/<scale>."""
        return results_folder(self.root, self.scale.name)

    def table(self, name: str) -> Table:
        """A file of config/tables."""
        return self.once("table", name, lambda: load_table(self.root, name))

    def cells(self, table: Table) -> list[Cell]:
        """The cells of a table at this scale."""
        return self.once("cells", table.name, lambda: cells_of(table, self.scale, self.seeds))

    def published(self, table: Table) -> Published:
        """The published values that belong to a table."""
        return self.once("published", table.name, lambda: Published(self.reported, table))

    def path_only(self, table: Table) -> bool:
        """Whether a table shows at this scale only that every step works, and nothing is concluded from it."""
        return table.name in self.scale.path_only

    def frame(self, table: Table) -> pd.DataFrame:
        """One row a cell, in the table's order, with COLUMNS and FOR_DRAWING.

        Raises ValueError where the scale has nothing in the place of the table's models and data.
        """
        return self.once("frame", table.name, lambda: self._frame(table))

    def records_of(self, cell: Cell) -> list[dict[str, Any]]:
        """The records that a cell is made of: all seeds there are, or as many as the source has.

        One that lacks the cell's checkpoint or metric is left out, and named in `runs.problems`; but that a method does
        not predict a token so far ahead, or makes fewer drafts, or that no problem has a degree, is no problem.
        """
        found = []
        for record in self.runs.of(cell.spec)[: cell.row.max_seeds]:
            names = {name: c["metrics"] for c in record["checkpoints"] for name in c["names"]}
            try:
                choose(cell.checkpoint, names, f"{record['file']}: checkpoint")
                numbered = any(word in cell.measured for word in ("_ahead_", "_draft_", "_degree_"))
                if numbered and cell.measured not in names[cell.checkpoint]:
                    continue
                choose(cell.measured, names[cell.checkpoint], f"{record['file']}: metric")
                found.append(record)
            except ValueError as error:
                self.runs.leave_out(error)
        return found

    def _frame(self, table: Table) -> pd.DataFrame:
        rows = list(resolve(table.drawing.rows)(self, table))
        if not rows:
            roles = {f"{row.model} on {row.train_data}" for row in table.rows}
            raise ValueError(
                f"{table.name}: scale {self.scale.name!r} has nothing in the place of {', '.join(sorted(roles))}"
            )
        columns = [*COLUMNS, *FOR_DRAWING]
        blank = {column: None if column in NUMBERS else "" for column in columns}
        blank |= {"artifact": table.name, "scale": self.scale.name + ", path only" * self.path_only(table)}
        rows = [blank | row for row in rows]
        for row in rows:
            if row["mean"] is not None and row["reported"] is not None and not row["stands_in_for"]:
                row["reported_difference"] = row["mean"] - row["reported"]
        return pd.DataFrame(rows, columns=columns)


def run_rows(evidence: Evidence, table: Table) -> Iterator[dict[str, Any]]:
    """Cells that runs fill: means and intervals over seeds and problems; n_seeds 0 where there are none."""
    for cell in evidence.cells(table):
        found = evidence.records_of(cell)
        values = [checkpoint_metrics(record, cell.checkpoint)[cell.measured] for record in found]
        alike = len(found) == 1 or same_problems(*(record.get("test_data_hash") for record in found))
        scores = [problem_scores(record, cell.checkpoint, cell.measured) for record in found if alike]
        summary = summarise(values, scores, possible=possible(cell.unit), solved_at=cell.solved_at)
        row = _described(cell)
        task = load(TASKS, cell.spec.dataset.task, "task")
        yield row | {
            "added_params": found[0]["added_parameters"] if found else "",
            "n_seeds": summary.n_seeds,
            "mean": summary.mean,
            "std": summary.std,
            "ci_low": summary.ci_low,
            "ci_high": summary.ci_high,
            "n_solved": summary.n_solved,
            "solved_low": summary.solved_low,
            "solved_high": summary.solved_high,
            "solved_at": cell.solved_at,
            **_published(evidence.published(table), cell, row["train_data"]),
            "values": values,
            "chance": task.chance(cell.spec.task_config) if hasattr(task, "chance") else None,
        }


def settings_rows(evidence: Evidence, table: Table) -> Iterator[dict[str, Any]]:
    """Cells that name a setting of a run: of its recipe, its method or its task; nothing where it has none."""
    for cell in evidence.cells(table):
        spec = cell.spec
        places = (spec.recipe, spec.method_config, spec.task_config, _corpus(spec))
        values = [getattr(place, cell.metric, None) for place in places]
        row = _described(cell)
        label = f"{row['label'].split(', d_max')[0]} on {row['data']}"
        yield row | {"mean": next((v for v in values if v is not None), None), "unit": "", "label": label}


def _corpus(spec: Spec) -> Any:
    return CORPORA.get(getattr(spec.task_config, "corpus", ""))


def _published(published: Published, cell: Cell, train_data: str) -> dict[str, float]:
    """The published value beside a run's cell, and its standard error if told.

    None where the data have metrics of their own.
    """
    spec = cell.spec
    if spec.dataset.metrics:
        return {}
    stated: dict[str, list[str]] = {
        "role": [spec.model_config.role],
        "method": [spec.method],
        "train_data": [train_data, str(cell.row.train_data)],
        "metric": [cell.metric],
        "variant": [_extra(spec) or "default"],
    }
    if cell.row.iterations is not None:
        stated["iterations"] = [str(cell.row.iterations)]
    for setting in ("d_max", "a", "register_embedding", "placement"):
        ours = str(getattr(spec.method_config, setting, ""))
        stated[setting] = [{"all": "every_token", "every": "every_second_token"}.get(ours, ours)]
    found = published.row_beside(stated, spec.budget_factor) or {}
    told = {"reported": found.get("value"), "reported_error": found.get("std_error")}
    return {column: float(value) for column, value in told.items() if value}


def _described(cell: Cell) -> dict[str, Any]:
    """A cell's columns without its numbers."""
    spec = cell.spec
    task = load(TASKS, spec.dataset.task, "task")
    settings = {key: getattr(spec.method_config, key, "") for key in PUBLISHED_SETTINGS}
    if settings["placement"] == "all":
        settings["registers"] = ""
    label, data = cell.row.label or _label(spec), task.describe(spec.task_config)
    stands = spec.dataset.stands_in_for
    named_alike = stands.startswith(f"{data} ") or (bool(stands) and str(cell.row.train_data).startswith(data))
    return {
        "role": spec.model_config.role,
        "model": spec.model,
        "method": spec.method,
        "kind": spec.method + (f" ({_extra(spec)})" if _extra(spec) else ""),
        "settings": settings_name(spec.settings) if spec.settings else "",
        "train_data": data,
        "benchmark": task.scored_on(spec.task_config),
        "metric": cell.measured,
        "unit": cell.unit,
        **settings,
        "iterations": cell.iterations,
        "epochs": spec.recipe.epochs,
        "stands_in_for": spec.stands_in_for,
        "label": label + _when(cell),
        "line": label,
        "ran": what_ran(spec.model, spec.model_config.role if spec.model_config.stands_in_for else spec.model),
        "data": f"{data} stand-in" if named_alike else data,
    }


def what_ran(model: str, role: str) -> str:
    """A model's name, with the model that it stands in for."""
    return model if model == role else f"{model} for {role}"


def stand_ins(frame: pd.DataFrame) -> list[str]:
    """What stands in for what in a table's cells, each model and dataset once."""
    return sorted({part for words in frame["stands_in_for"] if words for part in words.split("; ")})


def _when(cell: Cell) -> str:
    """After how many steps a row is scored, where it says so, and for how many published ones these stand."""
    if cell.row.iterations is None:
        return ""
    published = f"{cell.row.iterations // 1000}K"
    return f", {published}" if cell.iterations == cell.row.iterations else f", {cell.iterations} steps for {published}"


def _extra(spec: Spec) -> str:
    """Settings that have no column of their own."""
    rest = {k: v for k, v in spec.settings.items() if k not in PUBLISHED_SETTINGS and k != "d_min"}
    return ", ".join(f"{k}={v}" for k, v in sorted(rest.items()))


def _label(spec: Spec) -> str:
    d_max = getattr(spec.method_config, "d_max", None)
    return spec.method if d_max is None else f"{spec.method}, d_max {d_max}"
