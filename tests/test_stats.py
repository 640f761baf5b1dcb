"""Statistics against scipy, cases worked by hand, and their own promises in simulation."""

from math import comb

import numpy as np
import pytest
from scipy import stats

from mutor.config.runs import possible
from mutor.results.stats import (
    Interval,
    Summary,
    clopper_pearson,
    fisher,
    graded,
    interval,
    over_seeds,
    paired,
    seeds_to_tell_apart,
    shares_apart,
    summarise,
    wilson,
)

ANY = (-np.inf, np.inf)


def rng(seed=0):
    """A generator."""
    return np.random.default_rng(seed)


def test_spread_of_seeds_alone_is_students_t():
    """Seeds that score all problems alike: nothing varies but seeds."""
    means = np.array([0.2, 0.5, 0.6, 0.4])
    got = interval(np.repeat(means[:, None], 50, axis=1))
    low, high = stats.t.interval(0.95, 3, loc=means.mean(), scale=stats.sem(means))
    assert (got.low, got.high, got.covers) == (pytest.approx(low), pytest.approx(high), "seeds and problems")


@pytest.mark.parametrize("right", [0, 1, 7, 29, 30])
def test_right_or_wrong_is_wilsons(right):
    """Of one seed, and of several that solve the same problems: 0 of 30 leaves a width, which seeds do not narrow."""
    low, high = stats.binomtest(right, 30).proportion_ci(0.95, method="wilson")
    for seeds in (1, 3):
        got = interval(np.tile(np.arange(30) < right, (seeds, 1)))
        assert (got.low, got.high) == pytest.approx((low, high)) and got.estimate == right / 30
        assert got.over_problems == pytest.approx((high - low) / 2) and got.high > got.low
        assert got.covers == ("problems" if seeds == 1 else "seeds and problems")


def test_seeds_that_differ_count_as_more_problems():
    """Three seeds, 400 problems, all 1,200 answers by themselves: about as good as 1,200 problems."""
    scores = rng().random((3, 400)) < 0.3
    alone = interval(scores).over_problems
    share = scores.mean()
    halves = [np.diff(wilson(share, n))[0] / 2 for n in (400, 1200)]
    assert alone == pytest.approx(halves[1], rel=0.05) and alone < 0.7 * halves[0]
    padded = np.append(scores.mean(axis=0), (0, 0, 1, 1))
    effect = padded.var() / (padded.mean() * (1 - padded.mean()))
    assert alone == pytest.approx(np.diff(wilson(share, 400 / effect))[0] / 2)


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [(0, 0, -0.086619, 0.086619), (30, 30, -0.086619, 0.086619), (30, 0, 0.816931, 1.0), (0, 30, -1.0, -0.816931)],
)
def test_none_right_against_none_or_all(ours, theirs, low, high):
    """Bonett and Price by hand, 30 problems: (n12 - n21) / 32 +- 1.96 sqrt((n12 + n21) / 32 - that^2) / sqrt(32)."""
    for seeds in (1, 3):
        one, other = (np.tile(np.arange(30) < right, (seeds, 1)) for right in (ours, theirs))
        got = paired(one, other)
        assert (got.low, got.high) == pytest.approx((low, high), abs=1e-6)


def test_differences_within_problems_by_hand():
    """Of 50 problems 6 are only ours, 2 only theirs; with one more of each 7 and 3 of 52."""
    change = np.zeros((1, 50))
    change[0, :8] = [1] * 6 + [-1] * 2
    half = 1.959964 * ((10 / 52 - (4 / 52) ** 2) / 52) ** 0.5
    got = interval(change, difference=True)
    assert (got.low, got.high) == pytest.approx((4 / 52 - half, 4 / 52 + half)) and got.estimate == 4 / 50
    assert got.minus(0.5).estimate == 4 / 50 - 0.5 and got.minus(0.5).low == pytest.approx(4 / 52 - half - 0.5)


