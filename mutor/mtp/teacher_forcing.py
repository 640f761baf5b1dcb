"""Scores under teacher forcing: whether the likeliest token is the right one, behind right tokens."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mutor.mtp.backbone import Backbone
from mutor.mtp.layout import IGNORE, Example, Layout, collate
from mutor.mtp.loss import LossTargets, cross_entropy, head_loss
from mutor.mtp.method import Context, Method


@torch.no_grad()
def teacher_forced_scores(
    model: Any, method: Method, context: Context, examples: Sequence[tuple[np.ndarray, int]], batch_size: int
) -> tuple[np.ndarray, float]:
    """Teacher-forced argmax accuracy and mean loss on the inputs the method feeds, registers left out.

    Returns bool [N, A] (A: longest answer, False beyond an answer's end) and the loss in nats a token. As in training,
    logits are those of the rows with a target alone, and never all at once.
    """
    attached = getattr(method, "trunk", None)
    trunk = attached if attached is not None and attached.model is model else Backbone(model)  # of a plain checkpoint
    longest = max(len(ids) - prefix for ids, prefix in examples)
    right, loss, tokens = np.zeros((len(examples), longest), dtype=bool), 0.0, 0
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        rows = collate([Example(ids, prefix) for ids, prefix in part], context.pad_id)
        layout = method.eval_layout(rows, context).to(model.device)
        hit, summed = _hits_and_loss(trunk, layout)
        loss, tokens = loss + summed, tokens + len(hit)
        predicts = (layout.target != IGNORE).sum(1).cumsum(0).tolist()
        for i, row in enumerate(np.split(hit, predicts[:-1])):
            right[start + i, : len(row)] = row  # wherever a method's own tokens move the answer to
    return right, loss / tokens


def _hits_and_loss(trunk: Backbone, layout: Layout) -> tuple[np.ndarray, float]:
    """Whether each target of a layout is the likeliest token, bool [n], row by row; and the sum of their losses."""
    hits: list[Tensor] = []

    def criterion(logits: Tensor, target: Tensor) -> Tensor:
        hits.append(logits.argmax(-1) == target)
        return cross_entropy(logits, target)

    targets = LossTargets.of(layout.target, layout.segment)
    summed = replace(targets, count=torch.ones_like(targets.count))
    loss = head_loss(trunk.logits, trunk(trunk.model, layout).normed, summed, trunk.vocabulary, criterion)
    return torch.cat(hits).cpu().numpy(), float(loss)
