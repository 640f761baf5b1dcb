"""Whether a method helps on a user's own data, in words: what stands first in results/own.md and in the report.

for sentence in sentences(evidence, evidence.table("own")): print(sentence)

Each row of a table that is drawn as `verdict` is compared with the rows that it names as `against`, seed by seed and
problem by problem. A single seed decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mutor.config.runs import Cell
from mutor.config.schema import Table
from mutor.registry import METHODS, TASKS, load
from mutor.results.cells import Evidence
from mutor.results.claims import scores_of
from mutor.results.records import seed_folder
from mutor.results.stats import Interval, to_decide
from mutor.results.verdicts import difference

if TYPE_CHECKING:
    import pandas as pd

UNDECIDED = "undecided"


HOW = (
    "How many would decide: an error falls with the root of their number; with so many, four of five repetitions "
    "decide, if the measured difference is the true one. One seed decides nothing: another one trains another model."
)


@dataclass(frozen=True)
class Verdict:
    """One comparison. word: helps, hurts, undecided or not run; found: ours - theirs in points; cost: in words."""

    ours: str
    theirs: str
    word: str
    found: Interval | None = None
    decides: str = ""
    cost: str = ""

    def __str__(self) -> str:
        text = f"{self.ours} against {self.theirs}: {self.word}"
        if self.found is not None:
            d = self.found
            text += f", {d.estimate:+.1f} points"
            known = "" if np.isnan(d.low) else f"95% interval {d.low:+.1f} to {d.high:+.1f}, over {d.covers}"
            text += f" ({'; '.join(filter(None, (known, self.decides)))})"
        return f"{text}. {self.cost}".strip()


def sentences(evidence: Evidence, table: Table) -> list[str]:
    """The answer in short, the scores, each comparison, and how it is estimated what would decide."""
    cells = [cell for cell in evidence.cells(table) if cell.metric == table.metrics[0]]
    out = []
    for place in dict.fromkeys((cell.spec.data, cell.spec.model) for cell in cells):
        out += _of_model(evidence, [cell for cell in cells if (cell.spec.data, cell.spec.model) == place])
    return out


def _of_model(evidence: Evidence, cells: list[Cell]) -> list[str]:
    spec = cells[0].spec
    compared = {
        _name(cell, cells): [verdict(evidence, cell, other, cells) for other in _against(cell, cells)] for cell in cells
    }
    plain = {label for cell in cells for label in cell.row.against}
    judged = [
        compared[_name(cell, cells)][0]
        for cell in cells
        if cell.row.label not in plain and any(other.row.against for other in _against(cell, cells))
    ]  # not next_token, which is compared with the model that no one has trained
    scores = {_name(cell, cells): [s.value for s in scores_of(evidence, cell).values()] for cell in cells}
    said = ", ".join(f"{name} {np.mean(values):.1f}" for name, values in scores.items() if values)
    where = f"{cells[0].measured} on {load(TASKS, spec.dataset.task, 'task').scored_on(spec.task_config)}"
    listed, warning = [one for several in compared.values() for one in several], _warning(evidence, cells)
    if warning:
        listed = [replace(one, found=None, decides="") for one in listed]
    out = [f"{spec.model}, {where}: {warning or _answer(judged)}"]
    out += [f"Scores in percent: {said}."] if said else []
    return [*out, *map(str, listed), *([HOW] if any(one.decides for one in listed) else [])]


def _answer(judged: list[Verdict]) -> str:
    """What the comparisons of the methods say together."""
    if not judged:
        return "no method is compared with plain fine-tuning."
    named = {word: [one.ours for one in judged if one.word == word] for word in ("helps", "hurts", UNDECIDED)}
    if not any(named.values()):
        return "nothing can be said before the runs."
    texts = [f"{', '.join(names)} {_verb(word, len(names))}" for word, names in named.items() if names]
    head = "yes" if named["helps"] else "not decided" if named[UNDECIDED] else "no"
    return f"does multi-token prediction help? {head.capitalize()}: {'; '.join(texts)}."


def _verb(word: str, count: int) -> str:
    if word == UNDECIDED:
        return f"{'is' if count == 1 else 'are'} {UNDECIDED}"
    return word if count == 1 else word.removesuffix("s")


def _against(cell: Cell, cells: list[Cell]) -> list[Cell]:
    """The cells that one is compared with, in the order of its row."""
    return [other for label in cell.row.against for other in cells if other.row.label == label]


def _name(cell: Cell, cells: list[Cell]) -> str:
    """A row's label, with its settings where it has several."""
    alike = [other for other in cells if other.row.label == cell.row.label]
    return cell.row.label if len(alike) == 1 else f"{cell.row.label} ({cell.spec.name})"


