"""Path planning on one fixed graph: name a path from s to t, for pairs (s, t) that were not trained on.

    3 9 3 5 8 9     source, target, then the path with both; a token that ends the line stands behind it
    3 9             the prompt: any path of the graph from 3 to 9 is right

Edges i -> j, i < j, are drawn. Trained on are each edge as "s t s t", and random paths of each edge and of a
share of the other connected pairs; those that are left are asked. Zhong et al., arXiv 2509.23186, whose loss is of all
tokens of a line, its prompt's included (equation 3). Graph and lines are those of the run's seed: published are means
over graphs, and all methods of a seed have the same one.

Not found there: whether edges have more paths than themselves, how a path is drawn, and whether answers are. Here all
is as in the public code of the setting (ALPINE, arXiv 2405.09220): they have, a path goes on to any new node from which
the target can be reached, and answers are drawn at temperature 1. The likeliest tokens, without paths of edges, are
far from what is published for next-token prediction (98, 89, 55, 20% at degrees 0 to 3 against 93, 87, 64, 31); so are
the likeliest with them (99, 98, 84, 53).
"""

from __future__ import annotations

import hashlib
import itertools
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mutor.checks import setting
from mutor.streams import stream, torch_seed
from mutor.tasks.task import Log, Source, Task

if TYPE_CHECKING:
    from torch import Tensor

    from mutor.mtp.method import Context, Method

DEGREES = 4
Line = list[int]  # source, target, and the nodes of a path


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    """How much is trained on and asked of any graph."""

    paths: int = setting(20, doc="paths of a training pair; on Blocksworld of each length from 2 to 6", low=0)
    valid_size: int = setting(500, doc="pairs asked during training", low=1)
    test_size: int | None = setting(None, doc="pairs asked at the end; none: all others", low=1)
    draws: int = setting(1, doc="answers drawn for each pair, whose score is the share of right ones", low=1)


@dataclass(frozen=True, kw_only=True)
class PathPlanningConfig(PathsConfig):
    """A random graph, and what is trained on of it."""

    nodes: int = setting(100, doc="nodes of the graph", low=4, high=10_000)
    edge_probability: float = setting(0.1, doc="of each edge i -> j, i < j", low=0, high=1)
    train_share: float = setting(
        0.1, doc="of the connected pairs without an edge, whose paths are trained on", low=0, high=1
    )


