"""Training examples by number, so that a run is a pure function of its seed and can be resumed anywhere.

Sample `c` of a run (c = 0 .. steps x batch - 1) is the same whatever was drawn before it: with N examples it is
example perm(seed, c // N)[c % N] of epoch c // N, without end it is example c of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from mutor.mtp.layout import Example
from mutor.streams import stream
from mutor.tasks.task import Source


class Samples(Dataset):
    """The samples of one run, in order. Item c is an `Example` with counter c."""

    def __init__(self, source: Source, total: int, seed: int):
        self.source, self.total, self.seed = source, total, seed
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, sample: int) -> Example:
        return self.__getitems__([sample])[0]

    def __getitems__(self, samples: Sequence[int]) -> list[Example]:
        index = np.asarray(samples, dtype=np.int64)
        if self.source.size is not None:
            size = self.source.size
            index = np.array([self._permutation(int(c) // size, size)[c % size] for c in index])
        found = self.source.examples(index)
        return [Example(ids, prefix, int(c)) for (ids, prefix), c in zip(found, samples, strict=True)]

    def _permutation(self, epoch: int, size: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, stream("epoch_order", self.seed, epoch).permutation(size)
        return self._order[1]
