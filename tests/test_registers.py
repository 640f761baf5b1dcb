"""Registers against tables written out by hand, and the draws of their offsets and places."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mutor.checks import from_mapping
from mutor.mtp import registers as r
from mutor.mtp.attention import dense_mask, visible_pairs
from mutor.mtp.layout import Example, collate, regular, with_registers
from mutor.mtp.layout import lay as rows_of
from mutor.mtp.method import Context
from mutor.mtp.mutor import MuToR
from mutor.mtp.mutor_images import MuToR2D

LONG, SHORT = [10, 11, 12, 13, 14, 15], [20, 21, 22, 23]
N = -100  # no target


@pytest.fixture(scope="module")
def lay(tiny):
    """lay(examples, row_length, prefix_lm, **settings): MuToR's layout; a register's id is 61 + its number."""

    def make(examples, row_length=None, prefix_lm=False, seed=0, **settings):
        method = MuToR.of(**settings)
        method.attach(tiny())
        rows = collate([Example(np.array(ids), prefix, sample) for ids, prefix, sample in examples], 0, row_length)
        return method.train_layout(rows, Context(seed=seed, prefix_lm=prefix_lm))

    return make


def test_prefix_and_answer_of_different_lengths(lay, tools):
    """Right padding; the register past the end is left out."""
    got = lay([(LONG, 2, 0), (SHORT, 1, 1)], d_min=2, d_max=2)
    assert got.ids.tolist() == [[10, 11, 12, 13, 14, 15, 61, 61, 61], [20, 21, 22, 23, 0, 0, 61, 61, 0]]
    assert got.position.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 4], [0, 1, 2, 3, 0, 0, 1, 2, 0]]
    assert got.target.tolist() == [[N, 12, 13, 14, 15, N, 13, 14, 15], [21, 22, 23, N, N, N, 22, 23, N]]
    assert got.causal_index[:, :8].tolist() == [[0, 1, 2, 3, 4, 5, 1, 2], [0, 1, 2, 3, 4, 5, 0, 1]]
    assert got.register.int().tolist() == [[0] * 6 + [1] * 3, [0] * 6 + [1, 1, 0]]
    assert got.segment.tolist() == [[0] * 9, [0, 0, 0, 0, -1, -1, 0, 0, -1]]
    sees = dense_mask(got)
    assert sees.shape == (2, 1, 9, 9)
    assert tools.picture(sees[0, 0]) == [
        "1........", "11.......", "111......", "1111.....", "11111....", "111111...",
        "11....1..", "111....1.", "1111....1",
    ]  # fmt: skip
    assert tools.picture(sees[1, 0]) == [
        "1........", "11.......", "111......", "1111.....", "....1....", ".....1...",
        "1.....1..", "11.....1.", "........1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("d", "target", "position"),
    [(1, [6, 7, 8, 9], [0, 1, 2, 3]), (2, [7, 8, 9], [1, 2, 3]), (4, [9], [3]), (5, [], [])],
)
def test_one_class_token_and_a_raster(lay, d, target, position):
    """1D images: a register behind the class token and each token but the last."""
    got = lay([([5, 6, 7, 8, 9], 1, 0)], d_min=d, d_max=d)
    assert got.target[0, 5:].tolist() == target
    assert got.position[0, 5:].tolist() == position
    assert got.causal_index[0, 5:].tolist() == list(range(len(target)))


def test_sparse_registers(lay):
    """Every second answer position of each document, its first included."""
    got = lay([(LONG, 2, 0), (SHORT, 1, 1)], d_min=1, d_max=1, placement="every", registers=2)
    assert got.causal_index[:, 6:].tolist() == [[1, 3], [0, 2]]
    assert got.target[:, 6:].tolist() == [[12, 14], [21, 23]]
    packed = lay([(LONG, 2, 0), (SHORT, 1, 1)], 10, d_min=1, d_max=1, placement="every", registers=2)
    assert packed.causal_index[0, 10:].tolist() == [1, 3, 6, 8]


def test_random_registers(lay):
    """So many of each document, drawn anew for each sample, never twice the same place."""
    many = [(list(range(10, 30)), 3, sample) for sample in range(40)]
    got = lay(many, d_min=1, d_max=1, placement="random", registers=5)
    places = [tuple(line) for line in got.causal_index[:, 20:].tolist()]
    assert all(len(set(place)) == 5 and min(place) >= 2 and max(place) <= 18 for place in places)
    assert len(set(places)) > 35
    counts = torch.bincount(got.causal_index[:, 20:].flatten(), minlength=20)[2:19]
    assert counts.min() > 2 and counts.max() < 25
    few = lay([(SHORT, 2, 0)], d_min=1, d_max=1, placement="random", registers=5)
    assert sorted(few.causal_index[0, 4:].tolist()) == [1, 2]


def test_packed_documents_stay_apart(lay, tools):
    """Registers, targets, positions and visibility never cross from one document to the next."""
    got = lay([(LONG, 2, 0), (SHORT, 1, 1), (list(range(20, 28)), 2, 2)], 10, d_min=2, d_max=2)
    assert got.ids.shape == (2, 15)
    assert got.position[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 2, 3, 4, 1, 2]
    assert got.target[0].tolist() == [N, 12, 13, 14, 15, N, 21, 22, 23, N, 13, 14, 15, 22, 23]
    assert got.segment[0].tolist() == [0] * 6 + [1] * 4 + [0] * 3 + [1] * 2
    assert got.causal_index[0].tolist() == [*range(10), 1, 2, 3, 6, 7]
    assert got.target[1].tolist() == [N, 22, 23, 24, 25, 26, 27, N, N, N, 23, 24, 25, 26, 27]
    assert tools.picture(dense_mask(got)[0, 0]) == [
        "1..............", "11.............", "111............", "1111...........", "11111..........",
        "111111.........", "......1........", "......11.......", "......111......", "......1111.....",
        "11........1....", "111........1...", "1111........1..", "......1......1.", "......11......1",
    ]  # fmt: skip


def test_prefix_lm(lay, tools):
    """The prefix sees itself both ways, the answer stays causal, documents stay apart."""
    got = lay([([1, 2, 3, 4, 5], 3, 0), ([6, 7, 8], 2, 1)], 8, True, d_min=1, d_max=1)
    assert got.prefix.int().tolist() == [[1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0]]
    assert tools.picture(dense_mask(got)[0, 0]) == [
        "111........", "111........", "111........", "1111.......", "11111......",
        ".....11....", ".....11....", ".....111...",
        "111.....1..", "1111.....1.", ".....11...1",
    ]  # fmt: skip


def test_mixed_offsets_by_hand():
    """An offset for each register."""
    rows = collate([Example(np.array(LONG), 2)], 0)
    offset = torch.tensor([[9, 3, 1, 3, 1, 9]])
    target, exists = r.targets(rows.ids, rows.segment, rows.is_target, offset)
    has_register = r.anchors(rows.segment, rows.is_target) & exists
    assert has_register.int().tolist() == [[0, 1, 1, 0, 1, 0]]
    got = with_registers(regular(rows), has_register, offset, target, offset + 100)
    assert got.target[0, 6:].tolist() == [14, 13, 15]
    assert got.position[0, 6:].tolist() == [3, 2, 4]
    assert got.causal_index[0, 6:].tolist() == [1, 2, 4]
    assert got.ids[0, 6:].tolist() == [103, 101, 101]


@pytest.mark.parametrize("embedding", ["shared", "per_offset"])
def test_registers_of_all_offsets(lay, tools, embedding):
    """Offsets 1, 3 and 5 behind each of two sequences, where their targets are; none sees another."""
    got = lay([(LONG, 2, 0), (SHORT, 1, 1)], d_max=5, leap=2, offsets="all", register_embedding=embedding)
    number = {"shared": (61, 61), "per_offset": (61, 62)}[embedding]  # what offset 5 would predict is in no answer
    assert got.ids.tolist() == [
        [*LONG, *[number[0]] * 4, *[number[1]] * 2],
        [*SHORT, 0, 0, *[number[0]] * 3, 0, number[1], 0],
    ]
    assert got.causal_index[:, 6:].tolist() == [[1, 2, 3, 4, 1, 2], [0, 1, 2, 3, 0, 1]]
    assert got.position[:, 6:].tolist() == [[1, 2, 3, 4, 3, 4], [0, 1, 2, 0, 2, 0]]
    assert got.target[:, 6:].tolist() == [[12, 13, 14, 15, 14, 15], [21, 22, 23, N, 23, N]]
    assert got.segment[1, 6:].tolist() == [0, 0, 0, -1, 0, -1]
    assert tools.picture(dense_mask(got.row(0))[0, 0])[6:] == [
        "11....1.....", "111....1....", "1111....1...", "11111....1..", "11........1.", "111........1",
    ]  # fmt: skip
    packed = lay([(LONG, 2, 0), (SHORT, 1, 1)], 10, d_max=3, leap=2, offsets="all", register_embedding=embedding)
    assert packed.causal_index[0, 10:].tolist() == [1, 2, 3, 4, 6, 7, 8, 1, 2, 6]
    assert packed.target[0, 10:].tolist() == [12, 13, 14, 15, 21, 22, 23, 14, 15, 23]


def test_all_offsets_where_registers_are_few(lay):
    """Every second answer position has them, or two random ones: the same for each offset."""
    every = lay([(LONG, 2, 0)], d_max=2, offsets="all", placement="every", registers=2)
    assert every.causal_index[0, 6:].tolist() == [1, 3, 1, 3] and every.target[0, 6:].tolist() == [12, 14, 13, 15]
    drawn = lay([(list(range(30)), 3, 5)], d_max=2, offsets="all", placement="random", registers=2)
    at = drawn.causal_index[0, 30:].tolist()
    assert len(at) == 4 and at[:2] == at[2:]
    assert drawn.target[0, 30:].tolist() == [at[0] + 1, at[1] + 1, at[0] + 2, at[1] + 2]


@pytest.mark.parametrize("settings", [{}, {"register_embedding": "per_offset"}, {"entropy_limit": 3.0}])
@pytest.mark.parametrize("backend", ["sdpa", "blockwise"])
def test_the_loss_of_all_offsets_is_that_of_each(tiny, tools, settings, backend):
    """A mean over all registers: those of one offset at a time, weighted with how many there are."""
    model, method = tiny("llama", attn_implementation=backend), MuToR.of(d_max=3, offsets="all", **settings)
    tools.attach(method, model)
    rows = collate([Example(np.array(ids), 1, n) for n, ids in enumerate([LONG, SHORT, list(range(20, 30))])], 0, 12)
    whole = method.train_layout(rows, Context())
    assert int(whole.register.sum()) == 17 + 14 + 11
    _, parts = method.compute_loss(model, whole)
    found, counts = [], []
    for d in (1, 2, 3):  # next to a token no entropy is in between
        limit = {} if d == 1 else {key: value for key, value in settings.items() if key == "entropy_limit"}
        one = MuToR.of(d_min=d, d_max=d, **limit)
        one.trunk = method.trunk
        laid = one.train_layout(rows, Context())
        if "register_embedding" in settings:
            laid = replace(laid, ids=laid.ids + laid.register * (d - 1))
        counts.append(int(laid.register.sum()))
        found.append(float(one.compute_loss(model, laid)[1]["register"]))
    assert float(parts["register"]) == pytest.approx(float(np.average(found, weights=counts)), rel=1e-4)


def test_a_target_inside_the_prefix_does_not_exist():
    """Only answer tokens of the same document are targets."""
    rows = collate([Example(np.array(SHORT), 3), Example(np.array(LONG), 1)], 0, 12)
    target, exists = r.targets(rows.ids, rows.segment, rows.is_target, torch.full_like(rows.ids, 2))
    assert exists.int().tolist() == [[0, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]]
    assert target[exists].tolist() == [23, 12, 13, 14, 15]
    assert r.anchors(rows.segment, rows.is_target).int().tolist() == [[0, 0, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize("settings", [{"offsets": "sequence"}, {"offsets": "mixed"}])
def test_per_offset_embeddings(lay, settings):
    """Number 0 is d_min; shared registers all have number 0."""
    many = [(LONG, 1, sample) for sample in range(30)]
    got = lay(many, d_min=2, d_max=4, register_embedding="per_offset", **settings)
    offset = got.position[got.register] - got.causal_index[got.register] + 1
    assert set(offset.tolist()) == {2, 3, 4}
    assert torch.equal(got.ids[got.register], 61 + offset - 2)
    shared = lay(many, d_min=2, d_max=4, **settings)
    assert set(shared.ids[shared.register].tolist()) == {61}
    assert torch.equal(shared.position, got.position)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("d_min", "d_max"), [(1, 4), (2, 6), (3, 3)])
def test_offsets_are_uniform(mixed, d_min, d_max):
    """Chi-square of the values and of neighbouring pairs, across block borders."""
    samples = torch.arange(9000).view(-1, 1) if not mixed else torch.arange(300).view(-1, 1).expand(-1, 30)
    drawn = r.offsets(samples, seed=3, d_min=d_min, d_max=d_max, mixed=mixed).flatten() - d_min
    k = d_max - d_min + 1
    for values, cells in [(drawn, k), (drawn[:-1] * k + drawn[1:], k * k)]:
        assert set(values.tolist()) == set(range(cells))
        seen = torch.bincount(values, minlength=cells).double()
        chi2 = float(((seen - len(values) / cells) ** 2 / (len(values) / cells)).sum())
        assert chi2 <= cells + 5 * (2 * cells) ** 0.5


def test_pairs_on_a_grid_are_drawn_for_each_sequence_or_each_register():
    """d_max 3 on 10 columns: eight pairs, all of them in each of a few samples where they are mixed."""
    pairs = {(h - 1) * 10 + w - 1: (h - 1) * 3 + w - 2 for h in (1, 2, 3) for w in (1, 2, 3) if (h, w) != (1, 1)}
    samples = torch.arange(3)[:, None].expand(-1, 400)
    for offsets, different in (("sequence", 1), ("mixed", 8)):
        method = MuToR2D(from_mapping(MuToR2D.Config, {"d_max": 3, "offsets": offsets}, "mutor_2d"))
        method.trunk = SimpleNamespace(config=SimpleNamespace(columns=10))
        drawn, number = method.offsets(samples, Context(seed=5))
        assert [len(set(line)) for line in drawn.tolist()] == [different] * 3
        assert all(pairs[d] == n for d, n in zip(drawn.flatten().tolist(), number.flatten().tolist(), strict=True))
        plain = r.grid_offsets(samples, seed=5, d_max=3, columns=10, mixed=offsets == "mixed")
        assert torch.equal(drawn, plain[0]) and torch.equal(number, plain[1])
    assert len(set(r.grid_offsets(samples, seed=5, d_max=3, columns=10)[0][0].tolist())) == 1


def test_one_draw_a_sequence_and_other_seeds_draw_otherwise():
    """The same offset at each token of a sample; mixed differs inside it."""
    samples = torch.tensor([3, 9000, 123456789]).view(-1, 1).expand(-1, 12)
    drawn = r.offsets(samples, seed=0, d_min=1, d_max=9)
    assert (drawn == drawn[:, :1]).all()
    mixed = r.offsets(samples, seed=0, d_min=1, d_max=9, mixed=True)
    assert all(len(set(line)) > 2 for line in mixed.tolist())
    assert not torch.equal(mixed[0], mixed[1])
    many = torch.arange(100)[:, None]
    for flag in (False, True):
        one, two = (r.offsets(many, seed=s, d_min=1, d_max=9, mixed=flag) for s in (0, 1))
        assert 0 < int((one == two).sum()) < 40


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"offsets": "mixed"},
        {"offsets": "all", "placement": "random", "registers": 3},
        {"placement": "random", "registers": 3},
        {"placement": "every", "registers": 2},
    ],
)
def test_draws_depend_on_seed_and_counter_alone(lay, settings):
    """Not on batching, order, padding or packing."""
    rng = np.random.default_rng(0)
    samples = [0, 5, 4096, 4095, 70000, 1]
    samples = [(rng.integers(3, 60, n).tolist(), 2, c) for n, c in zip([9, 14, 6, 12, 8, 11], samples, strict=True)]
    samples = [([name, *ids[1:]], prefix, c) for name, (ids, prefix, c) in enumerate(samples)]

    def registers(batches):
        found = {}
        for examples, row_length in batches:
            got = lay(examples, row_length, seed=8, d_max=4, **settings)
            named = {ids[0]: sample for ids, _, sample in examples}
            for row in range(got.ids.shape[0]):
                for number in range(int(got.segment[row].max()) + 1):
                    mine = (got.segment[row] == number) & got.register[row]
                    start = int(torch.nonzero(got.segment[row] == number)[0])
                    sample = named[int(got.ids[row, start])]
                    table = torch.stack([got.causal_index[row] - start, got.position[row], got.target[row]])[:, mine]
                    found[sample] = sorted(zip(*table.tolist(), strict=True))
        return found

    whole = registers([(samples, None)])
    assert sum(map(len, whole.values())) >= 12
    assert whole == registers([([s], None) for s in samples])
    assert whole == registers([(samples[::-1], None)])
    assert whole == registers([(samples, 30)])
    assert whole == registers([(samples[::-1], 40)])


def test_the_global_generators_are_left_alone(tiny):
    """Layouts draw from generators of their own."""
    rows = collate([Example(np.array(LONG), 2, c) for c in range(4)], 0)
    for settings in (
        {},
        {"offsets": "mixed"},
        {"placement": "random", "registers": 2},
        {"register_targets": "shuffled"},
    ):
        method = MuToR.of(**settings)
        method.attach(tiny())
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        method.train_layout(rows, Context(seed=1))
        assert torch.equal(before[0], torch.get_rng_state())
        assert (before[1], before[2]) == (np.random.get_state()[1].tolist(), random.getstate())


def test_shuffled_targets_keep_their_multiset(lay):
    """The control: the same targets at other registers; nothing else moves."""
    many = [(list(range(c, c + 9)), 2, c) for c in range(10, 40)]
    true, shuffled = (lay(many, register_targets=t) for t in ("true", "shuffled"))
    moved = true.target[true.register], shuffled.target[shuffled.register]
    assert torch.equal(moved[0].sort().values, moved[1].sort().values)
    assert float((moved[0] == moved[1]).float().mean()) < 0.3
    assert torch.equal(true.target[~true.register], shuffled.target[~true.register])
    assert torch.equal(true.position, shuffled.position) and torch.equal(true.ids, shuffled.ids)
    again, other = lay(many, register_targets="shuffled"), lay(many, register_targets="shuffled", seed=1)
    assert torch.equal(shuffled.target, again.target) and not torch.equal(shuffled.target, other.target)


@pytest.mark.parametrize(
    ("settings", "registers"),
    [
        ({}, 5),
        ({"placement": "every", "registers": 2}, 3),
        ({"placement": "every", "registers": 5}, 1),
        ({"placement": "random", "registers": 2}, 2),
        ({"placement": "random", "registers": 9}, 5),
        ({"offsets": "all", "d_max": 3}, 15),
        ({"offsets": "all", "d_max": 5, "leap": 2, "placement": "random", "registers": 2}, 6),
    ],
)
def test_room_that_a_sequence_takes_of_a_row(lay, settings, registers):
    """Four prefix tokens, five answer tokens and their registers; as many as `train_layout` puts there at offset 1.

    At other offsets there is room to spare.
    """
    example = Example(np.arange(9), 4)
    assert MuToR.of(**settings).tokens(example) == 9 + registers
    if "offsets" not in settings:
        assert int(lay([(list(example.ids), 4, 0)], d_max=1, **settings).register.sum()) == registers


def test_visible_pairs_by_hand(lay):
    """6 + 5 + .. + 1 pairs of tokens; the registers behind 1 and 2 see 2 and 3 tokens, and each itself."""
    alone = lay([(LONG, 2, 0)], d_min=3, d_max=3)
    assert int(alone.register.sum()) == 2 and visible_pairs(alone) == 21 + 2 + 3 + 2
    both = lay([(LONG, 2, 0), (SHORT, 1, 1)], d_min=3, d_max=3)
    assert visible_pairs(both) == 21 + 2 + 3 + 2 + 10 + 1 + 1  # padding sees itself, and does not count
    packed = regular(rows_of([[Example(np.array(LONG), 2), Example(np.array(SHORT), 1)]], 0))
    assert visible_pairs(packed) == 21 + 10  # those of its own sequence alone


@pytest.mark.parametrize(
    ("ids", "prefix", "row_length"), [([1, 2], 2, None), ([1, 2], 0, None), ([], 0, None), ([1, 2, 3], 1, 2)]
)
def test_sequences_that_cannot_be_laid_are_refused(ids, prefix, row_length):
    """Nothing is silently cut."""
    with pytest.raises(ValueError, match="sequence 12"):
        collate([Example(np.array(ids), prefix, 12)], 0, row_length)


def test_no_anchor_across_a_border():
    """The last token of a document predicts nothing, whatever follows it."""
    segment, is_target = torch.tensor([[0, 0, 0, 1, 1, -1]]), torch.tensor([[0, 1, 1, 1, 1, 1]]).bool()
    assert r.anchors(segment, is_target).int().tolist() == [[1, 1, 0, 1, 0, 0]]


def test_what_training_needs_of_a_layout(lay):
    """Last tokens and common padding are left out, everything else stays in its order."""
    got = lay([(LONG, 2, 0), (SHORT, 1, 1), (list(range(20, 28)), 2, 2)], 12, d_min=2, d_max=2).compact()
    assert got.target.tolist() == [
        [N, 12, 13, 14, 15, 21, 22, 23, 13, 14, 15, 22, 23],
        [N, 22, 23, 24, 25, 26, 27, 23, 24, 25, 26, 27, N],
    ]
    assert got.segment.tolist() == [[0] * 5 + [1] * 3 + [0] * 3 + [1] * 2, [0] * 12 + [-1]]
    assert got.position[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 2, 3, 4, 1, 2]
    assert got.causal_index[0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 1, 2, 3, 6, 7]
    assert got.register[0].tolist() == [False] * 8 + [True] * 5
