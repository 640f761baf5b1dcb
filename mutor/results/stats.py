"""Means and intervals over seeds and problems, as pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation over seeds, a 95% interval, and what the interval accounts for."""

    n_seeds: int
    mean: float | None = None
    std: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    covers: str = ""


def summarise(
    values: Sequence[float], scores: Sequence[np.ndarray | None] = (), *, rate: bool = True, level: float = 0.95
) -> Summary:
    """Summary of one metric over seeds.

    values: one a seed, in percent if `rate`; scores: of each seed the scores [N] of the same problems, 0 to 1, where
    they are kept. With scores the interval is over seeds and problems (`interval`), with one seed over problems alone
    (Wilson's for right or wrong); without, Student's t over the seeds, for one seed none. Rates are cut to 0..100.
    """
    n = len(values)
    if n == 0:
        return Summary(0)
    mean = float(np.mean(values))
    std = float(np.std(values, ddof=1)) if n > 1 else None
    kept = [s for s in scores if s is not None]
    if len(kept) == n and len({len(s) for s in kept}) == 1:
        table = np.array(kept, dtype=float)
        if n == 1 and np.isin(table, (0, 1)).all():
            low, high = (100 * end for end in wilson(table.mean(), table.size, level))
            return Summary(1, mean, None, low, high, "problems")
        found = interval(100 * table, level)
        low, high, covers = found.low, found.high, found.covers
    elif (varying := over_seeds(values, level=level)) is not None:
        low, high, covers = varying.low, varying.high, varying.covers
    else:
        return Summary(1, mean)
    if rate:
        low, high = max(low, 0.0), min(high, 100.0)
    return Summary(n, mean, std, low, high, covers)


