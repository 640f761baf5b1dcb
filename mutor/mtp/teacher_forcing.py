"""Scores under teacher forcing: whether the likeliest token is the right one, behind right tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mutor.mtp.attention import attention_mask
from mutor.mtp.layout import IGNORE, Example, collate
from mutor.mtp.method import Context, Method


@torch.no_grad()
def teacher_forced_scores(
    model: Any, method: Method, context: Context, examples: Sequence[tuple[np.ndarray, int]], batch_size: int
) -> tuple[np.ndarray, float]:
    """Teacher-forced argmax accuracy and mean loss on the inputs the method feeds, registers left out.

    Returns bool [N, A] (A: longest answer, False beyond an answer's end) and the loss in nats a token.
    """
    longest = max(len(ids) - prefix for ids, prefix in examples)
    right, loss, tokens = np.zeros((len(examples), longest), dtype=bool), 0.0, 0
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        rows = collate([Example(ids, prefix) for ids, prefix in part], context.pad_id)
        layout = method.eval_layout(rows, context).to(model.device)
        mask = attention_mask(layout, model.config.get_text_config(), model.dtype)
        logits = model(
            input_ids=layout.ids, position_ids=layout.position, attention_mask=mask, use_cache=False
        ).logits.float()
        where = layout.target != IGNORE
        losses = torch.nn.functional.cross_entropy(logits[where], layout.target[where], reduction="sum")
        loss, tokens = loss + float(losses), tokens + int(where.sum())
        hits = (logits.argmax(-1) == layout.target).cpu().numpy()
        for i, (hit, predicts) in enumerate(zip(hits, where.cpu().numpy(), strict=True)):
            right[start + i, : predicts.sum()] = hit[predicts]  # wherever a method's own tokens move the answer to
    return right, loss / tokens
