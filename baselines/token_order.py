"""Token order prediction: a second output layer ranks the coming tokens by how soon they come (arXiv 2508.19228).

answer       A  B  A  C        at the last prompt token: A comes next, B after it, C last
distance     0  1  .  3        of each token's first occurrence; scores are minus that
weights      softmax(0, -1, -3) for A, B, C, nothing for any other token

    L = L_next + weight L_order,   L_order = - sum_v softmax(scores)_v log softmax(U h)_v

U is an output layer of its own, d x V without biases, on the hidden state that the model's output layer reads.
Equations, weight 1, and answer tokens as the only ones with a score are those of the authors' code
(zaydzuhri/token-order-prediction, and its fork of Next-Token-Failures). The window keeps distances below it, as the
authors' kernel does; their plain version keeps one more. The mean is over positions that predict an answer token;
theirs counts those without any score, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mutor.checks import setting
from mutor.mtp.method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from mutor.mtp.layout import Layout
    from mutor.mtp.loss import LossTargets

WEIGHTLESS = 104  # from this distance on a weight is exp(-104) at most, which is 0 in float32


@dataclass(frozen=True)
class TokenOrderConfig:
    """Settings of token_order; defaults are the paper's."""

    window: int = setting(0, doc="tokens ahead that are ranked, 1: the next alone; 0: all of the answer", low=0)
    weight: float = setting(1.0, doc="weight of the ranking loss beside that of next-token", low=0, open_ends=True)


class TokenOrder(Method):
    """Loss L_1 + weight L_order, a cross entropy with the order of the coming answer tokens."""

    Config = TokenOrderConfig
    config: TokenOrderConfig
    source = "Zuhri et al., arXiv 2508.19228"
    adds = "an output layer"

    def add_parameters(self) -> None:
        """An output layer."""
        from torch import nn

        self.order = self.trunk.new_linear(self.trunk.width, self.trunk.vocabulary, output=True)
        self.trunk.add(nn.ModuleDict({"order": self.order}))

    def loss_targets(self, layout: Layout) -> dict[str, LossTargets]:
        """Where a next token is predicted, the coming ones are ranked: ids int64 [N, K], see `coming_tokens`."""
        found = super().loss_targets(layout)
        ahead = coming_tokens(layout, min(self.config.window or WEIGHTLESS, WEIGHTLESS))
        return found | {"order": replace(found["next_token"], target=ahead)}

    def compute_loss(
        self, model: Any, layout: Layout, loss_targets: dict[str, LossTargets] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Both losses are means over the same positions."""
        from mutor.mtp.loss import head_loss

        loss_targets = loss_targets or self.loss_targets(layout)
        normed = self.trunk(model, layout).normed
        plain = self.cross_entropy(normed, loss_targets["next_token"])
        order = head_loss(self.order, normed, loss_targets["order"], self.trunk.vocabulary, listwise)
        return plain + self.config.weight * order, {"next_token": plain.detach(), "order": order.detach()}


def coming_tokens(layout: Layout, window: int) -> Tensor:
    """int64 [N, K]: for each of the N targets, in order, it and those after it in its sequence, at their distance.

    -100 where the sequence has ended, and for a token that has come before. K: the longest answer's tokens, at most
    `window`; 0: no limit.
    """
    import torch

    from mutor.mtp.layout import IGNORE

    has = layout.target != IGNORE
    token, sequence = layout.target[has], sequence_numbers(layout)[has]
    count = len(token)
    number = torch.arange(count)
    longest = int(sequence.unique(return_counts=True)[1].max()) if count else 1
    # of each target, the one before it in its sequence with the same token
    key = sequence * (int(layout.target.max()) + 1) + token
    order = key.argsort(stable=True)
    same = key[order][1:] == key[order][:-1]
    before = torch.full_like(token, -1)
    before[order[1:]] = torch.where(same, order[:-1], -1)
    ahead = number[:, None] + torch.arange(min(window or longest, longest))
    inside, ahead = ahead < count, ahead.clamp(max=count - 1)
    inside = inside & (sequence[ahead] == sequence[:, None])
    return torch.where(inside & (before[ahead] < number[:, None]), token[ahead], IGNORE)


def sequence_numbers(layout: Layout) -> Tensor:
    """int64 [B, L]: a number of each token's sequence that no other sequence of the batch has."""
    import torch

    rows, length = layout.ids.shape
    return torch.arange(rows)[:, None] * length + layout.segment


def listwise(logits: Tensor, ahead: Tensor) -> Tensor:
    """[n]: cross entropy of logits [n, V] with the order of the tokens `ahead` [n, K]; without tensors as wide as V."""
    import torch

    from mutor.mtp.layout import IGNORE

    there, distance = ahead != IGNORE, torch.arange(ahead.shape[1], device=ahead.device)
    weights = torch.where(there, -distance.float(), -torch.inf).softmax(-1)
    return logits.logsumexp(-1) - (weights * logits.gather(1, ahead.clamp(min=0))).sum(-1)
