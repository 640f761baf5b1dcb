"""Path planning: graphs, training lines, degrees, which answers are right, and one graph for all methods of a seed."""

import itertools
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
import torch

from mutor.checks import from_mapping
from mutor.config.load import load_scale
from mutor.config.runs import cells_of, make_spec
from mutor.mtp.facts import ModelFacts
from mutor.mtp.layout import Example
from mutor.mtp.method import Context
from mutor.registry import METHODS, load
from mutor.results import records
from mutor.results.cells import Evidence
from mutor.tasks.path_planning import (
    PathPlanning,
    PathPlanningConfig,
    degrees,
    path_to,
    reachable,
    successors,
)
from mutor.training.run import RunEnvironment, run

ROOT = Path(__file__).parent.parent


def small(seed=0, **options):
    return PathPlanning(PathPlanningConfig(**{"nodes": 30, "paths": 3, "valid_size": 20, **options}), seed=seed)


def distances(edges):
    """(s, t) -> edges of the shortest path, by breadth-first search; pairs without a path are missing."""
    found = {}
    for s in range(len(edges)):
        queue = deque([(s, 0)])
        while queue:
            node, far = queue.popleft()
            if (s, node) not in found:
                found[s, node] = far
                queue.extend((int(after), far + 1) for after in np.flatnonzero(edges[node]))
    return found


# -- graphs and lines


def test_a_dag_has_edges_to_later_nodes_alone_at_the_given_rate():
    graphs = [PathPlanning(PathPlanningConfig(), seed=seed).edges for seed in range(20)]
    assert not any(np.tril(edges).any() for edges in graphs)
    assert abs(np.mean([edges.sum() for edges in graphs]) / (100 * 99 / 2) - 0.1) < 0.004  # 3 standard errors: 0.003


def test_pairs_are_those_that_a_path_and_no_edge_connects_each_once():
    task = PathPlanning(PathPlanningConfig(), seed=3)
    asked = [tuple(pair) for split in ("train", "valid", "test") for pair in task.pairs[split].tolist()]
    assert set(asked) == {pair for pair, far in distances(task.edges).items() if far > 1}
    assert len(asked) == len(set(asked)) > 2000 and len(task.pairs["valid"]) == 500
    assert len(task.pairs["train"]) == round(0.1 * len(asked))


def test_trained_on_are_edges_and_paths_of_edges_and_training_pairs():
    task = small(seed=5)
    edges = [tuple(edge) for edge in np.argwhere(task.edges).tolist()]
    train = [tuple(pair) for pair in task.pairs["train"].tolist()]
    assert task.lines[: len(edges)] == [[s, t, s, t] for s, t in edges]
    paths = task.lines[len(edges) :]
    assert Counter((s, t) for s, t, *_ in paths) == dict.fromkeys([*edges, *train], 3)
    for s, t, *path in task.lines:
        assert path[0] == s and path[-1] == t and all(task.edges[step] for step in itertools.pairwise(path))


def test_a_path_goes_on_to_any_node_that_leads_to_the_target():
    edges = np.zeros((6, 6), dtype=bool)  # 3 leads nowhere; to turn back there would make paths by way of 1 rarer
    for a, b in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (1, 4), (2, 4), (4, 5)]:
        edges[a, b] = True
    rng = np.random.default_rng(0)
    found = Counter(tuple(path_to(successors(edges), reachable(edges), 0, 4, rng)) for _ in range(2000))
    assert found.keys() == {(0, 1, 4), (0, 1, 2, 4), (0, 2, 4)}
    for path, share in {(0, 1, 4): 0.25, (0, 1, 2, 4): 0.25, (0, 2, 4): 0.5}.items():
        assert abs(found[path] / 2000 - share) < 0.03


def test_right_answers_are_those_of_their_pair():
    task = small(seed=2)
    for split in ("valid", "test"):
        examples = task.examples(split)
        assert [ids[:2].tolist() for ids, _ in examples] == task.pairs[split].tolist()
        assert all(prefix == 2 and task.is_path(ids[2:].tolist(), *ids[:2]) for ids, prefix in examples)


