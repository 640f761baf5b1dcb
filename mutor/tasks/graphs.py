"""Star graphs as arrays and as lines of text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mutor.files import read_text

LINE = re.compile(r"(\d+,\d+(?:\|\d+,\d+)*)/(\d+),(\d+)=(\d+(?:,\d+)*)")


@dataclass(frozen=True)
class Graphs:
    """edges: int16 [N, n (l - 1), 2] in the order they are written; path: int16 [N, l] from start to goal."""

    edges: np.ndarray
    path: np.ndarray

    def __len__(self) -> int:
        return len(self.path)

    def __getitem__(self, index: Any) -> Graphs:
        return Graphs(self.edges[index], self.path[index])

    @staticmethod
    def join(parts: Sequence[Graphs]) -> Graphs:
        """All graphs of several groups of the same shape."""
        return Graphs(np.concatenate([p.edges for p in parts]), np.concatenate([p.path for p in parts]))


def generate(rng: np.random.Generator, count: int, n: int, l: int, labels: int) -> Graphs:  # noqa: E741
    """`count` graphs G(n, l), labels drawn without repetition, edges shuffled; vectorised over graphs."""
    nodes = _shuffled_columns(rng, np.tile(np.arange(labels, dtype=np.int16), (count, 1)), 1 + n * (l - 1))
    start = np.broadcast_to(nodes[:, None, :1], (count, n, 1))
    arms = np.concatenate([start, nodes[:, 1:].reshape(count, n, l - 1)], axis=2)
    edges = np.stack([arms[:, :, :-1], arms[:, :, 1:]], axis=3).reshape(count, n * (l - 1), 2)
    order = _shuffled_columns(rng, np.tile(np.arange(edges.shape[1]), (count, 1)), edges.shape[1])
    return Graphs(np.take_along_axis(edges, order[:, :, None], axis=1), arms[:, 0].copy())


def _shuffled_columns(rng: np.random.Generator, values: np.ndarray, taken: int) -> np.ndarray:
    """The first `taken` columns of a Fisher-Yates shuffle of each row."""
    count, width = values.shape
    rows = np.arange(count)
    for i in range(min(taken, width - 1)):
        j = rng.integers(i, width, size=count)
        chosen = values[rows, j]
        values[rows, j] = values[:, i]
        values[:, i] = chosen
    return values[:, :taken]


def keys(graphs: Graphs) -> np.ndarray:
    """uint64 [N]: equal for graphs with the same edge set and query, whatever the order of their edges."""
    with np.errstate(over="ignore"):
        edges = _mix(graphs.edges[..., 0].astype(np.uint64) << np.uint64(32) | graphs.edges[..., 1].astype(np.uint64))
        query = graphs.path[:, 0].astype(np.uint64) << np.uint64(48) | graphs.path[:, -1].astype(np.uint64)
        return _mix(edges.sum(axis=1) + _mix(query))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, a bijection of 64-bit integers."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def write_line(edges: np.ndarray, path: np.ndarray) -> str:
    """One graph in the published text format. edges: [E, 2]; path: [l]."""
    pairs = "|".join(f"{a},{b}" for a, b in edges.tolist())
    return f"{pairs}/{path[0]},{path[-1]}=" + ",".join(map(str, path.tolist()))


def write_file(file: Path, graphs: Graphs) -> None:
    """A file in the published format, one graph a line."""
    Path(file).write_text("".join(write_line(e, p) + "\n" for e, p in zip(graphs.edges, graphs.path, strict=True)))


def read_line(line: str, where: str) -> tuple[list[tuple[int, int]], list[int]]:
    """Edges and path of one line. Raises ValueError starting with `where` for anything malformed."""
    match = LINE.fullmatch(line.strip())
    if not match:
        raise ValueError(f"{where}: {line.strip()[:60]!r} is not of the form a,b|c,d/start,goal=start,...,goal")
    edges = [(int(a), int(b)) for a, b in (pair.split(",") for pair in match[1].split("|"))]
    path = [int(node) for node in match[4].split(",")]
    if (int(match[2]), int(match[3])) != (path[0], path[-1]):
        raise ValueError(f"{where}: the path {match[4]} does not run from {match[2]} to {match[3]}")
    absent = [step for step in itertools.pairwise(path) if step not in edges]
    if absent:
        raise ValueError(f"{where}: the path takes {absent[0][0]},{absent[0][1]}, which is no edge of the graph")
    return edges, path


def read_file(file: str | Path, shape: tuple[int, int] | None = None, labels: int | None = None) -> Graphs:
    """All graphs of a file in the published format; each must have `shape` (edges, nodes of its path) and `labels`.

    Raises ValueError with file and line number for a malformed or foreign line.
    """
    all_edges: list[list[tuple[int, int]]] = []
    all_paths: list[list[int]] = []
    for number, line in enumerate(read_text(Path(file)).splitlines(), start=1):
        where = f"{file}:{number}"
        edges, path = read_line(line, where)
        shape = shape or (len(edges), len(path))
        if (len(edges), len(path)) != shape:
            raise ValueError(
                f"{where}: {len(edges)} edges and {len(path)} path nodes, expected {shape[0]} and {shape[1]}"
            )
        highest = max(node for edge in edges for node in edge)
        if labels is not None and highest >= labels:
            raise ValueError(f"{where}: node {highest}, allowed: 0 to {labels - 1}")
        all_edges.append(edges)
        all_paths.append(path)
    if not all_edges:
        raise ValueError(f"{file}: no graphs in it")
    return Graphs(np.array(all_edges, dtype=np.int16), np.array(all_paths, dtype=np.int16))
