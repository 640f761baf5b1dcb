"""From two cells to a verdict: the difference with its interval, and what it says about a claim.

Each seed of a side is a `Scored`; a side is seed -> Scored. Differences are ours - theirs, in the metric's unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mutor.results.records import same_problems
from mutor.results.stats import (
    Interval,
    clopper_pearson,
    fisher,
    interval,
    over_seeds,
    paired,
    seeds_to_tell_apart,
    seeds_to_tell_from_half,
    shares_apart,
    to_decide,
)

RULE = """\
The verdict follows the 95% interval of the difference ours - theirs. `above` (`below`): reproduced if the whole
interval lies above (below) zero, contradicted if it lies on the other side, else inconclusive; with a margin m, -m (m)
takes the place of zero. `equal` with margin m: reproduced if the whole interval lies within -m to m, contradicted if it
lies outside as a whole, else inconclusive. Where `theirs` names several cells, each is compared; the claim is
reproduced if it is against all of them and contradicted if it is against any; the least favourable is shown. Where
anything stands in for the published model or data, the words are: same direction, opposite direction, undecided. Where
nothing does, and the interval holds zero but not the published difference, that is: smaller than published. It is told
from the combined interval, theirs in quadrature where the source has standard errors. A single seed decides nothing:
its interval covers problems alone, and another seed may come out the other way. "To decide" assumes that the measured
difference is the true one and that more seeds spread as these do.

An interval is for other seeds and other problems of the same kind, and is cut to what is possible. Its part for seeds
is Student's t. Its part for problems, where answers are right or wrong, is Wilson's for a rate and Bonett and Price's
for the difference of two rates on the same problems, so that none right or all right leaves a width too; for other
scores it is Student's t. The two are added in quadrature. Where only one number of each seed is known, it is Student's
or Welch's t, and none if all seeds are equal; where each seed has problems of its own, the same on both sides, and one
side has all seeds of the other, Student's t of the differences of those. Student's t takes it that seeds spread about
one mean.

