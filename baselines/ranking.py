"""Ranking into the future: the model's own logits rank the coming tokens (Frydenlund, arXiv 2503.10542, ACL 2025).

prompt       ... P  A  Q  B ...        answer   A  B  C
at the last prompt token:  A over B over C, and each of them over P and Q
one token on:                   B over C, and both over P and Q

    L = L_next + weight L_rank,   L_rank = sum over those pairs of max(0, 1 - (logit of the first - of the second))

The sum over pairs of what is still to come, and the margin of 1, are the source's. It ranks the right arm of a star
graph over the others. Here these are the distinct tokens of the prompt that the answer does not hold, which means
something for every task. Of a token that comes twice the first counts. Not found: whether the source adds the loss to
that of next-token, and with which weight. A large `weight` leaves the ranking alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mutor.checks import setting
from mutor.mtp.method import Method

from .token_order import coming_tokens, sequence_numbers

if TYPE_CHECKING:
    from torch import Tensor

    from mutor.mtp.layout import Layout
    from mutor.mtp.loss import LossTargets


@dataclass(frozen=True)
class RankingConfig:
    """Settings of ranking; it adds no parameters."""

    window: int = setting(0, doc="tokens ahead that are ranked, 1: the next alone; 0: all of the answer", low=0)
    others: bool = setting(True, doc="whether they are ranked over the prompt's tokens that the answer does not hold")
    weight: float = setting(1.0, doc="weight of the ranking loss beside that of next-token", low=0, open_ends=True)

    def __post_init__(self) -> None:
        if self.window == 1 and not self.others:
            raise ValueError("window: 1 token without others has nothing to be ranked over; allowed: 0, 2, 3, ...")


class Ranking(Method):
    """Loss L_1 + weight L_rank, a pairwise hinge, both on the same logits, which are computed once."""

    Config = RankingConfig
    config: RankingConfig
    source = "Frydenlund, arXiv 2503.10542"

    def loss_targets(self, layout: Layout) -> dict[str, LossTargets]:
        """One list, of ids int64 [N, 2, M]: the next token and those to come, and what they are ranked over."""
        import torch
        from torch.nn.functional import pad

        from mutor.mtp.layout import IGNORE

        found = super().loss_targets(layout)["next_token"]
        ahead = coming_tokens(layout, self.config.window)
        others = other_tokens(layout) if self.config.others else ahead[:, :0]
        width = max(ahead.shape[1], others.shape[1])
        both = [pad(some, (0, width - some.shape[1]), value=IGNORE) for some in (ahead, others)]
        return {"next_token": replace(found, target=torch.stack(both, dim=1))}

    def compute_loss(
        self, model: Any, layout: Layout, loss_targets: dict[str, LossTargets] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Both losses are means over the same positions, of the pairs' sum for the ranking."""
        import torch

        from mutor.mtp.loss import cross_entropy, head_loss

        targets = (loss_targets or self.loss_targets(layout))["next_token"]
        values: list[Tensor] = []  # of the ranking, part by part, for the log

        def both(logits: Tensor, wanted: Tensor) -> Tensor:
            ranked = pairwise_hinge(logits, wanted[:, 0], wanted[:, 1])
            values.append(ranked.detach())
            return cross_entropy(logits, wanted[:, 0, 0]) + self.config.weight * ranked

        width = targets.target.shape[2]
        wide = max(self.trunk.vocabulary, 2 * width * width)  # pairs take memory, too
        total = head_loss(self.trunk.logits, self.trunk(model, layout).normed, targets, wide, both)
        ranking = (torch.cat(values) * targets.share).sum() / targets.count.clamp(min=1)
        return total, {"next_token": total.detach() - self.config.weight * ranking, "ranking": ranking}


def other_tokens(layout: Layout) -> Tensor:
    """int64 [N, P]: for each of the N targets, the distinct tokens of its prompt that its answer does not hold.

    In the order of their ids; -100 where a prompt has fewer than the others.
    """
    import torch

    from mutor.mtp.layout import IGNORE

    has, sequence = layout.target != IGNORE, sequence_numbers(layout)
    prompt = (layout.segment >= 0) & ~layout.register
    prompt[:, 1:] &= ~(has[:, :-1] & (sequence[:, 1:] == sequence[:, :-1]))
    base = int(torch.maximum(layout.ids, layout.target).max()) + 1
    asked = (sequence * base + layout.ids)[prompt].unique()
    found = asked[~torch.isin(asked, (sequence * base + layout.target)[has])]
    owners, of_target = sequence[has].unique(return_inverse=True)
    found = found[torch.isin(found // base, owners)]
    owner, token = torch.searchsorted(owners, found // base), found % base
    column = torch.arange(len(found)) - torch.searchsorted(owner, owner)
    others = torch.full((len(owners), int(column.max()) + 1 if len(found) else 0), IGNORE)
    others[owner, column] = token
    return others[of_target]


def pairwise_hinge(logits: Tensor, ahead: Tensor, others: Tensor) -> Tensor:
    """[n]: sum over pairs of max(0, 1 - difference) of logits [n, V]: tokens `ahead` [n, K] over all later ones, and
    over `others` [n, P]; -100 is no token."""
    import torch

    from mutor.mtp.layout import IGNORE

    def scores(ids: Tensor, none: float) -> Tensor:  # infinite where no token is: no pair of it has a loss
        return logits.gather(1, ids.clamp(min=0)).masked_fill(ids == IGNORE, none)

    above = scores(ahead, torch.inf)[:, :, None] - 1
    below = [(scores(some, -torch.inf)[:, None] - above).relu() for some in (ahead, others)]
    return below[0].triu(1).sum((1, 2)) + below[1].sum((1, 2))