@pytest.mark.parametrize(("rate", "problems"), [(0.01, 30), (0.03, 30), (0.97, 30), (0.01, 200), (0.5, 30)])
def test_coverage_at_the_bounds(rate, problems):
    """95% intervals of rates and of paired differences, at rates where none or all are often right."""
    draw, held, held_difference = rng(7), [], []
    for _ in range(600):
        ours, theirs = (draw.random((1, problems)) < rate for _ in range(2))
        got, change = interval(ours), paired(ours, theirs)
        held.append(got.low <= rate <= got.high)
        held_difference.append(change.low <= 0 <= change.high)
    assert np.mean(held) > 0.925 and np.mean(held_difference) > 0.925


def test_every_field_of_an_interval_by_hand():
    """Two seeds, two problems: means 0.45 and 0.5 of the seeds, 0.5 and 0.45 of the problems."""
    got = interval(np.array([[0.5, 0.4], [0.5, 0.5]]))
    t = stats.t.ppf(0.975, 1)
    spread = 0.05 / 2**0.5
    half = t * spread / 2**0.5
    assert (got.estimate, got.spread, got.over_problems) == pytest.approx((0.475, spread, half))
    whole = (0.475 - 2**0.5 * half, 0.475 + 2**0.5 * half)
    assert (got.low, got.high) == pytest.approx(whole) and got.low > 0 and got.high < 1
    assert got.covers == "seeds and problems" and interval(np.array([[0, 1]])).spread is None
    assert got.spread is not None
    wanted = [47.5, *(100 * x for x in (got.low, got.high)), got.covers, 100 * got.spread, 100 * got.over_problems, 2]
    assert got.times(100) == Interval(*wanted)
    assert interval(np.array([[0, 1]])).times(100).spread is None
    less = Interval(got.estimate - 0.1, got.low - 0.1, got.high - 0.1, got.covers, got.spread, got.over_problems, 2)
    assert got.minus(0.1) == less


def test_one_problem_says_nothing_about_problems():
    """An interval is cut to what is possible: a score lies between 0 and 1, a difference between -1 and 1."""
    for difference, low in ((False, 0.0), (True, -1.0)):
        got = interval(np.array([[0.2], [0.6]]), difference=difference)
        assert (got.low, got.estimate, got.high) == (low, 0.4, 1.0)
    assert graded(np.array([0.4])) == (-np.inf, np.inf)


def test_scores_of_few_digits_are_averaged_in_double_precision():
    """Records keep scores as float32."""
    scores = rng().random((3, 50)).astype(np.float32)
    assert interval(scores) == interval(scores.astype(float))
    assert summarise([50.0] * 3, list(scores)) == summarise([50.0] * 3, list(scores.astype(float)))


def test_standard_error_over_problems_is_what_a_bootstrap_estimates():
    """Six problems, means 1, 1, 1/2, 1/2, 0, 0: resampling whole columns 200,000 times comes to s / sqrt(N).

    The bootstrap divides by N where s divides by N - 1, and its own error is 1 / sqrt(2 * 200,000) = 0.16%.
    """
    scores = np.array([[1, 1, 0.5, 0.5, 0, 0]])
    drawn = rng().integers(0, 6, size=(200_000, 6))
    resampled = scores.mean(axis=0)[drawn].mean(axis=1).std() * (6 / 5) ** 0.5
    t = stats.t.ppf(0.975, 5)
    assert interval(scores).over_problems == pytest.approx(t * (1 / 5 / 6) ** 0.5)  # s^2 = (4 * 0.25) / 5
    assert interval(scores).over_problems == pytest.approx(t * resampled, rel=4 * 0.0016)


def test_scores_are_seeds_by_problems():
    with pytest.raises(ValueError, match=r"expected \[seeds, problems\], got shape \(4,\)"):
        interval(np.ones(4))


@pytest.mark.parametrize("seeds", [1, 2, 3, 4, 10])
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


@pytest.mark.parametrize("seeds", [3, 4, 6, 8, 9, 12, 17])
def test_coverage_where_each_seed_has_problems_of_its_own(seeds):
    """Of differences seed by seed, and of two sides of their own seeds, one of which spreads three times as far."""
    draw, held, held_apart, runs = rng(seeds), 0, 0, 1500
    for _ in range(runs):
        ours, theirs = draw.normal(2.0, 3.0, size=seeds), draw.normal(0.0, 1.0, size=seeds)
        change, apart = over_seeds(list(ours - theirs)), over_seeds(list(ours), list(theirs))
        held += change.low <= 2 <= change.high
        held_apart += apart.low <= 2 <= apart.high
    assert 0.93 <= held / runs <= 0.97 and 0.93 <= held_apart / runs <= 0.975


