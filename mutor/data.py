"""Training examples by number, so that a run is a pure function of its seed and can be resumed anywhere.

Sample `c` of a run (c = 0 .. steps x batch - 1) is the same whatever was drawn before it: with N examples it is
example perm(seed, c // N)[c % N] of epoch c // N, without end it is example c of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mutor.layout import IGNORE, Example, collate

if TYPE_CHECKING:
    from mutor.method import Context, Method


@dataclass(frozen=True)
class Source:
    """examples: indices int64 [K] -> K pairs (ids, prefix length); size: how many there are, None without end.

    dropped: how many were left out for their length.
    """

    examples: Callable[[np.ndarray], list[tuple[np.ndarray, int]]]
    size: int | None
    dropped: int = 0


class Samples(Dataset):
    """The samples of one run, in order. Item c is an `Example` with counter c."""

    def __init__(self, source: Source, total: int, seed: int):
        self.source, self.total, self.seed = source, total, seed
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, counter: int) -> Example:
        return self.__getitems__([counter])[0]

    def __getitems__(self, counters: Sequence[int]) -> list[Example]:
        index = np.asarray(counters, dtype=np.int64)
        if self.source.size is not None:
            size = self.source.size
            index = np.array([self._permutation(int(c) // size, size)[c % size] for c in index])
        found = self.source.examples(index)
        return [Example(ids, prefix, int(c)) for (ids, prefix), c in zip(found, counters, strict=True)]

    def _permutation(self, epoch: int, size: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([epoch, self.seed]).permutation(size)
        return self._order[1]


@torch.no_grad()
def score_forced(
    model: Any, method: Method, context: Context, examples: Sequence[tuple[np.ndarray, int]], batch_size: int
) -> tuple[np.ndarray, float]:
    """Teacher-forced argmax accuracy and mean loss on the inputs the method feeds, registers left out.

    Returns bool [N, A] (A: longest answer, False beyond an answer's end) and the loss in nats a token.
    """
    from mutor.attention import attention_mask

    longest = max(len(ids) - prefix for ids, prefix in examples)
    right, loss, tokens = np.zeros((len(examples), longest), dtype=bool), 0.0, 0
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        rows = collate([Example(ids, prefix) for ids, prefix in part], context.pad_id)
        layout = method.inputs(rows, context).to(model.device)
        mask = attention_mask(layout, model.config._attn_implementation, model.dtype)
        logits = model(
            input_ids=layout.ids, position_ids=layout.position, attention_mask=mask, use_cache=False
        ).logits.float()
        where = layout.target != IGNORE
        losses = torch.nn.functional.cross_entropy(logits[where], layout.target[where], reduction="sum")
        loss, tokens = loss + float(losses), tokens + int(where.sum())
        hit = (logits.argmax(-1) == layout.target).cpu().numpy()
        for i, (ids, prefix) in enumerate(part):
            right[start + i, : len(ids) - prefix] = hit[i, prefix - 1 : len(ids) - 1]
    return right, loss / tokens
