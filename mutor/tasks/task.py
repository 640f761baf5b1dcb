"""What a task is: its settings, training examples, how a model is told about it, and how answers are scored.

The training loop and the workflow know this interface and no task's name:

    task = load(TASKS, "star_graph", "task")(config)         # config: an instance of the class's Config
    source = task.train(seed=42)                             # training examples by number
    task.prepare(model)                                      # refuses a model that does not fit
    metrics, scores = task.evaluate(model, method, context, "test", batch_size=500)

A new task is one file with such a class and one line in mutor/registry.py. This module and the tasks' files import
torch inside functions only, so that plans are made without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from mutor.mtp.method import Context, Method

Log = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """examples: indices int64 [K] -> K pairs (ids, prefix length); size: how many there are, None without end.

    dropped: how many were left out for their length.
    """

    examples: Callable[[np.ndarray], list[tuple[np.ndarray, int]]]
    size: int | None
    dropped: int = 0


BLOCK = 4096  # examples of an endless source that are made together


def endless(make: Callable[[int], Sequence[tuple[np.ndarray, int]]]) -> Source:
    """Examples without end. make: the number of a block to its BLOCK examples, the same whenever it is asked."""
    blocks: dict[int, Sequence[tuple[np.ndarray, int]]] = {}

    def examples(index: np.ndarray) -> list[tuple[np.ndarray, int]]:
        found = []
        for number, place in zip(*np.divmod(index, BLOCK), strict=True):
            if number not in blocks:
                if len(blocks) > 4:
                    blocks.clear()
                blocks[number] = make(int(number))
            found.append(blocks[number][place])
        return found

    return Source(examples, None)


def in_order(source: Source) -> Iterator[tuple[np.ndarray, int]]:
    """All training examples, or the first thousand where there is no end."""
    size = 1000 if source.size is None else source.size
    for start in range(0, size, 256):
        yield from source.examples(np.arange(start, min(size, start + 256)))


def answers(
    model: Any,
    method: Method,
    context: Context,
    examples: Sequence[tuple[np.ndarray, int]],
    batch_size: int,
    end_id: int | None = None,
) -> list[list[int]]:
    """What the method answers to each example's prompt: as many tokens as the longest answer has, `end_id` ends it.

    So no answer depends on what it shares a batch with.
    """
    import torch

    from mutor.mtp.answers import Prompts

    found: list[list[int]] = [[]] * len(examples)
    longest = max(len(ids) - prefix for ids, prefix in examples)
    sizes = np.array([prefix for _, prefix in examples])
    for size in np.unique(sizes):  # prompts of equal length need no padding
        rows = np.flatnonzero(sizes == size)
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            ids = torch.from_numpy(np.stack([examples[i][0][:size] for i in part])).to(model.device)
            prompts = Prompts(
                ids, torch.ones_like(ids), longest, end_id=end_id, pad_id=context.pad_id, prefix_lm=context.prefix_lm
            )
            for i, answer in zip(part, method.answer(model, prompts).tolist(), strict=True):
                found[i] = answer
    return found


class Task:
    """Base of all tasks.

    selection_metric: the metric on the validation set that names the best checkpoint, higher is better; prefix_lm:
    prompts are read in both directions; pad_id: the token that pads; vocabulary: tokens there are, for models from
    scratch, None: as many as the model's tokenizer has; tokenizer: saved beside checkpoints, None: there is none;
    greedy: answers are the likeliest tokens, one after the other, and not drawn; solved_at: of a task that a seed
    learns wholly or not at all, the percent from which a rate counts as solved: seeds are then counted, and their rates
    not averaged. Said of the task before any run; None: rates of seeds have a mean.
    """

    Config: ClassVar[type]
    selection_metric: str
    prefix_lm: bool = False
    pad_id: int
    vocabulary: int | None = None
    tokenizer: Any = None
    greedy: bool = True
    solved_at: ClassVar[float | None] = None

    def __init__(self, config: Any, tokenizer: Any = None):
        """config: an instance of `Config`; tokenizer: the model's own, where `needs_tokenizer`."""
        self.config, self.tokenizer = config, tokenizer

    @staticmethod
    def describe(config: Any) -> str:
        """The name of these training data in tables."""
        raise NotImplementedError

    @classmethod
    def scored_on(cls, config: Any) -> str:
        """The name of the benchmark in tables."""
        return cls.describe(config)

    @staticmethod
    def needs_tokenizer(config: Any) -> bool:
        """Whether texts are read with the model's own tokenizer."""
        return False

    @staticmethod
    def check_settings(config: Any, method_config: Any, where: str) -> None:
        """Raise ValueError, beginning with `where`, for a method or a setting of it that this task can't have."""

    @staticmethod
    def chance(config: Any) -> float | None:
        """The selection metric, in percent, of a model that has learned nothing; None where that means nothing."""
        return None

    @staticmethod
    def chosen_on(config: Any) -> str:
        """What names the best checkpoint: "valid", a split for that alone; "test"; or "", nothing: it is the last."""
        return "valid"

    def for_seed(self, seed: int) -> Task:
        """The task as runs of this seed have it: itself, unless the seed decides what is asked, too."""
        return self

    def prepare_assets(self, folder: Path, device: str, log: Log) -> None:
        """Make, once below `folder`, what all runs on these data share, and load it; the first thing a run does."""

    def train(self, seed: int) -> Source:
        """The training examples of a run: a function of the configuration and `seed` alone."""
        raise NotImplementedError

    def examples(self, split: str) -> Sequence[tuple[np.ndarray, int]]:
        """Pairs (ids, prefix length) of the split "valid" or "test", for losses and a method's own metrics."""
        raise NotImplementedError

    def prepare(self, model: Any, log: Log | None = None, behind_prompt: int = 0) -> None:
        """Tell a new model what it has to know of the task. Raises ValueError for a model that does not fit.

        log: told what does not fit and is not refused; behind_prompt: tokens that the method puts behind each prompt.
        """

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
        """Ask the method for the model's answers to a split, and score them.

        predictions_file: a .jsonl file beside which all answers may be kept; log: told of progress. Returns the metrics
        (rates in percent, losses in nats a token; `selection_metric` among them), and of some of them the score of
        every problem, [N], bool or 0 to 1.
        """
        raise NotImplementedError

    def data_hash(self) -> str:
        """A hash of what is learned from and scored on."""
        raise NotImplementedError

    def test_data_hash(self) -> str:
        """A hash of the test problems in their order: where it is the same, runs are compared problem by problem."""
        digest = hashlib.sha256()
        for ids, prefix in self.examples("test"):
            digest.update(repr((ids.tolist(), int(prefix))).encode())
        return digest.hexdigest()[:16]
