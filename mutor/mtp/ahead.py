"""Predictions of x_(t+k) from the tokens up to t alone, and how good they are.

A prompt Q Q and its answer A B C D; with k = 2, wherever an answer token is predicted next and x_(t+2) is there:

    t             0  1  2  3  4  5
    tokens        Q  Q  A  B  C  D
    x_(t+2)       .  B  C  D  .  .

`Method.ahead` makes them, `Method.metrics` measures them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mutor.mtp.layout import IGNORE, Layout, further_on, targets_ahead, with_registers
from mutor.mtp.loss import cross_entropy

if TYPE_CHECKING:
    from mutor.mtp.backbone import Backbone

EXAMPLES = 200  # the first so many of a split are measured on
TOKENS = 2**14  # that pass a model at once where a position takes a row of its own


@dataclass(frozen=True)
class Ahead:
    """Predictions of some tokens x_(t+distance).

    index: int64 [n] each t, in the flattened [B x T] of the layout; logits: float32 [n, V], up to a constant; mass:
    float32 [n] the probability of what was summed over, where that is not everything.
    """

    distance: int
    index: Tensor
    logits: Tensor
    mass: Tensor | None = None


def positions(layout: Layout, distance: int) -> Tensor:
    """int64 [n]: each t from which x_(t+distance) is to be predicted, ascending, in the flattened [B x T]."""
    return (targets_ahead(layout, distance) != IGNORE).flatten().nonzero().squeeze(1)


def rows_at_once(trunk: Backbone, hidden: Tensor) -> int:
    """How many rows of logits of hidden states are computed at once.

    A CPU works in its cache; a GPU reads the whole output layer for each part, so that they are larger there.
    """
    return max(1, (2**28 if hidden.is_cuda else 2**22) // trunk.vocabulary)


def read_off(
    trunk: Backbone,
    layout: Layout,
    distance: int,
    normed: Tensor,
    index: Tensor | None = None,
    logits: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Ahead]:
    """The output layer on normed hidden states, in parts that bound the memory of logits.

    normed: [B, T, d] at every token, or [n, d] at those of `index`, int64 [n]; none: all that are to be predicted.
    logits: another output layer than the model's.
    """
    if index is None:
        index = positions(layout, distance)
        normed = normed.flatten(0, 1)[index]
    rows = rows_at_once(trunk, normed)
    for some, where in zip(normed.split(rows), index.split(rows), strict=True):
        if len(where):
            yield Ahead(distance, where, (logits or trunk.logits)(some))


def registers_behind(layout: Layout, index: Tensor, ids: Tensor, distance: Sequence[int]) -> Layout:
    """The rows of a layout that have a token of `index`, with C registers behind each, for one forward pass.

    index: int64 [n], ascending, in the flattened [B x T]; ids: int64 [n, C], a register's, or a token's that stands
    there as a register does: it sees the tokens up to t and itself. distance: of C, each stands where x_(t+distance) is
    normally predicted, or with the layout's last token where that is none. Columns behind the last token of `index`
    are left out.
    """
    rows, column = index // layout.ids.shape[1], index % layout.ids.shape[1]
    width, used, count = int(column.max()) + 1, rows.unique(), ids.shape[1]
    base = Layout(*(getattr(layout, f.name)[used, :width] for f in fields(Layout)))
    here, number = torch.zeros_like(base.register), torch.zeros_like(base.ids)
    row = torch.searchsorted(used, rows)
    here[row, column], number[row, column] = True, torch.arange(len(index), device=index.device)
    one = with_registers(base, here, torch.ones_like(number), torch.full_like(number, IGNORE), number)
    columns = torch.arange(one.ids.shape[1], device=index.device)
    fed = one.take(torch.cat([columns[:width], columns[width:].repeat_interleave(count)]))
    further = torch.tensor(distance, device=index.device).repeat(one.ids.shape[1] - width) - 1
    position = (fed.position[:, width:] + further).clamp(max=layout.position.max())
    return replace(
        fed,
        ids=torch.cat([base.ids, ids[one.ids[:, width:]].flatten(1)], dim=1),
        position=torch.cat([base.position, position], dim=1),
    )


def at_registers(values: Tensor, layout: Layout, count: int) -> Tensor:
    """[n, count, d]: values [B, L, d] at the registers of `registers_behind`, `count` behind each token."""
    width = int(layout.register.any(0).int().argmax())
    present = layout.register[:, width:].unflatten(1, (-1, count))[..., 0]
    return values[:, width:].unflatten(1, (-1, count))[present]


def on_drafts(
    trunk: Backbone, layout: Layout, normed: Tensor, furthest: int, state: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Iterator[Ahead]:
    """Next tokens, and x_(t+k) up to k = furthest from a hidden state and drafts of the tokens between.

    normed: [B, T, d]. state: what the output layer reads, [n, d], from each t, int64 [n], ascending, the hidden states
    [n, d] there, and the drafts of x_(t+1) .. x_(t+k-1), int64 [n, k - 1].
    """
    drafts = layout.ids.flatten().clone()
    for found in read_off(trunk, layout, 1, normed):
        drafts[found.index] = found.logits.argmax(-1)
        yield found
    for some in positions(layout, 2).split(rows_at_once(trunk, normed)):
        index, known = some, drafts[some, None]
        for k in range(2, furthest + 1):
            there = torch.isin(index, positions(layout, k))
            index, known = index[there], known[there]
            if not len(index):
                break
            found = Ahead(k, index, trunk.logits(state(index, normed.flatten(0, 1)[index], known)))
            yield found
            known = torch.cat([known, found.logits.argmax(-1, keepdim=True)], dim=1)


class Tally:
    """Counts what is right among predictions ahead: for the data, and for the model's own greedy continuation.

    That one begins with g_t, the likeliest next token at t. As long as it is what the data say, x_(t+1) = g_t and so
    on, its next token is the g of the data's position: no loop is needed, and known is x_(t+k) = g_(t+k-1) wherever
    x_(t+j) = g_(t+j-1) for j = 1 .. k-1. Where the data say A B C and the model would say A X:

        t             0  1  2  3
        tokens        Q  A  B  C
        g             A  X  C  .
        known up to   2  1  1  .    from 0 on A, then X; what follows X is not known
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._layout: Layout | None = None
        self._drafts: dict[int, Tensor] = {}  # k -> int64 [B x T] the likeliest x_(t+k), -100 where none is asked

    def add(self, found: Ahead, layout: Layout) -> None:
        """Count predictions of the layout's own tokens. All parts of a layout come before the next layout's."""
        if layout is not self._layout:
            self._compare()
            self._layout = layout
        k, logits = found.distance, found.logits
        target = targets_ahead(layout, k).flatten()[found.index]
        best, likeliest = logits.argmax(-1), logits.topk(min(5, logits.shape[-1])).indices
        if k not in self._drafts:
            self._drafts[k] = torch.full_like(layout.ids, IGNORE).flatten()
        self._drafts[k][found.index] = best
        self._count(f"accuracy_ahead_{k}", 100 * (best == target))
        self._count(f"top5_accuracy_ahead_{k}", 100 * (likeliest == target[:, None]).any(1))
        self._count(f"loss_ahead_{k}", cross_entropy(logits, target))
        if found.mass is not None:
            self._count(f"coverage_ahead_{k}", 100 * found.mass)

    def _count(self, name: str, values: Tensor) -> None:
        if len(values):
            self._sums[name] = self._sums.get(name, 0.0) + float(values.double().sum())
            self._counts[name] = self._counts.get(name, 0) + len(values)

    def _compare(self) -> None:
        """Count the drafts of a layout, all of which have come, that are the model's own tokens."""
        layout, drafts, k = self._layout, self._drafts, 2
        self._layout, self._drafts = None, {}
        if layout is None or 1 not in drafts:
            return
        own = drafts[1].view_as(layout.ids)
        known = own != IGNORE
        accepted = known
        while k in drafts:
            true, draft = targets_ahead(layout, k - 1), drafts[k].view_as(own)
            known = known & (draft != IGNORE) & (further_on(own, layout.segment, k - 2) == true)
            before, accepted = accepted, accepted & (draft == further_on(own, layout.segment, k - 1))
            self._count(f"accepted_ahead_{k}", 100 * accepted[known])
            self._count(f"conditional_ahead_{k}", 100 * accepted[known & before])
            k += 1

    def metrics(self) -> dict[str, float]:
        """By name and k: accuracy of x_(t+k), top-5 accuracy, both in percent; loss in nats a token.

        coverage: the mean probability, in percent, of what was summed over. accepted: how often, in percent, the drafts
        of x_(t+2) .. x_(t+k) are all the model's own, which is what decoding with them accepts; conditional: how often
        that of x_(t+k) is where those before it are. Both are over all t where the model's own x_(t+k) is known, which
        are fewer and easier the larger k is: such rates compare methods at one k. No k is named that nothing is known
        of.
        """
        self._compare()
        return {name: value / self._counts[name] for name, value in self._sums.items()}
