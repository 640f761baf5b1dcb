"""Means and intervals over seeds and problems, as pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

LEVEL = 0.95  # of all intervals
UPPER = 0.5 + LEVEL / 2


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation over seeds, a 95% interval of the mean, and what the interval accounts for.

    Of a task that a seed learns wholly or not at all, the seeds that solve it are counted instead: n_solved, with the
    exact interval of their share in percent, and the mean has no interval.
    """

    n_seeds: int
    mean: float | None = None
    std: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    covers: str = ""
    n_solved: int | None = None
    solved_low: float | None = None
    solved_high: float | None = None


def summarise(
    values: Sequence[float],
    scores: Sequence[np.ndarray | None] = (),
    *,
    possible: tuple[float, float] = (0, 100),
    solved_at: float | None = None,
) -> Summary:
    """Summary of one metric over seeds.

    values: one a seed. scores: of each seed the scores [N] of the same problems, 0 to 1, where they are kept: a value
    is 100 times their mean. With scores the interval is `interval`'s, without `over_seeds`', cut to what is `possible`;
    none where nothing tells how the values would vary. solved_at: the value from which a seed counts as solved, on
    tasks whose seeds are counted (Task.solved_at).
    """
    n = len(values)
    if n == 0:
        return Summary(0)
    mean = float(np.mean(values))
    std = float(np.std(values, ddof=1)) if n > 1 else None
    if solved_at is not None:
        solved = sum(value >= solved_at for value in values)
        low, high = clopper_pearson(solved, n)
        return Summary(n, mean, std, n_solved=solved, solved_low=100 * low, solved_high=100 * high)
    kept = [s for s in scores if s is not None]
    if len(kept) == n and len({len(s) for s in kept}) == 1:
        found = interval(np.array(kept)).times(100)
        return Summary(n, mean, std, found.low, found.high, found.covers)
    varying = over_seeds(values)
    if varying is None:
        return Summary(n, mean, std)
    low, high = max(varying.low, possible[0]), min(varying.high, possible[1])
    return Summary(n, mean, std, low, high, varying.covers)


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    covers: what the interval accounts for: "seeds and problems", "seeds" or "problems"; spread: standard deviation of
    one seed's mean, None with one seed; over_problems: half the width that problems alone give, so many of them (0:
    nothing is known problem by problem).
    """

    estimate: float
    low: float
    high: float
    covers: str
    spread: float | None = None
    over_problems: float = 0.0
    problems: int = 0

    def times(self, factor: float) -> Interval:
        """The same in another unit: shares to percent."""
        mean, low, high, half = (factor * x for x in (self.estimate, self.low, self.high, self.over_problems))
        spread = None if self.spread is None else factor * self.spread
        return replace(self, estimate=mean, low=low, high=high, spread=spread, over_problems=half)

    def minus(self, number: float) -> Interval:
        """The difference from a number that does not vary."""
        return replace(self, estimate=self.estimate - number, low=self.low - number, high=self.high - number)


def interval(scores: np.ndarray, *, difference: bool = False) -> Interval:
    """Interval of the mean of scores [S seeds, N problems], for other seeds and other problems of the same kind.

    scores: 0 to 1; with `difference` those of one method less those of another, -1 to 1. Two parts in quadrature, each
    side of the mean by itself (Zou and Donner 2008), cut to what is possible: Student's t over the seeds' means, as few
    seeds say little about their spread, and one over the problems' means (whole columns, so that problems hard for all
    seeds stay hard). The latter is `right_or_wrong`, or `won_or_lost` for a difference, where all scores are whole
    numbers, else `graded`. With one seed the interval is over problems alone, and says so.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 2 or min(scores.shape) < 1:
        raise ValueError(f"scores: expected [seeds, problems], got shape {scores.shape}")
    seeds, mean = len(scores), float(scores.mean())
    whole = np.isin(scores, (-1, 0, 1)).all()
    over_problems = (won_or_lost if difference else right_or_wrong) if whole else graded
    low, high = over_problems(scores.mean(axis=0))
    spread = float(scores.mean(axis=1).std(ddof=1)) if seeds > 1 else None
    from_seeds = 0.0 if spread is None else float(stats.t.ppf(UPPER, seeds - 1)) * spread / seeds**0.5
    below, above = float(np.hypot(mean - low, from_seeds)), float(np.hypot(high - mean, from_seeds))
    covers = "problems" if spread is None else "seeds and problems"
    lowest = -1.0 if difference else 0.0
    ends = max(mean - below, lowest), min(mean + above, 1.0)
    return Interval(mean, *ends, covers, spread, (high - low) / 2, scores.shape[1])


