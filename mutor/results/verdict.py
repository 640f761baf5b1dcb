"""results/verdict.md: are the implementations right, where does looking ahead help, and what about your model?

The same three answers stand first in report.html. Claims and the rule of their verdicts follow them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mutor.config.load import load_scale
from mutor.config.runs import run_cells, specs_of
from mutor.config.schema import Table
from mutor.files import write_text
from mutor.results import claims, gains
from mutor.results.cells import Evidence
from mutor.results.numbers import is_missing
from mutor.results.plan import gpu_hours
from mutor.results.published import half_width
from mutor.results.records import Records
from mutor.results.render import answer, grid, plain
from mutor.results.verdicts import RULE

RIGHT = "Are these implementations right?"
HELPS = "Where does looking ahead help, where does it hurt?"
YOURS = "What about your model?"
HOW_TO_TRY = (
    "`python -m mutor try MODEL train.jsonl test.jsonl` fine-tunes your model on your data with and without looking "
    "ahead, and says whether it helps."
)


@dataclass(frozen=True)
class Answer:
    """A question with its answer: sentences, the first one in short, and a table (empty: none)."""

    question: str
    sentences: list[str]
    table: pd.DataFrame


def three_answers(evidence: Evidence, tables: Sequence[Table]) -> list[Answer]:
    """The three questions, answered from the runs behind these tables; of one's own model and data, the last one."""
    return evidence.once("answers", " ".join(table.name for table in tables), lambda: _answers(evidence, tables))


def _answers(evidence: Evidence, tables: Sequence[Table]) -> list[Answer]:
    yours = Answer(YOURS, _own(evidence, tables), pd.DataFrame())
    if any(table.drawing.answer for table in tables):  # one's own model and data alone
        return [yours]
    beside = against_published(evidence, tables)
    here, _ = claims.here_and_elsewhere(claims.claim_frame(evidence))
    said = [] if here.empty else claims.summary(here)
    found = gains.sentences(gains.gains(evidence, tables))
    return [
        Answer(RIGHT, _rightness(beside), beside),
        Answer(HELPS, [*found, *(f"Claims: {sentence}" for sentence in said)], pd.DataFrame()),
        yours,
    ]


def against_published(evidence: Evidence, tables: Sequence[Table]) -> pd.DataFrame:
    """A row for each cell in whose place nothing stands in: ours and the published value, and whether they agree.

    They do where the difference lies inside both 95% intervals in quadrature: of ours over seeds and problems, and of
    the published mean, 1.96 of its standard errors where the source tells them, else none. A single seed of ours
    decides nothing, and cells whose seeds are counted have no mean to compare.
    """
    rows = {}
    for table in tables if evidence.runs else ():
        for row in evidence.frame(table).to_dict("records"):
            unknown = is_missing(row["reported"]) or is_missing(row["ci_low"]) or row["n_seeds"] == ""
            if unknown or row["stands_in_for"] or row["n_seeds"] < 2 or evidence.path_only(table):
                continue
            error = half_width(row["reported_error"])
            apart = row["reported"] - row["mean"]
            ends = row["ci_low"] - row["mean"], row["ci_high"] - row["mean"]
            inside = -np.hypot(ends[0], error) <= apart <= np.hypot(ends[1], error)
            told = f" ± {error:.1f}" if error else ""
            key = (row["data"], row["label"], row["metric"])
            rows[key] = {
                "table": table.name,
                "on": f"{row['data']}, {row['ran']}",
                "method": row["label"],
                "metric": row["metric"],
                "here": f"{row['mean']:.1f} ({row['ci_low']:.1f} to {row['ci_high']:.1f}; n={row['n_seeds']})",
                "published": f"{row['reported']:g}{told}",
                "inside": "yes" if inside else "no",
            }
    return pd.DataFrame(list(rows.values()))


