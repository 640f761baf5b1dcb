"""The star-graph task: generation, the published text format, tokens, scoring."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from mutor.baselines.next_token import NextToken

from mutor.checks import from_mapping
from mutor.mtp.method import Context
from mutor.tasks.graphs import Graphs, generate, keys, read_file, read_line, write_file, write_line
from mutor.tasks.star_graph import StarGraph, StarGraphConfig
from mutor.training.data import Samples

DATA = os.environ.get("MUTOR_TEST_DATA")
LINE = "32,3|16,12|3,19|32,34|34,6|6,16|19,47|47,28/32,12=32,34,6,16,12"


@pytest.mark.parametrize(("n", "length", "labels"), [(2, 4, 7), (3, 3, 30), (5, 10, 50), (1, 13, 13)])
def test_generated_graphs_are_star_graphs(n, length, labels):
    graphs = generate(np.random.default_rng(0), 500, n, length, labels)
    for edges, path in zip(graphs.edges, graphs.path, strict=True):
        follow = {}
        for a, b in edges.tolist():
            follow.setdefault(a, []).append(b)
        start = path[0]
        assert len(follow[start]) == n and len(edges) == n * (length - 1)
        arms = []
        for node in follow.pop(start):
            arm = [start, node]
            while arm[-1] in follow:
                (following,) = follow[arm[-1]]
                arm.append(following)
            arms.append(arm)
        assert all(len(arm) == length for arm in arms) and path.tolist() in arms
        assert len({x for arm in arms for x in arm}) == 1 + n * (length - 1)  # no repetition
        assert max(map(max, arms)) < labels


def test_labels_edges_and_paths_are_uniform():
    graphs = generate(np.random.default_rng(1), 20_000, 2, 3, 8)
    assert np.abs(np.bincount(graphs.path[:, 0], minlength=8) / 20_000 - 1 / 8).max() < 0.01
    first = (graphs.edges[:, 0] == graphs.path[:, :2]).all(1).mean()  # the path's first edge is written first
    assert abs(first - 1 / 4) < 0.015


def test_a_million_graphs_differ_and_come_in_seconds():
    graphs = generate(np.random.default_rng(2), 1_000_000, 2, 5, 50)
    assert len(np.unique(keys(graphs))) > 999_990


def test_same_graph_is_recognised_whatever_the_order_of_edges():
    one = generate(np.random.default_rng(3), 50, 2, 4, 12)
    shuffled = Graphs(one.edges[:, ::-1], one.path)
    assert (keys(one) == keys(shuffled)).all()
    other_goal = one.path.copy()
    other_goal[:, -1] = (other_goal[:, -1] + 1) % 12
    assert (keys(one) != keys(Graphs(one.edges, other_goal))).all()
    swapped = one.edges.copy()
    swapped[:, 0] = swapped[:, 0, ::-1]
    assert (keys(one) != keys(Graphs(swapped, one.path))).all()


@pytest.mark.parametrize("train_size", [None, 3000])
def test_no_held_out_graph_is_trained_on(train_size):
    task = StarGraph(StarGraphConfig(2, 3, 7, train_size=train_size, valid_size=100, test_size=200))
    held = np.concatenate([keys(task.splits[s]) for s in ("valid", "test")])
    assert len(np.unique(held)) == 300
    source = task.train(0)
    rows = source.examples(np.arange(source.size or 12_000))
    seen = Graphs(
        np.stack([np.stack([r[0:12:3], r[1:12:3]], 1) for r, _ in rows]), np.stack([r[prefix:] for r, prefix in rows])
    )
    assert not np.isin(keys(seen), held).any()
    assert source.size == train_size


def test_training_is_a_function_of_seed_and_counter():
    task = StarGraph(StarGraphConfig(2, 3, 10))
    whole = Samples(task.train(5), 10_000, 5)
    again = Samples(task.train(5), 10_000, 5)
    order = [9000, 3, 4097, 4095, 4]
    for sample, example in zip(order, again.__getitems__(order), strict=True):
        assert example.sample == sample and (example.ids == whole[sample].ids).all()
    assert any((Samples(task.train(6), 10, 6)[i].ids != whole[i].ids).any() for i in range(10))


def test_epochs_see_every_graph_once_in_a_new_order():
    task = StarGraph(StarGraphConfig(2, 3, 10, train_size=50))
    samples = Samples(task.train(0), 150, seed=1)
    epochs = [[tuple(e.ids) for e in samples.__getitems__(range(50 * k, 50 * k + 50))] for k in range(3)]
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2]) and len(set(epochs[0])) == 50
    assert epochs[0] != epochs[1] != epochs[2]


def test_published_line_encodes_to_27_and_5_tokens():
    edges, path = read_line(LINE, "x")
    task = StarGraph(StarGraphConfig(2, 5, 50))
    ((ids, prefix),) = task.encode(Graphs(np.array([edges]), np.array([path])))
    assert (prefix, len(ids)) == (27, 32)
    assert ids[:9].tolist() == [32, 3, 50, 16, 12, 50, 3, 19, 50]
    assert ids[21:27].tolist() == [47, 28, 51, 32, 12, 52]
    assert ids[27:].tolist() == [32, 34, 6, 16, 12]
    assert write_line(np.array(edges), np.array(path)) == LINE
    backwards = StarGraph(StarGraphConfig(2, 5, 50, reverse=True))
    assert backwards.encode(Graphs(np.array([edges]), np.array([path])))[0][0][27:].tolist() == [12, 16, 6, 34, 32]


@pytest.mark.skipif(not DATA, reason="MUTOR_TEST_DATA names no folder of published files")
def test_published_file_reads_encodes_and_writes_back(tmp_path):
    file = Path(DATA) / "star_graph/deg_2_path_5_nodes_50_test_2000.txt"
    graphs = read_file(file, (8, 5), 50)
    assert len(graphs) == 2000
    write_file(tmp_path / "again.txt", graphs)
    assert (tmp_path / "again.txt").read_bytes() == file.read_bytes()
    task = StarGraph(StarGraphConfig(2, 5, 50, test_file=str(file)))
    assert all((prefix, len(ids)) == (27, 32) for ids, prefix in task.encode(task.splits["test"]))


def test_backward_walks_ask_from_goal_to_start_and_hold_out_the_same_graphs():
    plain, backward = (StarGraph(StarGraphConfig(2, 4, 9, direction=d)) for d in ("forward", "backward"))
    one, other = (task.encode(task.splits["test"])[0][0].tolist() for task in (plain, backward))
    assert one[:18] == other[:18]
    start, goal = one[18], one[19]
    assert other[18:21] == [goal, start, one[20]] and other[21:] == one[21:][::-1]
    assert (keys(plain.splits["test"]) == keys(backward.splits["test"])).all()
    assert (plain._forbidden == backward._forbidden).all()


def test_walks_in_both_directions_ask_half_of_the_graphs_each_way():
    tasks = {d: StarGraph(StarGraphConfig(3, 4, 12, direction=d)) for d in ("forward", "backward", "both")}
    graphs = tasks["both"].splits["test"]
    ids = {d: np.array([row for row, _ in task.encode(graphs)]) for d, task in tasks.items()}
    forward, backward = ((ids["both"] == ids[d]).all(axis=1) for d in ("forward", "backward"))
    assert (forward ^ backward).all() and 0.45 < forward.mean() < 0.55
    assert (tasks["both"]._answers(graphs) == ids["both"][:, -4:]).all()
    again = tasks["both"].encode(graphs[np.arange(len(graphs))[::-1]])  # the direction belongs to the graph
    assert (np.array([row for row, _ in again])[::-1] == ids["both"]).all()
    assert StarGraph.chance(tasks["both"].config) == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("1,2|2,3/1,3", "not of the form"),
        ("1,2|2,x/1,3=1,2,3", "not of the form"),
        ("1,2|2,3/1,3=1,2,4", "does not run from 1 to 3"),
        ("1,2|2,3|1,4|4,5/1,3=1,4,3", "4,3, which is no edge"),
        ("1,2|2,3/1,3=1,2,3", "2 edges and 3 path nodes, expected 4 and 3"),
        ("1,2|2,9|1,4|4,5/1,9=1,2,9", "node 9, allowed: 0 to 7"),
    ],
)
def test_malformed_line_names_file_and_line(tmp_path, line, says):
    file = tmp_path / "graphs.txt"
    file.write_text("1,2|2,3|1,4|4,5/1,3=1,2,3\n" + line + "\n")
    with pytest.raises(ValueError, match=r"graphs\.txt:2: ") as error:
        read_file(file, (4, 3), 8)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n": 2, "l": 5, "labels": 8}, "9 nodes, more than the 8 labels"),
        ({"n": 0, "l": 5}, "n: 0 is out of range"),
        ({"n": 1, "l": 5}, "n: 1 is out of range"),
        ({"n": 2, "l": 3, "labels": 5, "test_size": 100}, "leave too few"),
        ({"n": 2, "l": 5, "lables": 8}, "did you mean 'labels'"),
    ],
)
def test_impossible_graphs_are_refused(settings, says):
    with pytest.raises(ValueError, match="options") as error:
        from_mapping(StarGraphConfig, settings, "options")
    assert says in str(error.value)


class Oracle(NextToken):
    """Answers right, always takes the first arm written, or always errs at one position."""

    def __init__(self, task, kind):
        super().__init__(None)
        self.kind, self.answers = kind, {tuple(ids[:p]): ids[p:] for ids, p in task.examples("test")}

    def answer(self, model, prompts):
        assert prompts.attended.all() and prompts.end_id is None
        out = np.stack([self.answers[tuple(row)] for row in prompts.ids.tolist()])
        if self.kind == "cheat":
            for row, line in zip(prompts.ids.tolist(), out, strict=True):
                follow = {}
                for a, b in zip(row[0:-3:3], row[1:-3:3], strict=True):
                    follow.setdefault(a, b)  # the first arm that is written
                for i in range(1, len(line)):
                    line[i] = follow[line[i - 1]]
        if self.kind == "last":
            out[:, -1] = -5
        return torch.from_numpy(out)


@pytest.fixture
def indifferent(tiny):
    """From the number of tokens to a model to which all are alike."""

    def make(vocabulary):
        model = tiny(vocab_size=vocabulary)
        torch.nn.init.zeros_(model.lm_head.weight)
        return model

    return make


@pytest.mark.parametrize(("kind", "low", "high"), [("right", 100, 100), ("cheat", 29, 38), ("last", 0, 0)])
def test_scores_of_known_answerers(indifferent, kind, low, high):
    task = StarGraph(StarGraphConfig(3, 3, 12, test_size=1500))
    metrics, scores = task.evaluate(indifferent(16), Oracle(task, kind), Context(), "test", 400)
    assert low <= metrics["solve_rate"] <= high and metrics["solve_rate"] == 100 * scores["solve_rate"].mean()
    assert metrics["chance"] == pytest.approx(100 / 3)
    assert metrics["accuracy_at_1"] == 100
    assert metrics["loss"] == pytest.approx(np.log(16), abs=1e-4)
    if kind == "last":
        assert (metrics["first_step_accuracy"], metrics["accuracy_at_3"]) == (100, 0)
    if kind == "cheat":
        assert metrics["first_step_accuracy"] == metrics["solve_rate"]


@pytest.mark.parametrize("options", [{"reverse": True}, {"direction": "backward"}, {}], ids=str)
def test_first_step_is_the_node_behind_the_start(indifferent, options):
    """Of a path of five that begins at the goal, the last but one; errors elsewhere do not count."""
    task = StarGraph(StarGraphConfig(2, 5, 12, test_size=60, **options))
    start = 4 if options else 0  # where the start stands in an answer
    paths = task.splits["test"].path
    for wrong in range(5):

        class Errs(Oracle):
            """At one position."""

            def answer(self, model, prompts, wrong=wrong):
                out = super().answer(model, prompts)
                out[:, wrong] = task.pad_id
                return out

        answers = np.stack([ids[prefix:] for ids, prefix in task.examples("test")])
        assert (answers[:, start] == paths[:, 0]).all()
        metrics, scores = task.evaluate(indifferent(16), Errs(task, "right"), Context(), "test", 40)
        assert metrics["solve_rate"] == 0
        assert metrics["first_step_accuracy"] == (0 if abs(wrong - start) == 1 else 100)
        assert scores["first_step_accuracy"].shape == (60,)
        found = [metrics[f"accuracy_at_{i + 1}"] for i in range(5)]
        assert found == [0 if i == wrong else 100 for i in range(5)]


class Bytes:
    """A tokenizer of bytes, so that a label has one token or two; 0 pads, 1 ends."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        read = [list(t.encode()) for t in ([text] if isinstance(text, str) else text)]
        return {"input_ids": read[0] if isinstance(text, str) else read}

    def decode(self, ids):
        return bytes(ids).decode()


