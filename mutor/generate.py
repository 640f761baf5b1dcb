"""Answers to prompts of equal length: greedy decoding with transformers' generate, or all tokens in one pass."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def greedy(model: Any, prefix: Tensor, length: int, *, prefix_lm: bool = False) -> Tensor:
    """int64 [B, length]: greedy decoding with cache, no teacher forcing. prefix: int64 [B, P], no padding.

    With `prefix_lm` the prefix is read in both directions and decoding stays causal.
    """
    extra = {"is_causal": False} if prefix_lm else {}
    out = model.generate(
        prefix,
        attention_mask=torch.ones_like(prefix),
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **extra,
    )
    return out[:, prefix.shape[1] :]


@torch.no_grad()
def in_one_pass(model: Any, prefix: Tensor, length: int, dummy_id: int, *, prefix_lm: bool = False) -> Tensor:
    """int64 [B, length]: argmax after the prefix and after each of length - 1 dummy tokens, all in one forward."""
    from mutor.attention import attention_mask
    from mutor.layout import Layout

    batch, start = prefix.shape
    ids = torch.cat([prefix, prefix.new_full((batch, length - 1), dummy_id)], dim=1)
    index = torch.arange(ids.shape[1], device=ids.device).expand(batch, -1)
    zero = torch.zeros_like(ids)
    layout = Layout(ids, index, zero, index, (index < start) & prefix_lm, zero.bool(), zero)
    mask = attention_mask(layout, model.config._attn_implementation, model.dtype)
    logits = model(input_ids=ids, position_ids=index, attention_mask=mask, use_cache=False).logits
    return logits[:, start - 1 :].argmax(-1)
