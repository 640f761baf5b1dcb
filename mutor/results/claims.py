"""What the sources claim, held against the runs: config/claims.yaml -> results/claims.csv.

A claim compares two cells of a table, or a cell with a number. It gets its verdict from the 95% interval of the
difference ours - theirs, over seeds and problems, by one rule (verdicts.RULE); nobody judges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import hypot
from pathlib import Path
from typing import Any

import pandas as pd

from mutor.checks import choose, from_mapping, setting
from mutor.config.load import read_config, scale_names, table_names
from mutor.config.runs import Cell
from mutor.files import write_text
from mutor.registry import METHODS, TASKS, load
from mutor.results.cells import Evidence
from mutor.results.numbers import is_missing, text
from mutor.results.published import half_width
from mutor.results.records import checkpoint_metrics, problem_scores
from mutor.results.verdicts import SMALLER, Compared, Scored, compare, least_favourable

COLUMNS = {  # of claims.csv, and what they say
    "claim": "in words",
    "source": "where it is said",
    "scale": "the scale, a file of config/scales",
    "table": "the table or figure that the claim is about",
    "role": "the published model",
    "model": "the model that ran",
    "train_data": "what it was trained on",
    "metric": "what is compared",
    "ours": "one side of the comparison",
    "theirs": "the other side",
    "direction": "what is claimed of ours - theirs",
    "margin": "how far off still counts",
    "published": "ours - theirs as published",
    "measured": "ours - theirs as measured; where seeds are counted, in percent of them (for the claim, of a number)",
    "ci_low": "lower end of its 95% interval",
    "ci_high": "its upper end",
    "covers": "what the interval accounts for; problems alone decide nothing",
    "n_seeds": "seeds on both sides",
    "verdict": "by the rule in verdict.md",
    "to_decide": "what would decide it",
    "stands_in_for": "what stands in for which published model and data",
    "solved": "where seeds are counted: how many solve the task, ours against theirs, or are for the claim",
    "p": "of Fisher's exact test of these counts, two-sided",
}


@dataclass(frozen=True, kw_only=True)
class Side:
    """Which cells stand on one side of a comparison."""

    method: str = setting(doc="a registered method")
    settings: dict = setting({}, doc="settings that the cells have")
    budget_factor: float = setting(1.0, was="longer", doc="how many times longer than usual they were trained", low=0)
    train_data: str | None = setting(None, doc="role of the training data, if not the claim's")
    control: bool = setting(False, doc="whether the row is a control")
    iterations: int | None = setting(None, doc="after how many of the published steps they are scored")
    others: bool = setting(False, doc="all such cells but the one on the other side")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An entry of config/claims.yaml."""

    claim: str = setting(doc="in words")
    source: str = setting(doc="where it is said")
    table: str = setting(doc="a file of config/tables")
    metric: str = setting(doc="a metric of that table")
    model: str = setting(doc="role of the model")
    train_data: str | list = setting(doc="role of the training data; a list makes a claim of each")
    ours: dict = setting(doc="which cell is compared")
    theirs: dict | float | str = setting(doc="with which cells, or with which number, or `chance`")
    direction: str = setting(doc="what is claimed of ours - theirs", choices=("above", "below", "equal"))
    margin: float = setting(0.0, doc="how far off still counts", low=0)
    headline: bool = setting(False, doc="whether README.md shows it: the paper says it in its abstract or main results")
    not_at: list = setting([], doc="scales with too few seeds for it, by what they measured")


Pair = tuple[Cell, Mapping[Any, Any]]  # a cell, and its row of the table's frame


def load_claims(evidence: Evidence) -> list[Claim]:
    """config/claims.yaml, checked, one claim for each training set; `ours` and `theirs` are Sides (or a number)."""
    where = "config/claims.yaml"
    out = []
    for number, given in enumerate(read_config(evidence.root, "claims.yaml").get("claims") or [], start=1):
        here = f"{where}: claim {number}"
        claim = from_mapping(Claim, given, here)
        for name in claim.not_at:
            choose(name, scale_names(evidence.root), f"{here}: not_at")
        choose(claim.table, table_names(evidence.root), f"{here}: table")
        table = evidence.table(claim.table)
        choose(claim.metric, table.metrics, f"{here}: metric")
        choose(claim.model, [row.model for row in table.rows], f"{here}: model")
        ours, theirs = _side(claim.ours, f"{here}: ours"), claim.theirs
        if isinstance(theirs, dict):
            theirs = _side(theirs, f"{here}: theirs")
        elif isinstance(theirs, str):
            choose(theirs, ["chance"], f"{here}: theirs")
        for data in claim.train_data if isinstance(claim.train_data, list) else [claim.train_data]:
            choose(data, [row.train_data for row in table.rows], f"{here}: train_data")
            out.append(replace(claim, ours=ours, theirs=theirs, train_data=data))
    return out