def words(**options):
    """A task of twenty labels, read and written as bytes."""
    return StarGraph(StarGraphConfig(2, 3, 20, tokens="model", test_size=50, valid_size=10, **options), Bytes())


def test_words_of_another_tokenizer_are_read_as_labels():
    task = words()
    (ids, prefix) = task.encode(task.splits["test"][:1])[0]
    assert bytes(ids[:-1].tolist()).decode() == write_line(task.splits["test"].edges[0], task.splits["test"].path[0])
    assert ids[prefix - 1] == ord("=")
    assert task._labels(list(b"12,3,x,4"), 3) == [12, 3, -1]
    assert task._labels(list(b"12,3\x01,4"), 3) == [12, 3, -1]  # what stands behind the end is no answer
    assert task._labels(list(b"20," + b"9" * 20 + ",²".encode()), 3) == [-1, -1, -1]  # numbers that are no labels
    with pytest.raises(ValueError, match="tokenizer"):
        StarGraph(StarGraphConfig(2, 3, 20, tokens="model"))


def test_an_end_is_trained_where_labels_differ_in_tokens():
    task = words()
    examples = task.train(0).examples(np.arange(200)) + task.examples("test")
    assert task.end_id == 1 and all((ids == 1).tolist() == [False] * (len(ids) - 1) + [True] for ids, _ in examples)
    assert len({len(ids) - prefix for ids, prefix in examples}) > 1
    digits = StarGraph(StarGraphConfig(2, 3, 10, tokens="model", test_size=50, valid_size=10), Bytes())
    assert digits.end_id is None and {len(ids) - prefix for ids, prefix in digits.examples("test")} == {5}
    assert all(1 not in ids for ids, _ in digits.examples("test"))
    assert StarGraph(StarGraphConfig(2, 3, 20)).end_id is None

    class Merges(Bytes):
        def __call__(self, text, add_special_tokens):
            return super().__call__([t.replace(",1", "&") for t in text], add_special_tokens)

    assert StarGraph(digits.config, Merges()).end_id == 1

    class Endless(Bytes):
        eos_token_id = None

    with pytest.raises(ValueError, match="answers differ in length and the model's tokenizer has no end token"):
        StarGraph(task.config, Endless())


