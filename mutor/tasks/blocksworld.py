"""Blocksworld as path planning: nodes are the 73 states of four blocks, an edge is a move of one block.

Trained on are each edge, and as many random acyclic paths of each length from 2 to 6. Zhong et al., arXiv 2509.23186,
appendix E. Any pair is asked that no edge connects, trained on or not: the 5,000 published ones are nearly all there
are. All else is as in path planning on random graphs.
"""

from __future__ import annotations

from collections import deque
from functools import cache, cached_property

import numpy as np

from mutor.streams import stream
from mutor.tasks.path_planning import Line, Paths, PathsConfig

LENGTHS = range(2, 7)  # edges of the training paths
BLOCKS = 4
State = frozenset[tuple[int, ...]]  # stacks of blocks, the lowest first


class Blocksworld(Paths):
    """One graph for all seeds, with training lines and pairs of each seed's own."""

    Config = PathsConfig

    @staticmethod
    def describe(config: PathsConfig) -> str:
        """The name of this graph, with its training paths, in tables."""
        return f"blocksworld paths={config.paths}"

    @property
    def nodes(self) -> int:
        """How many states there are."""
        return len(block_states(BLOCKS))

    @cached_property
    def edges(self) -> np.ndarray:
        """bool [V, V]: whether a move leads from one state to another."""
        return moves(block_states(BLOCKS))

    @cached_property
    def lines(self) -> list[Line]:
        """The training lines: edges, then paths of each length."""
        rng = stream("path_planning", self.seed, 2)
        walks = (acyclic(self.following, length, rng) for length in LENGTHS for _ in range(self.config.paths))
        return self.edge_lines + [[walk[0], walk[-1], *walk] for walk in walks]

    def path(self, s: int, t: int, rng: np.random.Generator) -> Line:
        """The nodes of a shortest path: a drawn one may pass through all states, and a model has room for few."""
        return shortest(self.following, s, t)


def acyclic(following: list[list[int]], length: int, rng: np.random.Generator) -> list[int]:
    """The nodes of a random path of `length` edges without a node twice; begins anew where none is left."""
    while True:
        path = [int(rng.integers(len(following)))]
        while len(path) <= length:
            onward = [node for node in following[path[-1]] if node not in path]
            if not onward:
                break
            path.append(onward[int(rng.random() * len(onward))])
        else:
            return path


def shortest(following: list[list[int]], s: int, t: int) -> list[int]:
    """The nodes of a shortest path from s to t, by breadth-first search; of several, the first by their numbers."""
    came_from, queue = {s: s}, deque([s])
    while t not in came_from:
        for node in following[queue[0]]:
            if node not in came_from:
                came_from[node] = queue[0]
                queue.append(node)
        queue.popleft()
    path = [t]
    while path[-1] != s:
        path.append(came_from[path[-1]])
    return path[::-1]


@cache
def block_states(blocks: int) -> list[State]:
    """All ways to stack so many blocks on a table, in a fixed order; 73 of four blocks."""
    states: set[State] = {frozenset()}
    for block in range(blocks):
        states = {state | {(block,)} for state in states} | {
            state - {stack} | {(*stack[:at], block, *stack[at:])}
            for state in states
            for stack in state
            for at in range(len(stack) + 1)
        }
    return sorted(states, key=sorted)


def moves(states: list[State]) -> np.ndarray:
    """bool [V, V]: whether one block that lies on top, put on the table or another stack, makes one state the other."""
    number = {state: i for i, state in enumerate(states)}
    edges = np.zeros((len(states), len(states)), dtype=bool)
    for state in states:
        for stack in state:
            block, rest = stack[-1], state - {stack} | ({stack[:-1]} if stack[1:] else set())
            onto = [rest - {other} | {(*other, block)} for other in rest]
            for after in [*onto, rest | {(block,)}]:
                if after != state:
                    edges[number[state], number[after]] = True
    return edges
