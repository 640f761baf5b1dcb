"""results/verdict.md: are the implementations right, where does looking ahead help, and what about your model?

The same three answers stand first in report.html. Claims and the rule of their verdicts follow them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
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
from mutor.results.stats import Interval
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
    found = gains.gains(evidence, tables)
    beside = against_published(evidence, tables, found)
    here, _ = claims.here_and_elsewhere(claims.claim_frame(evidence))
    said = [] if here.empty else claims.summary(here)
    return [
        Answer(RIGHT, _rightness(beside), beside),
        Answer(HELPS, [*gains.sentences(found), *(f"Claims: {sentence}" for sentence in said)], pd.DataFrame()),
        yours,
    ]


def against_published(evidence: Evidence, tables: Sequence[Table], found: Sequence[gains.Gain] = ()) -> pd.DataFrame:
    """A row for each cell in whose place nothing stands in: ours and the published value, and whether they agree.

    They do where the difference lies inside both 95% intervals in quadrature: of ours over seeds and problems, and of
    the published mean, 1.96 of its standard errors where the source tells them, else none. So with the gain over
    next-token prediction, where one is `found` and published, which leans less on what a source does not tell of its
    optimiser. A single seed of ours decides nothing, and cells whose seeds are counted have no mean to compare.
    """
    rows = {}
    gained = {(gain.data, gain.label, gain.metric): gain.found.difference for gain in found}
    for table in tables if evidence.runs else ():
        told = evidence.frame(table).to_dict("records")
        next_token = {(row["data"], row["ran"], row["metric"]): row for row in told if row["label"] == "next_token"}
        for row in told:
            unknown = is_missing(row["reported"]) or is_missing(row["ci_low"]) or row["n_seeds"] == ""
            if unknown or row["stands_in_for"] or row["n_seeds"] < 2 or evidence.path_only(table):
                continue
            here = Interval(row["mean"], row["ci_low"], row["ci_high"], "")
            on, key = f"{row['data']}, {row['ran']}", (row["data"], row["label"], row["metric"])
            rows[key] = {
                "table": table.name,
                "on": on,
                "method": row["label"],
                "metric": row["metric"],
                "here": f"{here.estimate:.1f} ({here.low:.1f} to {here.high:.1f}; n={row['n_seeds']})",
                **_beside("", row["reported"], here, half_width(row["reported_error"])),
            }
            gain, other = gained.get((on, *key[1:])), next_token.get((row["data"], row["ran"], row["metric"]), {})
            if gain is not None and not np.isnan(gain.low) and not is_missing(other.get("reported")):
                error = hypot(half_width(row["reported_error"]), half_width(other["reported_error"]))
                rows[key] |= {"gain": f"{gain.estimate:+.1f} ({gain.low:+.1f} to {gain.high:+.1f})"}
                rows[key] |= _beside("gain ", row["reported"] - other["reported"], gain, error)
    return pd.DataFrame(list(rows.values())).fillna("")


def _beside(what: str, published: float, here: Interval, error: float) -> dict[str, str]:
    """The published value in words, and whether it lies inside; error: half the width of its interval, 0: not told."""
    apart = published - here.estimate
    inside = -hypot(here.low - here.estimate, error) <= apart <= hypot(here.high - here.estimate, error)
    told = f"{published:+.2f}" if what else f"{published:g}"
    return {
        f"{what}published": told + (f" ± {error:.1f}" if error else ""),
        f"{what}inside": "yes" if inside else "no",
    }


def _inside(column: pd.Series) -> str:
    """How many of those that are known, yes or no, are inside."""
    return f"{(column == 'yes').sum()} of {(column != '').sum()}"


def _rightness(beside: pd.DataFrame) -> list[str]:
    if beside.empty:
        return ["No cell of this scale has published settings, models and data: there is nothing to compare."]
    kinds = {"inside": "published values"}
    if "gain inside" in beside:
        kinds["gain inside"] = "published gains over next-token prediction"
    counts = [f"{_inside(beside[c])} {words}" for c, words in kinds.items()]
    out = [
        f"{' and '.join(counts)} lie inside the combined 95% interval of theirs and ours. Whether a method computes "
        "what its source says is held by tests against independent code and cases worked out by hand."
    ]
    for name, own in beside.groupby("table", sort=False):
        known = {c: words.removeprefix("published ") for c, words in kinds.items() if own[c].any()}
        out.append(f"{name}: {', '.join(f'{_inside(own[c])} {words}' for c, words in known.items())}.")
    if any((beside[column] == "no").any() for column in kinds):
        out.append("Why values lie outside, as far as it was tested, is told in the notes of these tables.")
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
        parts += ["", f"## {one.question}", "", plain(first)]
        if one.question == HELPS:
            parts += ["", "![Gain over next-token prediction by task and method](verdict.png)"]
        parts += [*([""] if rest else []), *(f"- {plain(sentence)}" for sentence in rest)]
        if len(one.table):
            parts += ["", grid(one.table.set_index("table"))]
    here, _ = claims.here_and_elsewhere(claims.claim_frame(evidence))
    parts += ["", "## Claims", "", "Differences ours - theirs, with 95% intervals (n = seeds), or solved seeds.", ""]
    parts += [grid(claims.shown(here).set_index("claim")) if len(here) else "Nothing that is claimed is decided here."]
    parts += ["", *(f"- Stands in for {words}." for words in sorted(set(filter(None, here["stands_in_for"]))))]
    parts += ["", "How verdicts come about:", "", *RULE.splitlines()]
    if others := elsewhere(evidence):
        parts += ["", "## Needs the paper scale", "", *(f"- {line}" for line in others)]
    return "\n".join(parts) + "\n"
