"""Random 3-SAT: clauses of three literals; give an assignment that satisfies all of them.

     1 -2  4   -1 -3  5   ...   =    1 -2  3 -4  5
    a clause,  a clause,  ...   =    one literal of each variable, in order

Huang et al., arXiv 2604.11912, train small models on 3-SAT; their sizes and format were not found, so both are ours.

A formula is drawn uniformly: `clauses` clauses, each one of the 8 C(n, 3) that there are, repetition allowed. It is
kept if any of the 2^n assignments satisfies it. Formulas built around a planted assignment would be drawn in proportion
to how many assignments satisfy them, the easy ones most often. The answer that is trained is one of the satisfying
assignments, drawn uniformly: the first in some order would have more literals of one sign, which can be guessed without
the clauses. Any satisfying assignment counts as right.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mutor.checks import setting
from mutor.tasks.generated import GeneratedConfig, GeneratedTask, Problem, check_share


@dataclass(frozen=True, kw_only=True)
class SatConfig(GeneratedConfig):
    """Size of the formulas, and how many there are."""

    variables: int = setting(doc="variables of a formula", low=3, high=12)
    clauses: int = setting(doc="clauses of a formula; about half of all formulas should have a solution", low=1)


class Sat(GeneratedTask):
    """Tokens: literals 1 to n are 0 to n - 1, their negations n to 2n - 1; then "=" and padding."""

    Config = SatConfig
    config: SatConfig

    def __init__(self, config: SatConfig, tokenizer: Any = None):
        super().__init__(config)
        self.equals, self.pad_id, self.vocabulary = (2 * config.variables + i for i in range(3))
        self.hold_out()

    @staticmethod
    def describe(config: SatConfig) -> str:
        """The name of these formulas in tables."""
        return f"sat variables={config.variables} clauses={config.clauses}"

    @staticmethod
    def longest_answer(config: SatConfig) -> int:
        """A literal of each variable."""
        return config.variables

    @cached_property
    def clauses(self) -> np.ndarray:
        """int [8 C(n, 3), 3]: all clauses, as tokens, variables in order."""
        n = self.config.variables
        triples = itertools.combinations(range(n), 3)
        return np.array([np.add(t, np.multiply(n, s)) for t in triples for s in itertools.product((0, 1), repeat=3)])

    @cached_property
    def assignments(self) -> np.ndarray:
        """int [2^n, n]: all assignments, as tokens."""
        n = self.config.variables
        return np.array(list(itertools.product((0, n), repeat=n))) + np.arange(n)

    @cached_property
    def violated(self) -> np.ndarray:
        """bool [clauses there are, 2^n]: which assignments have all of a clause's literals the other way round."""
        n = self.config.variables
        return (self.assignments[:, self.clauses % n] != self.clauses).all(-1).T

    def draw(self, rng: np.random.Generator, count: int) -> list[Problem]:
        """Uniform formulas, kept if they have a solution, each with one of its solutions, drawn uniformly."""
        c, found, drawn = self.config, list[Problem](), 0
        part = max(1, min(count, 2**24 // (c.clauses * len(self.assignments))))
        while len(found) < count:
            formulas = rng.integers(len(self.clauses), size=(part, c.clauses))
            solves = np.logical_not(self.violated[formulas].any(1))
            chosen = (rng.random(solves.shape) * solves).argmax(1)
            for formula, solutions, answer in zip(formulas, solves, chosen, strict=True):
                if solutions.any():
                    prompt = [*self.clauses[formula].ravel().tolist(), self.equals]
                    key = tuple(sorted(set(formula.tolist())))
                    found.append(Problem(prompt, self.assignments[answer].tolist(), key, float(solutions.mean())))
            drawn += part
            check_share(len(found), drawn, f"clauses: {c.clauses} for {c.variables} variables")
        return found[:count]

    def judge(self, problem: Problem, answer: Sequence[int]) -> dict[str, float]:
        """Whether an assignment satisfies all clauses, and how many it does; a literal out of place satisfies none.

        `chance` is the share of all assignments that satisfy the formula.
        """
        n = self.config.variables
        stands = {token for place, token in enumerate(answer) if token in (place, place + n)}
        body = problem.prompt[:-1]
        satisfied = [not stands.isdisjoint(body[i : i + 3]) for i in range(0, len(body), 3)]
        return {
            "solve_rate": float(len(stands) == n and all(satisfied)),
            "satisfied_clauses": sum(satisfied) / len(satisfied),
            "chance": problem.about,
        }
