"""Auxiliary targets beyond a token that the model could not foresee, left out of the loss (AdaMTP, arXiv 2608.00434).

A target x_(t+d) is left out where one of x_(t+1) .. x_(t+d-1), the tokens between, had a next-token distribution of
more than `entropy_limit` nats under the model as it is, without gradients. Offset 1 has none between.

Known of the source from notes alone: auxiliary losses are masked beyond a high-entropy boundary, with weight 0.1. Not
found there: the threshold, and whether it is one of entropy or of its rise; whether the target itself counts (here
not); what the loss is divided by (here by all targets, so that surprises make it smaller, and the parts of a batch add
up).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mutor.mtp.layout import Layout
from mutor.mtp.loss import LossTargets


@torch.no_grad()
def entropies(trunk: Any, normed: Tensor, index: Tensor) -> Tensor:
    """float32 [N]: entropy, in nats, of the next token at flattened positions index [N] of normed [B, L, d]."""
    rows = max(1, 2**25 // trunk.vocabulary)
    found = []
    for part in normed.flatten(0, 1).index_select(0, index).split(rows):
        logs = trunk.logits(part).float().log_softmax(-1)
        found.append(-(logs.exp() * logs).sum(-1))
    return torch.cat(found) if found else normed.new_zeros(0, dtype=torch.float32)


def within_segments(
    trunk: Any,
    normed: Tensor,
    layout: Layout,
    loss_targets: dict[str, LossTargets],
    ahead: Mapping[str, int | None],
    limit: float | None,
) -> dict[str, LossTargets]:
    """The loss targets, those left out with share 0; all as they are without a limit.

    normed: [B, L, d] of the trunk; ahead: by name of a loss, how many tokens on its targets are, None: registers, whose
    positions say it.
    """
    if limit is None:
        return loss_targets
    index = loss_targets["next_token"].index
    unsure = torch.zeros(layout.ids.numel(), dtype=torch.long, device=layout.ids.device)
    unsure[index] = (entropies(trunk, normed, index) > limit).long()
    # each row's regular tokens in their order, wherever they stand, and how many unsure ones are before each
    regular = (layout.segment >= 0) & ~layout.register
    order = layout.causal_index.masked_fill(~regular, torch.iinfo(torch.long).max).sort(dim=1)
    before = unsure.view_as(layout.ids).gather(1, order.indices).cumsum(1).roll(1, dims=1)
    before[:, 0] = 0
    place = torch.searchsorted(order.values, layout.causal_index.contiguous())
    anchor = layout.position.gather(1, order.indices).gather(1, place.clamp(max=layout.ids.shape[1] - 1))
    kept = {}
    for name, distance in ahead.items():
        at = loss_targets[name].index
        row, here = at // layout.ids.shape[1], place.flatten()[at]
        far = distance if distance is not None else (layout.position - anchor + 1).flatten()[at]
        between = before[row, here + far - 1] - before[row, here]
        kept[name] = replace(loss_targets[name], share=loss_targets[name].share * (between == 0))
    return {**loss_targets, **kept}