Where a seed learns a task wholly or not at all, as the task says before any run, its seeds are counted. Two methods
differ if Fisher's exact test of their solved seeds, two-sided, has p below 0.05 (three of three against none of three:
0.10, four of four against none of four: 0.03); the interval of the difference is made of the exact ones (Clopper and
Pearson) of both shares, and holds the truth 92 times in 100 at the worst shares. Against a number, a seed counts for a
claim or against it; the claim is reproduced if the exact interval of the share that is for it lies above one half,
contradicted if below."""
SMALLER = "smaller than published"
WORDS = {
    "reproduced": "same direction",
    "contradicted": "opposite direction",
    "inconclusive": "undecided",
}
# the first of several comparisons' is the claim's
ORDER = ["not run", "contradicted", "inconclusive", SMALLER, "reproduced"]
FAVOUR: dict[str, Callable[[float], float]] = {
    "above": lambda difference: difference,
    "below": lambda difference: -difference,
    "equal": lambda difference: -abs(difference),
}


@dataclass(frozen=True)
class Scored:
    """What one seed scored: its value, scores [N] of the test problems (None: not kept), and which problems."""

    value: float
    problems: np.ndarray | None
    test_data_hash: str | None


@dataclass(frozen=True)
class Found:
    """A measured difference ours - theirs in the metric's unit; low and high are NaN where nothing tells them.

    Where seeds are counted, the difference is in percent of them, and counts has (solved, seeds) of ours and theirs,
    with Fisher's p; against a number, the share of seeds that are for the claim, and (for it, seeds).
    """

    difference: Interval
    seeds: int
    counts: tuple[tuple[int, int], ...] = ()
    p: float | None = None

    @property
    def counted(self) -> str:
        """The counts in words: "9 of 10 against 0 of 10"; empty where no seeds are counted."""
        return " against ".join(f"{count} of {of}" for count, of in self.counts)


@dataclass(frozen=True)
class Compared:
    """One comparison: published and measured difference (None: there is none), verdict, and what would decide it."""

    published: float | None
    found: Found | None
    verdict: str
    to_decide: str


def compare(
    direction: str,
    margin: float,
    published: float | None,
    ours: dict[int, Scored],
    theirs: dict[int, Scored] | float,
    *,
    percent: bool,
    command: str,
    solved_at: float | None = None,
    error: float | None = None,
) -> Compared:
    """Compare two sides, or one with a number.

    command: what would make the runs, if there are none; solved_at: the value from which a seed counts as solved, where
    seeds are counted; error: half the width of the published difference's interval, None where it is of something else.
    """
    if solved_at is not None and not isinstance(theirs, dict) and ours:
        return _seeds_against_number(direction, margin, published, [one.value for one in ours.values()], theirs)
    found = difference(ours, theirs, percent=percent, solved_at=solved_at)
    if found is None:
        return Compared(published, None, "not run", command)
    if found.p is not None and direction != "equal" and not margin:
        verdict = _by_test(direction, found)
        return Compared(published, found, verdict, _more_seeds(found, verdict))
    verdict = judge(direction, margin, found.difference)
    if verdict == "inconclusive" and smaller(direction, found, published, error):
        verdict = SMALLER
    return Compared(published, found, verdict, _to_decide(direction, margin, found, verdict))


def judge(direction: str, margin: float, found: Interval) -> str:
    """The verdict on a difference, by RULE; without an interval or with one seed, inconclusive."""
    if np.isnan(found.low) or found.covers == "problems":
        return "inconclusive"
    low, high, m = found.low, found.high, margin
    if direction == "below":
        low, high = -high, -low
    if direction == "equal":
        inside, outside = -m < low and high < m, high < -m or low > m
    else:
        inside, outside = low > -m, high < -m
    return "reproduced" if inside else "contradicted" if outside else "inconclusive"


def smaller(direction: str, found: Found, published: float | None, error: float | None) -> bool:
    """Whether several seeds tell a difference from the published one, which is further in the claimed direction."""
    d = found.difference
    if published is None or error is None or direction == "equal" or found.seeds < 2 or np.isnan(d.low):
        return False
    end, sign = (d.high, 1) if direction == "above" else (d.low, -1)
    return sign * (published - d.estimate) > np.hypot(end - d.estimate, error)


def _by_test(direction: str, found: Found) -> str:
    """The verdict on counted seeds: Fisher's test says whether they differ. A single seed decides nothing."""
    if found.p is None or found.p >= 0.05 or found.seeds < 2:
        return "inconclusive"
    return "reproduced" if (found.difference.estimate > 0) == (direction == "above") else "contradicted"


def _more_seeds(found: Found, verdict: str) -> str:
    """How many seeds would decide what is not, if the shares are as counted."""
    if verdict != "inconclusive":
        return ""
    shares = [count / of for count, of in found.counts]
    if len(shares) == 1:
        seeds, a_side = seeds_to_tell_from_half(shares[0], found.seeds), ""
    else:
        seeds, a_side = seeds_to_tell_apart(shares[0], shares[1]), " a side"
    return "a larger effect" if seeds is None else f"about {max(seeds, found.seeds + 1)} seeds{a_side}"


def _seeds_against_number(
    direction: str, margin: float, published: float | None, values: list[float], number: float
) -> Compared:
    """Whether most seeds are for a claim about a number: the exact interval of their share against one half."""
    holds = {"above": lambda d: d >= -margin, "below": lambda d: d <= margin, "equal": lambda d: abs(d) <= margin}
    count = sum(holds[direction](value - number) for value in values)
    low, high = (100 * end for end in clopper_pearson(count, len(values)))
    share = Interval(100 * count / len(values), low, high, "seeds")
    verdict = "reproduced" if low > 50 else "contradicted" if high < 50 else "inconclusive"
    found = Found(share, len(values), ((count, len(values)),))
    return Compared(published, found, verdict, _more_seeds(found, verdict))


