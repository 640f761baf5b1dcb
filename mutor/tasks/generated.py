"""Generated problems in tokens of their own, for models from scratch: what tasks of that kind share.

A task draws problems and judges answers; the rest is here: splits, training examples, scores.

    sat          mutor/tasks/sat.py           clauses = an assignment
    countdown    mutor/tasks/countdown.py     numbers and a target = equations
    fact_chains  mutor/tasks/fact_chains.py   facts, from where to where = the way
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mutor.checks import setting
from mutor.streams import stream
from mutor.tasks.task import BLOCK, Log, Source, Task, answers, endless

if TYPE_CHECKING:
    from mutor.mtp.method import Context, Method

PATIENCE = 20  # rounds without a new problem, after which there is none


class Problem(NamedTuple):
    """A problem and the answer that is trained, as tokens, an end token included where answers have one.

    key: the same for two problems that differ in nothing but the order of their parts. about: what a task needs beside
    the prompt to judge answers.
    """

    prompt: Sequence[int]
    answer: Sequence[int]
    key: Hashable
    about: Any = None


@dataclass(frozen=True, kw_only=True)
class GeneratedConfig:
    """How many problems there are."""

    train_size: int | None = setting(None, doc="training problems; none: new ones all the time", low=1)
    valid_size: int = setting(500, doc="problems scored during training", low=1)
    test_size: int = setting(2000, doc="problems scored at the end", low=1)
    data_seed: int = setting(0, doc="seed of the validation and test problems", low=0)


class GeneratedTask(Task):
    """Base of tasks of generated problems. A subclass sets `vocabulary` and `pad_id`, and writes `draw` and `judge`.

    end_id: the token that ends an answer; None: all answers have as many tokens.
    """

    selection_metric = "solve_rate"
    config: GeneratedConfig
    end_id: int | None = None

    def draw(self, rng: np.random.Generator, count: int) -> list[Problem]:
        """`count` problems, equal ones among them."""
        raise NotImplementedError

    def judge(self, problem: Problem, answer: Sequence[int]) -> dict[str, float]:
        """Scores from 0 to 1 of an answer, cut before its end token; `solve_rate` is among them.

        A metric that only some problems have is a mean over these.
        """
        raise NotImplementedError

    @staticmethod
    def longest_answer(config: Any) -> int | None:
        """Tokens of the longest answer, beyond which no method may look; None: answers differ too much."""
        return None

    @classmethod
    def check_settings(cls, config: Any, method_config: Any, where: str) -> None:
        """Raise ValueError for a method that looks further than an answer is long."""
        d_max, longest = getattr(method_config, "d_max", None), cls.longest_answer(config)
        if d_max is not None and longest is not None and d_max > longest:
            raise ValueError(f"{where}: d_max: {d_max} is longer than an answer; allowed: at most {longest}")

    def hold_out(self) -> None:
        """Draw the test and validation problems, all of them different. The last thing that `__init__` does."""
        c, self.splits, self._forbidden = self.config, dict[str, list[Problem]](), set[Hashable]()
        for split, size in (("test", c.test_size), ("valid", c.valid_size)):
            rng = stream("held_out_problems", c.data_seed, int(split == "test"))
            self.splits[split] = self._fresh(rng, size, f"{split}_size")
            self._forbidden |= {problem.key for problem in self.splits[split]}

    def _fresh(self, rng: np.random.Generator, count: int, unique: str = "") -> list[Problem]:
        """`count` problems that are not held out. unique: the setting for whose sake each is there only once."""
        found, seen, idle = list[Problem](), set(self._forbidden), 0
        while len(found) < count:
            before = len(found)
            for problem in self.draw(rng, max(64, (count - before) * 9 // 8)):
                if problem.key not in seen:
                    found.append(problem)
                    if unique:
                        seen.add(problem.key)
            idle = idle + 1 if len(found) == before else 0
            if idle == PATIENCE:
                raise ValueError(f"{unique or 'train_size'}: {count} is more than the {before} problems that exist")
        return found[:count]

    def train(self, seed: int) -> Source:
        """A fixed set of problems, the same for all seeds, or a stream of new ones, by seed."""
        c = self.config
        if c.train_size:
            rng, fixed = stream("fixed_problems", c.data_seed), list[tuple[np.ndarray, int]]()
            while len(fixed) < c.train_size:  # encoded in parts, which takes less memory
                fixed += encoded(self._fresh(rng, min(BLOCK, c.train_size - len(fixed))))
            return Source(lambda index: [fixed[i] for i in index], len(fixed))
        return endless(lambda number: encoded(self._fresh(stream("new_problems", seed, number), BLOCK)))

    def examples(self, split: str) -> list[tuple[np.ndarray, int]]:
        """The held-out problems of a split."""
        return encoded(self.splits[split])

    def evaluate(
        self,
        model: Any,
        method: Method,
        context: Context,
        split: str,
        batch_size: int,
        predictions_file: Path | None = None,
        log: Log | None = None,
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Judge answers without teacher forcing; the loss is that of the trained answers.

        Whether each token is the trained one under teacher forcing is `forced_accuracy_at_<place>`.
        """
        from mutor.mtp.teacher_forcing import teacher_forced_scores

        problems, examples = self.splits[split], self.examples(split)
        given = answers(model, method, context, examples, batch_size, self.end_id)
        judged = [self.judge(p, self._cut(ids)) for p, ids in zip(problems, given, strict=True)]
        names = sorted({name for scores in judged for name in scores})
        found = {name: np.array([scores[name] for scores in judged if name in scores]) for name in names}
        metrics = {name: 100 * float(values.mean()) for name, values in found.items()}
        forced, metrics["loss"] = teacher_forced_scores(model, method, context, examples, batch_size)
        lengths = np.array([len(problem.answer) for problem in problems])
        for place in range(lengths.max()):
            metrics[f"forced_accuracy_at_{place + 1}"] = 100 * float(forced[lengths > place, place].mean())
        return metrics, {name: values for name, values in found.items() if len(values) == len(problems)}

    def _cut(self, answer: list[int]) -> list[int]:
        """An answer without its end token and what stands behind it.

        One that does not end keeps a padding token, which is no answer's: it is wrong, however it goes on.
        """
        if self.end_id is None:
            return answer
        return answer[: answer.index(self.end_id)] if self.end_id in answer else [*answer, self.pad_id]

    def data_hash(self) -> str:
        """A hash of the held-out problems."""
        digest = hashlib.sha256()
        for split in sorted(self.splits):
            for problem in self.splits[split]:
                digest.update(repr((list(map(int, problem.prompt)), list(map(int, problem.answer)))).encode())
        return digest.hexdigest()[:16]


def check_share(found: int, drawn: int, what: str) -> None:
    """Raise ValueError, which begins with `what`, where under one problem in a thousand that are drawn can be kept."""
    if drawn > 1000 * (found + 1):
        raise ValueError(f"{what}: of {drawn} problems drawn {found} can be solved; allowed: one in a thousand")


def encoded(problems: Sequence[Problem]) -> list[tuple[np.ndarray, int]]:
    """(token ids, prefix length) of each problem."""
    return [(np.array([*p.prompt, *p.answer], dtype=np.int64), len(p.prompt)) for p in problems]