class Paths(Task):
    """The task of one seed on any graph: its training lines, its validation and test pairs, how answers are scored."""

    config: PathsConfig
    selection_metric = "accuracy"
    greedy = False

    def __init__(self, config: PathsConfig, tokenizer: Any = None, seed: int = 0):
        """seed: of graph, lines and pairs."""
        super().__init__(config, tokenizer)
        self.seed = seed
        self.end_id, self.pad_id, self.vocabulary = self.nodes, self.nodes + 1, self.nodes + 2

    @property
    @abstractmethod
    def nodes(self) -> int:
        """How many the graph has."""

    def for_seed(self, seed: int) -> Self:
        """The task with the graph of another seed."""
        return self if seed == self.seed else type(self)(self.config, self.tokenizer, seed)

    @cached_property
    @abstractmethod
    def edges(self) -> np.ndarray:
        """bool [V, V]: whether an edge leads from one node to another."""

    @cached_property
    @abstractmethod
    def lines(self) -> list[Line]:
        """The training lines: edges, then paths."""

    @property
    def edge_lines(self) -> list[Line]:
        """A line of each edge."""
        return [[s, t, s, t] for s, t in np.argwhere(self.edges).tolist()]

    @abstractmethod
    def path(self, s: int, t: int, rng: np.random.Generator) -> Line:
        """The nodes of a right answer."""

    def trained_pairs(self, connected: int) -> int:
        """How many of the connected pairs without an edge are trained on and not asked."""
        return 0

    @cached_property
    def pairs(self) -> dict[str, np.ndarray]:
        """int64 [N, 2] sources and targets, no edges, of "train", "valid" and "test"."""
        c, rng = self.config, stream("path_planning", self.seed, 1)
        pairs = rng.permutation(np.argwhere(self.leads & ~self.edges & ~np.eye(len(self.edges), dtype=bool)))
        count = self.trained_pairs(len(pairs))
        train, valid, test = np.split(pairs, [count, count + c.valid_size])
        if not len(test):
            raise ValueError(
                f"valid_size: {c.valid_size}, and the graph of seed {self.seed} has {len(pairs) - count} pairs that "
                "are not trained on; allowed: fewer, so that some are left to test"
            )
        return {"train": train, "valid": valid, "test": test[: c.test_size]}

    @cached_property
    def following(self) -> list[list[int]]:
        """The nodes that an edge leads to, of each node."""
        return successors(self.edges)

    @cached_property
    def leads(self) -> np.ndarray:
        """bool [V, V]: whether a path, of no edge or more, leads from one node to another."""
        return reachable(self.edges)

    @cached_property
    def degree(self) -> np.ndarray:
        """int64 [V, V]: of each pair of nodes, how much planning the training lines leave to do, see `degrees`."""
        return degrees(self.lines, len(self.edges))

    def train(self, seed: int) -> Source:
        """The training lines of a seed, all tokens but the first to be predicted."""
        lines = [self._encoded(line) for line in self.for_seed(seed).lines]
        return Source(lambda index: [(lines[i], 1) for i in index], len(lines))

    def examples(self, split: str) -> list[tuple[np.ndarray, int]]:
        """The pairs of a split, each with one of its right answers."""
        rng = stream("path_planning", self.seed, 3, int(split == "test"))
        return [(self._encoded([s, t, *self.path(s, t, rng)]), 2) for s, t in self.pairs[split].tolist()]

    def _encoded(self, line: Line) -> np.ndarray:
        return np.array([*line, self.end_id], dtype=np.int64)

    def prepare(self, model: Any, log: Log | None = None, behind_prompt: int = 0) -> None:
        """Raise ValueError for a model with fewer positions than the longest line has tokens.

        log: told how many test pairs there are of each degree.
        """
        longest, room = 1 + max(map(len, self.lines)) + behind_prompt, model.config.max_position_embeddings
        if longest > room:
            raise ValueError(
                f"{self.describe(self.config)}: the longest line of seed {self.seed} has {longest} tokens; allowed: "
                f"{room}, as the model has positions"
            )
        if log:
            found = np.bincount(self._degrees_of("test"), minlength=DEGREES)
            counts = ", ".join(f"{count} of degree {degree}" for degree, count in enumerate(found))
            log(f"{len(self.lines)} training lines; {len(self.pairs['test'])} test pairs: {counts}")

    def _degrees_of(self, split: str) -> np.ndarray:
        return self.degree[self.pairs[split][:, 0], self.pairs[split][:, 1]]

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
        """The share of answers that are paths of the graph from source to target, of all pairs and of each degree's.

        A degree without pairs has no metric. Metrics with `greedy_` before their names are of the likeliest tokens.
        Seed and batch size decide the noise of drawn answers, so that equal models draw equal ones. An answer may take
        all positions of the model.
        """
        degree, scores = self._degrees_of(split), {}
        for name, draws in (("accuracy", self.config.draws), ("greedy_accuracy", 0)):
            right = self._right(model, method, context, split, batch_size, draws)
            scores[name] = right
            scores |= {f"{name}_degree_{d}": right[degree == d] for d in range(DEGREES) if (degree == d).any()}
        return {name: 100 * float(values.mean()) for name, values in scores.items()}, scores

    def _right(
        self, model: Any, method: Method, context: Context, split: str, batch_size: int, draws: int
    ) -> np.ndarray:
        """[N]: the share of right answers among so many drawn ones; 0: whether the likeliest one is right."""
        import torch

        from mutor.mtp.answers import Prompts, most_likely

        pairs, room = self.pairs[split], model.config.max_position_embeddings - 2 - method.behind_prompt
        asked, right = np.repeat(pairs, max(draws, 1), axis=0), []
        for number, start in enumerate(range(0, len(asked), batch_size)):
            part = asked[start : start + batch_size]
            ids = torch.from_numpy(part).to(model.device)
            noise = torch.Generator(model.device)
            noise.manual_seed(torch_seed("path_answers", self.seed, int(split == "test"), number))

            def draw(logits: Tensor, step: int, noise: torch.Generator = noise) -> Tensor:
                return torch.multinomial(logits.softmax(-1), 1, generator=noise)[:, 0]

            prompts = Prompts(
                ids,
                torch.ones_like(ids),
                room,
                end_id=self.end_id,
                pad_id=context.pad_id,
                choose=draw if draws else most_likely,
            )
            answers = method.answer(model, prompts).tolist()
            right += [self.is_path(answer, *pair) for answer, pair in zip(answers, part.tolist(), strict=True)]
        found = np.array(right)
        return found.reshape(-1, draws).mean(axis=1) if draws > 1 else found

    def is_path(self, answer: Sequence[int], source: int, target: int) -> bool:
        """Whether generated ids are, up to the first end token, a path of the graph from source to target."""
        path = list(itertools.takewhile(lambda i: i != self.end_id, answer))
        if len(path) == len(answer) or len(path) < 2 or max(path) >= len(self.edges):
            return False
        ends = path[0] == source and path[-1] == target
        return ends and all(self.edges[step] for step in itertools.pairwise(path))

    def data_hash(self) -> str:
        """A hash of the lines of seed 0, and of the pairs asked: the same for all seeds, whose data are drawn alike."""
        task = self.for_seed(0)
        digest = hashlib.sha256(repr(task.lines).encode())
        for split in ("valid", "test"):
            digest.update(np.ascontiguousarray(task.pairs[split]).tobytes())
        return digest.hexdigest()[:16]


