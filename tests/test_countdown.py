"""Countdown: problems, the published format, and exact scores, held against all ways to join numbers."""

import itertools
import operator
from fractions import Fraction

import numpy as np
import pytest

from mutor.checks import from_mapping
from mutor.tasks.countdown import CHARACTERS, Countdown, CountdownConfig, joined, result


@pytest.fixture(scope="module")
def task():
    return Countdown(CountdownConfig(valid_size=50, test_size=300))


def reachable(numbers):
    """All that whole numbers can be joined to, each used once: by brute force, with fractions for quotients."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        values = [Fraction(a + b), Fraction(a - b), Fraction(a * b), *([Fraction(a, b)] if b else [])]
        for value in values:
            if value.denominator == 1 and value >= 0:
                found |= reachable([*rest, int(value)])
    return found


def text(problem):
    return "".join((CHARACTERS + "$")[i] for i in [*problem.prompt, *problem.answer])


def test_the_published_example_in_tokens(task):
    problem = task.problem([86, 28, 13, 31], 96, ["86+28=114", "31-13=18", "114-18=96"])
    assert text(problem) == "86,28,13,31,96=86+28=114,31-13=18,114-18=96$"
    assert problem.prompt[:3] == [8, 6, 15] and problem.answer[-1] == task.end_id == 16
    assert task.judge(problem, problem.answer[:-1]) == {"solve_rate": 1, "right_equations": 1}
    elsewhere = task.problem([86, 28, 13, 31], 96, ["86-28=58", "58-31=27", "27-13=14"])
    assert task.judge(problem, elsewhere.answer[:-1]) == {"solve_rate": 0, "right_equations": 1}
    assert task._cut([*problem.answer, 3, 16]) == problem.answer[:-1]
    assert task._cut(problem.answer[:-1]) == [*problem.answer[:-1], task.pad_id]  # stopped before it ended
    assert task.judge(problem, [*problem.answer[:-1], task.pad_id]) == {"solve_rate": 0, "right_equations": 0}


@pytest.mark.parametrize(
    ("answer", "reached"),
    [
        ("86+28=114,31-13=18,114-18=96", 96),
        ("28+86=114,31-13=18,114-18=96", 96),
        ("86-28=58,58-31=27,27-13=14", 14),
        ("86+28=115,31-13=18,115-18=97", None),  # 114
        ("86+28=114,31-13=18", None),  # two numbers are left
        ("86+28=114,114-18=96", None),  # 18 is not there
        ("86+28=114,86-13=73,114-73=41", None),  # 86 twice
        ("86+86=172,172-28=144,144-31=113", None),  # one 86 alone
        ("86+28=114,31-13=18,114-18=96,96-0=96", None),
        ("13-31=-18,86+28=114,114-18=96", None),  # below zero
        ("86/28=3,31-13=18,3*18=54", None),  # a remainder
        ("086+28=114,31-13=18,114-18=96", None),
        ("86+28=114,31-13=18,114-18=96,", None),
        ("86+28=114,31-13=18,114-18=96=96", None),
        ("86 +28=114,31-13=18,114-18=96", None),
        ("", None),
    ],
)
def test_equations_are_right_or_not(answer, reached):
    assert result(answer, [86, 28, 13, 31]) == reached


def test_zero_divides_nothing_and_is_reached():
    assert result("5-5=0,0*7=0", [5, 5, 7]) == 0
    assert result("5-5=0,0/7=0", [5, 5, 7]) == 0
    assert result("5-5=0,7/0=0", [5, 5, 7]) is None


def test_first_equations_are_judged_as_fractions_say():
    """All first equations over 2, 3 and 6 with results below 40, each followed by a right second one."""
    numbers, count = [2, 3, 6], 0
    apply = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
    for (i, a), (j, b) in itertools.product(enumerate(numbers), repeat=2):
        for sign, c in itertools.product("+-*/", range(40)):
            right = i != j and apply[sign](Fraction(a), b) == c
            last = numbers[3 - i - j] if i != j else 2
            assert (result(f"{a}{sign}{b}={c},{last}+{c}={last + c}", numbers) is not None) == right
            count += right
    assert count == 6 + 3 + 6 + 2  # sums and products both ways, a difference and 6/2, 6/3 one way


def test_problems_are_solved_by_their_own_answers_and_reachable(task):
    for problem in task.splits["test"]:
        numbers, target = problem.about
        assert task.judge(problem, problem.answer[:-1])["solve_rate"] == 1
        assert 10 <= target <= 100 and len(numbers) == 4 and min(numbers) >= 1 and max(numbers) <= 99
        assert text(problem).startswith(",".join(map(str, numbers)) + f",{target}=")
    for problem in task.splits["test"][:12]:
        assert problem.about[1] in reachable(problem.about[0])


def test_random_joins_reach_all_that_can_be_reached_and_nothing_else():
    rng, found = np.random.default_rng(0), set()
    for choices in rng.random((4000, 2, 3)).tolist():
        target, equations = joined([2, 3, 8], choices, "+-*/")
        if target is not None:
            assert result(",".join(equations), [2, 3, 8]) == target
            found.add(target)
    assert found == reachable([2, 3, 8])


def test_other_operations_and_sizes():
    task = Countdown(CountdownConfig(numbers=3, largest=9, target_low=1, target_high=20, operations="+-",
                                     valid_size=20, test_size=50))  # fmt: skip
    assert Countdown.describe(task.config) == "countdown numbers=3 largest=9 targets=1-20 operations=+-"
    texts = [text(p) for p in task.splits["test"]]
    assert not any(c in t for t in texts for c in "*/") and all(t.count("=") == 3 for t in texts)
    held = {p.key for split in task.splits.values() for p in split}
    assert len(held) == 70
    lines = [
        "".join((CHARACTERS + "$")[i] for i in ids[:prefix]) for ids, prefix in task.train(0).examples(np.arange(2000))
    ]
    parts = [[int(x) for x in line[:-1].split(",")] for line in lines]
    assert not held & {(*sorted(part[:-1]), part[-1]) for part in parts}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"numbers": 1}, "numbers: 1 is out of range"),
        ({"operations": "+x"}, "operations: '+x' is not allowed; allowed: one or more of + - * /"),
        ({"operations": ""}, "operations: '' is not allowed"),
        ({"target_low": 50, "target_high": 20}, "target_high: 20 is below target_low 50"),
    ],
)
def test_impossible_problems_are_refused(settings, says):
    with pytest.raises(ValueError, match="options") as error:
        from_mapping(CountdownConfig, settings, "options")
    assert says in str(error.value)


def test_targets_that_are_hardly_reached_are_refused():
    with pytest.raises(
        ValueError, match=r"target_low: 82 to target_high 99: of .* drawn 0 can be solved; allowed: one"
    ):
        Countdown(CountdownConfig(numbers=2, largest=9, target_low=82, target_high=99))
