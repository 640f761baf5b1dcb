"""Same-logit multi-token prediction: no heads, the next token's logits are scored on later tokens, too.

softmax at t               x_(t+1)   x_(t+2)      x_(t+3)
first third of training    1         0.5          0.25 --> 0
second third               1         0.5 --> 0    0
last third                 1         0            0

From modded-nanogpt (github.com/KellerJordan/modded-nanogpt, pull request 178). The weights are those of d_max 3: they
are powers of one, and fall in a line, the furthest token's first, each in one of d_max equal stages. A softmax can't
have several tokens at once, so that a constant weight costs next-token loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mutor.checks import setting
from mutor.mtp.method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from mutor.mtp.layout import Layout
    from mutor.mtp.loss import LossTargets
    from mutor.mtp.settings import Progress


@dataclass(frozen=True)
class SameLogitsConfig:
    """Settings of same_logits; defaults are the published ones."""

    d_max: int = setting(3, doc="furthest token scored: x_(t + d_max)", low=2)
    weight: float = setting(0.5, doc="weight of x_(t+2), above 0; its powers those further on", low=0, high=1)
    weight_schedule: str = setting(
        "stages", doc="the weights fall one after the other, or stay", choices=("stages", "constant")
    )

    def __post_init__(self) -> None:
        if not self.weight:
            raise ValueError("weight: 0 leaves next_token; allowed: (0, 1]")

    def weights(self, progress: Progress) -> list[float]:
        """What x_(t+1) .. x_(t+d_max) count in the step that comes next."""
        constant = [self.weight**k for k in range(self.d_max)]
        if self.weight_schedule == "constant":
            return constant
        left = self.d_max * (progress.steps - progress.step) / progress.steps  # stages; a weight falls in its own
        return [1.0, *(constant[k] * min(1.0, max(0.0, left - k)) for k in range(1, self.d_max))]


class SameLogits(Method):
    """Loss L_1 + w_2 L_2 + w_3 L_3 .. of one softmax, each a mean over its own tokens; weights fall to zero."""

    Config = SameLogitsConfig
    config: SameLogitsConfig
    source = "github.com/KellerJordan/modded-nanogpt, pull request 178"
    shortest_answer = 2

    def targets(self, layout: Layout) -> dict[str, Tensor]:
        """The next token, and those 2 to d_max further on."""
        from mutor.mtp.layout import targets_ahead

        return super().targets(layout) | {
            f"ahead_{k}": targets_ahead(layout, k) for k in range(2, self.config.d_max + 1)
        }

    def compute_loss(
        self, model: Any, layout: Layout, loss_targets: dict[str, LossTargets] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """All losses of the same logits, which are computed once."""
        import torch

        from mutor.mtp.loss import LossTargets, head_loss

        loss_targets = loss_targets or self.loss_targets(layout)
        index = loss_targets["next_token"].index  # ascending, and those of all the others are among them
        target = index.new_zeros(len(index), len(loss_targets))
        share = target.float()
        for column, each in enumerate(loss_targets.values()):
            at = torch.searchsorted(index, each.index)
            target[at, column] = each.target
            share[at, column] = each.share / each.count.clamp(min=1)
        weights = share.new_tensor(self.config.weights(self.progress))
        seen: list[Tensor] = []

        def criterion(logits: Tensor, wanted: Tensor) -> Tensor:
            losses = -logits.log_softmax(-1).gather(1, wanted)
            seen.append(losses.detach())
            return losses

        together = LossTargets(index, target, share * weights, index.new_ones(()))
        normed = self.trunk(model, layout).normed
        total = head_loss(self.trunk.logits, normed, together, self.trunk.vocabulary, criterion)
        return total, dict(zip(loss_targets, (torch.cat(seen) * share).sum(0), strict=True))

    def step_flops(self, layout: Layout, loss_targets: dict[str, LossTargets]) -> int:
        """As next-token prediction's: the output layer is applied once at each place."""
        return super().step_flops(layout, {"next_token": loss_targets["next_token"]})