class GoesOn(NextToken):
    """Answers right, or with all but the end, and goes on with a digit as long as it may."""

    def __init__(self, task, ends):
        super().__init__(None)
        self.ends, self.lengths = ends, set()
        self.answers = {tuple(ids[:p]): ids[p:].tolist() for ids, p in task.examples("test")}

    def answer(self, model, prompts):
        self.lengths.add(prompts.length)
        out = [self.answers[tuple(row)] for row in prompts.ids.tolist()]
        if not self.ends:
            out = [[i for i in row if i != 1] for row in out]
        return torch.tensor([(row + [ord("7")] * prompts.length)[: prompts.length] for row in out])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("ends", [True, False])
def test_a_score_does_not_depend_on_the_batch(indifferent, ends, reverse):
    """A model that is right, and goes on with a digit until it is stopped, in batches of different sizes."""
    task = words(reverse=reverse)
    model, rates = indifferent(128), []
    for size in (1, 3, 50):
        method = GoesOn(task, ends)
        metrics, scores = task.evaluate(model, method, Context(), "test", size)
        assert method.lengths == {max(len(ids) - prefix for ids, prefix in task.examples("test"))}
        rates.append((metrics, scores["solve_rate"].tolist()))
    assert rates[0][1] == rates[1][1] == rates[2][1]
    assert rates[0][0]["solve_rate"] == (100 if ends else 0)
    assert rates[0][0]["first_step_accuracy"] == 100
    assert rates[0][0]["accuracy_at_1"] == 100 and "forced_accuracy_at_1" not in rates[0][0]


def test_a_model_that_ends_its_answers_is_stopped(tiny):
    """By what the method is asked for: the same labels in batches of all sizes, and nothing behind an end."""
    task, seen = words(), []

    class Watched(NextToken):
        def answer(self, model, prompts):
            seen.append(prompts)
            answers = super().answer(model, prompts)
            assert all(set(row[row.index(1) + 1 :]) <= {0} for row in answers.tolist() if 1 in row)
            return answers

    model = tiny("llama", vocab_size=128, seed=4)
    with torch.no_grad():
        model.lm_head.weight[[i for i in range(128) if i not in (1, *b"0123456789,")]] = 0
    found = [task._answered(model, Watched(None), Context(), task.examples("test"), size) for size in (1, 4, 50)]
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all() and (found[0] >= 0).any()
    assert {prompts.end_id for prompts in seen} == {1} and len({prompts.ids.shape[1] for prompts in seen}) > 1
