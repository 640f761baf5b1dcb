"""What a task is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Source:
    """examples: indices int64 [K] -> K pairs (ids, prefix length); size: how many there are, None without end.

    dropped: how many were left out for their length.
    """

    examples: Callable[[np.ndarray], list[tuple[np.ndarray, int]]]
    size: int | None
    dropped: int = 0
