"""Chains of facts: which facts lead from the start to the goal? The first step depends on how the question ends.

    facts     3>7   9>2   7>5   3>9   8>7   2>6   4>2     shuffled
    question  3 ... 5 =                                   from 3 to 5
    answer    7 5 end                                     a wrong first step, 9, ends elsewhere: 9 2 6

`branches` chains of the same number of facts leave the start, and each ends in a place that no fact leaves; the goal is
one of them, drawn uniformly. All facts but the start's have no choice, so that a model which only follows facts is
right once the first step is: it is right in one of `branches` problems, at each depth. Unlike star graphs, chains of
several depths are mixed in one dataset, and other chains of unknown length lead into these: the rest of the `facts` are
chains from elsewhere that join an entity that is there already, any but the start. So going back from the goal meets
facts that lead astray, the number of facts says nothing of the depth, and what has to be foreseen is graded: at depth d
the first step is known from d - 1 facts further on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mutor.checks import setting
from mutor.tasks.generated import GeneratedConfig, GeneratedTask, Problem


@dataclass(frozen=True, kw_only=True)
class FactChainsConfig(GeneratedConfig):
    """Size of the problems, and how many there are."""

    depths: tuple[int, ...] = setting((1, 2, 3, 4), doc="facts from start to goal, drawn uniformly", low=1)
    branches: int = setting(2, doc="chains that leave the start", low=2)
    facts: int = setting(doc="facts of a problem, distracting ones included", low=2)
    entities: int = setting(doc="entities to choose from", low=3)

    def __post_init__(self) -> None:
        if not self.depths:
            raise ValueError("depths: [] is not allowed; allowed: one or more")
        needed = self.branches * max(self.depths)
        if self.facts < needed:
            raise ValueError(f"facts: {self.facts} is out of range, allowed: from {needed}, for all branches")
        if self.entities <= self.facts:
            raise ValueError(f"entities: {self.entities} is out of range, allowed: above facts, {self.facts}")


class FactChains(GeneratedTask):
    """Tokens: the entities, then what stands behind a fact, what stands before the answer, its end, and padding."""

    Config = FactChainsConfig
    config: FactChainsConfig

    def __init__(self, config: FactChainsConfig, tokenizer: Any = None):
        super().__init__(config)
        self.full_stop, self.equals, self.end, self.pad_id, self.vocabulary = (config.entities + i for i in range(5))
        self.end_id = self.end
        self.hold_out()

    @staticmethod
    def describe(config: FactChainsConfig) -> str:
        """The name of these problems in tables."""
        depths = "/".join(map(str, config.depths))
        branches = "" if config.branches == 2 else f" branches={config.branches}"
        return f"fact_chains depths={depths} facts={config.facts} entities={config.entities}{branches}"

    @staticmethod
    def longest_answer(config: FactChainsConfig) -> int:
        """The deepest goal's steps and the end."""
        return max(config.depths) + 1

    @staticmethod
    def chance(config: FactChainsConfig) -> float:
        """The solve rate, in percent, of a model that follows facts, a random one out of the start."""
        return 100.0 / config.branches

    def draw(self, rng: np.random.Generator, count: int) -> list[Problem]:
        """Problems of uniform depth."""
        depths = rng.choice(self.config.depths, size=count)
        return [self._problem(rng, int(depth)) for depth in depths]

    def _problem(self, rng: np.random.Generator, depth: int) -> Problem:
        c = self.config
        names = rng.permutation(c.entities).tolist()  # entities in the order in which they come into the problem
        facts = list[tuple[int, int]]()
        for first in range(1, c.branches * depth + 1, depth):
            facts += itertools.pairwise([0, *range(first, first + depth)])
        while (left := c.facts - len(facts)) > 0:  # a chain of new entities that joins what is there
            length, first = int(rng.integers(1, min(left, max(c.depths)) + 1)), len(facts) + 1
            joined = int(rng.integers(1, first))
            chain = [*range(first, first + length), joined]
            facts += itertools.pairwise(chain)
        way = [names[step] for step in range(1, depth + 1)]
        order = rng.permutation(len(facts)).tolist()
        written = [(names[a], names[b]) for a, b in (facts[i] for i in order)]
        prompt = [token for a, b in written for token in (a, b, self.full_stop)]
        key = (frozenset(written), names[0], way[-1])
        return Problem([*prompt, names[0], way[-1], self.equals], [*way, self.end], key)

    def judge(self, problem: Problem, answer: Sequence[int]) -> dict[str, float]:
        """Whether every step is a fact and the last one ends at the goal; and whether the first step is right."""
        body, (start, goal) = problem.prompt[:-3], problem.prompt[-3:-1]
        facts = {(body[i], body[i + 1]) for i in range(0, len(body), 3)}
        steps = list(zip([start, *answer], answer, strict=False))
        solved = float(bool(steps) and all(step in facts for step in steps) and answer[-1] == goal)
        depth = len(problem.answer) - 1
        return {
            "solve_rate": solved,
            "first_step_accuracy": float(list(answer[:1]) == list(problem.answer[:1])),
            f"solve_rate_depth_{depth}": solved,
        }
