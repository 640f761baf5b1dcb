"""How often the intervals in use hold the truth, by simulation, at the seed counts in use.

Each case draws data whose truth is known, many times over, and counts. An interval that is too narrow (Student's t with
the normal's quantile, a standard deviation with N for N - 1, problems without seeds) leaves the bounds.
`python -m tests.test_coverage` prints the table with ten times the draws.
"""

import functools
import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from mutor.results.stats import Interval, clopper_pearson, fisher, interval, over_seeds, paired, shares_apart
from mutor.results.verdicts import Scored, difference


def rates(rng, seeds, problems, base, spread):
    """Scores [S, N] of right answers: seeds differ by `spread` in logits, problems by 1, both normal; and the truth."""
    levels = rng.normal(base, spread, (seeds, 1)) + rng.normal(0, 1, (1, problems))
    return rng.random((seeds, problems)) < 1 / (1 + np.exp(-levels))


def truth(base, spread):
    """The mean rate over all seeds and problems."""
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    level = base + np.hypot(spread, 1) * points
    return float((weights / (1 + np.exp(-level))).sum() / weights.sum())


def of_seeds(rng, seeds):
    """Student's t over seeds."""
    found = over_seeds(rng.normal(50, 3, seeds))
    return found.low <= 50 <= found.high


def of_two_sides(rng, seeds):
    """Welch's, with spreads that differ."""
    found = over_seeds(rng.normal(50, 1, seeds), rng.normal(48, 4, seeds))
    return found.low <= 2 <= found.high


def of_pairs(rng, seeds):
    """Seeds with problems of their own, as graphs: what both sides share goes."""
    shared = rng.normal(50, 15, seeds)
    sides = [
        {seed: Scored(x, None, f"graph {seed}") for seed, x in enumerate(shared + rng.normal(more, 2, seeds))}
        for more in (3, 0)
    ]
    found = difference(*sides, percent=False).difference
    assert found.high - found.low < 100  # not what graphs differ by
    return found.low <= 3 <= found.high


def of_problems_and_seeds(rng, seeds):
    """A rate over seeds and problems."""
    found = interval(rates(rng, seeds, 150, 0.4, 0.4))
    return found.low <= truth(0.4, 0.4) <= found.high


def of_paired_problems(rng, seeds):
    """The difference of two rates on the same problems."""
    problems = rng.normal(0, 1, (1, 150))
    sides = [
        rng.random((seeds, 150)) < 1 / (1 + np.exp(-(rng.normal(base, 0.4, (seeds, 1)) + problems)))
        for base in (0.4, 0.0)
    ]
    found = paired(*(side.astype(float) for side in sides))
    return found.low <= truth(0.4, 0.4) - truth(0.0, 0.4) <= found.high


def coverage(case, seeds, draws):
    """The share of draws in which the interval holds the truth."""
    rng = np.random.default_rng([seeds, len(case.__name__)])
    return float(np.mean([case(rng, seeds) for _ in range(draws)]))


# draws, and at least and at most how often: 0.95 with three standard errors. Welch's is wide with three seeds, and two
# parts in quadrature are, where one of them would do.
CASES = {
    of_seeds: (800, 0.927, 0.973),
    of_two_sides: (800, 0.927, 0.99),
    of_pairs: (800, 0.927, 0.973),
    of_problems_and_seeds: (200, 0.9, 1),
    of_paired_problems: (200, 0.9, 1),
}
SEEDS = (3, 10)


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_intervals_hold_the_truth(case, seeds):
    draws, low, high = CASES[case]
    assert low <= coverage(case, seeds, draws) <= high


solved = functools.cache(clopper_pearson)


@functools.cache
def apart(one, other):
    """The interval of the difference of two counts, and Fisher's p."""
    return shares_apart(one, other), fisher(one, other)


def exact(seeds, share):
    """The chance that the interval of a share of solved seeds holds it: summed over all counts, nothing drawn."""
    ends = [solved(count, seeds) for count in range(seeds + 1)]
    chances = scipy_stats.binom.pmf(np.arange(seeds + 1), seeds, share)
    return float(sum(chance for chance, (low, high) in zip(chances, ends, strict=True) if low <= share <= high))


def exact_apart(seeds, others, one, other):
    """The same of a difference of two shares, and how often Fisher's test tells them apart."""
    held = told = 0.0
    for count, less in itertools.product(range(seeds + 1), range(others + 1)):
        chance = scipy_stats.binom.pmf(count, seeds, one) * scipy_stats.binom.pmf(less, others, other)
        found, p = apart((count, seeds), (less, others))
        held += chance * (found.low - 1e-12 <= one - other <= found.high + 1e-12)
        told += chance * (p < 0.05)
    return float(held), float(told)


@pytest.mark.parametrize("seeds", [3, 4, 6, 10])
def test_the_interval_of_solved_seeds_never_holds_the_truth_too_rarely(seeds):
    """At least 95 of 100 whatever the share; and not always, else it would be too wide."""
    held = [exact(seeds, share) for share in np.linspace(0.005, 0.995, 199)]
    assert min(held) >= 0.95 - 1e-9 and min(held) < 0.98


@pytest.mark.parametrize(
    ("seeds", "others", "least"), [(3, 3, 0.95), (10, 3, 0.95), (10, 4, 0.95), (10, 6, 0.95), (10, 10, 0.92)]
)
def test_differences_of_solved_seeds(seeds, others, least):
    """The interval holds the difference, and Fisher's test tells equal shares apart in at most 5 of 100.

    Nearly all and nearly none against each other are the worst shares, 92 of 100: two exact intervals do not make an
    exact one.
    """
    for one, other in ((0.5, 0.5), (0.9, 0.9), (0.9, 0.3), (0.97, 0.03)):
        held, told = exact_apart(seeds, others, one, other)
        assert held >= (least if one - other > 0.9 else 0.95) and (one != other or told <= 0.05)
    assert min(exact_apart(seeds, others, *shares)[0] for shares in ((0.975, 0.035), (0.905, 0.105))) >= 0.92
    assert exact_apart(10, 3, 1, 0) == pytest.approx((1, 1))


def test_a_single_seed_has_no_interval_over_seeds():
    """Over problems alone it would hold the truth of another seed far too rarely, which is why it decides nothing."""
    assert over_seeds([50.0]) is None and over_seeds([50.0], [40.0, 41.0]) is None
    rng = np.random.default_rng(1)
    held = []
    for _ in range(200):
        found: Interval = interval(rates(rng, 1, 400, 0.4, 0.8))
        assert found.covers == "problems"
        held.append(found.low <= truth(0.4, 0.8) <= found.high)
    assert np.mean(held) < 0.6


if __name__ == "__main__":
    print("| interval | seeds | holds the truth |\n|---|---|---|")
    for one, count in itertools.product(CASES, SEEDS):
        print(f"| {one.__doc__.rstrip('.')} | {count} | {100 * coverage(one, count, 10_000):.1f}% |")
    for count in SEEDS:
        worst = 100 * min(exact(count, share) for share in np.linspace(0.005, 0.995, 199))
        print(f"| Solved seeds, at the worst share | {count} | {worst:.1f}% |")
