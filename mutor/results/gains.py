"""Where looking ahead helps and where it hurts: each method against next-token prediction, task by task.

for gain in gains(evidence, tables): print(gain.data, gain.label, gain.word)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mutor.config.runs import Cell
from mutor.config.schema import Table
from mutor.results.cells import Evidence
from mutor.results.claims import scores_of
from mutor.results.verdicts import Found, difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS = ("helps", "hurts", "undecided")


@dataclass(frozen=True)
class Gain:
    """One method against next-token prediction of the same model, data and budget; unit: of the difference."""

    table: str
    data: str
    method: str
    label: str
    metric: str
    unit: str
    found: Found

    @property
    def word(self) -> str:
        """What it does: helps, hurts, or undecided, as is all of a single seed."""
        d = self.found.difference
        if self.found.seeds < 2 or np.isnan(d.low) or (self.found.p is not None and self.found.p >= 0.05):
            return "undecided"
        return "helps" if d.low > 0 else "hurts" if d.high < 0 else "undecided"


def gains(evidence: Evidence, tables: Sequence[Table]) -> list[Gain]:
    """Every method that ran beside next-token prediction, once; without controls and tables that are path only.

    The metric is the log-likelihood where a table has it, all degrees of one that is graded by them, else its first one
    if that is a rate: more is better. Single seeds, which decide nothing, do not stand beside several.
    """
    out: dict[tuple[str, str, str], Gain] = {}
    for table in tables:
        if table.needs_runs and not table.drawing.answer and not evidence.path_only(table):
            for gain in _of_table(evidence, table):
                out.setdefault((gain.data, gain.label, gain.metric), gain)
    several = {(gain.data, gain.metric) for gain in out.values() if gain.found.seeds > 1}
    return [gain for gain in out.values() if gain.found.seeds > 1 or (gain.data, gain.metric) not in several]


def _of_table(evidence: Evidence, table: Table) -> list[Gain]:
    metrics = [m for m in table.metrics if m == "log_likelihood" or m.startswith("accuracy_degree_")]
    metrics = metrics or [table.metrics[0]]
    pairs = zip(evidence.cells(table), evidence.frame(table).to_dict("records"), strict=True)
    told = [(cell, row) for cell, row in pairs if cell.metric in metrics and cell.checkpoint in ("last", "best")]
    out = []
    for cell, row in sorted(told, key=lambda pair: metrics.index(pair[0].metric)):
        plain = next((other for other, _ in told if other.metric == cell.metric and _is_plain(other, cell)), None)
        if plain is None or cell.row.control or cell.spec.method == "next_token":
            continue
        if cell.unit != "percent" and cell.metric != "log_likelihood":
            continue
        one, other = scores_of(evidence, cell), scores_of(evidence, plain)
        found = difference(one, other, percent=cell.unit == "percent", solved_at=cell.solved_at)
        if found is not None:
            unit = cell.unit if cell.solved_at is None else "percent of seeds"
            where = f"{row['data']}, {row['ran']}"
            out.append(Gain(table.name, where, cell.spec.method, row["label"], cell.measured, unit, found))
    return out


def _is_plain(other: Cell, cell: Cell) -> bool:
    """Whether a cell is that of next-token prediction on the same data and model, as long trained."""
    one, two = ((c.spec.data, c.spec.model, c.spec.budget_factor, c.checkpoint, c.spec.method) for c in (other, cell))
    return one == (*two[:-1], "next_token")


def sentences(found: Sequence[Gain]) -> list[str]:
    """What the gains say: in short, and then a line for each of the tasks."""
    if not found:
        return ["Nothing can be said before the runs."]
    counts = ", ".join(f"{word} in {sum(gain.word == word for gain in found)}" for word in WORDS)
    out = [f"{len(found)} comparisons with next-token prediction: looking ahead {counts}."]
    for data, metric in dict.fromkeys((gain.data, gain.metric) for gain in found):
        own = [gain for gain in found if (gain.data, gain.metric) == (data, metric)]
        parts = [f"{word}: {'; '.join(g.label for g in own if g.word == word)}." for word in WORDS]
        out.append(f"{data} ({metric}) {' '.join(part for part in parts if not part.endswith(': .'))}")
    return out


def draw(evidence: Evidence, found: Sequence[Gain]) -> Figure:
    """A panel a task, a line a method: the gain over next-token prediction with its 95% interval."""
    from mutor.results.figures import ROW, colour_of, graph_name, side_by_side, wrapped

    groups = list(dict.fromkeys((gain.data, gain.metric) for gain in found))
    panels = [[gain for gain in found if (gain.data, gain.metric) == group] for group in groups]
    figure, axes = side_by_side(len(groups), (4.9, 1.2 + 0.26 * max(map(len, panels), default=1)), 0.6)
    for axis, (data, metric), rows in zip(axes, groups, panels, strict=False):
        for y, gain in enumerate(rows):
            d, colour = gain.found.difference, colour_of(gain.method)
            axis.plot(d.estimate, y, "o", color=colour, ms=5, mfc="white" if gain.word == "undecided" else colour)
            if not np.isnan(d.low):
                axis.plot([d.low, d.high], [y, y], color=colour, lw=1.4)
        axis.axvline(0, color="#555555", lw=1, ls="--")
        names = [f"{g.label}  ({g.found.counted or f'n={g.found.seeds}'})" for g in rows]
        axis.set_yticks(range(len(rows)), [wrapped(name, 34) for name in names], fontsize=8.5)
        name = data.split(", ")[0] if "labels=" in data else data
        axis.set(ylim=(len(rows) - 0.4, -0.6), xlabel=f"{metric.replace('_', ' ')} ({rows[0].unit})")
        axis.set_title(wrapped(f"{graph_name(name)}{data.removeprefix(name)}", 28), fontsize=8.5)
    if not found:
        axes[0].axis("off")
        axes[0].text(0.5, 0.5, "no runs yet", ha="center", color="#777777")
    title = f"Gain over next-token prediction, with 95% intervals; hollow: undecided — scale {evidence.scale.name}"
    figure.suptitle(wrapped(title, 20 + 45 * min(max(len(groups), 1), ROW)), fontsize=10)
    return figure