def verdict(evidence: Evidence, ours: Cell, theirs: Cell, cells: list[Cell]) -> Verdict:
    """One cell against another, of the same model and data; one of no steps counts for every seed."""
    names = _name(ours, cells), _name(theirs, cells)
    one, other = scores_of(evidence, ours), scores_of(evidence, theirs)
    if not theirs.spec.recipe.trains:
        other = {seed: scored for seed in one for scored in other.values()}
    common = sorted(one.keys() & other.keys())
    found = difference({s: one[s] for s in common}, {s: other[s] for s in common}, percent=ours.unit == "percent")
    if found is None:
        return Verdict(*names, "not run")
    cost = _cost(evidence, ours, theirs, common)
    d = found.difference
    if found.seeds > 1 and (d.low > 0 or d.high < 0):
        return Verdict(*names, "helps" if d.low > 0 else "hurts", d, "", cost)
    decides = to_decide(d, found.seeds) if d.problems else ""
    return Verdict(*names, UNDECIDED, d, decides, cost)


def _cost(evidence: Evidence, ours: Cell, theirs: Cell, seeds: list[int]) -> str:
    """What the one costs more than the other: time and tokens of training on the same machine, and at inference."""
    pairs = [{r["seed"]: r for r in evidence.records_of(cell)} for cell in (ours, theirs)]
    both = [(pairs[0][s], pairs[1][s]) for s in seeds if s in pairs[1] and pairs[1][s]["steps"]]
    if not both:
        return ""
    texts = []
    if all(a.get("device") == b.get("device") and a.get("threads") == b.get("threads") for a, b in both):
        texts.append(f"{_ratio(both, 'seconds_training')} times the time")
    texts.append(f"{_ratio(both, 'tokens')} times the tokens")
    method = load(METHODS, ours.spec.method, "method")
    inference = "costs more, as what was added stays" if method.keeps_at_inference else "costs the same"
    return f"Training takes {' and '.join(texts)}; inference {inference}."


def _ratio(pairs: list[tuple[dict[str, Any], dict[str, Any]]], field: str) -> str:
    ours, theirs = (sum(pair[side].get(field, 0) for pair in pairs) for side in (0, 1))
    return f"{ours / theirs:.2f}" if theirs else "?"


def _warning(evidence: Evidence, cells: list[Cell]) -> str:
    """What to check where all that was trained scores 0 or all 100; empty otherwise."""
    trained = [cell for cell in cells if cell.spec.recipe.trains]
    values = {one.value for cell in trained for one in scores_of(evidence, cell).values()}
    if values not in ({0.0}, {100.0}):
        return ""
    record = next(record for cell in trained for record in evidence.records_of(cell))
    file = seed_folder(evidence.runs.runs, trained[0].spec, record["seed"]).parent
    config = trained[0].spec.task_config
    now = {name: getattr(config, name, None) for name in ("extract", "compare", "new_tokens")}
    options = ", ".join(f"{name} {value}" for name, value in now.items() if value is not None)
    if values == {0.0}:
        return (
            f"WARNING: every method scores 0, so nothing can be decided. Read the answers in {file}/*/predictions-last"
            f".jsonl: does `extract` find them, does `compare` mean what you do, are `new_tokens` enough ({options})?"
        )
    return (
        f"WARNING: every method scores 100, so nothing can be decided. Take harder test problems, or read in {file}/*/"
        f"predictions-last.jsonl whether `extract` and `compare` ask too little ({options})."
    )


def printed(frame: pd.DataFrame, table: Table) -> pd.DataFrame:
    """The cells as .md and .tex name them: by metric and test file."""
    return frame.assign(metric=frame["metric"] + " on " + frame["benchmark"], data="")
