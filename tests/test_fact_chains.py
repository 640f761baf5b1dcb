"""Chains of facts: what a problem looks like, that its first step needs the end of the question, and scores."""

import itertools

import numpy as np
import pytest
import torch
from mutor.baselines.next_token import NextToken

from mutor.checks import from_mapping
from mutor.mtp.method import Context
from mutor.tasks.fact_chains import FactChains, FactChainsConfig
from mutor.tasks.generated import Problem


@pytest.fixture(scope="module")
def task():
    config = FactChainsConfig(depths=(1, 2, 3), facts=7, entities=9, valid_size=50, test_size=900)
    return FactChains(config)


def read(problem):
    """Facts, start and goal of a prompt."""
    *body, start, goal, _ = problem.prompt
    return [(body[i], body[i + 1]) for i in range(0, len(body), 3)], start, goal


def ways(facts, here, goal):
    """All ways from `here` to `goal`, without what stands at `here`: by brute force."""
    if here == goal:
        return [[]]
    return [[b, *rest] for a, b in facts if a == here for rest in ways(facts, b, goal)]


def test_a_problem_in_tokens(task):
    """3>7 9>2 7>5 3>8 8>2 6>2 4>7: from 3 to 5 by 7; 3 8 2 ends elsewhere, 6 joins the one chain, 4 the other."""
    facts = [(3, 7), (0, 2), (7, 5), (3, 8), (8, 2), (6, 2), (4, 7)]
    prompt = [token for a, b in facts for token in (a, b, 9)] + [3, 5, 10]
    problem = Problem(prompt, [7, 5, 11], None)
    assert (task.full_stop, task.equals, task.end_id, task.pad_id, task.vocabulary) == (9, 10, 11, 12, 13)
    right = {"solve_rate": 1.0, "first_step_accuracy": 1.0, "solve_rate_depth_2": 1.0}
    assert task.judge(problem, [7, 5]) == right
    for answer, first in [
        ([], 0), ([7], 1), ([5], 0), ([8, 2], 0), ([7, 5, 5], 1), ([7, 8], 1), ([3, 7, 5], 0), ([7, 5, 12], 1),
        ([7, 5, 9], 1), ([4, 7, 5], 0), ([8, 5], 0),
    ]:  # fmt: skip
        scores = task.judge(problem, answer)
        assert (scores["solve_rate"], scores["solve_rate_depth_2"], scores["first_step_accuracy"]) == (0, 0, first)


def test_each_problem_has_one_way_and_two_that_look_alike(task):
    joined, chained, places = 0, 0, []
    for problem in task.splits["test"]:
        facts, start, goal = read(problem)
        depth = len(problem.answer) - 1
        assert len(facts) == len(set(facts)) == 7 and problem.prompt[2:21:3] == [task.full_stop] * 7
        assert ways(facts, start, goal) == [list(problem.answer[:-1])] and problem.answer[-1] == task.end_id
        sources, ends = [a for a, _ in facts], {b for _, b in facts} - {a for a, _ in facts}
        assert sources.count(start) == 2 and len(set(sources)) == 6  # no other choice
        assert start not in [b for _, b in facts] and goal in ends and len(ends) == 2
        (other,) = ends - {goal}
        assert [len(way) for way in ways(facts, start, other)] == [depth]
        into = [b for _, b in facts]
        joined += into.count(goal) > 1
        on_ways = {*ways(facts, start, goal)[0], *ways(facts, start, other)[0]}
        chained += any(into.count(b) > 1 for b in into if b not in on_ways)
        places.append(facts.index((start, problem.answer[0])))
    assert joined > 300 and chained > 100  # going back from the goal is a choice, too; and chains join any chain
    assert np.abs(np.bincount(places, minlength=7) / 900 - 1 / 7).max() < 0.04


def test_depths_are_mixed_and_facts_do_not_tell_the_right_branch():
    task = FactChains(FactChainsConfig(depths=(1, 2, 4), facts=10, entities=12, valid_size=5, test_size=5))
    problems = task.draw(np.random.default_rng(0), 6000)
    depths = np.array([len(p.answer) - 1 for p in problems])
    assert np.abs(np.bincount(depths, minlength=5)[[1, 2, 4]] / 6000 - 1 / 3).max() < 0.03
    assert {len(p.prompt) for p in problems} == {33}
    right = []  # of two first steps: is the right one that with more facts into its chain, first written, smaller?
    for problem in problems:
        facts, start, _ = read(problem)
        firsts = [b for a, b in facts if a == start]
        into = [sum(b == first for _, b in facts) for first in firsts]
        correct = firsts.index(problem.answer[0])
        right.append((correct == 0, firsts[correct] == min(firsts), into[correct] > into[1 - correct],
                      into[correct] < into[1 - correct]))  # fmt: skip
    first, smaller, more, less = np.mean(right, axis=0)
    assert abs(first - 0.5) < 0.03 and abs(smaller - 0.5) < 0.03 and abs(more - less) < 0.03