def test_a_seed_has_one_graph_and_seeds_have_different_ones():
    one, again, other = small(seed=1), small().for_seed(1), small(seed=2)
    assert (
        one.data_hash() == other.data_hash() != small(seed=1, paths=2).data_hash()
    )  # records of a setting agree on it
    assert one.test_data_hash() == again.test_data_hash() != other.test_data_hash()
    lines = [ids.tolist() for ids, _ in one.train(1).examples(np.arange(one.train(1).size))]
    assert lines == [[*line, 30] for line in again.lines]
    assert lines == [ids.tolist() for ids, _ in other.train(1).examples(np.arange(len(lines)))]


# -- degrees


def test_degrees_of_a_chain_by_hand():
    """0 -> 1 -> 2 -> 3 -> 4, each edge a line, and the path from 2 to 4; what a line shows of its source is nothing."""
    lines = [[0, 1, 0, 1], [1, 2, 1, 2], [2, 3, 2, 3], [3, 4, 3, 4], [2, 4, 2, 3, 4]]
    found = degrees(lines, 5)
    #      t: 0  1  2  3  4
    literal = [[3, 1, 2, 3, 3],
               [3, 0, 1, 2, 2],
               [3, 3, 0, 1, 1],
               [3, 3, 3, 0, 0],
               [3, 3, 3, 3, 0]]  # fmt: skip
    assert found.tolist() == literal
    assert degrees([[0, 2, 0, 1, 2]], 3).tolist() == [[3, 3, 1], [3, 3, 0], [3, 3, 0]]  # no line has the target 1


@pytest.mark.parametrize("seed", range(3))
def test_degrees_are_those_of_the_definition(seed):
    """Section 2.2 of the source in its own words: u_1 .. u_N a line, counted from 1."""
    task = small(seed, nodes=24, edge_probability=0.2, paths=2, valid_size=5)
    nodes = range(24)
    follows, passed = set(), set()
    for line in task.lines:
        u = dict(enumerate(line, start=1))
        follows |= {(u[n], u[n + 1]) for n in range(3, len(line))}
        passed |= {(u[2], u[n]) for n in range(4, len(line) + 1)}

    def degree(s, t):
        if (t, s) in passed:
            return 0
        if any((s, u) in follows and (t, u) in passed for u in nodes):
            return 1
        return 2 if any((s, u) in follows and degree_at_most_1(u, t) == 1 for u in nodes) else 3

    def degree_at_most_1(s, t):
        return 0 if (t, s) in passed else int(any((s, u) in follows and (t, u) in passed for u in nodes))

    assert task.degree.tolist() == [[degree(s, t) for t in nodes] for s in nodes]
    assert set(task.degree[task.edges]) <= {0, 1}  # each edge is a line


# -- what is learned, and how answers are scored


def test_all_tokens_of_a_line_are_learned_and_foreseen():
    task = small()
    method = load(METHODS, "parallel_mtp", "method")
    made = method(from_mapping(method.Config, {"d_max": 2, "a": 0.5}, "here"))
    made.trunk = ModelFacts()
    made.trunk.vocabulary = 32
    layout, targets = made.prepare_batch([Example(np.array([3, 9, 3, 5, 9, 30]), 1)], Context(pad_id=31))
    assert layout.ids.tolist() == [[3, 9, 3, 5, 9]]
    assert targets["next_token"].target.tolist() == [9, 3, 5, 9, 30]
    assert targets["head_2"].target.tolist() == [3, 5, 9, 30] and targets["head_2"].index.tolist() == [0, 1, 2, 3]
    assert {prefix for _, prefix in task.train(0).examples(np.arange(9))} == {1} and not task.prefix_lm


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ([0, 1, 2, 9], True),
        ([0, 2, 9, 9, 9], True),
        ([0, 2, 9, 1], True),  # what stands behind the end
        ([0, 1, 2], False),  # without an end
        ([0, 1, 9], False),
        ([1, 2, 9], False),
        ([0, 3, 9], False),
        ([0, 1, 2, 3, 9], False),
        ([0, 3, 2, 9], False),  # against an edge
        ([2, 9], False),
        ([9, 9], False),
        ([0, 1, 10, 2, 9], False),  # padding is no node
    ],
)
def test_an_answer_is_right_if_it_is_a_path_from_source_to_target(answer, right):
    task = small()
    task.end_id, task.edges = 9, np.zeros((9, 9), dtype=bool)
    task.edges[[0, 0, 1, 2], [1, 2, 2, 3]] = True
    assert task.is_path(answer, 0, 2) is right


