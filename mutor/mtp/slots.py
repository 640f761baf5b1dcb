"""Caches in which each row of a batch stands at a place of its own, as rows accept different numbers of drafts.

Token t of a row has slot t, whatever the other rows do. A pass writes from each row's own start on:

    slot      0 1 2 3 4 5 6 7
    row 0     a b c|y d d r r        three tokens are known to the cache; y, two drafts, two registers are fed
    row 1     a b c d e|y d d r r

A query sees the slots up to its own. So what stands further on (rejected drafts, registers, padding) is not seen, and
is overwritten by the next pass. Nothing has to be taken back after a rejection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from mutor.mtp.attention import additive


class Slots:
    """Where the tokens of a pass stand in the caches, and what each may see.

    at: int64 [B, n] the slots that are written; used: how many slots attention looks at. Set by `place` before layers
    run. prefix: int64 [B] tokens of each prompt that see each other in both directions, 0 for none.
    """

    def __init__(self, prefix: Tensor, capacity: int, config: Any, dtype: torch.dtype):
        """capacity: slots of a row, for text, drafts and registers; config: the model's, dtype: of its weights."""
        self.batch, self.capacity, self.prefix = len(prefix), capacity, prefix
        self.config, self.dtype = config, dtype
        self.at, self.used = prefix.new_zeros(len(prefix), 0), 0
        self._kept: list[_Kept] = []

    def place(self, at: Tensor, used: int) -> None:
        """The layers that run next write to the slots `at`, int64 [B, n], and look at the first `used`."""
        self.at, self.used = at, used

    def sees(self, at: Tensor, used: int) -> Tensor:
        """bool [B, n, used]: which of the first `used` slots tokens at the slots `at`, int64 [B, n], see."""
        keys, prefix = torch.arange(used, device=at.device), self.prefix[:, None, None]
        queries = at[..., None]
        return (keys <= queries) | ((keys < prefix) & (queries < prefix))

    def mask(self, at: Tensor, used: int) -> Tensor:
        """The same as the model's attention takes it, [B, 1, n, used]."""
        return self.as_taken(self.sees(at, used))

    def as_taken(self, seen: Tensor) -> Tensor:
        """[B, 1, n, keys] of bool [B, n, keys], as the attention under way takes a mask."""
        return (additive(seen, self.dtype) if self.config._attn_implementation == "eager" else seen)[:, None]

    def keep(self) -> _Kept:
        """A new store of one value for each slot."""
        self._kept.append(_Kept(self))
        return self._kept[-1]

    def cache(self) -> Cache:
        """A new cache for as many layers as the model has; one takes memory when it first writes."""
        return Cache(layers=[_SlotLayer(self) for _ in range(self.config.num_hidden_layers)])

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of all caches and stores. rows: int64 [n]."""
        self.batch, self.prefix = len(rows), self.prefix[rows]
        for kept in self._kept:
            kept.select(rows)


class _Kept:
    """A value for each slot: [B, slots, ...]."""

    def __init__(self, slots: Slots):
        self.slots, self.values = slots, torch.empty(0)

    def write(self, values: Tensor, at: Tensor) -> None:
        """values: [B or 1, n, ...], at: int64 [B, n] its slots."""
        if not self.values.numel():
            self.values = values.new_zeros(self.slots.batch, self.slots.capacity, *values.shape[2:])
        index = at.view(*at.shape, *[1] * (values.ndim - 2)).expand(*at.shape, *values.shape[2:])
        self.values.scatter_(1, index, values.expand_as(index))

    def read(self, at: Tensor) -> Tensor:
        """[B, n, ...]: the values at the slots `at`, int64 [B, n]."""
        index = at.view(*at.shape, *[1] * (self.values.ndim - 2)).expand(*at.shape, *self.values.shape[2:])
        return self.values.gather(1, index)

    def select(self, rows: Tensor) -> None:
        if self.values.numel():
            self.values = self.values[rows]


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [B, heads, slots, d], for transformers' `Cache`."""

    is_sliding = False

    def __init__(self, slots: Slots):
        super().__init__()
        self.slots, self.stores = slots, (slots.keep(), slots.keep())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: memory is taken by the first `update`."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, heads, n, d] to the slots of the pass under way; gives all that attention looks at."""
        self.is_initialized, used = True, self.slots.used
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            if self.slots.batch == 1 and store.values.numel():  # one row's slots follow on each other
                store.values[:, used - states.shape[2] : used] = states.transpose(1, 2)
            else:
                store.write(states.transpose(1, 2), self.slots.at)
        keys, values = (store.values[:, :used].transpose(1, 2) for store in self.stores)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As many as attention looks at, from the first."""
        return self.slots.used, 0

    def get_seq_length(self) -> int:
        """Slots in use before the pass under way."""
        return self.slots.used - self.slots.at.shape[1]

    def get_max_length(self) -> int:
        """Slots of a row."""
        return self.slots.capacity

    get_max_cache_shape = get_max_length  # its name in transformers before 5.20
