"""MuToR on a grid: where registers look, drawn by hand, and its equality with one dimension."""

import numpy as np
import pytest
import torch

from mutor.checks import from_mapping
from mutor.config.load import find_root, load_table
from mutor.models.llamagen import LlamaGenConfig, LlamaGenForCausalLM
from mutor.mtp import registers
from mutor.mtp.layout import IGNORE, Example, collate
from mutor.mtp.method import Context
from mutor.registry import METHODS, load

SMALL = {
    "codes": 40, "classes": 3, "rows": 5, "columns": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
    "hidden_size": 16, "intermediate_size": 24,
}  # fmt: skip
CELLS = SMALL["rows"] * SMALL["columns"]


def attached(name, **settings):
    torch.manual_seed(0)
    model = LlamaGenForCausalLM(LlamaGenConfig(**SMALL))
    torch.nn.init.normal_(model.lm_head.weight)
    kind = load(METHODS, name, "method")
    method = kind(from_mapping(kind.Config, settings, name))
    method.attach(model.eval())
    return method, model


def image(sample=0):
    """Class 1, then a code that names its cell."""
    return Example(np.array([SMALL["codes"] + 1, *range(CELLS)]), 1, sample)


def looked_at(method, anchor, samples=600):
    """Cells (row, column) that registers behind sequence index `anchor` were ever asked for; None: left out."""
    found = set()
    for sample in range(samples):
        layout = method.train_layout(collate([image(sample)], 0), Context(seed=1))
        at = (layout.causal_index[0] == anchor) & layout.register[0]
        assert int(at.sum()) <= 1
        target = int(layout.target[0][at][0]) if at.any() else IGNORE
        found.add(None if target == IGNORE else divmod(target, SMALL["columns"]))
    return found


def drawn(text):
    """Cells marked x in a picture of the grid."""
    lines = text.split()
    return {(r, c) for r, line in enumerate(lines) for c, mark in enumerate(line) if mark == "x"}


# the cell of the anchor is marked t; sequence index = 1 + its number
PICTURES = {
    "inner": (1 + 1 * 6 + 1, ["......", ".txx..", ".xxx..", ".xxx..", "......"], False),
    "corner": (1, ["txx...", "xxx...", "xxx...", "......", "......"], False),
    "right border": (1 + 0 * 6 + 5, [".....t", "xx...x", "xx...x", "xx....", "......"], False),  # runs on below
    "bottom": (1 + 3 * 6 + 2, ["......", "......", "......", "..txx.", "..xxx."], True),
    "last row": (1 + 4 * 6 + 3, ["......", "......", "......", "......", "...txx"], True),
}


@pytest.mark.parametrize("where", PICTURES)
def test_targets_of_registers_by_hand(where):
    """d_max 3, so that eight cells are in sight; what lies behind the last token is left out."""
    anchor, lines, beyond = PICTURES[where]
    method, _ = attached("mutor_2d", d_max=3)
    assert looked_at(method, anchor) == drawn(" ".join(lines)) | ({None} if beyond else set())


def test_behind_the_class_token_offsets_are_plain_too():
    """Index 0: d = 1 is cell 0, d = columns is the last but one cell above the second row's ... counted along."""
    method, _ = attached("mutor_2d", d_max=2)
    assert looked_at(method, 0, 200) == {divmod(d - 1, 6) for d in (1, 6, 7)}


def test_pairs_are_uniform():
    samples = torch.arange(60_000).view(-1, 1)
    offset, number = registers.grid_offsets(samples, seed=3, d_max=4, columns=16)
    share = torch.bincount(number.flatten(), minlength=15) / 60_000
    assert number.min() == 0 and number.max() == 14 and float((share - 1 / 15).abs().max()) < 0.005
    expected = {(h - 1) * 16 + w - 1 for h in range(1, 5) for w in range(1, 5)} - {0}
    assert set(offset.flatten().tolist()) == expected and len(expected) == 15


def test_first_row_alone_is_one_dimension(monkeypatch):
    """With d_h fixed at 1 and d_w up to n, what is fed and the losses equal mutor_1d's with d_max n - 1."""
    flat, model = attached("mutor_1d", d_max=3)
    grid, twin = attached("mutor_2d", d_max=4)
    twin.load_state_dict(model.state_dict())
    # the pair's number in {1 .. 15}, kept in the first row: 1 .. 3, drawn as one dimension draws its offsets
    plain = registers.offsets
    monkeypatch.setattr(
        registers,
        "offsets",
        lambda samples, *, seed, d_min, d_max, mixed=False, leap=1: plain(
            samples, seed=seed, d_min=1, d_max=3, mixed=mixed
        ),
    )
    rows = collate([image(c) for c in (4, 9)], 0)
    one, two = (m.train_layout(rows, Context(seed=2)) for m in (flat, grid))
    for name in ("ids", "position", "target", "register", "causal_index"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert torch.equal(flat.compute_loss(model, one)[0], grid.compute_loss(twin, two)[0])


def test_both_meanings_of_d_max_are_as_documented():
    """Offsets along the raster, and those of the grid within a row, of d_max 4: what settings and table 7 say."""
    anchor, ahead = 1, {}
    for name in ("mutor_1d", "mutor_2d"):
        method, _ = attached(name)
        assert method.config.d_max == 4
        ahead[name] = {column for row, column in looked_at(method, anchor) if row == 0}
    assert ahead == {"mutor_1d": {1, 2, 3, 4}, "mutor_2d": {1, 2, 3}}
    for name, said in (("mutor_1d", "1 .. d_max;"), ("mutor_2d", "1 .. d_max - 1")):
        fields = load(METHODS, name, "method").Config.__dataclass_fields__
        assert said in fields["d_max"].metadata["doc"]
    with pytest.raises(
        ValueError, match=r"offsets: 'all' would be d_max\^2 - 1 registers behind a token; allowed: seq"
    ):
        load(METHODS, "mutor_2d", "method").Config(offsets="all")
    assert any("offsets 1 to 4" in note and "are 1 to 3" in note for note in load_table(find_root(), "table7").notes)


def test_number_of_registers():
    """All but the last of the 1 + 30 tokens, or so many random ones, anew for each sample; ignored ones left out."""
    method, _ = attached("mutor_1d", d_max=1)
    layout = method.train_layout(collate([image()], 0), Context())
    assert int(layout.register.sum()) == CELLS
    method, _ = attached("mutor_1d", d_max=1, placement="random", registers=8)
    places = []
    for sample in range(4):
        layout = method.train_layout(collate([image(sample)], 0), Context())
        assert int(layout.register.sum()) == 8
        places.append(tuple(sorted(layout.causal_index[layout.register].tolist())))
    assert len(set(places)) == 4


def test_one_embedding_a_pair():
    method, model = attached("mutor_2d", d_max=3, register_embedding="per_offset")
    assert model.mtp["registers"].weight.shape == (8, 16)
    seen = set()
    for sample in range(200):
        layout = method.train_layout(collate([image(sample)], 0), Context())
        ids = set((layout.ids[layout.register] - method.trunk.vocabulary).tolist())
        assert len(ids) == 1
        seen |= ids
    assert seen == set(range(8))


def test_two_dimensions_need_a_grid(tiny):
    kind = load(METHODS, "mutor_2d", "method")
    with pytest.raises(ValueError, match="mutor_2d needs a model of images"):
        kind(kind.Config()).attach(tiny("llama"))
    with pytest.raises(ValueError, match="d_min: 2 means nothing in two dimensions"):
        from_mapping(kind.Config, {"d_min": 2}, "mutor_2d")
    assert (kind.Config().d_max, kind.Config().a) == (4, 0.5)
