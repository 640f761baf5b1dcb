"""What the sources claim, held against the runs: config/claims.yaml -> results/claims.csv and .md.

A claim compares two cells of a table, or a cell with a number. It gets its verdict from the 95% interval of the
difference ours - theirs, over seeds and problems, by one rule (RULE); nobody judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mutor.checks import choose, from_mapping, setting
from mutor.config.load import load_table, read_yaml, table_names
from mutor.config.runs import Cell, cells_of
from mutor.config.schema import Scale
from mutor.files import write
from mutor.registry import METHODS, TASKS, load
from mutor.results import records
from mutor.results.cells import cell_frame, cell_records
from mutor.results.render import grid
from mutor.results.stats import Interval, interval, needed, over_seeds, paired

COLUMNS = [
    "claim",
    "source",
    "scale",
    "table",
    "model",
    "train_data",
    "metric",
    "ours",
    "theirs",
    "direction",
    "margin",
    "published",
    "measured",
    "ci_low",
    "ci_high",
    "covers",
    "p",
    "n_seeds",
    "verdict",
    "to_decide",
    "stands_in_for",
]
RULE = """\
The verdict follows the 95% interval of the difference ours - theirs. `above` (`below`): reproduced if the whole
interval lies above (below) zero, contradicted if it lies on the other side, else inconclusive; with a margin m, -m (m)
takes the place of zero. `equal` with margin m: reproduced if the whole interval lies within -m to m, contradicted if it
lies outside as a whole, else inconclusive. Where `theirs` names several cells, each is compared; the claim is
reproduced if it is against all of them and contradicted if it is against any; the least favourable is shown. Where
anything stands in for the published model or data, the words are: same direction, opposite direction, undecided.
"To decide" assumes that the measured difference is the true one and that more seeds spread as these do."""
WORDS = {
    "reproduced": "same direction",
    "contradicted": "opposite direction",
    "inconclusive": "undecided",
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


_Scored = tuple[float, "np.ndarray | None", Any]  # value, scores of the problems, which problems


def load_claims(root: Path) -> list[Claim]:
    """config/claims.yaml, checked, one claim for each training set; `ours` and `theirs` are Sides (or a number)."""
    where = "config/claims.yaml"
    out = []
    for number, given in enumerate(read_yaml(root / where).get("claims") or [], start=1):
        here = f"{where}: claim {number}"
        claim = from_mapping(Claim, given, here)
        choose(claim.table, table_names(root), f"{here}: table")
        table = load_table(root, claim.table)
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


def judge(claim: Claim, found: Interval) -> str:
    """The verdict on a difference, by RULE; without an interval, inconclusive."""
    if np.isnan(found.low):
        return "inconclusive"
    low, high, m = found.low, found.high, claim.margin
    if claim.direction == "below":
        low, high = -high, -low
    if claim.direction == "equal":
        inside, outside = -m < low and high < m, high < -m or low > m
    else:
        inside, outside = low > -m, high < -m
    return "reproduced" if inside else "contradicted" if outside else "inconclusive"


def claim_frame(root: Path, scale: Scale, runs: records.Records, reported: pd.DataFrame) -> pd.DataFrame:
    """One row a claim and cell of the scale that it is about, with COLUMNS; none is dropped."""
    rows: list[dict[str, Any]] = []
    known: dict[str, list[tuple[Cell, Any]]] = {}
    for claim in load_claims(root):
        if claim.table not in known:
            table = load_table(root, claim.table)
            found = cells_of(table, scale)
            frame = cell_frame(table, scale, runs, reported) if found else pd.DataFrame()
            known[claim.table] = list(zip(found, [row for _, row in frame.iterrows()], strict=True))
        rows += _rows(claim, scale, known[claim.table], runs)
    return pd.DataFrame(rows, columns=COLUMNS)


def _rows(claim: Claim, scale: Scale, found: list[tuple[Cell, Any]], runs: records.Records) -> list[dict[str, Any]]:
    head = {
        "claim": claim.claim,
        "source": claim.source,
        "scale": scale.name,
        "table": claim.table,
        "model": claim.model,
        "train_data": claim.train_data,
        "metric": claim.metric,
        "ours": _named(claim.ours),
        "theirs": _named(claim.theirs),
        "direction": claim.direction,
        "margin": claim.margin or None,
        "n_seeds": 0,
        "stands_in_for": "",
    }
    ours = [pair for pair in found if _fits(pair[0], claim.ours, claim)]
    if not ours:
        return [head | {"verdict": "not at this scale", "to_decide": "a scale with this model and data"}]
    out = []
    for cell, row in ours:
        about = head | {
            "model": row["model"],
            "metric": cell.measured,
            "train_data": row["train_data"],
            "stands_in_for": row["stands_in_for"],
        }
        if isinstance(claim.theirs, Side):
            other = claim.theirs
            against = [
                pair
                for pair in found
                if _fits(pair[0], other, claim)
                and pair[0].spec.model == cell.spec.model
                and (other.train_data or pair[0].spec.data == cell.spec.data)
                and not (other.others and pair[0] == cell)
            ]
            compared = [_compare(claim, (cell, row), pair, runs) for pair in against]
        else:
            compared = [_compare(claim, (cell, row), None, runs)]
        if compared:
            out.append(about | _least(claim, compared, bool(row["stands_in_for"])))
        else:
            out.append(about | {"verdict": "not at this scale", "to_decide": "a scale that runs both sides"})
    return out


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


def _compare(
    claim: Claim, one: tuple[Cell, Any], other: tuple[Cell, Any] | None, runs: records.Records
) -> dict[str, Any]:
    """One comparison: published and measured difference, what is measured ending as a verdict."""
    cell, row = one
    constant = None
    if other is None:
        task = load(TASKS, cell.spec.dataset.task, "task")
        constant = task.chance(cell.spec.task_config) if claim.theirs == "chance" else float(str(claim.theirs))
        published = None if _none(row["reported"]) else row["reported"] - constant
    else:
        both = (row["reported"], other[1]["reported"])
        published = None if any(map(_none, both)) else both[0] - both[1]
    theirs = _scores(other[0], runs) if other else constant
    found = _difference(_scores(cell, runs), theirs, percent=cell.unit == "percent")
    verdict = judge(claim, found.difference) if found else "not run"
    return {
        "published": published,
        "found": found,
        "verdict": verdict,
        "to_decide": _to_decide(claim, found, verdict, cell.spec.scale),
    }


def _scores(cell: Cell, runs: records.Records) -> dict[int, _Scored]:
    """seed -> (value, scores [N] or None, which problems)."""
    return {
        r["seed"]: (
            records.checkpoint_metrics(r, cell.checkpoint)[cell.measured],
            records.problem_scores(r, cell.checkpoint, cell.measured),
            r.get("data_hash"),
        )
        for r in cell_records(cell, runs)
    }


@dataclass(frozen=True)
class Found:
    """A measured difference ours - theirs in the metric's unit; low and high are NaN where nothing tells them."""

    difference: Interval
    p: float | None
    seeds: int


