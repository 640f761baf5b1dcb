"""Means and intervals over seeds, as pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Summary:
    """mean and sample standard deviation over seeds, a 95% interval, and what the interval covers."""

    n_seeds: int
    mean: float | None = None
    std: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None


def summarise(values: Sequence[float], problems: int | None = None, *, rate: bool = True) -> Summary:
    """Summary of one metric over seeds.

    values: one a seed, in percent if `rate`; problems: how many problems each is a rate over. With several seeds the
    interval is Student's t over seeds, cut to 0..100 for rates; with one, Wilson's over the problems; with one and no
    count, none.
    """
    n = len(values)
    if n == 0:
        return Summary(0)
    mean = float(np.mean(values))
    if n == 1:
        if not (rate and problems):
            return Summary(1, mean)
        low, high = wilson(mean / 100, problems)
        return Summary(1, mean, None, 100 * low, 100 * high)
    std = float(np.std(values, ddof=1))
    half = float(stats.t.ppf(0.975, n - 1)) * std / n**0.5
    low, high = mean - half, mean + half
    if rate:
        low, high = max(low, 0.0), min(high, 100.0)
    return Summary(n, mean, std, low, high)


def wilson(share: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (0..1) observed over `count` problems."""
    interval = stats.binomtest(round(share * count), count).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)
