"""Greedy answers: to prompts of equal length or left-padded ones, token by token, or all tokens in one pass."""

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
def greedy_until(
    model: Any, ids: Tensor, attended: Tensor, length: int, end_id: int, pad_id: int, *, prefix_lm: bool = False
) -> Tensor:
    """int64 [B, length]: greedy decoding of left-padded prompts up to their end tokens, then padding.

    ids, attended: int64 [B, P], attended is 0 where padding stands. Answers differ in length by factors: rows that have
    ended leave the batch, which `generate` decodes to the end of its longest answer.
    """
    out = torch.full((len(ids), length), pad_id, device=ids.device)
    rows, going = torch.arange(len(ids), device=ids.device), torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    position, feed, cache = (attended.cumsum(-1) - 1).clamp(min=0), ids, None
    extra = {"is_causal": False} if prefix_lm else {}
    for step in range(length):
        state = model(
            input_ids=feed,
            attention_mask=attended,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **extra,
        )
        best, cache, extra = state.logits[:, -1].argmax(-1), state.past_key_values, {}
        out[rows[going], step] = best[going]
        going &= best != end_id
        left = int(going.sum())
        if not left:
            break
        if left < 0.9 * len(going):  # not at each end, for it copies the cache
            cache.batch_select_indices(going.nonzero()[:, 0])
            rows, best, attended, position, going = (x[going] for x in (rows, best, attended, position, going))
        attended = torch.cat([attended, attended.new_ones(len(attended), 1)], dim=1)
        feed, position = best[:, None], position[:, -1:] + 1
    return out


@torch.no_grad()
def in_one_pass(model: Any, prefix: Tensor, length: int, dummy_id: int, *, prefix_lm: bool = False) -> Tensor:
    """int64 [B, length]: argmax after the prefix and after each of length - 1 dummy tokens, all in one forward."""
    from mutor.mtp.attention import attention_mask
    from mutor.mtp.layout import Layout

    batch, start = prefix.shape
    ids = torch.cat([prefix, prefix.new_full((batch, length - 1), dummy_id)], dim=1)
    index = torch.arange(ids.shape[1], device=ids.device).expand(batch, -1)
    zero = torch.zeros_like(ids)
    layout = Layout(ids, index, zero, index, (index < start) & prefix_lm, zero.bool(), zero)
    mask = attention_mask(layout, model.config._attn_implementation, model.dtype)
    logits = model(input_ids=ids, position_ids=index, attention_mask=mask, use_cache=False).logits
    return logits[:, start - 1 :].argmax(-1)
