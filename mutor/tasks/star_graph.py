"""Star graphs G(n, l): n paths of l nodes out of one start; find the one that leads to the goal.

    32,3|16,12|3,19|32,34|34,6|6,16|19,47|47,28/32,12=32,34,6,16,12
    edges, shuffled                            / start,goal = the path

Bachmann and Nagarajan, arXiv 2403.06963. For models from scratch every label and each of | / = is one token and
commas are dropped (27 prefix and 5 answer tokens for G(2, 5)); pretrained models read the line with their own
tokenizer. Where it takes as many tokens for each label (GPT-2: one), all answers are equally long and nothing ends
them, as in the published code. Else (Gemma: one or two) its end token is trained behind the answer and ends it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mutor.checks import setting
from mutor.streams import stream
from mutor.tasks.graphs import Graphs, generate, keys, read_file, write_line
from mutor.tasks.task import BLOCK, Log, Source, Task, answers, endless

if TYPE_CHECKING:
    from mutor.mtp.method import Context, Method


@dataclass(frozen=True)
class StarGraphConfig:
    """The graphs, how many of them, and how they are written."""

    n: int = setting(doc="number of paths out of the start node; 1 only backward, a walk to train bases on", low=1)
    l: int = setting(doc="nodes on a path, start and goal counted", low=3)  # noqa: E741 (the literature's name)
    labels: int = setting(50, doc="node labels to choose from", low=3)
    reverse: bool = setting(False, doc="answer with the path from goal to start (positive control)")
    direction: str = setting(
        "forward",
        doc="ask for the path to the goal; or back to the start, or either for half of the graphs, to train bases on",
        choices=("forward", "backward", "both"),
    )
    train_size: int | None = setting(None, doc="training graphs; none: new ones all the time", low=1)
    valid_size: int = setting(500, doc="graphs scored during training", low=1)
    test_size: int = setting(2000, doc="graphs scored at the end", low=1)
    train_file: str | None = setting(None, doc="training graphs from a file in the published format", on_disk="file")
    test_file: str | None = setting(None, doc="test graphs from a file in the published format", on_disk="file")
    tokens: str = setting(
        "labels",
        doc="one token a label, or the model's own tokenizer, with an end token unless all labels take as many tokens",
        choices=("labels", "model"),
    )
    data_seed: int = setting(0, doc="seed of the validation and test graphs", low=0)

    @property
    def shape(self) -> tuple[int, int]:
        """Edges of a graph, and nodes of its path."""
        return self.n * (self.l - 1), self.l

    def __post_init__(self) -> None:
        if self.reverse and self.direction != "forward":
            raise ValueError(f"reverse: not together with direction {self.direction!r}, which turns paths already")
        if self.n == 1 and self.direction != "backward":
            raise ValueError(f"n: 1 is out of range, allowed: from 2, as direction is {self.direction!r}")
        nodes = 1 + self.n * (self.l - 1)
        if nodes > self.labels:
            raise ValueError(f"labels: G({self.n}, {self.l}) has {nodes} nodes, more than the {self.labels} labels")
        if self.labels >= 2**15:
            raise ValueError(f"labels: {self.labels} is out of range, allowed: below {2**15}")
        distinct = math.perm(self.labels, nodes) // math.factorial(self.n - 1)
        held_out = self.valid_size + (0 if self.test_file else self.test_size)
        if held_out > distinct // 4:
            raise ValueError(
                f"test_size: {held_out} validation and test graphs of the {distinct} there are leave too few to train "
                f"on; allowed: at most {distinct // 4}"
            )


class StarGraph(Task):
    """The task: training graphs, validation and test graphs, their tokens, and how answers are scored."""

    Config = StarGraphConfig
    config: StarGraphConfig
    selection_metric = "solve_rate"
    solved_at = 95.0  # a model guesses at the first step, or has learned to look ahead
    end_id: int | None = None  # what ends an answer

    def __init__(self, config: StarGraphConfig, tokenizer: Any = None):
        """tokenizer: the model's own, for `tokens: model`."""
        super().__init__(config, tokenizer)
        if (config.tokens == "model") != (tokenizer is not None):
            raise ValueError(
                f"star_graph: tokens: {config.tokens!r} goes with {'a' if tokenizer is None else 'no'} tokenizer"
            )
        self.pipe, self.slash, self.equals, self.pad_id = range(config.labels, config.labels + 4)
        if tokenizer is None:
            self.vocabulary = config.labels + 4
        else:
            self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            self.end_id = self._end(tokenizer)
        self.splits = self._held_out()
        self._forbidden = np.sort(np.concatenate([keys(g) for g in self.splits.values()]))

    def _end(self, tokenizer: Any) -> int | None:
        """What ends an answer: nothing where all labels, and so all answers, have as many tokens."""
        twice = [f"{label},{label}" for label in range(self.config.labels)]  # a comma may be a part of a label's token
        if len({len(ids) for ids in tokenizer(twice, add_special_tokens=False)["input_ids"]}) == 1:
            return None
        if tokenizer.eos_token_id is None:
            raise ValueError("tokens: 'model': answers differ in length and the model's tokenizer has no end token")
        return int(tokenizer.eos_token_id)

    @staticmethod
    def describe(config: StarGraphConfig) -> str:
        """The name of these graphs in tables."""
        return (
            f"star_graph n={config.n} l={config.l} labels={config.labels}"
            + (" reversed" * config.reverse)
            + ("" if config.direction == "forward" else f" {config.direction}")
        )

    @staticmethod
    def needs_tokenizer(config: StarGraphConfig) -> bool:
        """Where the lines of text are read, with `tokens: model`."""
        return config.tokens == "model"

    @staticmethod
    def check_settings(config: StarGraphConfig, method_config: Any, where: str) -> None:
        """Raise ValueError for a method that looks further than a path is long."""
        d_max = getattr(method_config, "d_max", None)
        if config.tokens == "labels" and d_max is not None and d_max > config.l:
            raise ValueError(f"{where}: d_max: {d_max} is longer than a path; allowed: at most l = {config.l}")

    @staticmethod
    def chance(config: StarGraphConfig) -> float:
        """The solve rate, in percent, of a model that follows edges, a random one out of the start.

        Backwards from the goal there is nothing to choose.
        """
        sure = 1.0 if config.reverse else {"forward": 0.0, "both": 0.5, "backward": 1.0}[config.direction]
        return 100.0 * (sure + (1 - sure) / config.n)

    def _held_out(self) -> dict[str, Graphs]:
        c, seen, splits = self.config, np.zeros(0, dtype=np.uint64), {}
        for split, size in (("test", c.test_size), ("valid", c.valid_size)):
            if split == "test" and c.test_file:
                splits[split] = read_file(c.test_file, c.shape, c.labels)
            else:
                rng = stream("held_out_graphs", c.data_seed, int(split == "test"))
                splits[split] = self._fresh(rng, size, seen)
            seen = np.concatenate([seen, keys(splits[split])])
        return splits

    def _fresh(self, rng: np.random.Generator, count: int, forbidden: np.ndarray, unique: bool = True) -> Graphs:
        """`count` graphs that are not in `forbidden` (and, if `unique`, each only once)."""
        c, parts, have = self.config, [], 0
        while have < count:
            graphs = generate(rng, max(64, (count - have) * 9 // 8), c.n, c.l, c.labels)
            if unique:
                first = np.unique(keys(graphs), return_index=True)[1]
                graphs = graphs[np.sort(first)]
            graphs = graphs[~np.isin(keys(graphs), forbidden)]
            if unique:
                forbidden = np.concatenate([forbidden, keys(graphs)])
            parts.append(graphs)
            have += len(graphs)
        return Graphs.join(parts)[:count]

    def train(self, seed: int) -> Source:
        """Training examples of a run: a fixed set (the same for all seeds) or a stream of new graphs, by seed."""
        c = self.config
        if c.train_file or c.train_size:
            if c.train_file:
                graphs = read_file(c.train_file, c.shape, c.labels)
                graphs = graphs[~np.isin(keys(graphs), self._forbidden)]
            else:
                assert c.train_size
                rng = stream("fixed_graphs", c.data_seed)
                graphs = self._fresh(rng, c.train_size, self._forbidden, unique=False)
            return Source(lambda index: self.encode(graphs[index]), len(graphs))

        def block(number: int) -> list[tuple[np.ndarray, int]]:
            rng = stream("new_graphs", seed, number)
            return self.encode(self._fresh(rng, BLOCK, self._forbidden, unique=False))

        return endless(block)

    def examples(self, split: str) -> list[tuple[np.ndarray, int]]:
        """The held-out graphs of a split."""
        return self.encode(self.splits[split])

    def encode(self, graphs: Graphs) -> list[tuple[np.ndarray, int]]:
        """(token ids, prefix length) of each graph."""
        asked = self._asked(graphs)
        if self.tokenizer is not None:
            return [self._encode_text(e, p) for e, p in zip(graphs.edges, asked, strict=True)]
        count, edges = graphs.edges.shape[:2]
        pairs = np.concatenate([graphs.edges, np.full((count, edges, 1), self.pipe)], axis=2).reshape(count, -1)
        pairs[:, -1] = self.slash
        answer = self._answers(graphs)
        query = np.stack([asked[:, 0], asked[:, -1], np.full(count, self.equals)], axis=1)
        ids = np.concatenate([pairs, query, answer], axis=1).astype(np.int64)
        return [(row, 3 * edges + 3) for row in ids]

    def _asked(self, graphs: Graphs) -> np.ndarray:
        """int16 [N, l]: the path in the direction it is asked for; of "both", which one is the graph's own hash."""
        half = (keys(graphs) & np.uint64(1)).astype(bool)
        turned = {"forward": half & False, "both": half, "backward": half | True}[self.config.direction]
        return np.where(turned[:, None], graphs.path[:, ::-1], graphs.path)

    def _answers(self, graphs: Graphs) -> np.ndarray:
        """int16 [N, l]: the nodes to answer with, in order."""
        asked = self._asked(graphs)
        return asked[:, ::-1] if self.config.reverse else asked

    def _encode_text(self, edges: np.ndarray, path: np.ndarray) -> tuple[np.ndarray, int]:
        prefix, answer = write_line(edges, path).split("=")
        if self.config.reverse:
            answer = ",".join(reversed(answer.split(",")))
        head = self.tokenizer(prefix + "=", add_special_tokens=False)["input_ids"]
        tail = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        end = [] if self.end_id is None else [self.end_id]
        return np.array(head + tail + end, dtype=np.int64), len(head)

    def _labels(self, ids: Iterable[int], length: int) -> list[int]:
        """The first `length` node labels that generated ids stand for, -1 for whatever is no label.

        Ids behind the end count for nothing; an answer without an end is read to its last id.
        """
        known = self.config.labels
        if self.tokenizer is None:
            got = [i if i < known else -1 for i in ids]
        else:
            text = self.tokenizer.decode(list(itertools.takewhile(lambda i: i != self.end_id, ids)))
            words = [word.strip() for word in text.split(",")]
            got = [int(w) if w.isdecimal() and int(w) < known else -1 for w in words]
        return (got + [-1] * length)[:length]

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
        """Score answers without teacher forcing (whole path right), and each position with and without it.

        Labels are compared, an end token is not; the loss is of all that is trained, an end token included. Scores of
        every graph come of the rates of solved graphs and of right first steps.
        """
        from mutor.mtp.teacher_forcing import teacher_forced_scores

        length, examples = self.config.l, self.examples(split)
        right = self._answered(model, method, context, examples, batch_size) == self._answers(self.splits[split])
        solved: np.ndarray = np.all(right, axis=1)
        step = length - 2 if self.config.reverse or self.config.direction == "backward" else 1
        forced, loss = teacher_forced_scores(model, method, context, examples, batch_size)
        scores: dict[str, np.ndarray] = {"solve_rate": solved, "first_step_accuracy": right[:, step]}
        metrics = {name: 100 * float(values.mean()) for name, values in scores.items()}
        metrics |= {"chance": self.chance(self.config), "loss": loss}
        metrics |= {f"accuracy_at_{i + 1}": 100 * float(right[:, i].mean()) for i in range(length)}
        if self.tokenizer is None:
            metrics |= {f"forced_accuracy_at_{i + 1}": 100 * float(forced[:, i].mean()) for i in range(length)}
        return metrics, scores

    def _answered(
        self, model: Any, method: Method, context: Context, examples: list[tuple[np.ndarray, int]], batch_size: int
    ) -> np.ndarray:
        """int64 [N, l]: the labels that the model answers with, -1 for whatever is no label."""
        found = answers(model, method, context, examples, batch_size, self.end_id)
        return np.array([self._labels(answer, self.config.l) for answer in found])

    def data_hash(self) -> str:
        """A hash of the held-out graphs."""
        return self._hash(*sorted(self.splits))

    def test_data_hash(self) -> str:
        """A hash of the test graphs, whichever way they are asked for."""
        return self._hash("test")

    def _hash(self, *splits: str) -> str:
        digest = hashlib.sha256()
        for split in splits:
            digest.update(np.ascontiguousarray(self.splits[split].edges).tobytes())
            digest.update(np.ascontiguousarray(self.splits[split].path).tobytes())
        return digest.hexdigest()[:16]
