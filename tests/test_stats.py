"""Statistics against scipy, cases worked by hand, and their own promises in simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats

from mutor.results.stats import interval, mcnemar, needed, over_seeds, paired


def rng(seed=0):
    """A generator."""
    return np.random.default_rng(seed)


def test_spread_of_seeds_alone_is_students_t():
    """Seeds that score all problems alike: nothing varies but seeds."""
    means = np.array([0.2, 0.5, 0.6, 0.4])
    got = interval(np.repeat(means[:, None], 50, axis=1))
    low, high = stats.t.interval(0.95, 3, loc=means.mean(), scale=stats.sem(means))
    assert (got.low, got.high, got.covers) == (pytest.approx(low), pytest.approx(high), "seeds and problems")


def test_one_seed_is_over_problems_only():
    """100 of 400 right: the standard error is sqrt(p (1 - p) / (N - 1))."""
    got = interval((np.arange(400) < 100)[None])
    half = stats.t.ppf(0.975, 399) * (0.25 * 0.75 / 399) ** 0.5
    assert got.covers == "problems" and got.estimate == 0.25
    assert got.over_problems == pytest.approx(half) and got.high - got.estimate == pytest.approx(half)


def test_standard_error_over_problems_is_what_a_bootstrap_estimates():
    """Two seeds, six problems, means 1, 1, 1/2, 1/2, 0, 0: resampling whole columns 200,000 times comes to s / sqrt(N).

    The bootstrap divides by N where s divides by N - 1, and its own error is 1 / sqrt(2 * 200,000) = 0.16%.
    """
    scores = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]])
    drawn = rng().integers(0, 6, size=(200_000, 6))
    resampled = scores.mean(axis=0)[drawn].mean(axis=1).std() * (6 / 5) ** 0.5
    t = stats.t.ppf(0.975, 5)
    assert interval(scores).over_problems == pytest.approx(t * (1 / 5 / 6) ** 0.5)  # s^2 = (4 * 0.25) / 5
    assert interval(scores).over_problems == pytest.approx(t * resampled, rel=4 * 0.0016)


def test_nothing_that_varies_has_no_width():
    got = interval(np.ones((3, 20)))
    assert (got.estimate, got.low, got.high) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"expected \[seeds, problems\], got shape \(4,\)"):
        interval(np.ones(4))


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_coverage(seeds):
    """95% intervals hold the true mean in 93% or more of simulated experiments, at the seed counts in use."""
    draw, hits, runs = rng(seeds), 0, 400
    for _ in range(runs):
        skill = draw.normal(0.0, 0.3 if seeds > 1 else 0.0, size=(seeds, 1))
        ease = draw.normal(0.0, 1.0, size=(1, 150))
        scores = draw.random((seeds, 150)) < 1 / (1 + np.exp(-(skill + ease)))
        got = interval(scores)
        hits += got.low <= 0.5 <= got.high
    assert 0.93 <= hits / runs <= (0.98 if seeds == 1 else 1.0)


def test_mcnemar_by_hand():
    """Five problems only one solves, one only the other: 2 (C(6,0) + C(6,1)) / 2^6."""
    ours = np.array([1] * 5 + [0] + [1] * 10)
    theirs = np.array([0] * 5 + [1] + [1] * 10)
    assert mcnemar(ours, theirs) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar(ours, ours) == 1.0
    one = paired(ours[None], theirs[None], rng())
    assert one.test == "McNemar, exact" and one.p == mcnemar(ours, theirs)
    assert one.difference.estimate == pytest.approx(4 / 16) and one.difference.covers == "problems"


def test_permutation_against_all_of_them():
    """Two seeds, five problems on which the methods differ: all 2^5 exchanges counted."""
    ours = np.array([[1, 1, 1, 0, 1], [1, 1, 0, 0, 1]])
    theirs = np.array([[0, 0, 1, 0, 1], [0, 1, 0, 1, 0]])
    changes = (ours - theirs)[ours != theirs]
    sums = [abs(np.dot(signs, changes)) for signs in itertools.product((-1, 1), repeat=len(changes))]
    exact = np.mean([s >= abs(changes.sum()) for s in sums])
    got = paired(ours, theirs, rng(), draws=20_000)
    assert got.p == pytest.approx(exact, abs=0.01) and "permutation" in got.test


def test_permutation_p_values_are_uniform_where_methods_are_alike():
    draw = rng(5)
    values = []
    for _ in range(150):
        ease = draw.random((1, 80))
        ours, theirs = (draw.random((2, 80)) < ease for _ in range(2))
        values.append(paired(ours, theirs, draw, draws=500).p)
    assert 0.01 <= np.mean(np.array(values) < 0.05) <= 0.1 and 0.4 < np.mean(values) < 0.65


def test_same_scores_and_other_shapes():
    same = np.eye(3)
    assert paired(same, same, rng()).p == 1.0
    with pytest.raises(ValueError, match=r"\(3, 3\) and \(2, 3\) differ"):
        paired(same, same[:2], rng())


def test_one_number_a_seed():
    ours, theirs = [70.1, 72.4, 71.0], [68.0, 66.5, 69.9, 67.0]
    welch = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    got = over_seeds(ours, theirs)
    assert (got.low, got.high) == pytest.approx((welch.low, welch.high)) and got.covers == "seeds"
    alone = over_seeds(ours)
    assert (alone.low, alone.high) == pytest.approx(stats.t.interval(0.95, 2, np.mean(ours), stats.sem(ours)))
    assert over_seeds([1.0]) is None and over_seeds(ours, [1.0]) is None
    assert over_seeds([2.0, 2.0], [1.0, 1.0]).low == 1.0


def test_what_would_decide():
    """With n seeds half the width is t(n - 1) s / sqrt(n): 2.57 at 6 seeds of s = 2.45, 2.27 at 7."""
    assert stats.t.ppf(0.975, 5) * 2.45 / 6**0.5 > 2.5 > stats.t.ppf(0.975, 6) * 2.45 / 7**0.5
    assert needed(2.5, 2.45, 0.0) == needed(-2.5, 2.45, 0.0) == "about 7 seeds"
    assert needed(2.5, None, 0.1) == "three seeds or more"
    assert needed(1.0, 0.1, 3.0) == "more than 9 times the problems"
    assert needed(0.0, 0.1, 3.0) == "a larger effect" and needed(0.01, 5.0, 0.0) == "more than 1000 seeds"