def difference(
    ours: dict[int, Scored], theirs: dict[int, Scored] | float, *, percent: bool, solved_at: float | None = None
) -> Found | None:
    """ours - theirs, problem by problem where both scored the same ones; None without runs on both sides.

    solved_at: where seeds are counted, the value from which one is solved; then ours - theirs of their shares.
    """
    if not ours or theirs == {}:
        return None
    if solved_at is not None and isinstance(theirs, dict):
        one, other = ((sum(s.value >= solved_at for s in side.values()), len(side)) for side in (ours, theirs))
        return Found(shares_apart(one, other).times(100), min(len(ours), len(theirs)), (one, other), fisher(one, other))
    if not isinstance(theirs, dict):
        table = _table(ours, sorted(ours)) if percent else None
        if table is not None:
            return Found(interval(table).times(100).minus(theirs), len(ours))
        return _by_seeds([scored.value - theirs for scored in ours.values()], None, (-theirs, 100 - theirs), percent)
    common = sorted(ours.keys() & theirs.keys())
    mine, others = (_table(side, common) if percent and common else None for side in (ours, theirs))
    alike = all(same_problems(ours[s].test_data_hash, theirs[s].test_data_hash) for s in common)
    if alike and mine is not None and others is not None and mine.shape == others.shape:
        return Found(paired(mine, others).times(100), len(common))
    if alike and common and len(common) == min(len(ours), len(theirs)):  # each seed has problems of its own
        each = [ours[seed].value - theirs[seed].value for seed in common]
        return _by_seeds(each, None, (-100, 100), percent)
    one_each, other_each = ([scored.value for scored in side.values()] for side in (ours, theirs))
    return _by_seeds(one_each, other_each, (-100, 100), percent)


def _table(side: dict[int, Scored], seeds: list[int]) -> np.ndarray | None:
    """[S, N] scores of the same problems, or None."""
    kept = [side[s].problems for s in seeds]
    if any(k is None for k in kept):
        return None
    alike = len(seeds) == 1 or same_problems(*(side[s].test_data_hash for s in seeds))
    return np.array(kept, dtype=float) if alike and len({len(k) for k in kept if k is not None}) == 1 else None


def _by_seeds(ours: list[float], theirs: list[float] | None, possible: tuple[float, float], percent: bool) -> Found:
    """The difference where one number of each seed is known; of percentages no more than what is possible."""
    found = over_seeds(ours, theirs)
    if found is None:
        mean = float(np.mean(ours)) - (float(np.mean(theirs)) if theirs else 0.0)
        found = Interval(mean, np.nan, np.nan, "nothing")
    elif percent:
        found = replace(found, low=max(found.low, possible[0]), high=min(found.high, possible[1]))
    return Found(found, min(len(ours), len(theirs or ours)))


def _to_decide(direction: str, margin: float, found: Found, verdict: str) -> str:
    if verdict != "inconclusive":
        return ""
    estimate = found.difference.estimate * (-1 if direction == "below" else 1)
    effect = margin - abs(estimate) if direction == "equal" else estimate + margin
    return to_decide(found.difference, found.seeds, effect).removesuffix(" would decide")


def least_favourable(direction: str, compared: Sequence[Compared], stands_in: bool) -> dict[str, Any]:
    """Columns of the least favourable comparison, with the verdict on all."""
    favour = FAVOUR[direction]

    def measured(one: Compared) -> float:
        return -np.inf if one.found is None else favour(one.found.difference.estimate)

    verdict = min((one.verdict for one in compared), key=ORDER.index)
    shown = min((one for one in compared if one.verdict == verdict), key=measured)
    published = [one.published for one in compared if one.published is not None]
    row: dict[str, Any] = {
        "published": min(published, key=favour) if len(published) == len(compared) else None,
        "verdict": WORDS.get(verdict, verdict) if stands_in else verdict,
        "to_decide": shown.to_decide,
    }
    if shown.found is not None:
        d = shown.found.difference
        row |= {
            "measured": d.estimate,
            "ci_low": d.low,
            "ci_high": d.high,
            "covers": d.covers,
            "n_seeds": shown.found.seeds,
            "solved": shown.found.counted,
            "p": shown.found.p,
        }
    return row
