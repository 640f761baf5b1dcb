"""What drafts are made of: how a method proposes the tokens behind the next one, in a decoding loop with a cache.

drafter = method.drafter(3)             # raises ValueError where the method knows no token that far ahead
drafter.registers                       # what is fed behind each verified token: pairs (id, distance)
drafter.propose(step)                   # behind a pass: calls step.choose for each draft, in order

mutor/decode.py has the loop. A drafter sees what the tokens up to the last accepted one, t, gave: their hidden states,
those of registers behind t, and x_(t+1), which is known. It draws x_(t+2), x_(t+3) .. from logits of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import Cache

from mutor.mtp.ahead import TOKENS, Ahead, positions
from mutor.mtp.backbone import Backbone
from mutor.mtp.layout import Layout
from mutor.mtp.passes import BackboneOutput, first
from mutor.mtp.slots import Slots


@dataclass(frozen=True)
class Drafter:
    """How drafts are made.

    propose: calls `Step.choose` with the logits of x_(t+2), x_(t+3) .., as many as are to be drafted, or `Step.put`;
    registers: (id, distance) of what stands behind each token that is verified, and of the prompt behind its last;
    reads_layers: whether `Step.window` is asked for; earlier: how many tokens before the new ones are read anew there
    in each pass, since drafts stood for what they read; all_states: whether the states of all layers are needed.
    """

    propose: Callable[[Step], None]
    registers: tuple[tuple[int, int], ...] = ()
    reads_layers: bool = False
    earlier: int = 0
    all_states: bool = False


def check_reach(method: Any, draft: int, known: Iterable[int], why: str) -> None:
    """Raise ValueError where the distances 2 .. draft + 1 are not all among those that a method knows."""
    distances, most = set(known), 0
    while most + 2 in distances:
        most += 1
    if draft > most:
        allowed = f"0 to {most}" if most else "0"
        raise ValueError(
            f"draft: {draft} tokens behind the next, and {type(method).__name__} has {why}; allowed: {allowed}"
        )


@dataclass
class Step:
    """Where a decoding loop stands behind a pass.

    text: int64 [B, slots] tokens by slot, `last` int64 [B] the slot of t, behind which stands x_(t+1) already;
    normed: [B, d] what the output layer reads at t; at_registers: [B, C, d] the same at the registers behind t;
    choose: takes logits [B, V] of the next draft, writes it to `text` and returns it, int64 [B]; put: takes drafts
    that are not drawn, int64 [B, n], -1 where there is none; window: the newest tokens.
    """

    text: Tensor
    last: Tensor
    normed: Tensor
    at_registers: Tensor
    choose: Callable[[Tensor], Tensor]
    put: Callable[[Tensor], Any]
    window: Callable[[], Window]

    @property
    def following(self) -> Tensor:
        """int64 [B]: x_(t+1)."""
        return self.text.gather(1, self.last[:, None] + 1)[:, 0]


@dataclass
class Window:
    """The newest tokens of each row, as a layer beside the trunk's reads them.

    out: hidden states [B, n, d] of the trunk there, whose `apply_layer` keeps a cache for each layer; at: int64 [B, n]
    their slots; column: int64 [B] which of them is t.
    """

    out: BackboneOutput
    at: Tensor
    column: Tensor

    def here(self, values: Tensor) -> Tensor:
        """[B, d]: values [B, n, d] at t."""
        return values[torch.arange(len(values), device=values.device), self.column]


class Beside:
    """Runs layers beside the trunk's on the newest tokens, each with a cache of its own.

    What a layer reads and is given (hidden states, rotary angles, position ids) is kept by slot, so that tokens of
    earlier passes can be read anew.
    """

    def __init__(self, slots: Slots, drafter: Drafter):
        self.slots, self.drafter = slots, drafter
        self.states: list[Any] = []
        self.given: dict[int, Any] = {}
        self.caches: dict[int, Cache] = {}

    def write(self, out: BackboneOutput, at: Tensor) -> None:
        """Keep what a pass gave for its first n tokens, whose slots are `at`, int64 [B, n]."""
        states = [out.hidden, out.normed, *out.states[:-1]]
        self.states = self.states or [self.slots.keep() for _ in states]
        for store, values in zip(self.states, states, strict=True):
            store.write(values[:, : at.shape[1]], at)
        leaves, self.tree = tree_flatten(out.given)
        self.leaves = dict(enumerate(leaves))
        for number, leaf in self.leaves.items():
            if isinstance(leaf, Tensor) and 1 < leaf.ndim < 4 and leaf.shape[1] == out.hidden.shape[1]:
                if number not in self.given:
                    self.given[number] = self.slots.keep()
                self.given[number].write(leaf[:, : at.shape[1]], at)

    def window(self, last: Tensor, new: int) -> Window:
        """The newest `new` tokens of each row, and those before them that the drafter reads anew.

        Tokens of a prefix in both directions have seen all of it, so that all of it is read anew with any of it.
        """
        count = min(new + self.drafter.earlier, int(last.max()) + 1)
        start = (last + 1 - count).clamp(min=0)
        if bool((start < self.slots.prefix).any()):
            count, start = int(last.max()) + 1, torch.zeros_like(last)
        at = start[:, None] + torch.arange(count, device=last.device)
        used = int(at.max()) + 1
        given = {n: self._given(n, leaf, at, used) for n, leaf in self.leaves.items()}
        hidden, normed, *before = (store.read(at) for store in self.states)

        def apply_layer(layer: nn.Module, x: Tensor) -> Tensor:
            self.slots.place(at, used)
            if id(layer) not in self.caches:
                self.caches[id(layer)] = self.slots.cache()
            cache = self.caches[id(layer)]
            own = [cache if isinstance(value, Cache) else value for value in given.values()]
            args, kwargs = tree_unflatten(own, self.tree)
            return first(layer(x, *args, **kwargs))

        states = (*before, hidden) if self.drafter.all_states else ()
        return Window(BackboneOutput(hidden, normed, apply_layer, states), at, last - start)

    def _given(self, number: int, leaf: Any, at: Tensor, used: int) -> Any:
        if number in self.given:
            return self.given[number].read(at)
        return self.slots.mask(at, used) if isinstance(leaf, Tensor) and leaf.ndim == 4 else leaf


@dataclass
class TextPart:
    """Tokens of one text in a layout. ids: int64 [T] the whole text; prefix: int64 [1] tokens of it that see each other
    in both directions; where: int64 [n] which of the tokens asked for these are; last: int64 [n] their places in it.
    """

    ids: Tensor
    prefix: Tensor
    where: Tensor
    last: Tensor

    def read(self, trunk: Backbone, model: Any, more: int, **options: Any) -> tuple[Slots, Cache, BackboneOutput]:
        """One pass over the text; its cache, with room for so many tokens more."""
        slots = Slots(self.prefix, len(self.ids) + more, trunk.config, trunk.dtype)
        cache, at = slots.cache(), torch.arange(len(self.ids), device=self.ids.device)[None]
        return slots, cache, _fed(trunk, model, slots, cache, self.ids[None], at, **options)

    def behind(self, trunk: Backbone, model: Any, ids: Tensor) -> Tensor:
        """[n, d]: normed hidden states of the last of some tokens, int64 [n, m], each behind the text up to `last`."""
        slots, cache, _ = self.read(trunk, model, ids.shape[1])
        slots.select(torch.zeros_like(self.last))
        at = self.last[:, None] + 1 + torch.arange(ids.shape[1], device=ids.device)
        return _fed(trunk, model, slots, cache, ids, at).normed[:, -1]


def _fed(
    trunk: Backbone, model: Any, slots: Slots, cache: Cache, ids: Tensor, at: Tensor, **options: Any
) -> BackboneOutput:
    used = int(at.max()) + 1
    slots.place(at, used)
    return trunk.run(
        model,
        input_ids=ids,
        position_ids=at,
        attention_mask=slots.mask(at, used),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **options,
    )


def text_parts(layout: Layout, index: Tensor) -> Iterator[TextPart]:
    """The texts that have tokens of `index`, int64 [n] in the flattened [B x L], with these tokens.

    In parts, as each of them takes a copy of the text's cache: TOKENS in all.
    """
    row, length = index // layout.ids.shape[1], layout.ids.shape[1]
    number = layout.segment.flatten()[index]
    for r, s in torch.stack([row, number], 1).unique(dim=0).tolist():
        columns = (layout.segment[r] == s).nonzero()[:, 0]
        where = ((row == r) & (number == s)).nonzero()[:, 0]
        for part in where.split(max(1, TOKENS // len(columns))):
            last = index[part] - r * length - columns[0]
            yield TextPart(layout.ids[r, columns], layout.prefix[r, columns].sum()[None], part, last)


def along_text(
    trunk: Backbone, model: Any, drafter: Drafter, draft: int, layout: Layout, following: Tensor
) -> Iterator[Ahead]:
    """What a drafter proposes behind each token of a text, as it would in decoding: x_(t+2) .. x_(t+1+draft).

    Up to t a text's own tokens are read, then x_(t+1) as the model says it, then drafts. following: int64 [B x L] what
    the model says behind each token of the layout.
    """
    index = positions(layout, 2)
    for part in text_parts(layout, index):
        slots, _, out = part.read(trunk, model, draft + 1, all_states=drafter.all_states)
        beside = Beside(slots, drafter)
        at = torch.arange(len(part.ids), device=index.device)[None]
        beside.write(out, at)
        text = torch.cat([part.ids, part.ids.new_zeros(draft + 1)])[None]
        _proposed(drafter, beside, text, at[:, -1], out, len(part.ids))  # of the whole text, into the caches
        slots.select(torch.zeros_like(part.last))
        rows = text.repeat(len(part.last), 1).scatter_(1, part.last[:, None] + 1, following[index[part.where], None])
        for k, logits in enumerate(_proposed(drafter, beside, rows, part.last, out, 1), start=2):
            there = torch.isin(index[part.where], positions(layout, k))
            yield Ahead(k, index[part.where[there]], logits[there])


def _proposed(
    drafter: Drafter, beside: Beside, text: Tensor, last: Tensor, out: BackboneOutput, new: int
) -> list[Tensor]:
    """Logits [n, V] of each draft behind the tokens `last`, int64 [n], of texts, int64 [n, T], which get the drafts."""
    found: list[Tensor] = []

    def choose(logits: Tensor) -> Tensor:
        token, slot = logits.argmax(-1), last[:, None] + 2 + len(found)
        text.scatter_(1, slot.clamp(max=text.shape[1] - 1), token[:, None])
        found.append(logits)
        return token

    normed = out.normed[0, last]
    drafter.propose(Step(text, last, normed, normed[:, :0], choose, choose, partial(beside.window, last, new)))
    return found
