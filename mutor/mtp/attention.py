"""Who sees whom, said once: as a dense mask (CPU, small cases) or as a FlexAttention block mask (GPU).

The rule, for query q and key k of one row:

    same segment, k not a register, and (k's causal index at most q's, or both in the prefix of a prefix-LM)
    or q is k

so regular tokens never see a register, and a register sees the regular tokens up to its anchor and itself.

mutor/registry.py: ATTENTION says which of these masks an attention implementation takes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mutor.mtp.layout import Layout
from mutor.registry import ATTENTION, resolve


def attention_mask(layout: Layout, implementation: str, dtype: torch.dtype) -> Any:
    """The mask in the form that transformers' attention `implementation` takes; dtype: of the model's weights.

    Raises ValueError for an implementation that is not in the table of backends.
    """
    if implementation not in ATTENTION:
        raise ValueError(f"attention {implementation!r} can't hold registers; allowed: {', '.join(sorted(ATTENTION))}")
    return resolve(ATTENTION[implementation].mask)(layout, dtype)


def dense_mask(layout: Layout, dtype: torch.dtype | None = None) -> Tensor:
    """bool [B, 1, L, L], True where the query (third axis) sees the key (fourth axis). Padding sees itself only."""
    q, k = (slice(None), slice(None), None), (slice(None), None, slice(None))
    sees = (layout.causal_index[k] <= layout.causal_index[q]) | (layout.prefix[k] & layout.prefix[q])
    sees &= (layout.segment[k] == layout.segment[q]) & ~layout.register[k] & (layout.segment[k] >= 0)
    sees |= torch.eye(layout.ids.shape[1], dtype=torch.bool, device=layout.ids.device)
    return sees[:, None]


def additive_mask(layout: Layout, dtype: torch.dtype) -> Tensor:
    """The same rule as floats [B, 1, L, L] to add to the scores: a bool would be added as 0 and 1, silently wrong."""
    return torch.where(dense_mask(layout), 0.0, torch.finfo(dtype).min).to(dtype)


def mask_mod(layout: Layout) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same rule as a FlexAttention `mask_mod(batch, head, query, key)`."""
    segment, causal_index, prefix, register = layout.segment, layout.causal_index, layout.prefix, layout.register

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        earlier = (causal_index[b, k] <= causal_index[b, q]) | (prefix[b, k] & prefix[b, q])
        same = (segment[b, k] == segment[b, q]) & (segment[b, k] >= 0)
        return (same & ~register[b, k] & earlier) | (q == k)

    return rule


def block_mask(layout: Layout, dtype: torch.dtype | None = None) -> Any:
    """The same rule as a FlexAttention BlockMask on the layout's device."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, length = layout.ids.shape
    return create_block_mask(mask_mod(layout), batch, None, length, length, device=layout.ids.device)


def visible_pairs(layout: Layout) -> int:
    """How many pairs of a token and one that it sees a layout has, padding left out; in the memory of one row."""
    rows = range(len(layout.ids))
    return sum(int(dense_mask(layout.row(row)).sum()) for row in rows) - int((layout.segment < 0).sum())