class Scripted:
    """A method that answers from a table, or draws the first node of one of two answers."""

    behind_prompt = 0

    def __init__(self, answers, options=None):
        self.answers, self.options = answers, options

    def answer(self, model, prompts):
        pairs = [tuple(pair) for pair in prompts.ids.tolist()]
        if self.options is None:
            return torch.tensor([self.answers[pair] for pair in pairs])
        chosen = prompts.choose(torch.tensor([[0.5, 0.0]]).expand(len(pairs), -1), 0).tolist()
        return torch.tensor(
            [
                self.answers[pair] if one else [31] * len(self.answers[pair])
                for pair, one in zip(pairs, chosen, strict=True)
            ]
        )


class Model:
    config = type("Config", (), {"max_position_embeddings": 64})
    device = torch.device("cpu")


def padded(task):
    longest = max(len(ids) for ids, _ in task.examples("test"))
    return {(int(i[0]), int(i[1])): [*i[2:].tolist(), *[30] * (longest - len(i))] for i, _ in task.examples("test")}


@pytest.mark.parametrize("draws", [1, 3])
def test_scores_are_of_all_pairs_and_of_each_degree_alone(draws):
    task = small(seed=6, draws=draws)
    right, degree = padded(task), {tuple(p): task.degree[tuple(p)] for p in task.pairs["test"].tolist()}
    counts = Counter(int(d) for d in degree.values())
    assert min(counts[d] for d in range(3)) >= 3
    wrong = {pair: [31] * len(answer) for pair, answer in right.items()}
    answers = {pair: (right if degree[pair] in (1, 3) else wrong)[pair] for pair in right}
    metrics, scores = task.evaluate(Model(), Scripted(answers), Context(pad_id=31), "test", 7)
    hundreds = {d: 100.0 * (d in (1, 3)) for d in counts}
    for kind in ("accuracy", "greedy_accuracy"):
        assert {d: metrics[f"{kind}_degree_{d}"] for d in counts} == hundreds
        assert metrics[kind] == pytest.approx(100 * (counts[1] + counts[3]) / sum(counts.values()))
        assert {d: len(scores[f"{kind}_degree_{d}"]) for d in counts} == counts
    absent = {f"{kind}_degree_{d}" for kind in ("accuracy", "greedy_accuracy") for d in {0, 1, 2, 3} - counts.keys()}
    assert not absent & metrics.keys()


def test_answers_are_drawn_as_likely_as_they_are_and_greedy_ones_are_not():
    task = small(seed=6, draws=50)
    method = Scripted(padded(task), options=True)  # right at odds of 1 to e^0.5
    metrics, scores = task.evaluate(Model(), method, Context(pad_id=31), "test", 100)
    chance = 1 / (1 + np.exp(0.5))
    assert metrics["greedy_accuracy"] == 0.0 and metrics["accuracy"] == pytest.approx(100 * chance, abs=3)
    assert scores["accuracy"].std() == pytest.approx((chance * (1 - chance) / 50) ** 0.5, rel=0.25)  # of 50 draws each
    assert task.evaluate(Model(), method, Context(pad_id=31), "test", 100)[0] == metrics
    other = small(seed=7)
    first = [
        each._right(Model(), Scripted(padded(each), options=True), Context(), "test", 10, 1)[:30]
        for each in (task, other)
    ]
    assert (first[0] != first[1]).any()  # noise of its own for each seed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nodes": 4, "valid_size": 20}, "valid_size: 20, and the graph of seed 0 has "),
    ],
)
def test_what_can_not_be_is_named(options, says):
    with pytest.raises(ValueError, match=says):
        _ = PathPlanning(from_mapping(PathPlanningConfig, options, "here")).pairs


