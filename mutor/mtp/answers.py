"""Answers to prompts: token by token with a cache, or all tokens in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mutor.mtp.attention import attention_mask
from mutor.mtp.layout import Layout


def most_likely(logits: Tensor, step: int) -> Tensor:
    """Greedy: the token of the highest logit, the same at every step."""
    return logits.argmax(-1)


@dataclass(frozen=True)
class Prompts:
    """What is asked, in rows of equal length, and how answers are given.

    ids, attended: int64 [B, P], padded on the left; attended is 0 where padding stands, else 1. length: of the longest
    answer, in tokens. end_id: the token that ends an answer, None: all have `length` tokens. pad_id: stands behind an
    answer that ended. prefix_lm: prompts are read in both directions. choose: logits float32 [B, V] and the step
    0, 1, .. to the next tokens int64 [B]; with an `end_id`, of the rows that have not ended. compiled: with
    torch.compile and a cache of fixed size, which pays for long answers on a GPU.
    """

    ids: Tensor
    attended: Tensor
    length: int
    end_id: int | None = None
    pad_id: int = 0
    prefix_lm: bool = False
    choose: Callable[[Tensor, int], Tensor] = most_likely
    compiled: bool = False


@torch.no_grad()
def decode(model: Any, prompts: Prompts) -> Tensor:
    """int64 [B, length]: answers token by token, each behind those before it.

    Rows that have ended leave the batch: answers differ in length by factors, and the longest would hold up all.
    Raises ValueError for `compiled` prompts that are padded or whose answers end, as shapes would change.
    """
    from transformers import StaticCache

    ids, end, length = prompts.ids, prompts.end_id, prompts.length
    padded = not bool(prompts.attended.all())
    if prompts.compiled and (padded or end is not None):
        raise ValueError(f"compiled: not with padding or an end token, end_id: {end}; allowed: answers of one length")
    out = torch.full((len(ids), length), prompts.pad_id, device=ids.device)
    rows, going = torch.arange(len(ids), device=ids.device), torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    attended, feed, position = prompts.attended, ids, (prompts.attended.cumsum(-1) - 1).clamp(min=0)
    cache = StaticCache(model.config, max_cache_len=ids.shape[1] + length - 1) if prompts.compiled else None
    forward = torch.compile(model.forward) if prompts.compiled else model
    extra = {"is_causal": False} if prompts.prefix_lm else {}
    for step in range(length):
        state = forward(
            input_ids=feed,
            attention_mask=attended if padded else None,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **extra,
        )
        chosen, cache, extra = prompts.choose(state.logits[:, -1].float(), step), state.past_key_values, {}
        out[rows, step] = torch.where(going, chosen, prompts.pad_id)
        if end is not None:
            going &= chosen != end
            left = int(going.sum())
            if not left:
                break
            if left < 0.9 * len(going):  # not at each end, for it copies the cache
                cache.batch_select_indices(going.nonzero()[:, 0])
                rows, chosen, attended, position, going = (x[going] for x in (rows, chosen, attended, position, going))
        attended = torch.cat([attended, attended.new_ones(len(attended), 1)], dim=1)
        feed, position = chosen[:, None], position[:, -1:] + 1
    return out


@torch.no_grad()
def decode_in_one_pass(model: Any, prompts: Prompts) -> Tensor:
    """int64 [B, length]: chosen behind the prompt and behind each of length - 1 dummies (`pad_id`), in one forward.

    A dummy sees none behind it, so an answer does not depend on how many stand behind its end.
    """
    (batch, start), more = prompts.ids.shape, prompts.length - 1
    ids = torch.cat([prompts.ids, prompts.ids.new_full((batch, more), prompts.pad_id)], dim=1)
    attended = torch.cat([prompts.attended, prompts.attended.new_ones(batch, more)], dim=1)
    index, none = torch.arange(ids.shape[1], device=ids.device).expand(batch, -1), torch.zeros_like(ids)
    position, prefix = (attended.cumsum(-1) - 1).clamp(min=0), (index < start) & prompts.prefix_lm
    layout = Layout(ids, position, attended - 1, index, prefix, none.bool(), none)
    mask = attention_mask(layout, model.config.get_text_config(), model.dtype)
    logits = model(input_ids=ids, position_ids=position, attention_mask=mask, use_cache=False).logits
    behind = logits[:, start - 1 :].float()
    out = torch.stack([prompts.choose(behind[:, step], step) for step in range(prompts.length)], dim=1)
    if prompts.end_id is None:
        return out
    ends = (out == prompts.end_id).long()
    return out.masked_fill(ends.cumsum(1) > ends, prompts.pad_id)  # an end stands before it