@pytest.mark.parametrize(
    ("ours", "theirs", "least"),
    [(10, 10, 0.95), (10, 9, 0.95), (6, 10, 0.95), (4, 10, 0.95), (3, 10, 0.95), (3, 3, 0.92)],
)
def test_coverage_of_counted_seeds(ours, theirs, least):
    """By the binomial sum over counts: intervals of a share, or a difference (not 3 against 3), hold it 19 times in 20.

    Fisher's test calls equal shares different 5 times in 100 at most.
    """
    shares = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
    counts = [(one, other) for one in range(ours + 1) for other in range(theirs + 1)]
    found = {pair: shares_apart((pair[0], ours), (pair[1], theirs)) for pair in counts}
    differ = {pair: fisher((pair[0], ours), (pair[1], theirs)) < 0.05 for pair in counts}
    exact = [clopper_pearson(count, ours) for count in range(ours + 1)]
    for one in shares:
        chances = stats.binom.pmf(range(ours + 1), ours, one)
        assert sum(c for c, (low, high) in zip(chances, exact, strict=True) if low <= one <= high) >= 0.95
        for other in shares:
            both = np.outer(chances, stats.binom.pmf(range(theirs + 1), theirs, other))
            assert sum(both[p] for p in counts if found[p].low <= one - other <= found[p].high) >= least, (one, other)
            assert one != other or sum(both[pair] for pair in counts if differ[pair]) <= 0.05, one


def test_same_scores_and_other_shapes():
    same = np.eye(3)
    got = paired(same, same)
    assert got.estimate == 0.0 and -got.low == pytest.approx(got.high) and got == interval(0 * same, difference=True)
    with pytest.raises(ValueError, match=r"\(3, 3\) and \(2, 3\) differ"):
        paired(same, same[:2])


@pytest.mark.filterwarnings("ignore:Precision loss")
def test_one_number_a_seed():
    ours, theirs = [70.1, 72.4, 71.0], [68.0, 66.5, 69.9, 67.0]
    welch = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    got = over_seeds(ours, theirs)
    assert (got.low, got.high) == pytest.approx((welch.low, welch.high)) and got.covers == "seeds"
    assert got.estimate == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert got.spread == pytest.approx((np.var(ours, ddof=1) + np.var(theirs, ddof=1)) ** 0.5)
    alone = over_seeds(ours)
    assert (alone.low, alone.high) == pytest.approx(stats.t.interval(0.95, 2, np.mean(ours), stats.sem(ours)))
    assert (alone.estimate, alone.spread) == pytest.approx((np.mean(ours), np.std(ours, ddof=1)))
    assert alone.covers == "seeds"
    assert over_seeds([1.0]) is None and over_seeds(ours, [1.0]) is None and over_seeds([1.0], ours) is None
    two = over_seeds([1.0, 3.0])
    assert (two.estimate, two.spread) == pytest.approx((2, 2**0.5))
    assert over_seeds([0.0, 2**0.5], [0.0, 0.0]).low < 0 and over_seeds(ours, [60.0, 60.0]).spread == alone.spread


def test_seeds_that_do_not_differ_tell_nothing(recwarn):
    assert over_seeds([2.0, 2.0], [0.5, 0.5]) is over_seeds([2.0, 2.0]) is None and not recwarn.list
    assert over_seeds([95.85, 95.85 + 1e-13]) is None  # but for rounding
    one = over_seeds([2.0, 2.0], [0.5, 0.6])
    assert one.high - 1.45 == pytest.approx(stats.t.ppf(0.975, 1) * 0.05) and not recwarn.list
    assert summarise([100.0, 100.0, 100.0]) == Summary(3, 100.0, 0.0)