def right_or_wrong(columns: np.ndarray) -> tuple[float, float]:
    """Wilson's interval of the share of right answers, from the share [N] of seeds that solve each problem.

    As over problems alone; several seeds count as more problems as far as they differ (the effective sample size of
    Kott and Liu 2009). How far is estimated with two more problems that all seeds solve and two that none does, so
    that seeds which are all right or all wrong count as one.
    """
    padded = np.append(columns, (0, 0, 1, 1))
    share = padded.mean()
    return wilson(float(columns.mean()), float(len(columns) * share * (1 - share) / padded.var()))


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's score interval of a share (0..1) observed over `count` problems."""
    z2 = float(stats.norm.ppf(UPPER)) ** 2
    centre, half = share + z2 / (2 * count), (z2 * (share * (1 - share) + z2 / (4 * count)) / count) ** 0.5
    return max((centre - half) / (1 + z2 / count), 0.0), min((centre + half) / (1 + z2 / count), 1.0)


def won_or_lost(columns: np.ndarray) -> tuple[float, float]:
    """Bonett and Price's interval (2012) of the difference of two paired shares, from each problem's mean change [N].

    The normal interval with one more problem that only ours solves and one that only theirs does.
    """
    padded = np.append(columns, (-1, 1))
    mean, half = float(padded.mean()), float(stats.norm.ppf(UPPER) * padded.std()) / len(padded) ** 0.5
    return mean - half, mean + half


def graded(columns: np.ndarray) -> tuple[float, float]:
    """Student's t over the problems' means [N]; a single problem tells nothing.

    The standard error of a mean over N problems is s / sqrt(N) exactly, so nothing is resampled.
    """
    count, mean = len(columns), float(columns.mean())
    if count == 1:
        return -np.inf, np.inf
    half = float(stats.t.ppf(UPPER, count - 1) * columns.std(ddof=1)) / count**0.5
    return mean - half, mean + half


def over_seeds(ours: Sequence[float], theirs: Sequence[float] | None = None) -> Interval | None:
    """Interval of the mean of `ours`, or of mean(ours) - mean(theirs) (Welch's), where only one number a seed is known.

    None with a single seed on a side, and where all seeds of each side are equal: nothing tells how they would vary.
    """
    sides = [np.asarray(side, dtype=float) for side in (ours, theirs) if side is not None]
    if any(len(side) < 2 for side in sides) or all(np.allclose(side, side[0], rtol=1e-12, atol=0) for side in sides):
        return None
    parts = [float(side.var(ddof=1)) / len(side) for side in sides]  # of the variance of the mean
    freedom = sum(parts) ** 2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, sides, strict=True))
    half = float(stats.t.ppf(UPPER, freedom)) * sum(parts) ** 0.5
    mean = float(sides[0].mean() - sum(side.mean() for side in sides[1:]))
    spread = float(np.hypot.reduce([side.std(ddof=1) for side in sides]))
    return Interval(mean, mean - half, mean + half, "seeds", spread)


def clopper_pearson(count: int, of: int) -> tuple[float, float]:
    """The exact interval (Clopper and Pearson 1934) of a share, 0 to 1, seen as `count` of `of`."""
    found = stats.binomtest(count, of).proportion_ci(LEVEL, method="exact")
    return float(found.low), float(found.high)


def fisher(ours: tuple[int, int], theirs: tuple[int, int]) -> float:
    """Fisher's exact test, two-sided, of two counts (so many, of so many): the p value of equal shares.

    The chance, if whole seeds were dealt to the two sides anew, of a table that is no more likely than this one.
    """
    table = [[count, of - count] for count, of in (ours, theirs)]
    return float(stats.fisher_exact(table).pvalue)


def shares_apart(ours: tuple[int, int], theirs: tuple[int, int]) -> Interval:
    """Interval of the difference of two shares, -1 to 1, of counts (so many, of so many) of seeds.

    From the exact interval of each, each side of the difference by itself (Zou and Donner 2008).
    """
    (one, low, high), (other, lowest, highest) = (
        (count / of, *clopper_pearson(count, of)) for count, of in (ours, theirs)
    )
    below, above = float(np.hypot(one - low, highest - other)), float(np.hypot(high - one, other - lowest))
    return Interval(one - other, one - other - below, one - other + above, "seeds")


