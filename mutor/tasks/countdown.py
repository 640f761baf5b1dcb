"""Countdown: use all numbers, each once, to reach the target.

    86,28,13,31,96=86+28=114,31-13=18,114-18=96
    numbers, target=equations

Gandhi et al., arXiv 2404.03683 (Stream of Search), in the format of Ye et al., arXiv 2410.14157, who have the part
before and behind the first "=" as `input` and `output`. Tokens are the characters.

Numbers are drawn from 1 to `largest`; then two of what is left are replaced by their sum, difference (the larger one
first), product or quotient (without remainder), drawn uniformly, until one is left. It is the target if it lies from
`target_low` to `target_high`, as published 10 to 100; else all is drawn anew.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mutor.checks import setting
from mutor.tasks.generated import GeneratedConfig, GeneratedTask, Problem, check_share

CHARACTERS = "0123456789+-*/=,"
NUMBER = "(0|[1-9][0-9]*)"
EQUATION = re.compile(f"{NUMBER}([-+*/]){NUMBER}={NUMBER}")


@dataclass(frozen=True, kw_only=True)
class CountdownConfig(GeneratedConfig):
    """Which numbers and targets, and how many problems."""

    numbers: int = setting(4, doc="numbers of a problem", low=2, high=8)
    largest: int = setting(99, doc="largest number", low=2)
    target_low: int = setting(10, doc="smallest target", low=0)
    target_high: int = setting(100, doc="largest target", low=1)
    operations: str = setting("+-*/", doc="what numbers are joined by, of + - * /")

    def __post_init__(self) -> None:
        if not self.operations or set(self.operations) - set("+-*/"):
            raise ValueError(f"operations: {self.operations!r} is not allowed; allowed: one or more of + - * /")
        if self.target_high < self.target_low:
            raise ValueError(
                f"target_high: {self.target_high} is below target_low {self.target_low}; allowed: from there"
            )


class Countdown(GeneratedTask):
    """Tokens: the characters, then the end of an answer and padding."""

    Config = CountdownConfig
    config: CountdownConfig

    def __init__(self, config: CountdownConfig, tokenizer: Any = None):
        super().__init__(config)
        self.end_id, self.pad_id, self.vocabulary = (len(CHARACTERS) + i for i in range(3))
        self.hold_out()

    @staticmethod
    def describe(config: CountdownConfig) -> str:
        """The name of these problems in tables."""
        c = config
        usual = "" if c.operations == "+-*/" else f" operations={c.operations}"
        return f"countdown numbers={c.numbers} largest={c.largest} targets={c.target_low}-{c.target_high}{usual}"

    def draw(self, rng: np.random.Generator, count: int) -> list[Problem]:
        """Problems with the equations that they were made by."""
        c, found, total = self.config, list[Problem](), 0
        while len(found) < count:
            drawn = rng.integers(1, c.largest + 1, size=(count, c.numbers)).tolist()
            choices = rng.random((count, c.numbers - 1, 3)).tolist()
            for numbers, chosen in zip(drawn, choices, strict=True):
                target, equations = joined(numbers, chosen, c.operations)
                if target is not None and c.target_low <= target <= c.target_high:
                    found.append(self.problem(numbers, target, equations))
            total += count
            check_share(len(found), total, f"target_low: {c.target_low} to target_high {c.target_high}")
        return found[:count]

    def problem(self, numbers: Sequence[int], target: int, equations: Sequence[str]) -> Problem:
        """A problem and its answer in tokens."""
        prompt = [CHARACTERS.index(character) for character in ",".join(map(str, [*numbers, target])) + "="]
        answer = [CHARACTERS.index(character) for character in ",".join(equations)]
        return Problem(prompt, [*answer, len(CHARACTERS)], (*sorted(numbers), target), (numbers, target))

    def judge(self, problem: Problem, answer: Sequence[int]) -> dict[str, float]:
        """Whether the equations reach the target, and whether they are right whatever they reach."""
        text = "".join(CHARACTERS[i] if i < len(CHARACTERS) else "?" for i in answer)
        numbers, target = problem.about
        reached = result(text, numbers)
        return {"solve_rate": float(reached == target), "right_equations": float(reached is not None)}


def joined(numbers: Sequence[int], choices: Sequence[Sequence[float]], operations: str) -> tuple[int | None, list[str]]:
    """What operations make of all numbers, and the equations; None where a division is not possible.

    choices: of each equation three numbers from 0 to 1, which choose the first and the second of what is left, and the
    operation.
    """
    left, equations = list(numbers), list[str]()
    for first, second, sign in choices:
        a = left.pop(int(first * len(left)))
        b = left.pop(int(second * len(left)))
        operation = operations[int(sign * len(operations))]
        if operation in "-/":
            a, b = max(a, b), min(a, b)
        value = applied(a, operation, b)
        if value is None:
            return None, []
        equations.append(f"{a}{operation}{b}={value}")
        left.append(value)
    return left[0], equations


def applied(a: int, operation: str, b: int) -> int | None:
    """a operation b, exactly; None for a quotient that is no whole number."""
    if operation == "/":
        return a // b if b and a % b == 0 else None
    return {"+": a + b, "-": a - b, "*": a * b}[operation]


def result(text: str, numbers: Sequence[int]) -> int | None:
    """What the equations of an answer end in; None unless all are right and use each number and result once.

    "86+28=114,31-13=18,114-18=96" of [86, 28, 13, 31] is 96.
    """
    left, value = Counter(numbers), None
    for part in text.split(","):
        match = EQUATION.fullmatch(part)
        if match is None:
            return None
        a, b, value = int(match[1]), int(match[3]), int(match[4])
        left.subtract((a, b))
        if min(left.values()) < 0 or applied(a, match[2], b) != value:
            return None
        left[value] += 1
    return value if left.total() == 1 else None