def _rightness(beside: pd.DataFrame) -> list[str]:
    if beside.empty:
        return ["No cell of this scale has published settings, models and data: there is nothing to compare."]
    inside = int((beside["inside"] == "yes").sum())
    out = [f"{inside} of {len(beside)} published values lie inside the combined 95% interval of theirs and ours."]
    for name, own in beside.groupby("table", sort=False):
        outside = own[own["inside"] == "no"]
        many = own["on"].nunique() > 1
        missed = [
            f"{method}{f' on {on}' if many else ''} ({', '.join(of['metric'])})"
            for (on, method), of in outside.groupby(["on", "method"], sort=False)
        ]
        kept = int((own["inside"] == "yes").sum())
        out.append(f"{name}: {kept} of {len(own)}{'; outside: ' + ', '.join(missed) if missed else ''}.")
    return out


def _own(evidence: Evidence, tables: Sequence[Table]) -> list[str]:
    """How to try, and what came out of one's own model, at the scale `own` or with runs of it in the same folder."""
    said = [sentence for table in tables for sentence in answer(evidence, table)]
    if not said and (evidence.runs.runs / "own").is_dir():
        own = Evidence(evidence.root, load_scale(evidence.root, "own"), evidence.runs)
        if evidence.runs.of_scale("own"):
            said = answer(own, own.table("own"))
    return [*said, HOW_TO_TRY] if said else [HOW_TO_TRY]


def elsewhere(evidence: Evidence) -> list[str]:
    """Claims that this scale can't decide, by the table they are about, with what the paper scale takes for it."""
    frame = claims.claim_frame(evidence)
    out = []
    for table, own in frame[frame["verdict"] == "not at this scale"].groupby("table", sort=False):
        names = "; ".join(dict.fromkeys(own["claim"]))
        out.append(f"{table}: {names}. {_cost(evidence, str(table))}".strip())
    return out


@functools.cache
def _paper(root: Path) -> Evidence:
    return Evidence(root, load_scale(root, "paper"), Records(root / "none"))


def _cost(evidence: Evidence, name: str) -> str:
    """What a table takes at the paper scale, in words; empty where that does not have it."""
    paper = _paper(evidence.root)
    if evidence.scale.name == "paper" or name not in paper.scale.artifacts:
        return ""
    hours = gpu_hours(specs_of(run_cells(paper.table(name), paper.scale)), paper.scale)
    return f"At the paper scale: {hours}."


def collect_verdict(evidence: Evidence, artifacts: Sequence[str], folder: Path) -> list[Path]:
    """Write verdict.md and its figure, verdict.png and .svg."""
    from mutor.results.figures import save

    tables = [evidence.table(name) for name in artifacts]
    found = gains.gains(evidence, tables)
    file = folder / "verdict.md"
    write_text(file, markdown(evidence, tables))
    return [file, *save(lambda: gains.draw(evidence, found), folder / "verdict")]


def markdown(evidence: Evidence, tables: Sequence[Table]) -> str:
    """The page: three answers, the claims, how their verdicts come about, and what this scale can't decide."""
    parts = ["# Does multi-token prediction help?", "", f"Scale: {evidence.scale.name} ({evidence.scale.description})."]
    for one in three_answers(evidence, tables):
        first, *rest = one.sentences
        parts += ["", f"## {one.question}", "", plain(first), *([""] if rest else [])]
        parts += [f"- {plain(sentence)}" for sentence in rest]
        if len(one.table):
            parts += ["", grid(one.table.set_index("table"))]
        if one.question == HELPS:
            parts += ["", "![Gain over next-token prediction by task and method](verdict.png)"]
    here, _ = claims.here_and_elsewhere(claims.claim_frame(evidence))
    parts += ["", "## Claims", "", "Differences ours - theirs, with 95% intervals (n = seeds), or solved seeds.", ""]
    parts += [grid(claims.shown(here).set_index("claim")) if len(here) else "Nothing that is claimed is decided here."]
    parts += ["", *(f"- Stands in for {words}." for words in sorted(set(filter(None, here["stands_in_for"]))))]
    parts += ["", "How verdicts come about:", "", *RULE.splitlines()]
    if others := elsewhere(evidence):
        parts += ["", "## Needs the paper scale", "", *(f"- {line}" for line in others)]
    return "\n".join(parts) + "\n"