def seeds_to_tell_apart(ours: float, theirs: float, max_seeds: int = 100) -> int | None:
    """The fewest seeds a side with which two such shares, 0 to 1, differ by Fisher's test at 5%; None for more."""
    for seeds in range(2, max_seeds + 1):
        if fisher((round(ours * seeds), seeds), (round(theirs * seeds), seeds)) < 0.05:
            return seeds
    return None


def seeds_to_tell_from_half(share: float, more_than: int, max_seeds: int = 100) -> int | None:
    """The fewest seeds with which the exact interval of such a share, 0 to 1, spares one half; None for more."""
    for seeds in range(more_than + 1, max_seeds + 1):
        low, high = clopper_pearson(round(share * seeds), seeds)
        if low > 0.5 or high < 0.5:
            return seeds
    return None


def seeds_needed(effect: float, spread: float, over_problems: float = 0.0, max_seeds: int = 1000) -> int | None:
    """The fewest seeds with which half the width of an interval is below `effect`; None for more than `max_seeds`."""
    for seeds in range(2, max_seeds + 1):
        half = float(stats.t.ppf(UPPER, seeds - 1)) * spread / seeds**0.5
        if np.hypot(half, over_problems) < effect:
            return seeds
    return None


def problems_needed(effect: float, half_width: float, problems: int) -> int:
    """Problems with which half the width of an interval over problems is |effect|: half_width is that over `problems`.

    A standard error falls with the root of their number, so N (half_width / effect)^2, rounded up.
    """
    return int(np.ceil(problems * (half_width / effect) ** 2 - 1e-9))


def to_decide(found: Interval, seeds: int, effect: float | None = None, power: float = 0.8, most: int = 1000) -> str:
    """About how many problems or seeds would decide, in words, where an interval does not.

    effect: how far the estimate is from what it has to be told from; by default from zero, as a difference. With so
    many, an interval lies on one side of that with probability `power`, if what is measured is the true value and more
    seeds spread as these do: half its width is then |effect| / (1 + z_power / z_95), 1 / 1.43 of it. What is left of
    that beside the seeds' part is for problems (`problems_needed`), and the other way round (`seeds_needed`); where
    neither is enough alone, both get the same share. most: times the problems, and seeds, beyond which no number is
    told.
    """
    effect = abs(found.estimate if effect is None else effect)
    target = effect / (1 + float(stats.norm.ppf(power) / stats.norm.ppf(UPPER)))
    problems, half = found.problems, found.over_problems
    if target == 0:
        return "no number of problems or seeds can be told, as there is no difference"
    out = "too small a difference for any number within reach"
    if problems_needed(target, half, problems) > most * problems:
        return out
    if found.spread is None:
        more = problems_needed(target, half, problems)
        and_more = f", with {_about(more)} problems (now {problems})," if more > problems else ""
        return f"three seeds or more{and_more} would decide"
    options = []
    from_seeds = float(stats.t.ppf(UPPER, seeds - 1)) * found.spread / seeds**0.5
    if from_seeds < target and problems:
        left = (target**2 - from_seeds**2) ** 0.5
        options.append(f"{_about(problems_needed(left, half, problems))} problems (now {problems})")
    if half < target:
        more_seeds = seeds_needed(target, found.spread, half, most)
        options += [] if more_seeds is None else [f"about {more_seeds} seeds (now {seeds})"]
    share = target / 2**0.5
    more_seeds = seeds_needed(share, found.spread, 0.0, most)
    if not options and more_seeds is not None:
        more = max(problems, problems_needed(share, half, problems))
        options.append(f"about {more_seeds} seeds (now {seeds}) with {_about(more)} problems (now {problems})")
    return f"{' or '.join(options)} would decide" if options else out


def _about(count: int) -> str:
    """A number with two digits that count: "about 740"."""
    return f"about {float(f'{count:.2g}'):,.0f}"


def paired(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    """Interval of the difference of two methods' scores [S, N] of the same seeds and problems. Raises ValueError."""
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if ours.shape != theirs.shape:
        raise ValueError(f"scores: shapes {ours.shape} and {theirs.shape} differ; allowed: the same seeds and problems")
    return interval(ours - theirs, difference=True)