def wilson(share: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (0..1) observed over `count` problems."""
    interval = stats.binomtest(round(share * count), count).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    covers: what the interval accounts for: "seeds and problems", "seeds" or "problems"; spread: standard deviation of
    one seed's mean, None with one seed; over_problems: half the width that problems alone give.
    """

    estimate: float
    low: float
    high: float
    covers: str
    spread: float | None = None
    over_problems: float = 0.0

    def times(self, factor: float) -> Interval:
        """The same in another unit: shares to percent."""
        mean, low, high = (factor * x for x in (self.estimate, self.low, self.high))
        spread = None if self.spread is None else factor * self.spread
        return Interval(mean, low, high, self.covers, spread, factor * self.over_problems)


def interval(scores: np.ndarray, level: float = 0.95) -> Interval:
    """Interval of the mean of scores [S seeds, N problems], for other seeds and other problems of the same kind.

    Two half-widths in quadrature (Zou and Donner 2008): Student's t over the seeds' means, as few seeds say little
    about their spread, and Student's t over the problems' means (whole columns, so that problems hard for all seeds
    stay hard). The standard error of a mean over N problems is s / sqrt(N) exactly, so nothing is resampled. With one
    seed the interval is over problems alone, and says so.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 2 or min(scores.shape) < 1:
        raise ValueError(f"scores: expected [seeds, problems], got shape {scores.shape}")
    seeds, problems = scores.shape
    mean, columns = float(scores.mean()), scores.mean(axis=0)
    over_problems = float(columns.std(ddof=1)) / problems**0.5 if problems > 1 else 0.0
    half = from_problems = float(stats.t.ppf(0.5 + level / 2, max(problems - 1, 1))) * over_problems
    spread = float(scores.mean(axis=1).std(ddof=1)) if seeds > 1 else None
    if spread is not None:
        half = float(np.hypot(half, stats.t.ppf(0.5 + level / 2, seeds - 1) * spread / seeds**0.5))
    covers = "problems" if spread is None else "seeds and problems"
    return Interval(mean, mean - half, mean + half, covers, spread, from_problems)


def over_seeds(ours: Sequence[float], theirs: Sequence[float] | None = None, level: float = 0.95) -> Interval | None:
    """Interval of the mean of `ours`, or of mean(ours) - mean(theirs) (Welch's), where only one number a seed is known.

    None with a single seed on a side: nothing tells how it would vary.
    """
    if len(ours) < 2 or (theirs is not None and len(theirs) < 2):
        return None
    mean, spread = float(np.mean(ours)), float(np.std(ours, ddof=1))
    if theirs is None:
        half = float(stats.t.ppf(0.5 + level / 2, len(ours) - 1)) * spread / len(ours) ** 0.5
        return Interval(mean, mean - half, mean + half, "seeds", spread)
    mean -= float(np.mean(theirs))
    spread = float(np.hypot(spread, np.std(theirs, ddof=1)))
    if spread == 0:
        return Interval(mean, mean, mean, "seeds", 0.0)
    found = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(level)
    return Interval(mean, float(found.low), float(found.high), "seeds", spread)


def needed(
    effect: float, spread: float | None, over_problems: float, level: float = 0.95, max_seeds: int = 1000
) -> str:
    """What would bring half the width of an interval below |effect|, in words: seeds, problems.

    spread, over_problems: of an `Interval`; that more seeds spread as these do, and that the effect is the true one, is
    assumed.
    """
    effect = abs(effect)
    if spread is None:
        return "three seeds or more"
    if over_problems >= effect:
        factor = (over_problems / effect) ** 2 if effect else np.inf
        return f"more than {factor:.0f} times the problems" if factor < max_seeds else "a larger effect"
    for seeds in range(2, max_seeds + 1):
        half = float(stats.t.ppf(0.5 + level / 2, seeds - 1)) * spread / seeds**0.5
        if np.hypot(half, over_problems) < effect:
            return f"about {seeds} seeds"
    return f"more than {max_seeds} seeds"


@dataclass(frozen=True)
class Paired:
    """Difference of two methods on the same seeds and problems, its interval and a two-sided p-value."""

    difference: Interval
    p: float
    test: str


def paired(ours: np.ndarray, theirs: np.ndarray, rng: np.random.Generator, draws: int = 10_000) -> Paired:
    """Compare scores [S, N] of two methods, seed by seed and problem by problem.

    p: with several seeds, how often a difference as large comes up when the two methods' scores of a problem change
    places at random, within each seed (`draws` times, from `rng`); with one seed and right-or-wrong scores, McNemar's
    exact test.
    """
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if ours.shape != theirs.shape:
        raise ValueError(f"scores: shapes {ours.shape} and {theirs.shape} differ; allowed: the same seeds and problems")
    change = ours - theirs
    found = interval(change)
    if len(change) == 1 and np.isin(ours, (0, 1)).all() and np.isin(theirs, (0, 1)).all():
        return Paired(found, mcnemar(ours[0], theirs[0]), "McNemar, exact")
    cells = change[change != 0]
    if not len(cells):
        return Paired(found, 1.0, "permutation of problems within seeds")
    total, extreme = cells.sum(), 0
    for start in range(0, draws, 500):  # bits say which changes keep their sign
        bits = rng.integers(0, 256, size=(min(500, draws - start), -(-len(cells) // 8)), dtype=np.uint8)
        sums = 2 * (np.unpackbits(bits, axis=1, count=len(cells)) @ cells) - total
        extreme += int((np.abs(sums) >= abs(total) - 1e-9).sum())
    return Paired(found, (extreme + 1) / (draws + 1), "permutation of problems within seeds")


def mcnemar(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Exact two-sided p-value of McNemar's test: right-or-wrong scores [N] of two models on the same problems."""
    only_ours, only_theirs = int(((ours == 1) & (theirs == 0)).sum()), int(((ours == 0) & (theirs == 1)).sum())
    if only_ours + only_theirs == 0:
        return 1.0
    return float(stats.binomtest(only_ours, only_ours + only_theirs, 0.5).pvalue)
