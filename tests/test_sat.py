"""Random 3-SAT: formulas, their solutions, and scores, held against all assignments."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from mutor.baselines.next_token import NextToken

from mutor.checks import from_mapping
from mutor.config.load import load_scale
from mutor.config.runs import make_spec
from mutor.mtp.method import Context
from mutor.tasks.sat import Sat, SatConfig

ROOT = Path(__file__).parent.parent


def signed(tokens, n):
    """Literals as in DIMACS: 1 to n, negated -1 to -n."""
    return [t + 1 if t < n else -(t - n + 1) for t in tokens]


def solutions(problem, n):
    """All assignments, as sets of literals, that make no clause false: by brute force."""
    body = signed(problem.prompt[:-1], n)
    clauses = [body[i : i + 3] for i in range(0, len(body), 3)]
    for values in itertools.product((1, -1), repeat=n):
        literals = {(i + 1) * value for i, value in enumerate(values)}
        if all(any(literal in literals for literal in clause) for clause in clauses):
            yield literals


@pytest.fixture(scope="module")
def task():
    return Sat(SatConfig(variables=4, clauses=15, valid_size=50, test_size=100))


def test_a_problem_in_tokens():
    """1 -2 3  -1 2 4  4 variables; x1 and x2 true, x3 and x4 false is -2 for nothing, but 1 and 2 satisfy."""
    task = Sat(SatConfig(variables=4, clauses=2, valid_size=5, test_size=5))
    problem = task.splits["test"][0]._replace(prompt=[0, 5, 2, 4, 1, 3, 8])
    assert signed(problem.prompt[:-1], 4) == [1, -2, 3, -1, 2, 4]
    assert (task.equals, task.pad_id, task.vocabulary) == (8, 9, 10)
    judged = {tuple(a): task.judge(problem, a) for a in itertools.product(range(10), repeat=4)}
    for answer, scores in judged.items():
        proper = all(token in (place, place + 4) for place, token in enumerate(answer))
        true = set(signed(answer, 4)) if proper else set()
        assert scores["solve_rate"] == (bool(true & {1, -2, 3}) and bool(true & {-1, 2, 4}))
    assert judged[0, 1, 6, 7] == {"solve_rate": 1, "satisfied_clauses": 1, "chance": problem.about}
    assert judged[4, 1, 6, 7]["satisfied_clauses"] == 0.5  # -1 2 -3 -4 leaves 1 -2 3 false
    assert judged[8, 1, 9, 7]["satisfied_clauses"] == 0.5  # 2 stands in its place, the rest is no assignment
    assert judged[1, 0, 6, 7]["satisfied_clauses"] == 0  # 1 and 2 have changed places
    assert task.judge(problem, [0, 1, 6])["solve_rate"] == 0


def test_scores_of_all_assignments_are_those_of_brute_force(task):
    for problem in task.splits["test"]:
        right = {tuple(sorted(s, key=abs)) for s in solutions(problem, 4)}
        found = [a for a in task.assignments.tolist() if task.judge(problem, a)["solve_rate"]]
        assert {tuple(signed(a, 4)) for a in found} == right and len(found) == len(right) > 0
        assert problem.answer in found and problem.about == len(right) / 16


def test_formulas_are_uniform_among_those_with_a_solution():
    """In three variables there are eight clauses, each false of one assignment: seven clauses always leave one."""
    task = Sat(SatConfig(variables=3, clauses=7, valid_size=5, test_size=5))
    problems = task.draw(np.random.default_rng(0), 4000)
    clauses = np.array([len(p.key) for p in problems])
    drawn = np.random.default_rng(1).integers(8, size=(40_000, 7))
    wanted = np.bincount([len(set(row)) for row in drawn.tolist()], minlength=8) / 40_000
    assert np.abs(np.bincount(clauses, minlength=8) / 4000 - wanted).max() < 0.03
    assert all(p.about == (8 - len(p.key)) / 8 for p in problems)


def test_unsatisfiable_formulas_are_left_out_and_answers_are_uniform():
    task = Sat(SatConfig(variables=3, clauses=20, valid_size=5, test_size=5))
    problems = task.draw(np.random.default_rng(0), 3000)
    assert all(len(p.key) < 8 for p in problems)
    answers = np.array([p.answer for p in problems])
    assert np.abs((answers < 3).mean(0) - 0.5).max() < 0.04  # no sign is the likelier one
    two = [p for p in problems if p.about == 0.25]
    later = [p.answer == signed_last(p) for p in two]
    assert abs(np.mean(later) - 0.5) < 0.05  # of two solutions each as often


def signed_last(problem):
    """The later of all solutions in their own order, as tokens."""
    found = [[abs(x) - 1 + 3 * (x < 0) for x in sorted(s, key=abs)] for s in solutions(problem, 3)]
    return max(found)


def test_held_out_formulas_are_told_by_their_clauses_and_never_trained_on():
    task = Sat(SatConfig(variables=3, clauses=3, valid_size=20, test_size=20))
    held = {p.key for split in task.splits.values() for p in split}
    assert len(held) == 40
    seen = [
        frozenset(tuple(ids[i : i + 3]) for i in range(0, 9, 3)) for ids, _ in task.train(0).examples(np.arange(3000))
    ]
    where = {tuple(clause): number for number, clause in enumerate(task.clauses.tolist())}
    assert not held & {tuple(sorted(where[clause] for clause in formula)) for formula in seen}
    with pytest.raises(ValueError, match="test_size: 500 is more than the 92 problems that exist"):
        Sat(SatConfig(variables=3, clauses=3, test_size=500))  # 8 + 28 + 56 sets of up to three of eight clauses


def test_a_fixed_set_is_the_same_for_all_seeds_and_new_ones_are_not():
    fixed = Sat(SatConfig(variables=4, clauses=9, train_size=300, valid_size=5, test_size=5))
    one, other = (fixed.train(seed).examples(np.array([0, 299])) for seed in (0, 1))
    assert fixed.train(0).size == 300 and all((a[0] == b[0]).all() for a, b in zip(one, other, strict=True))
    new = Sat(SatConfig(variables=4, clauses=9, valid_size=5, test_size=5))
    assert new.train(0).size is None and (new.train(0).examples(np.array([4096]))[0][0].size == 27 + 1 + 4)
    assert any(
        (new.train(0).examples(np.array([i]))[0][0] != new.train(1).examples(np.array([i]))[0][0]).any()
        for i in range(5)
    )


class Answers(NextToken):
    """Gives each prompt a satisfying assignment, the trained one or not."""

    def __init__(self, task):
        super().__init__(None)
        self.known = {tuple(p.prompt): p for p in task.splits["test"]}
        self.task = task

    def answer(self, model, prompts):
        rows = []
        for row in prompts.ids.tolist():
            problem = self.known[tuple(row)]
            found = [a for a in self.task.assignments.tolist() if self.task.judge(problem, a)["solve_rate"]]
            rows.append(next((a for a in found if a != problem.answer), problem.answer))
        return torch.tensor(rows)


def test_any_satisfying_assignment_is_right(tiny, task):
    model = tiny(vocab_size=task.vocabulary)
    metrics, scores = task.evaluate(model, Answers(task), Context(pad_id=task.pad_id), "test", 30)
    assert metrics["solve_rate"] == metrics["satisfied_clauses"] == 100
    assert scores["solve_rate"].shape == (100,) and "forced_accuracy_at_4" in metrics
    assert 5 < metrics["chance"] < 30


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"variables": 2, "clauses": 5}, "variables: 2 is out of range"),
        ({"variables": 4}, "clauses"),
        ({"variables": 4, "clauses": 9, "claus": 1}, "did you mean 'clauses'"),
    ],
)
def test_impossible_formulas_are_refused(settings, says):
    with pytest.raises(ValueError, match="options") as error:
        from_mapping(SatConfig, settings, "options")
    assert says in str(error.value)


def test_formulas_that_hardly_ever_have_a_solution_are_refused():
    with pytest.raises(
        ValueError, match=r"clauses: 90 for 3 variables: of .* can be solved; allowed: one in a thousand"
    ):
        Sat(SatConfig(variables=3, clauses=90))  # of eight clauses one has to be missing


def test_a_method_that_looks_beyond_the_answer_is_refused():
    scale = load_scale(ROOT, "laptop")
    with pytest.raises(ValueError, match="d_max: 5 is longer than an answer; allowed: at most 4"):
        make_spec(scale, "sat", "gpt2-2x64", "parallel_mtp", {"d_max": 5})