def _difference(ours: dict[int, _Scored], theirs: dict[int, _Scored] | float | None, *, percent: bool) -> Found | None:
    """ours - theirs, problem by problem where both scored the same ones; None without runs on both sides."""
    if not ours or not (theirs or isinstance(theirs, float)):
        return None
    if not isinstance(theirs, dict):
        table = _table(ours, sorted(ours)) if percent else None
        if table is not None:
            found = interval(table - (theirs or 0.0) / 100).times(100)
            return Found(found, None, len(ours))
        return _by_seeds([v - (theirs or 0.0) for v, *_ in ours.values()], None)
    common = sorted(ours.keys() & theirs.keys())
    one, other = (_table(side, common) if percent and common else None for side in (ours, theirs))
    alike = all(ours[s][2] == theirs[s][2] for s in common)
    if alike and one is not None and other is not None and one.shape == other.shape:
        result = paired(one, other, np.random.default_rng(0))
        return Found(result.difference.times(100), result.p, len(common))
    return _by_seeds([v for v, *_ in ours.values()], [v for v, *_ in theirs.values()])


def _table(side: dict[int, _Scored], seeds: list[int]) -> np.ndarray | None:
    """[S, N] scores of the same problems, or None."""
    kept = [side[s][1] for s in seeds]
    if any(k is None for k in kept) or len({len(k) for k in kept if k is not None} | {side[s][2] for s in seeds}) != 2:
        return None
    return np.array(kept, dtype=float)


def _by_seeds(ours: list[float], theirs: list[float] | None) -> Found:
    found = over_seeds(ours, theirs)
    if found is None:
        mean = float(np.mean(ours)) - (float(np.mean(theirs)) if theirs else 0.0)
        found = Interval(mean, np.nan, np.nan, "nothing")
    return Found(found, None, min(len(ours), len(theirs or ours)))