class PathPlanning(Paths):
    """Random graphs whose edges lead to later nodes alone."""

    Config = PathPlanningConfig
    config: PathPlanningConfig

    @staticmethod
    def describe(config: PathPlanningConfig) -> str:
        """The name of these graphs in tables."""
        return f"path_planning nodes={config.nodes}"

    @property
    def nodes(self) -> int:
        """How many the graph has."""
        return self.config.nodes

    @cached_property
    def edges(self) -> np.ndarray:
        """bool [V, V]: whether an edge leads from one node to another."""
        drawn = stream("path_planning", self.seed, 0).random((self.nodes, self.nodes))
        return np.triu(drawn < self.config.edge_probability, 1)

    def trained_pairs(self, connected: int) -> int:
        """How many of the connected pairs without an edge are trained on and not asked."""
        return round(self.config.train_share * connected)

    @cached_property
    def lines(self) -> list[Line]:
        """The training lines: edges, then paths of edges and training pairs."""
        rng, lines = stream("path_planning", self.seed, 2), self.edge_lines
        for s, t in [*np.argwhere(self.edges).tolist(), *self.pairs["train"].tolist()]:
            lines += [[s, t, *self.path(s, t, rng)] for _ in range(self.config.paths)]
        return lines

    def path(self, s: int, t: int, rng: np.random.Generator) -> Line:
        """The nodes of a right answer, drawn: on to any node from which t can be reached."""
        return path_to(self.following, self.leads, s, t, rng)


def successors(edges: np.ndarray) -> list[list[int]]:
    """The nodes that an edge leads to, of each node; edges: bool [V, V]."""
    return [np.flatnonzero(row).tolist() for row in edges]


def reachable(edges: np.ndarray) -> np.ndarray:
    """bool [V, V]: whether a path, of no edge or more, leads from one node to another; edges: bool [V, V]."""
    found = edges | np.eye(len(edges), dtype=bool)
    while True:
        twice = (found.astype(np.float32) @ found.astype(np.float32)) > 0
        if (twice == found).all():
            return found
        found = twice


def path_to(following: list[list[int]], leads: np.ndarray, s: int, t: int, rng: np.random.Generator) -> list[int]:
    """The nodes of a random path from s to t without circles: on to any node from which t can be reached.

    following, leads: of `successors` and `reachable`, on a graph without circles.
    """
    path = [s]
    while path[-1] != t:
        onward = [node for node in following[path[-1]] if leads[node, t]]
        path.append(onward[int(rng.random() * len(onward))])
    return path


def degrees(lines: Iterable[Line], nodes: int) -> np.ndarray:
    """int64 [V, V]: the degree of each pair (s, t), 0 to 3, by what the lines show (section 2.2 of the source).

    A(i, k): k follows i on a path. R(t, k): k is on a path to t, its first node left out. 0: R(t, s). 1: A(s, u) and
    R(t, u) for a u, so that the two have to be put together. 2: A(s, u) for a u of degree 1. 3: all others.
    """
    follows, passed = np.zeros((2, nodes, nodes), dtype=bool)
    for _, t, *path in lines:
        follows[path[:-1], path[1:]] = True
        passed[t, path[1:]] = True
    passed = passed.T

    def behind(some: np.ndarray) -> np.ndarray:
        return (follows.astype(np.float32) @ some.astype(np.float32)) > 0

    first = behind(passed) & ~passed
    second = behind(first) & ~first & ~passed
    return np.where(passed, 0, np.where(first, 1, np.where(second, 2, 3)))
