"""Who sees whom, said once as bounds, of which each backend makes what it takes.

The rule, for query q and key k of one row:

    low(q) <= key(k) <= high(q)   or   q is k

key(k) is a regular token's causal index, -1 for a register, so no other token sees one. low and high are the first and
the last regular token that q sees: a regular token up to itself, in the prefix of a prefix-LM up to the prefix's end, a
register up to its anchor. Padding sees itself alone.

Layers with a sliding window of W tokens see less: keys at positions above the query's minus W, and of two prefix tokens
of a prefix-LM those at most W apart, as transformers has it. A register's window ends at its own position id, that of
the token that normally predicts its target.

mutor/registry.py: ATTENTION says which of these masks an attention implementation takes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mutor.mtp.layout import Layout
from mutor.registry import ATTENTION, resolve

SLIDING = "sliding_attention"  # what transformers calls a layer with a sliding window


def attention_mask(layout: Layout, config: Any, dtype: torch.dtype, *, windows: bool = True) -> Any:
    """The mask as the model takes it: one for all layers, or where windows matter, one for each type of layer by name.

    config: the model's, as transformers has it for texts; dtype: of the model's weights; windows: whether it takes
    masks with sliding windows, else the layout has to be inside of them. Raises ValueError for an
    attention implementation that is not in the table of backends.
    """
    implementation = config._attn_implementation
    if implementation not in ATTENTION:
        raise ValueError(f"attention {implementation!r} can't hold registers; allowed: {', '.join(sorted(ATTENTION))}")
    make = resolve(ATTENTION[implementation].mask)
    window = sliding_window(config)
    if window is None or not windows or layout.ids.shape[1] <= window:
        return make(layout, dtype)
    within = make(layout, dtype, window)
    types = set(getattr(config, "layer_types", None) or ())
    return {kind: within if kind == SLIDING else make(layout, dtype) for kind in sorted(types)} if types else within


def sliding_window(config: Any) -> int | None:
    """How many tokens a layer with a sliding window sees; None for a model without such layers."""
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = getattr(config, "use_sliding_window", True) and (not types or SLIDING in types)
    return int(window) if window and slides else None


def bounds(layout: Layout, window: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """key, low and high of the rule above, each int32 [B, L], on the layout's device."""
    index, position, there = layout.causal_index, layout.position, layout.segment >= 0
    token, inside = there & ~layout.register, layout.segment.clamp(min=0)

    def of_sequence(values: Tensor, which: Tensor, least: bool) -> Tensor:
        """[B, L]: the least or greatest value in each token's sequence, of those tokens."""
        end = 2**31 - 1 if least else -1
        kept = torch.where(which, values, end)
        out = torch.full_like(kept, end).scatter_reduce(1, inside, kept, "amin" if least else "amax")
        return out.gather(1, inside)

    high = torch.where(layout.prefix, of_sequence(index, token & layout.prefix, least=False), index)
    low = of_sequence(index, token, least=True)
    if window is not None:  # positions count tokens of a sequence, as causal indices do, from another start
        start = of_sequence(index - position, token, least=True)
        low = torch.maximum(low, start + position - window + torch.where(layout.prefix, 0, 1))
        high = torch.where(layout.prefix, torch.minimum(high, start + position + window), high)
    key, high = torch.where(token, index, -1), torch.where(there, high, -1)
    return key.int(), low.int(), high.int()


def dense_mask(layout: Layout, dtype: torch.dtype | None = None, window: int | None = None) -> Tensor:
    """bool [B, 1, L, L], True where the query (third axis) sees the key (fourth axis). Padding sees itself only."""
    return dense(*bounds(layout, window))


def dense(key: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The dense mask of bounds."""
    sees = (low[:, :, None] <= key[:, None]) & (key[:, None] <= high[:, :, None])
    return (sees | torch.eye(key.shape[1], dtype=torch.bool, device=key.device))[:, None]


def additive_mask(layout: Layout, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """The same rule as floats [B, 1, L, L] to add to the scores: a bool would be added as 0 and 1, silently wrong."""
    return additive(dense_mask(layout, window=window), dtype)


def additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as floats: 0 where a key is seen, else the least of the dtype."""
    return torch.where(sees, 0.0, torch.finfo(dtype).min).to(dtype)


def mask_mod(layout: Layout, window: int | None = None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same rule as a FlexAttention `mask_mod(batch, head, query, key)`: a kernel reads three numbers a pair."""
    key, low, high = bounds(layout, window)

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((low[b, q] <= key[b, k]) & (key[b, k] <= high[b, q])) | (q == k)

    return rule


def block_mask(layout: Layout, dtype: torch.dtype | None = None, window: int | None = None) -> Any:
    """The same rule as a FlexAttention BlockMask on the layout's device."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, length = layout.ids.shape
    return create_block_mask(mask_mod(layout, window), batch, None, length, length, device=layout.ids.device)


def visible_pairs(layout: Layout) -> int:
    """How many pairs of a token and one that it sees a layout has, padding left out."""
    pairs = 0
    for key, low, high in zip(*bounds(layout), strict=True):
        keys = key[key >= 0].sort().values
        seen = torch.searchsorted(keys, high, right=True) - torch.searchsorted(keys, low)
        pairs += int(seen.clamp(min=0).sum())
    return pairs + int(layout.register.sum())  # each register sees itself
