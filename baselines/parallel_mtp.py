"""Parallel multi-token prediction: one extra transformer layer per further token (Gloeckle et al., arXiv 2404.19737).

trunk --> norm --> output layer            x_(t+1)
  |--> layer 2 --> norm --> output layer   x_(t+2)      all layers read the trunk's last hidden state
  '--> layer 3 --> norm --> output layer   x_(t+3)      before the final norm; norm and output layer are shared
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mutor.checks import setting
from mutor.mtp.method import AuxiliarySettings, Method

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mutor.mtp.ahead import Ahead
    from mutor.mtp.layout import Layout
    from mutor.mtp.loss import LossTargets


@dataclass(frozen=True)
class ParallelMTPConfig(AuxiliarySettings):
    """Settings of parallel_mtp; defaults are the paper's (d_max 2, a 0.1)."""

    d_max: int = setting(2, doc="furthest token predicted; d_max - 1 extra layers", low=2)


class ParallelMTP(Method):
    """Loss (1 - a) L_1 + a mean_k L_k, the heads trained one at a time in the memory of one."""

    Config = ParallelMTPConfig
    config: ParallelMTPConfig
    shortest_answer = 2

    def add_parameters(self) -> None:
        """d_max - 1 layers of the model's own kind."""
        from torch import nn

        self.heads = nn.ModuleList(self.trunk.new_layer() for _ in range(self.config.d_max - 1))
        self.trunk.add(nn.ModuleDict({"heads": self.heads}))

    def targets(self, layout: Layout) -> dict[str, Tensor]:
        """Head k predicts the token k further on."""
        from mutor.mtp.layout import targets_ahead

        return super().targets(layout) | {
            f"head_{k}": targets_ahead(layout, k) for k in range(2, self.config.d_max + 1)
        }

    def compute_loss(
        self, model: Any, layout: Layout, loss_targets: dict[str, LossTargets] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Each head's loss is a mean over its own tokens; heads are averaged."""
        from mutor.mtp.loss import one_at_a_time

        loss_targets = loss_targets or self.loss_targets(layout)
        out = self.trunk(model, layout)
        plain = self.cross_entropy(out.normed, loss_targets["next_token"])

        def head_loss(head: nn.Module, targets: LossTargets) -> Any:
            return lambda hidden: self.cross_entropy(self.trunk.norm(out.apply_layer(head, hidden)), targets)

        losses = [head_loss(head, loss_targets[f"head_{k}"]) for k, head in enumerate(self.heads, start=2)]
        shared = [*self.trunk.norm.parameters(), *self.trunk.head.parameters()]
        extra, values = one_at_a_time(losses, out.hidden, [*self.heads.parameters(), *shared])
        parts = {f"head_{k}": value for k, value in enumerate(values, start=2)}
        a = self.config.a
        return (1 - a) * plain + a * extra, {"next_token": plain.detach(), **parts}

    def ahead(self, model: Any, layout: Layout) -> Iterator[Ahead]:
        """Head k at t."""
        from mutor.mtp.ahead import read_off

        out = self.trunk(model, layout)
        yield from read_off(self.trunk, layout, 1, out.normed)
        for k, head in enumerate(self.heads, start=2):
            yield from read_off(self.trunk, layout, k, self.trunk.norm(out.apply_layer(head, out.hidden)))