def test_a_model_needs_positions_for_the_longest_line():
    task, said = small(), []
    longest = 1 + max(map(len, task.lines))
    Model.config.max_position_embeddings = longest
    task.prepare(Model(), said.append)
    counts = [int((task.degree[tuple(task.pairs["test"].T)] == d).sum()) for d in range(4)]
    words = ", ".join(f"{count} of degree {d}" for d, count in enumerate(counts))
    assert said == [f"{len(task.lines)} training lines; {sum(counts)} test pairs: {words}"]
    Model.config.max_position_embeddings = longest - 1
    with pytest.raises(ValueError, match=f"has {longest} tokens; allowed: {longest - 1}"):
        task.prepare(Model())
    Model.config.max_position_embeddings = 64


# -- in the suite


def test_runs_of_a_seed_have_the_same_graph_and_a_degree_without_pairs_is_no_problem(tmp_path):
    scale = load_scale(ROOT, "smoke")
    spec = make_spec(scale, "path-20", "path-1x16", "next_token", {}, (1, 2))
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=tmp_path))
    found = {s: records.read(records.seed_folder(tmp_path, spec, s) / "metrics.json") for s in spec.seeds}
    hashes = {s: PathPlanning(spec.task_config, seed=s).test_data_hash() for s in spec.seeds}
    assert {s: record["test_data_hash"] for s, record in found.items()} == hashes and hashes[1] != hashes[2]
    test = PathPlanning(spec.task_config, seed=1).pairs["test"]
    assert len(records.problem_scores(found[1], "last", "accuracy")) == len(test)

    evidence = Evidence(ROOT, scale, records.Records(tmp_path))
    cells = cells_of(evidence.table("path_planning"), scale, (1, 2))
    plain = {cell.metric: evidence.records_of(cell) for cell in cells if cell.spec.method == "next_token"}
    pairs = {s: Counter(PathPlanning(spec.task_config, seed=s)._degrees_of("test").tolist()) for s in (1, 2)}
    shown = [("accuracy", d) for d in range(4)] + [("greedy_accuracy", d) for d in (0, 2)]
    assert {m: len(of) for m, of in plain.items() if "_degree_" in m} == {
        f"{kind}_degree_{d}": sum(pairs[s][d] > 0 for s in (1, 2)) for kind, d in shown
    }
    assert any(0 in (pairs[s][d] for d in range(4)) for s in (1, 2)) and not evidence.runs.problems


def test_published_values_stand_beside_the_settings_that_they_are_of():
    laptop = load_scale(ROOT, "laptop")
    evidence = Evidence(ROOT, laptop, records.Records(ROOT / "no_such_folder"))
    frame = evidence.frame(evidence.table("path_planning"))
    third = frame[frame["metric"] == "accuracy_degree_3"]
    shown = dict(zip(third["label"], third["reported"].fillna(-1), strict=True))
    assert list(shown.values()) == [30.76, 36.09, 31.85, 39.25, -1]
    assert set(frame.loc[frame["metric"] == "greedy_accuracy", "reported"].isna()) == {True}
    gpu = Evidence(ROOT, load_scale(ROOT, "gpu"), evidence.runs)
    frame = gpu.frame(gpu.table("path_planning"))
    second = frame[frame["metric"] == "accuracy_degree_2"]
    said = {(r["label"], r["train_data"].split("=")[1]): r["reported"] for r in second.to_dict("records")}
    assert said["next_token", "100"] == 63.80 and said["next_token", "300"] == 56.16
    assert said["parallel_mtp, own output layers", "300"] == 50.13
    assert said["next_token, width 320", "300"] == 55.92
    assert said["parallel_mtp, layer", "100"] == 68.78
    assert said["parallel_mtp, layer, next token injected", "100"] == 71.32
    assert said["parallel_mtp, own output layers, d_max 3", "100"] == 62.17
