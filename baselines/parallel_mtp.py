"""Parallel multi-token prediction: one extra transformer layer per further token (Gloeckle et al., arXiv 2404.19737).

trunk --> norm --> output layer            x_(t+1)
  |--> layer 2 --> norm --> output layer   x_(t+2)      all layers read the trunk's last hidden state
  '--> layer 3 --> norm --> output layer   x_(t+3)      before the final norm; norm and output layer are shared
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mutor.checks import setting
from mutor.mtp.method import Method
from mutor.mtp.settings import HeadSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mutor.mtp.layout import Layout
    from mutor.mtp.loss import LossTargets


@dataclass(frozen=True)
class ParallelMTPConfig(HeadSettings):
    """Settings of parallel_mtp; defaults are the paper's (d_max 2, a 0.1)."""

    d_max: int = setting(2, doc="furthest token predicted; a head for each further token", low=2)


class ParallelMTP(Method):
    """Loss (1 - a) L_1 + a mean_k L_k, the heads trained one at a time in the memory of one."""

    Config = ParallelMTPConfig
    config: ParallelMTPConfig

    @property
    def shortest_answer(self) -> int:  # type: ignore[override]
        """The first head looks a leap beyond the next token."""
        return 1 + self.config.leap

    def add_parameters(self) -> None:
        """A layer of the model's own kind for each further token."""
        from torch import nn

        self.heads = nn.ModuleList(self.trunk.new_layer() for _ in self.config.further)
        self.trunk.add(nn.ModuleDict({"heads": self.heads}))

    def targets(self, layout: Layout) -> dict[str, Tensor]:
        """Head k predicts the token k further on."""
        from mutor.mtp.layout import targets_ahead

        return super().targets(layout) | {f"head_{k}": targets_ahead(layout, k) for k in self.config.further}

    def compute_loss(
        self, model: Any, layout: Layout, loss_targets: dict[str, LossTargets] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Each head's loss is a mean over its own tokens; active heads are averaged."""
        from mutor.mtp.loss import no_loss, one_at_a_time

        loss_targets = loss_targets or self.loss_targets(layout)
        out = self.trunk(model, layout)
        plain = self.cross_entropy(out.normed, loss_targets["next_token"])

        def head_loss(head: nn.Module, targets: LossTargets) -> Any:
            return lambda hidden: self.cross_entropy(self.trunk.norm(out.apply_layer(head, hidden)), targets)

        parts, extra = {f"head_{k}": plain.new_zeros(()) for k in self.config.further}, no_loss(self._idle())
        active = list(self.heads)[: self.config.active(self.progress)]
        losses = [
            head_loss(head, loss_targets[f"head_{k}"]) for k, head in zip(self.config.further, active, strict=False)
        ]
        if losses:
            shared = [*self.trunk.norm.parameters(), *self.trunk.head.parameters()]
            mean, values = one_at_a_time(losses, out.hidden, [*self.heads.parameters(), *shared])
            parts |= {f"head_{k}": value for k, value in zip(self.config.further, values, strict=False)}
            extra = extra + mean
        a = self.config.weight(self.progress)
        return (1 - a) * plain + a * extra, {"next_token": plain.detach(), **parts}

    def resting(self) -> list[nn.Parameter]:
        """Heads that a schedule leaves out, too."""
        return [*super().resting(), *self._idle()]

    def _idle(self) -> list[nn.Parameter]:
        idle = list(self.heads)[self.config.active(self.progress) :]
        return [p for head in idle for p in head.parameters()]