def _side(given: dict[str, Any], where: str) -> Any:
    side = from_mapping(Side, given, where)
    choose(side.method, METHODS, f"{where}: method")
    return side


def claim_frame(evidence: Evidence) -> pd.DataFrame:
    """One row a claim and cell of the scale that it is about, with COLUMNS and what to call model and data."""
    return evidence.once("claims", "", lambda: _claim_frame(evidence))


def _claim_frame(evidence: Evidence) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    pairs: dict[str, list[Pair]] = {}
    for claim in load_claims(evidence):
        table = evidence.table(claim.table)
        if claim.table not in pairs:
            # none where the scale has nothing in the place of the table's models, or concludes nothing from it
            cells = [] if evidence.path_only(table) else evidence.cells(table)
            found = evidence.frame(table).to_dict("records") if cells else []
            both = zip(cells, found, strict=True)  # what is measured in the place of a claim's metric can't decide it
            pairs[claim.table] = [(cell, row) for cell, row in both if cell.measured == cell.metric]
        rows += _rows(evidence, claim, pairs[claim.table])
    return pd.DataFrame(rows, columns=[*COLUMNS, "ran", "data"])


def _rows(evidence: Evidence, claim: Claim, pairs: list[Pair]) -> list[dict[str, Any]]:
    head = {
        "claim": claim.claim,
        "source": claim.source,
        "scale": evidence.scale.name,
        "table": claim.table,
        "role": claim.model,
        "model": "",
        "train_data": claim.train_data,
        "metric": claim.metric,
        "ours": _named(claim.ours),
        "theirs": _named(claim.theirs),
        "direction": claim.direction,
        "margin": claim.margin or None,
        "n_seeds": 0,
        "stands_in_for": "",
    }
    ours = [pair for pair in pairs if _fits(pair[0], claim.ours, claim)]
    if not ours or evidence.scale.name in claim.not_at:
        return [head | {"verdict": "not at this scale", "to_decide": "a scale with this model and data, and the seeds"}]
    out = []
    for pair in ours:
        cell, row = pair
        said = ("model", "train_data", "stands_in_for", "ran", "data")
        about = head | {"metric": cell.measured, **{key: row[key] for key in said}}
        if isinstance(claim.theirs, Side):
            compared = [_compare(evidence, claim, pair, other) for other in _against(claim, claim.theirs, cell, pairs)]
        else:
            compared = [_compare(evidence, claim, pair, None)]
        if compared:
            out.append(about | least_favourable(claim.direction, compared, bool(row["stands_in_for"])))
        else:
            out.append(about | {"verdict": "not at this scale", "to_decide": "a scale that runs both sides"})
    return out


def _against(claim: Claim, theirs: Side, ours: Cell, pairs: list[Pair]) -> list[Pair]:
    """The cells that one of ours is compared with: of the same model, and data where the claim names no others."""
    return [
        (cell, row)
        for cell, row in pairs
        if _fits(cell, theirs, claim)
        and cell.spec.model == ours.spec.model
        and (theirs.train_data or cell.spec.data == ours.spec.data)
        and not (theirs.others and cell == ours)
    ]


def _fits(cell: Cell, side: Any, claim: Claim) -> bool:
    row, config = cell.row, cell.spec.method_config
    return (
        cell.metric == claim.metric
        and row.model == claim.model
        and row.method == side.method
        and row.train_data == (side.train_data or claim.train_data)
        and row.control == side.control
        and abs(row.budget_factor - side.budget_factor) < 0.01
        and row.iterations == side.iterations
        and all(getattr(config, key, None) == value for key, value in side.settings.items())
    )


def _named(side: Any) -> str:
    if not isinstance(side, Side):
        return f"{side:g}" if isinstance(side, float) else str(side)
    more = [f"{k} {v}" for k, v in side.settings.items()]
    more += [f"{side.budget_factor:g} times as long"] * (side.budget_factor != 1) + ["all others"] * side.others
    more += [f"after {side.iterations // 1000}K steps"] if side.iterations else []
    return ", ".join([side.method, *more, *([f"on {side.train_data}"] if side.train_data else [])])


