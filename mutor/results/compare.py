"""What differs between two runs, or between two settings seed by seed: configuration, makers, results.

print("\\n".join(lines(Path("runs/laptop/.../mutor/a=0.5"), Path("runs/laptop/.../next_token/default"))))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mutor.results import records
from mutor.results.stats import paired

MADE_BY = (
    "git_commit",
    "versions",
    "device",
    "platform",
    "processes",
    "threads",
    "code",
    "data_hash",
    "test_data_hash",
)


def lines(one: Path, other: Path) -> list[str]:
    """The comparison as printable lines.

    one, other: a metrics.json, its folder, or the folder of a setting with its seeds. Raises ValueError where there is
    no run.
    """
    ours, theirs = _load(one), _load(other)
    seeds = sorted(ours.keys() & theirs.keys())
    if len(ours) == len(theirs) == 1:  # two runs, whatever their seeds
        pairs = [(next(iter(ours.values())), next(iter(theirs.values())))]
    else:
        pairs = [(ours[s], theirs[s]) for s in seeds]
    if not pairs:
        raise ValueError(f"{one} and {other} have no seed in common: {sorted(ours)} and {sorted(theirs)}")
    first, second = pairs[0]
    out = [
        f"A  {one}",
        f"B  {other}",
        f"   seeds {', '.join(str(a['seed']) for a, _ in pairs)}",
        "settings that differ",
    ]
    out += _different(_flat(first["config"]), _flat(second["config"])) or ["   none"]
    made = [_flat({k: r.get(k) for k in MADE_BY}) for r in (first, second)]
    out += ["made by", *(_different(*made) or ["   the same code, data and machine"]), "results"]
    sides = list(zip(*pairs, strict=True))
    scored = [records.checkpoint_metrics(r, "last") for r in (first, second)]
    for metric in [m for m in scored[0] if m in scored[1]]:
        a, b = (float(np.mean([records.checkpoint_metrics(r, "last")[metric] for r in side])) for side in sides)
        out.append(f"   {metric:<24} {a:10.4g} {b:10.4g}  difference {a - b:+.4g}")
    return out + _paired(pairs)


def _load(place: Path) -> dict[int, dict[str, Any]]:
    files = [place] if place.is_file() else sorted([*place.glob("metrics.json"), *place.glob("seed*/metrics.json")])
    if not files:
        raise ValueError(f"{place}: no run there; give a metrics.json, its folder, or the folder of a setting")
    return {record["seed"]: record for record in map(records.read, files)}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}" if name else key).items()}
    return {name: value}


def _different(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    names = [k for k in dict.fromkeys([*ours, *theirs]) if ours.get(k) != theirs.get(k)]
    return [f"   {k}: {ours.get(k)} | {theirs.get(k)}" for k in names]


def _paired(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    """Scores of the same problems, compared problem by problem."""
    if not records.same_problems(*(record.get("test_data_hash") for pair in pairs for record in pair)):
        return ["   not known to be scored on the same problems, so not compared problem by problem"]
    out = []
    for metric in records.checkpoint_metrics(pairs[0][0], "last"):
        scores = [[records.problem_scores(r, "last", metric) for r in pair] for pair in pairs]
        if any(s is None for pair in scores for s in pair):
            continue
        ours, theirs = (np.array(side) for side in zip(*scores, strict=True))
        d = paired(ours, theirs)
        out.append(
            f"   {metric}, problem by problem: A - B = {100 * d.estimate:+.2f} points, 95% interval {100 * d.low:+.2f} "
            f"to {100 * d.high:+.2f} over {d.covers}"
        )
    return out
