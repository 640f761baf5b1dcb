"""Blocksworld: its graph, training lines, and the answers that stand for right ones."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
from test_path_planning import distances

from mutor.config.load import load_scale
from mutor.results import records
from mutor.results.cells import Evidence
from mutor.tasks.blocksworld import Blocksworld, acyclic, block_states, moves, shortest
from mutor.tasks.path_planning import PathsConfig, successors

ROOT = Path(__file__).parent.parent


def test_blocksworld_is_what_moving_one_free_block_gives():
    """Nodes as what each block stands on: by all ways to do so; edges where one, free before and after, differs."""
    ways = [on for on in itertools.product((None, 0, 1, 2, 3), repeat=4) if all(on[b] != b for b in range(4))]
    ways = [on for on in ways if len([b for b in on if b is not None]) == len({b for b in on if b is not None})]

    def stands(on, block):
        for _ in range(5):
            if block is None:
                return True
            block = on[block]
        return False

    ways = {on for on in ways if all(stands(on, b) for b in range(4))}
    states = block_states(4)
    under = [{b: s[i - 1] if i else None for s in state for i, b in enumerate(s)} for state in states]
    under = [tuple(found[b] for b in range(4)) for found in under]
    assert len(states) == 73 and set(under) == ways
    edges = moves(states)
    for i, j in itertools.product(range(73), repeat=2):
        moved = [b for b in range(4) if under[i][b] != under[j][b]]
        free = len(moved) == 1 and moved[0] not in under[i] and moved[0] not in under[j]
        assert edges[i, j] == free


def test_blocksworld_is_trained_on_edges_and_as_many_acyclic_paths_of_each_length():
    task = Blocksworld(PathsConfig(paths=7), seed=4)
    edges = int(task.edges.sum())
    assert task.lines[:edges] == [[s, t, s, t] for s, t in np.argwhere(task.edges).tolist()]
    assert Counter(len(line) - 3 for line in task.lines[edges:]) == dict.fromkeys(range(2, 7), 7)
    for s, t, *path in task.lines:
        assert path[0] == s and path[-1] == t and len(set(path)) == len(path)
        assert all(task.edges[step] for step in itertools.pairwise(path))
    asked = {tuple(pair) for split in ("train", "valid", "test") for pair in task.pairs[split].tolist()}
    assert asked == {pair for pair, far in distances(task.edges).items() if far > 1} and len(asked) == 73 * 72 - edges
    assert task.lines != task.for_seed(5).lines


def test_acyclic_paths_begin_anew_at_a_dead_end():
    edges = np.zeros((4, 4), dtype=bool)
    edges[[0, 1, 0], [1, 2, 3]] = True
    found = {tuple(acyclic(successors(edges), 2, np.random.default_rng(seed))) for seed in range(50)}
    assert found == {(0, 1, 2)}


def test_right_answers_are_shortest_paths():
    """Drawn ones would pass through up to all 73 states, and the model of this size has 32 positions."""
    task = Blocksworld(PathsConfig(paths=7, valid_size=200), seed=3)
    far = distances(task.edges)
    for split in ("valid", "test"):
        examples = task.examples(split)
        assert [ids[:2].tolist() for ids, _ in examples] == task.pairs[split].tolist()
        assert all(prefix == 2 and task.is_path(ids[2:].tolist(), *ids[:2]) for ids, prefix in examples)
        assert all(len(ids) - 4 == far[int(ids[0]), int(ids[1])] for ids, _ in examples)
    assert max(far.values()) == 6


def test_a_shortest_path_by_hand():
    edges = np.zeros((6, 6), dtype=bool)
    for a, b in [(0, 1), (1, 2), (2, 5), (0, 3), (3, 5), (5, 4)]:
        edges[a, b] = True
    assert shortest(successors(edges), 0, 5) == [0, 3, 5]
    assert shortest(successors(edges), 1, 4) == [1, 2, 5, 4]


def test_published_values_stand_beside_the_settings_that_they_are_of():
    evidence = Evidence(ROOT, load_scale(ROOT, "laptop"), records.Records(ROOT / "no_such_folder"))
    blocks = evidence.frame(evidence.table("blocksworld"))
    drawn = blocks[blocks["metric"] == "accuracy"]["reported"].fillna(-1).tolist()
    assert drawn == [45.62, 42.42, 51.32, 44.91, -1]