def _compare(evidence: Evidence, claim: Claim, ours: Pair, theirs: Pair | None) -> Compared:
    """One comparison, of two cells or of one with the claim's number."""
    cell, row = ours
    if theirs is None:
        task = load(TASKS, cell.spec.dataset.task, "task")
        number = task.chance(cell.spec.task_config) if claim.theirs == "chance" else float(str(claim.theirs))
        reference, scored = number, number
    else:
        reference, scored = theirs[1]["reported"], scores_of(evidence, theirs[0])
    unpublished = is_missing(row["reported"]) or is_missing(reference)
    known = [half_width(side["reported_error"]) for side in (row, *(() if theirs is None else (theirs[1],)))]
    return compare(
        claim.direction,
        claim.margin,
        None if unpublished else row["reported"] - reference,
        scores_of(evidence, cell),
        scored,
        percent=cell.unit == "percent",
        command=f"snakemake {evidence.home}/{claim.table}.csv --config scale={evidence.scale.name}",
        solved_at=cell.solved_at,
        error=None if row["stands_in_for"] else hypot(*known),
    )


def scores_of(evidence: Evidence, cell: Cell) -> dict[int, Scored]:
    """What each seed of a cell scored."""
    return {
        record["seed"]: Scored(
            checkpoint_metrics(record, cell.checkpoint)[cell.measured],
            problem_scores(record, cell.checkpoint, cell.measured),
            record.get("test_data_hash"),
        )
        for record in evidence.records_of(cell)
    }


def collect_claims(evidence: Evidence, folder: Path) -> list[Path]:
    """Write claims.csv; verdict.md shows it."""
    file = folder / "claims.csv"
    frame = claim_frame(evidence)
    write_text(file, frame[[*COLUMNS]].to_csv(index=False, lineterminator="\n", float_format="%.6g"))
    return [file]


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """The claims for people: verdict, measured and published difference, of what on what, what would decide it."""
    rows = []
    for row in frame.to_dict("records"):
        measured = text(row["measured"], "+.1f")
        if not is_missing(row["solved"]):
            measured = f"{row['solved']} seeds" + ("" if is_missing(row["p"]) else f" (p = {row['p']:.2g})")
        elif measured and not is_missing(row["ci_low"]):
            measured += f" ({row['ci_low']:+.1f} to {row['ci_high']:+.1f}; n={row['n_seeds']})"
        than = f"{row['ours']} {row['direction'].replace('equal', 'equal to')} {row['theirs']}"
        if not is_missing(row["margin"]):
            than += f" (margin {row['margin']:g})"
        rows.append(
            {
                "claim": row["claim"],
                "verdict": row["verdict"],
                "measured": measured,
                "published": text(row["published"], "+.2f"),
                "compared": than,
                "on": f"{row['ran']}, {row['data']}, {row['metric']}",
                "to decide": row["to_decide"],
                "source": row["source"],
            }
        )
    return pd.DataFrame(rows)


def here_and_elsewhere(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The claims about this scale's models and data, and (claim, source) of the others, each once."""
    here = frame["verdict"] != "not at this scale"
    names = zip(frame[~here]["claim"], frame[~here]["source"], strict=True)
    return frame[here], list(dict.fromkeys(names))


def counted(frame: pd.DataFrame) -> str:
    """How many comparisons got which verdict, the most frequent one first: "52 undecided, 10 same direction"."""
    return ", ".join(f"{count} {verdict}" for verdict, count in frame["verdict"].value_counts().items())


def summary(here: pd.DataFrame) -> list[str]:
    """What came out of a scale's claims, in sentences: verdicts, and which claims are decided by all comparisons."""
    if here.empty:
        return []
    out = [f"{len(here)} comparisons of {here['claim'].nunique()} claims: {counted(here)}."]
    agreed = {
        "Came out as claimed": ("reproduced", "same direction"),
        "Smaller than published": (SMALLER,),
        "The other way": ("contradicted", "opposite direction"),
    }
    for words, verdicts in agreed.items():
        claims = [str(name) for name, own in here.groupby("claim", sort=False) if own["verdict"].isin(verdicts).all()]
        out.append(f"{words}, wherever compared: {'; '.join(claims) or 'none'}.")
    return out