def test_summary_by_hand():
    three = summarise([50.0, 60.0, 70.0])
    assert (three.n_seeds, three.mean, three.std) == (3, 60.0, 10.0)
    half = 4.302653 * 10 / 3**0.5  # t, 2 degrees of freedom
    assert (three.ci_low, three.ci_high) == pytest.approx((60 - half, 60 + half), abs=1e-4)
    assert summarise([99.0, 100.0, 100.0]).ci_high == 100.0
    low, high = stats.t.interval(0.95, 4, loc=np.mean([1, 2, 3, 4, 5]), scale=stats.sem([1, 2, 3, 4, 5]))
    five = summarise([1.0, 2.0, 3.0, 4.0, 5.0], possible=ANY)
    assert (five.ci_low, five.ci_high) == pytest.approx((low, high))


def test_one_seed_has_an_interval_over_problems():
    one = summarise([25.0], [np.arange(200) < 50])
    assert one.std is None and (one.ci_low, one.ci_high) == pytest.approx((19.5, 31.4), abs=0.1)
    p, n, z = 0.25, 200, 1.959964
    centre, spread = p + z * z / 2 / n, z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5
    assert wilson(p, n) == pytest.approx(((centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)))
    assert one.covers == "problems" and one.n_seeds == 1 and one.mean == 25.0
    assert summarise([]) == Summary(0) and summarise([3.0], possible=ANY) == summarise([3.0], [None]) == Summary(1, 3.0)


def test_one_seed_of_graded_scores_has_students_t():
    """F-measures are not right or wrong; the unit is percent, and a rate stays inside 0 and 100."""
    graded = np.array([0.4, 0.5, 0.5, 0.6])
    one = summarise([50.0], [graded])
    assert (one.mean, one.std, one.covers) == (50.0, None, "problems")
    assert (one.ci_low, one.ci_high) == pytest.approx(stats.t.interval(0.95, 3, 50, 100 * stats.sem(graded)))
    assert summarise([50.0], [np.array([0.0, 0.5])]).ci_low == 0.0
    assert summarise([50.0], [np.array([0.5, 1.0])]).ci_high == 100.0


def test_seeds_and_problems_vary_together():
    """Half-widths in quadrature: t over the seeds' means, and Wilson's over the problems', which the seeds share."""
    scores = [np.arange(400) < n for n in (180, 200, 220)]
    both = summarise([45.0, 50.0, 55.0], scores)
    from_seeds = stats.t.ppf(0.975, 2) * 5 / 3**0.5
    padded = np.append(np.mean(scores, axis=0), (0, 0, 1, 1))
    over_problems = 100 * (wilson(0.5, 400 * 0.25 / padded.var())[1] - 0.5)
    assert (both.n_seeds, both.mean, both.std, both.covers) == (3, 50.0, 5.0, "seeds and problems")
    half = np.hypot(from_seeds, over_problems)
    assert (both.ci_low, both.ci_high) == pytest.approx((50 - half, 50 + half))
    assert summarise([45.0, 50.0], [scores[0], None]).covers == "seeds"
    assert summarise([45.0, 50.0], [scores[0], scores[1][:300]]) == summarise([45.0, 50.0])  # not the same problems
    assert (two := summarise([45.0, 50.0])).covers == "seeds" and two.std == pytest.approx(12.5**0.5)
    assert summarise([0.0, 10.0]).ci_low == 0.0


def test_what_is_no_rate_is_not_cut():
    """A log-likelihood may be below 0, a distance above 100."""
    below, above = summarise([-2.4, -2.0], possible=ANY), summarise([140.0, 200.0], possible=ANY)
    assert below.ci_low < below.ci_high < 0.5 and below.ci_low < -2.4 and above.ci_high > 200
    assert summarise([-2.4, -2.0]).ci_low == 0
    fids = summarise([140.0, 200.0], possible=possible("score"))
    assert (fids.ci_low, fids.ci_high) == (0, above.ci_high) and fids.mean == 170
    assert summarise([0.9, 0.99], possible=possible("fraction")).ci_high == 1
    assert summarise([-2.4, -2.0], possible=possible("nats")) == below


def test_seeds_differ_unless_by_rounding():
    assert over_seeds([0.1 + 0.2, 0.3]) is None and over_seeds([50.0, 50.0], [0.1 + 0.2, 0.3]) is None
    for seeds in ([1e-9, 2e-9], [50.0, 50.0001], [1.0, 1.0, 2.0]):  # small numbers and differences are some
        assert over_seeds(seeds) is not None