class Follows(NextToken):
    """Follows facts from the start; at a choice takes the fact that is written first, or looks ahead."""

    def __init__(self, task, ahead):
        super().__init__(None)
        self.task, self.ahead = task, ahead

    def answer(self, model, prompts):
        assert prompts.end_id == self.task.end_id and prompts.length == 4
        rows = []
        for row in prompts.ids.tolist():
            facts, here, goal = read(Problem(row, [], None))
            way = []
            while here != goal and (steps := [b for a, b in facts if a == here]):
                here = next((b for b in steps if self.ahead and ways(facts, b, goal)), steps[0])
                way.append(here)
            rows.append(([*way, self.task.end_id] + [self.task.pad_id] * 4)[:4])
        return torch.tensor(rows)


@pytest.mark.parametrize(("ahead", "low", "high"), [(True, 100, 100), (False, 44, 56)])
def test_scores_of_known_answerers(tiny, task, ahead, low, high):
    model = tiny(vocab_size=task.vocabulary)
    metrics, scores = task.evaluate(model, Follows(task, ahead), Context(pad_id=task.pad_id), "test", 300)
    assert low <= metrics["solve_rate"] <= high and metrics["solve_rate"] == metrics["first_step_accuracy"]
    assert all(low - 4 <= metrics[f"solve_rate_depth_{d}"] <= high + 4 for d in (1, 2, 3))
    assert scores.keys() == {"solve_rate", "first_step_accuracy"} and scores["solve_rate"].shape == (900,)
    assert FactChains.chance(task.config) == 50
    depths = np.array([len(p.answer) - 1 for p in task.splits["test"]])
    for depth in (1, 2, 3):
        mean = 100 * scores["solve_rate"][depths == depth].mean()
        assert metrics[f"solve_rate_depth_{depth}"] == pytest.approx(mean)


def test_forced_accuracy_is_that_of_answers_with_so_many_tokens(tiny, task, monkeypatch):
    lengths = np.array([len(p.answer) for p in task.splits["test"]])
    right = np.arange(4) < lengths[:, None]  # as for a model that errs nowhere
    monkeypatch.setattr("mutor.mtp.teacher_forcing.teacher_forced_scores", lambda *_: (right, 0.5))
    metrics, _ = task.evaluate(tiny(vocab_size=task.vocabulary), Follows(task, True), Context(), "test", 300)
    assert [metrics[f"forced_accuracy_at_{place}"] for place in (1, 2, 3, 4)] == [100] * 4
    assert metrics["loss"] == 0.5 and "forced_accuracy_at_5" not in metrics


def test_an_answer_without_an_end_is_wrong(tiny, task):
    class Endless(Follows):
        def answer(self, model, prompts):
            found = super().answer(model, prompts)
            return torch.where(found == task.end_id, task.pad_id, found)

    metrics, _ = task.evaluate(tiny(vocab_size=task.vocabulary), Endless(task, True), Context(), "test", 300)
    assert metrics["solve_rate"] == 0 and metrics["first_step_accuracy"] == 100


def test_a_problem_is_the_same_in_any_order_of_its_facts(task):
    held = {p.key for split in task.splits.values() for p in split}
    assert len(held) == 950
    small = FactChains(FactChainsConfig(depths=(1,), facts=2, entities=4, valid_size=6, test_size=6))
    keys = {p.key for split in small.splits.values() for p in split}  # 4 starts x 3 goals x 2 others: 24 problems
    rows = small.train(0).examples(np.arange(2000))
    found = {(frozenset(read(Problem(ids[:p].tolist(), [], None))[0]), ids[p - 3], ids[p - 2]) for ids, p in rows}
    assert len(found) == 12 and not found & keys
    with pytest.raises(ValueError, match="valid_size: 20 is more than the 18 problems that exist"):
        FactChains(FactChainsConfig(depths=(1,), facts=2, entities=4, valid_size=20, test_size=6))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"facts": 5, "entities": 9, "depths": [1, 3]}, "facts: 5 is out of range, allowed: from 6"),
        ({"facts": 8, "entities": 8}, "entities: 8 is out of range, allowed: above facts, 8"),
        ({"facts": 8, "entities": 9, "depths": []}, "depths: [] is not allowed"),
        ({"facts": 8, "entities": 9, "depths": [0]}, "depths"),
        ({"facts": 8, "entities": 9, "branches": 1}, "branches: 1 is out of range"),
    ],
)
def test_impossible_problems_are_refused(settings, says):
    with pytest.raises(ValueError, match="options") as error:
        from_mapping(FactChainsConfig, settings, "options")
    assert says in str(error.value)


def test_all_ways_to_draw_a_problem_are_met():
    """Two branches of one fact and one that joins: either end, of four entities, in all orders."""
    task = FactChains(FactChainsConfig(depths=(1,), facts=3, entities=4, valid_size=2, test_size=2))
    found = {tuple(p.prompt) for p in task.draw(np.random.default_rng(0), 6000)}
    wanted = set()
    for start, goal, other, more in itertools.permutations(range(4)):
        for end in (goal, other):
            for facts in itertools.permutations([(start, goal), (start, other), (more, end)]):
                wanted.add((*(t for a, b in facts for t in (a, b, 4)), start, goal, 5))
    assert found == wanted and len(wanted) == 24 * 2 * 6
