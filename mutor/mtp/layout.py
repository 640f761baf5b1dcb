"""What a method feeds the model: tokens, positions, who sees whom, what is predicted where.

A batch of rows (two prefix tokens, an answer of four; registers of offset 2 behind all regular tokens):

    ids           Q  Q  A  B  C  D | r  r  r
    position      0  1  2  3  4  5 | 2  3  4   a register stands where its target is normally predicted
    causal_index  0  1  2  3  4  5 | 1  2  3   a register sees the regular tokens up to its anchor, and itself
    target        .  A  B  C  D  . | B  C  D   "." predicts nothing

Order in the row does not matter, since positions and visibility are explicit: this equals the paper's interleaved
picture exactly, and the regular part stays plain causal attention.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from mutor.mtp.registers import anchors

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """One training sequence: `ids` int64 [T], the first `prefix` of them the prompt, `sample` its number.

    is_target: bool [T] which tokens are predicted, where those behind the prompt are not all.
    """

    ids: np.ndarray
    prefix: int
    sample: int = 0
    is_target: np.ndarray | None = None


@dataclass(frozen=True)
class TokenBatch:
    """Sequences laid into rows of equal length, padded or packed. All tensors [B, T].

    ids: token ids; segment: number of the sequence inside its row, -1 for padding; position: index inside the
    sequence; is_target: whether the token is to be predicted; sample: sample number of the token's sequence.
    """

    ids: Tensor
    segment: Tensor
    position: Tensor
    is_target: Tensor
    sample: Tensor


def collate(
    examples: Sequence[Example],
    pad_id: int,
    row_length: int | None = None,
    tokens: Callable[[Example], int] = lambda example: len(example.ids),
) -> TokenBatch:
    """Lay sequences into rows: one a row, padded on the right; or packed into rows of `row_length` tokens.

    Packed rows are about equally full. tokens: how many a sequence takes of a row, with what a method adds to it.
    Raises ValueError when a sequence is empty, has no answer, or is longer than `row_length`.
    """
    for example in examples:
        if not 0 < example.prefix < len(example.ids):
            raise ValueError(
                f"sequence {example.sample}: prefix of {example.prefix} tokens in {len(example.ids)}: "
                "a sequence needs at least one prefix and one answer token"
            )
        if row_length is not None and tokens(example) > row_length:
            raise ValueError(f"sequence {example.sample}: {tokens(example)} tokens, rows hold {row_length}")
    rows = [[example] for example in examples] if row_length is None else _packed(examples, row_length, tokens)
    return lay(rows, pad_id, row_length)


def lay(rows: Sequence[Sequence[Example]], pad_id: int, row_length: int | None = None) -> TokenBatch:
    """The sequences of each row one behind the other, padded on the right: to `row_length`, or as the longest row."""
    shape = (len(rows), row_length or max(sum(len(example.ids) for example in row) for row in rows))
    ids = np.full(shape, pad_id, dtype=np.int64)
    segment = np.full(shape, -1, dtype=np.int64)
    position = np.zeros(shape, dtype=np.int64)
    is_target = np.zeros(shape, dtype=bool)
    sample = np.zeros(shape, dtype=np.int64)
    for r, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row):
            span = slice(start, start + len(example.ids))
            ids[r, span] = example.ids
            segment[r, span] = number
            position[r, span] = np.arange(len(example.ids))
            behind = np.arange(len(example.ids)) >= example.prefix
            is_target[r, span] = behind if example.is_target is None else example.is_target
            sample[r, span] = example.sample
            start = span.stop
    return TokenBatch(*(torch.from_numpy(a) for a in (ids, segment, position, is_target, sample)))


def _packed(examples: Sequence[Example], row_length: int, tokens: Callable[[Example], int]) -> list[list[Example]]:
    """The longest first, each into the emptiest row: the fewest rows in which none exceeds `row_length`."""
    takes = [tokens(example) for example in examples]
    count = -(-sum(takes) // row_length)
    while True:
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for number in sorted(range(len(takes)), key=takes.__getitem__, reverse=True):
            emptiest = filled.index(min(filled))
            rows[emptiest].append(number)
            filled[emptiest] += takes[number]
        if max(filled) <= row_length:
            return [[examples[number] for number in sorted(row)] for row in sorted(rows, key=min)]
        count += 1


@dataclass(frozen=True)
class Layout:
    """The input of one training step. All tensors [B, L], regular tokens first, registers behind.

    ids: token ids, a register is `vocabulary size + its number`; position: position ids; segment: as in TokenBatch;
    causal_index: a regular token's index in its row, a register's anchor; prefix: sees the whole prefix of its
    sequence in both directions; register: is a register; target: the id to predict, -100 for none.
    """

    ids: Tensor
    position: Tensor
    segment: Tensor
    causal_index: Tensor
    prefix: Tensor
    register: Tensor
    target: Tensor

    def to(self, device: torch.device | str) -> "Layout":
        """The same layout on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def compact(self) -> "Layout":
        """What training needs of the layout: without columns of padding, and without each sequence's last token.

        That one predicts nothing, and is seen by no token that does. Padding that stays is behind a row's tokens.
        """
        regular = (self.segment >= 0) & ~self.register
        last = regular.clone()
        last[:, :-1] &= ~regular[:, 1:] | (self.segment[:, 1:] != self.segment[:, :-1])
        kept = replace(self, segment=self.segment.masked_fill(last, -1))
        absent = kept.segment < 0
        return kept.take(absent.to(torch.int8).argsort(dim=1, stable=True)[:, : int((~absent).sum(1).max())])

    def row(self, number: int) -> "Layout":
        """One row as a batch of its own."""
        return replace(self, **{f.name: getattr(self, f.name)[number : number + 1] for f in fields(self)})

    def take(self, index: Tensor) -> "Layout":
        """The same layout with its columns in another order; index: int64 [L] or [B, L]."""
        index = index.expand(self.ids.shape[0], -1)
        return replace(self, **{f.name: getattr(self, f.name).gather(1, index) for f in fields(self)})