# seeds that are counted


def tail(count, of, share):
    """The chance of `count` or more of `of`, by the binomial sum."""
    return sum(comb(of, k) * share**k * (1 - share) ** (of - k) for k in range(count, of + 1))


@pytest.mark.parametrize(("count", "of"), [(0, 3), (1, 3), (3, 3), (9, 10), (10, 10), (5, 10), (17, 20)])
def test_exact_interval_leaves_a_fortieth_on_each_side(count, of):
    """At its ends as many or more, as few or fewer, have the chance 0.025; where none or all are seen it is open."""
    low, high = clopper_pearson(count, of)
    assert low == 0 if count == 0 else tail(count, of, low) == pytest.approx(0.025)
    assert high == 1 if count == of else 1 - tail(count + 1, of, high) == pytest.approx(0.025)


def test_fishers_test_sums_the_tables_that_are_no_more_likely():
    """By the hypergeometric sum, for all counts of 10 and 3 seeds, and of 5 and 5."""
    for one, other in ((10, 3), (5, 5)):
        for solved in range(one + other + 1):
            chances = {
                k: comb(one, k) * comb(other, solved - k) / comb(one + other, solved)
                for k in range(max(0, solved - other), min(one, solved) + 1)
            }
            for k, chance in chances.items():
                by_hand = sum(c for c in chances.values() if c <= chance * (1 + 1e-9))
                assert fisher((k, one), (solved - k, other)) == pytest.approx(by_hand), (one, other, solved, k)
    assert fisher((3, 3), (0, 3)) == pytest.approx(0.1) and fisher((4, 4), (0, 4)) == pytest.approx(2 / 70)


def test_difference_of_counted_shares_by_hand():
    """10 of 10 have 69.2 to 100%, 0 of 10 have 0 to 30.8: below 100 points by the root of two squares of 30.8."""
    end = 0.025**0.1
    found = shares_apart((10, 10), (0, 10))
    assert (found.estimate, found.high, found.covers) == (1, 1, "seeds")
    assert found.low == pytest.approx(1 - 2**0.5 * (1 - end)) and shares_apart((0, 10), (10, 10)).high == -found.low
    assert shares_apart((3, 3), (0, 3)).low < 0 < shares_apart((4, 4), (0, 4)).low
    uneven = shares_apart((9, 10), (1, 3))
    (low, high), (lowest, highest) = clopper_pearson(9, 10), clopper_pearson(1, 3)
    assert uneven.estimate == pytest.approx(0.9 - 1 / 3)
    assert uneven.low == pytest.approx(0.9 - 1 / 3 - np.hypot(0.9 - low, highest - 1 / 3))
    assert uneven.high == pytest.approx(0.9 - 1 / 3 + np.hypot(high - 0.9, 1 / 3 - lowest))


def test_seeds_to_tell_apart():
    assert seeds_to_tell_apart(1, 0) == 4 and seeds_to_tell_apart(0, 1) == 4 and seeds_to_tell_apart(0.5, 0.5) is None
    assert seeds_to_tell_apart(0.9, 0.8, max_seeds=20) is None
    assert seeds_to_tell_apart(1, 0, max_seeds=4) == 4 and seeds_to_tell_apart(1, 0, max_seeds=3) is None
    assert seeds_to_tell_apart(0.9, 0.8) is None  # beyond the 100 of the default


def test_counted_seeds_have_no_interval_of_a_mean():
    found = summarise([95.0, 94.9, 100.0], [np.ones(9)] * 3, solved_at=95.0)
    assert (found.n_seeds, found.n_solved, found.ci_low, found.ci_high, found.covers) == (3, 2, None, None, "")
    assert found.mean == pytest.approx(96.6333, abs=1e-4) and found.std == pytest.approx(2.917, abs=1e-3)
    assert (found.solved_low, found.solved_high) == pytest.approx([100 * x for x in clopper_pearson(2, 3)])
    assert summarise([95.0, 94.9, 100.0]).n_solved is None and summarise([], solved_at=95.0) == Summary(0)