def _to_decide(claim: Claim, found: Any, verdict: str, scale: str) -> str:
    if verdict == "not run":
        return f"snakemake results/{claim.table}.csv --config scale={scale}"
    if verdict != "inconclusive":
        return ""
    d = found.difference.estimate * (-1 if claim.direction == "below" else 1)
    effect = claim.margin - abs(d) if claim.direction == "equal" else d + claim.margin
    return needed(effect, found.difference.spread, found.difference.over_problems)


def _least(claim: Claim, compared: Sequence[dict[str, Any]], stands_in: bool) -> dict[str, Any]:
    """The row of the least favourable comparison, with the verdict on all."""
    favour = {"above": lambda d: d, "below": lambda d: -d, "equal": lambda d: -abs(d)}[claim.direction]

    def measured(one: dict[str, Any]) -> float:
        return -np.inf if one["found"] is None else favour(one["found"].difference.estimate)

    order = ["not run", "contradicted", "inconclusive", "reproduced"]
    verdict = min((one["verdict"] for one in compared), key=order.index)
    shown = min((one for one in compared if one["verdict"] == verdict), key=measured)
    published = [one["published"] for one in compared]
    row: dict[str, Any] = {
        "published": None if any(map(_none, published)) else min(published, key=favour),
        "verdict": WORDS.get(verdict, verdict) if stands_in else verdict,
        "to_decide": shown["to_decide"],
    }
    if shown["found"] is not None:
        d = shown["found"].difference
        row |= {
            "measured": d.estimate,
            "ci_low": d.low,
            "ci_high": d.high,
            "covers": d.covers,
            "p": shown["found"].p,
            "n_seeds": shown["found"].seeds,
        }
    return row


def _none(value: Any) -> bool:
    return value is None or bool(pd.isna(value))


def collect_claims(root: Path, scale: Scale, runs: records.Records, reported: pd.DataFrame, folder: Path) -> list[Path]:
    """Write claims.csv and claims.md."""
    frame = claim_frame(root, scale, runs, reported)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "claims.csv", folder / "claims.md"]
    write(files[0], lambda f: frame.to_csv(f, index=False, lineterminator="\n", float_format="%.6g"))
    write(files[1], lambda f: f.write_text(markdown(frame, scale)))
    return files


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """The claims for people: verdict, measured and published difference, of what on what, what would decide it."""
    rows = []
    for _, row in frame.iterrows():
        measured = ""
        if not _none(row["measured"]):
            measured = f"{row['measured']:+.1f}"
            if not _none(row["ci_low"]):
                measured += f" ({row['ci_low']:+.1f} to {row['ci_high']:+.1f}; n={row['n_seeds']})"
        than = f"{row['ours']} {row['direction'].replace('equal', 'equal to')} {row['theirs']}"
        if not _none(row["margin"]):
            than += f" (margin {row['margin']:g})"
        rows.append(
            {
                "claim": row["claim"],
                "verdict": row["verdict"],
                "measured": measured,
                "published": "" if _none(row["published"]) else f"{row['published']:+.2f}",
                "compared": than,
                "on": f"{row['train_data']}, {row['metric']}",
                "to decide": row["to_decide"],
                "source": row["source"],
            }
        )
    return pd.DataFrame(rows)


def markdown(frame: pd.DataFrame, scale: Scale) -> str:
    """The claims that this scale has runs for, then the others by name, and the rule."""
    here = frame[frame["verdict"] != "not at this scale"]
    elsewhere = frame[frame["verdict"] == "not at this scale"]
    parts = [
        "# What the sources claim, and what came out",
        "",
        f"Scale: {scale.name} ({scale.description}).",
        "",
        "Differences ours - theirs, with 95% intervals (n = seeds).",
        "",
    ]
    parts += [grid(shown(here).set_index("claim")) if len(here) else "Nothing that is claimed is part of this scale."]
    parts += ["", *(f"- Stands in for {text}." for text in sorted(set(filter(None, here["stands_in_for"]))))]
    parts += ["", "How verdicts come about:", "", *RULE.splitlines()]
    if len(elsewhere):
        parts += ["", "Claims about models and data that are not part of this scale:", ""]
        names = zip(elsewhere["claim"], elsewhere["source"], strict=True)
        parts += [f"- {claim} ({source})" for claim, source in dict.fromkeys(names)]
    return "\n".join(parts) + "\n"