def regular(rows: TokenBatch, *, prefix_lm: bool = False) -> Layout:
    """Plain next-token prediction of the answers; with `prefix_lm` prefix tokens see each other both ways."""
    batch, length = rows.ids.shape
    predicts = anchors(rows.segment, rows.is_target)
    target = torch.full_like(rows.ids, IGNORE)
    target[:, :-1] = torch.where(predicts[:, :-1], rows.ids[:, 1:], target[:, :-1])
    return Layout(
        ids=rows.ids,
        position=rows.position,
        segment=rows.segment,
        causal_index=torch.arange(length).expand(batch, -1),
        prefix=~rows.is_target & (rows.segment >= 0) & prefix_lm,
        register=torch.zeros_like(rows.is_target),
        target=target,
    )


def targets_ahead(layout: Layout, distance: int) -> Tensor:
    """int64 [B, L]: the target `distance` tokens on, for heads and modules; -100 where there is none.

    Only at positions that predict an answer token next, so the last prefix token is the first; never across the end
    of a sequence. `targets_ahead(layout, 1)` is the next token, the layout's own target.
    """
    here = layout.target
    return further_on(here, layout.segment, distance - 1).masked_fill(here == IGNORE, IGNORE)


def further_on(values: Tensor, segment: Tensor, distance: int) -> Tensor:
    """int64 [B, L]: the value `distance` tokens on in the same sequence; -100 where there is none."""
    out, stop = torch.full_like(values, IGNORE), max(0, values.shape[1] - distance)
    start = values.shape[1] - stop
    out[:, :stop] = torch.where(segment[:, :stop] == segment[:, start:], values[:, start:], IGNORE)
    return out


def with_registers(base: Layout, has_register: Tensor, offset: Tensor, target: Tensor, number: Tensor) -> Layout:
    """Put the chosen registers behind all regular tokens.

    base: layout of T regular tokens; has_register: bool [B, T] which tokens a register follows; offset, target,
    number: int64 [B, T] each such register's offset, target id and embedding id. Rows with fewer registers are padded.
    """
    count = int(has_register.sum(1).max())
    if count == 0:
        return base
    index = (~has_register).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
    present = has_register.gather(1, index)

    def pick(values: Tensor, padding: int) -> Tensor:
        return torch.where(present, values.gather(1, index), padding)

    behind = Layout(
        ids=pick(number, 0),
        position=pick(base.position + offset - 1, 0),
        segment=pick(base.segment, -1),
        causal_index=index,
        prefix=torch.zeros_like(present),
        register=present,
        target=pick(target, IGNORE),
    )
    return Layout(*(torch.cat([getattr(base, f.name), getattr(behind, f.name)], 1) for f in fields(Layout)))


def beside(layouts: Sequence[Layout], base: Layout) -> Layout:
    """One layout of the same regular tokens `base` with the registers of all, which see each other in none."""
    width = base.ids.shape[1]
    columns = {f.name: [getattr(each, f.name)[:, width:] for each in layouts] for f in fields(Layout)}
    return Layout(*(torch.cat([getattr(base, name), *behind], 1) for name, behind in columns.items()))
