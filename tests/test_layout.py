"""Rows and layouts against tables written out by hand."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from mutor.mtp.attention import additive_mask, block_mask, dense_mask
from mutor.mtp.layout import Example, Layout, collate, regular, with_registers

N = -100  # no target
TWO = [Example(np.array([5, 6, 7, 8]), 1, 40), Example(np.array([9, 10, 11]), 2, 41)]


def lists(record):
    """Every field of rows or of a layout as nested lists."""
    return {f.name: getattr(record, f.name).int().tolist() for f in fields(record)}


def test_padded_rows_by_hand():
    assert lists(collate(TWO, 3)) == {
        "ids": [[5, 6, 7, 8], [9, 10, 11, 3]],
        "segment": [[0, 0, 0, 0], [0, 0, 0, -1]],
        "position": [[0, 1, 2, 3], [0, 1, 2, 0]],
        "is_target": [[0, 1, 1, 1], [0, 0, 1, 0]],
        "sample": [[40] * 4, [41, 41, 41, 0]],
    }


def test_packed_rows_by_hand():
    assert lists(collate(TWO, 3, row_length=8)) == {
        "ids": [[5, 6, 7, 8, 9, 10, 11, 3]],
        "segment": [[0, 0, 0, 0, 1, 1, 1, -1]],
        "position": [[0, 1, 2, 3, 0, 1, 2, 0]],
        "is_target": [[0, 1, 1, 1, 0, 0, 1, 0]],
        "sample": [[40] * 4 + [41, 41, 41, 0]],
    }


@pytest.mark.parametrize(
    ("takes", "rows"),
    [
        ([4, 5], [[0, 1]]),  # exactly full
        ([5, 5], [[0], [1]]),
        ([3, 3, 5, 4, 3], [[0, 1], [2], [3, 4]]),  # two rows would do by their sum, but not for these
        ([1, 8, 2, 7], [[0, 1], [2, 3]]),
        ([1, 8, 7], [[0, 2], [1]]),  # rows in the order of their first sequences
    ],
)
def test_which_sequences_share_a_row(takes, rows):
    """The longest first, each into the emptiest row, in as few rows as the longest row allows; rows of nine."""
    some = [Example(np.array([n, n]), 1, n) for n in range(len(takes))]
    laid = collate(some, 77, 9, lambda example: takes[example.sample])
    assert [sorted(set(row) - {77}) for row in laid.ids.tolist()] == rows


def test_rows_that_just_hold_a_sequence():
    assert collate(TWO[:1], 0, row_length=4).ids.tolist() == [[5, 6, 7, 8]]
    with pytest.raises(ValueError, match="sequence 40: 5 tokens, rows hold 4"):
        collate(TWO[:1], 0, 4, lambda example: 5)
    with pytest.raises(ValueError, match="sequence 0: prefix of 0 tokens in 2"):
        collate([Example(np.array([1, 2]), 0)], 0)


def test_next_token_layout_by_hand():
    got = regular(collate(TWO, 3, row_length=8), prefix_lm=True)
    assert lists(got) == {
        "ids": [[5, 6, 7, 8, 9, 10, 11, 3]],
        "position": [[0, 1, 2, 3, 0, 1, 2, 0]],
        "segment": [[0, 0, 0, 0, 1, 1, 1, -1]],
        "causal_index": [[0, 1, 2, 3, 4, 5, 6, 7]],
        "prefix": [[1, 0, 0, 0, 1, 1, 0, 0]],
        "register": [[0] * 8],
        "target": [[6, 7, 8, N, N, 11, N, N]],
    }
    assert not regular(collate(TWO, 3)).prefix.any()


def test_columns_and_rows_are_taken_from_every_field():
    layout = regular(collate(TWO, 3), prefix_lm=True)
    turned = lists(layout.take(torch.tensor([3, 2, 1, 0])))
    assert turned == {name: [row[::-1] for row in rows] for name, rows in lists(layout).items()}
    each = lists(layout.take(torch.tensor([[1, 0], [2, 3]])))
    assert each == {name: [[a[1], a[0]], [b[2], b[3]]] for name, (a, b) in lists(layout).items()}
    assert lists(layout.row(1)) == {name: rows[1:] for name, rows in lists(layout).items()}
    assert lists(layout.row(0)) == {name: rows[:1] for name, rows in lists(layout).items()}


def test_masks_are_made_where_the_layout_is():
    away = regular(collate(TWO, 3)).to("meta")
    assert {getattr(away, f.name).device.type for f in fields(Layout)} == {"meta"}
    assert dense_mask(away).device.type == additive_mask(away, torch.float32).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_to_add_is_zero_or_the_lowest_number(dtype):
    layout = regular(collate(TWO, 3))
    sees, mask = dense_mask(layout), additive_mask(layout, dtype)
    assert mask.dtype == dtype and set(mask[sees].tolist()) == {0.0} and mask[~sees].max() == torch.finfo(dtype).min


def test_blocks_of_each_row_are_those_that_hold_a_visible_pair():
    """Two rows of three blocks of 128 tokens: a sequence of 300 tokens, and three of 128, 100 and 40."""
    long, short = ([Example(np.arange(n), 1) for n in lengths] for lengths in ((300,), (128, 100, 40)))
    layouts = [regular(collate(some, 0, 384)) for some in (long, short)]
    both = Layout(*(torch.cat([getattr(layout, f.name) for layout in layouts]) for f in fields(Layout)))
    blocks = dense_mask(both).view(2, 1, 3, 128, 3, 128).any(-1).any(-2)
    assert torch.equal(block_mask(both).to_dense().bool(), blocks) and not torch.equal(blocks[0], blocks[1])
    narrow, places = block_mask(both, window=2).mask_mod, torch.arange(both.ids.shape[1])
    found = narrow(torch.arange(len(both.ids))[:, None, None], None, places[:, None], places)
    assert torch.equal(found, dense_mask(both, window=2)[:, 0]) and not torch.equal(found, dense_mask(both)[:, 0])


def test_no_registers_are_no_columns():
    base = regular(collate(TWO, 3))
    nowhere, number = torch.zeros_like(base.register), torch.zeros_like(base.ids)
    assert with_registers(base, nowhere, number, number, number) is base
