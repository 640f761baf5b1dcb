"""Who sees whom, said once: as a dense mask (CPU, small cases) or as a FlexAttention block mask (GPU).

The rule, for query q and key k of one row:

    same segment, k not a register, and (k's causal index at most q's, or both in the prefix of a prefix-LM)
    or q is k

so regular tokens never see a register, and a register sees the regular tokens up to its anchor and itself.

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


def dense_mask(layout: Layout, dtype: torch.dtype | None = None, window: int | None = None) -> Tensor:
    """bool [B, 1, L, L], True where the query (third axis) sees the key (fourth axis). Padding sees itself only."""
    q, k = (slice(None), slice(None), None), (slice(None), None, slice(None))
    both = layout.prefix[k] & layout.prefix[q]
    sees = (layout.causal_index[k] <= layout.causal_index[q]) | both
    sees &= (layout.segment[k] == layout.segment[q]) & ~layout.register[k] & (layout.segment[k] >= 0)
    if window is not None:
        sees &= _near(layout.position[q] - layout.position[k], both, window)
    sees |= torch.eye(layout.ids.shape[1], dtype=torch.bool, device=layout.ids.device)
    return sees[:, None]


def _near(distance: Tensor, both: Tensor, window: int) -> Tensor:
    """Whether a key so many positions before the query is inside its window; both: of two prefix tokens."""
    return torch.where(both, distance.abs() <= window, distance < window)


def additive_mask(layout: Layout, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """The same rule as floats [B, 1, L, L] to add to the scores: a bool would be added as 0 and 1, silently wrong."""
    return torch.where(dense_mask(layout, window=window), 0.0, torch.finfo(dtype).min).to(dtype)


def mask_mod(layout: Layout, window: int | None = None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same rule as a FlexAttention `mask_mod(batch, head, query, key)`."""
    segment, causal_index, prefix, register = layout.segment, layout.causal_index, layout.prefix, layout.register

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        both = prefix[b, k] & prefix[b, q]
        earlier = (causal_index[b, k] <= causal_index[b, q]) | both
        same = (segment[b, k] == segment[b, q]) & (segment[b, k] >= 0)
        seen = same & ~register[b, k] & earlier
        if window is not None:
            seen = seen & _near(layout.position[b, q] - layout.position[b, k], both, window)
        return seen | (q == k)

    return rule


def block_mask(layout: Layout, dtype: torch.dtype | None = None, window: int | None = None) -> Any:
    """The same rule as a FlexAttention BlockMask on the layout's device."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, length = layout.ids.shape
    return create_block_mask(mask_mod(layout, window), batch, None, length, length, device=layout.ids.device)


def visible_pairs(layout: Layout) -> int:
    """How many pairs of a token and one that it sees a layout has, padding left out; in the memory of one row."""
    rows = range(len(layout.ids))
    return sum(int(dense_mask(layout.row(row)).sum()) for row in rows) - int((layout.segment < 0).sum())
