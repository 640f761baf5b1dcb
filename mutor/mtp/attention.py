"""Who sees whom, said once: as a dense mask (CPU, small cases) or as a FlexAttention block mask (GPU).

The rule, for query q and key k of one row:

    same document, k not a register, and (k no later than q's order, or both in the prefix of a prefix-LM)
    or q is k

so regular tokens never see a register, and a register sees the regular tokens up to its anchor and itself.
"""

from typing import Any

import torch
from torch import Tensor

from mutor.mtp.layout import Layout


def dense_mask(layout: Layout) -> Tensor:
    """bool [B, 1, L, L], True where the query (third axis) sees the key (fourth axis). Padding sees itself only."""
    q, k = (slice(None), slice(None), None), (slice(None), None, slice(None))
    sees = (layout.causal_index[k] <= layout.causal_index[q]) | (layout.prefix[k] & layout.prefix[q])
    sees &= (layout.segment[k] == layout.segment[q]) & ~layout.register[k] & (layout.segment[k] >= 0)
    sees |= torch.eye(layout.ids.shape[1], dtype=torch.bool, device=layout.ids.device)
    return sees[:, None]


def mask_mod(layout: Layout) -> Any:
    """The same rule as a FlexAttention `mask_mod(batch, head, query, key)`."""
    segment, causal_index, prefix, register = layout.segment, layout.causal_index, layout.prefix, layout.register

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        earlier = (causal_index[b, k] <= causal_index[b, q]) | (prefix[b, k] & prefix[b, q])
        same = (segment[b, k] == segment[b, q]) & (segment[b, k] >= 0)
        return (same & ~register[b, k] & earlier) | (q == k)

    return rule


def block_mask(layout: Layout) -> Any:
    """The same rule as a FlexAttention BlockMask on the layout's device."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, length = layout.ids.shape
    return create_block_mask(mask_mod(layout), batch, None, length, length, device=layout.ids.device)


def attention_mask(layout: Layout, implementation: str, dtype: torch.dtype) -> Any:
    """The mask in the form that transformers' attention `implementation` takes.

    sdpa: bool. eager: floats to add (a bool would be added as 0 and 1, silently wrong). flex_attention: BlockMask.
    Raises ValueError for an implementation that can't hold an arbitrary mask.
    """
    if implementation == "sdpa":
        return dense_mask(layout)
    if implementation == "flex_attention":
        return block_mask(layout)
    if implementation == "eager":
        return torch.where(dense_mask(layout), 0.0, torch.finfo(dtype).min).to(dtype)
    raise ValueError(f"attention {implementation!r} can't hold registers; allowed: sdpa, eager, flex_attention")
