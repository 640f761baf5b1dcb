"""Sequential multi-token prediction: DeepSeek-V3's modules (arXiv 2412.19437, section 2.2).

Module k (k = 1 .. d_max - 1) keeps the causal chain, with the model's own embedding, final norm and output layer:

    h'_i = M_k [RMSNorm(h^(k-1)_i); RMSNorm(Emb(x_(i+k)))]      M_k: d x 2d, hidden first as the paper writes it
    h^k  = Layer_k(h')                                          h^0: the trunk's last hidden state before its norm
    p(x_(i+k+1)) = Output(Norm(h^k_i))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mutor.checks import setting
from mutor.mtp.method import Method
from mutor.mtp.settings import HeadSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mutor.mtp.ahead import Ahead
    from mutor.mtp.drafts import Drafter
    from mutor.mtp.layout import Layout
    from mutor.mtp.loss import LossTargets
    from mutor.mtp.passes import BackboneOutput


@dataclass(frozen=True)
class SequentialMTPConfig(HeadSettings):
    """Settings of sequential_mtp; defaults are the paper's (d_max 2, a 0.1)."""

    d_max: int = setting(2, doc="furthest token predicted; a module for each further token", low=2)


class SequentialMTP(Method):
    """Loss (1 - a) L_1 + a mean_k L_k over the modules' depths.

    A prefix-LM stays free of leaks: losses are read from the last prefix token on, and a token at depth k holds no
    embedding beyond x_(i+k), while its target is x_(i+k+1).
    """

    Config = SequentialMTPConfig
    config: SequentialMTPConfig
    source = "DeepSeek-V3, arXiv 2412.19437"
    adds = "a module for each further token: two norms, a projection and a layer"

    @property
    def shortest_answer(self) -> int:  # type: ignore[override]
        """The first module looks a leap beyond the next token."""
        return 1 + self.config.leap

    def add_parameters(self) -> None:
        """Modules: two norms, a projection of 2d to d, one layer of the model's kind."""
        import torch
        from torch import nn

        trunk, width = self.trunk, self.trunk.width
        modules: list[Any] = []
        for _ in self.config.further:
            with torch.device(trunk.embedding.weight.device):
                parts = {"hidden_norm": nn.RMSNorm(width, eps=1e-6), "token_norm": nn.RMSNorm(width, eps=1e-6)}
            projection = trunk.new_linear(2 * width, width)
            modules.append(nn.ModuleDict({**parts, "projection": projection, "layer": trunk.new_layer()}))
        self.depths = modules
        trunk.add(nn.ModuleDict({"depths": nn.ModuleList(modules)}))

    def targets(self, layout: Layout) -> dict[str, Tensor]:
        """Module k predicts the token 1 + k leaps further on."""
        from mutor.mtp.layout import targets_ahead

        further = enumerate(self.config.further, start=1)
        return super().targets(layout) | {f"depth_{k}": targets_ahead(layout, ahead) for k, ahead in further}

    def compute_loss(
        self, model: Any, layout: Layout, loss_targets: dict[str, LossTargets] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Each depth's loss is a mean over its own tokens; those that a schedule has reached are averaged."""
        import torch

        from mutor.mtp.loss import no_loss
        from mutor.mtp.segments import within_segments

        config = self.config
        loss_targets = loss_targets or self.loss_targets(layout)
        out = self.trunk(model, layout)
        plain = self.cross_entropy(out.normed, loss_targets["next_token"])
        ahead = {f"depth_{k}": far for k, far in enumerate(config.further, start=1)}
        limit = config.entropy_limit
        loss_targets = within_segments(self.trunk, out.normed, layout, loss_targets, ahead, limit)
        hidden, losses, extra = out.hidden, [], no_loss(self._idle())
        for k, depth in enumerate(self._active(), start=1):
            known = 1 + (k - 1) * config.leap  # the token that the module before predicts
            ids = layout.ids.roll(-known, dims=1)  # what wraps around stands where no loss is
            hidden = self._deeper(out, depth, hidden, ids)
            losses.append(self.cross_entropy(self.trunk.norm(hidden), loss_targets[f"depth_{k}"]))
        a = self.config.weight(self.progress)
        parts = {f"depth_{k}": plain.new_zeros(()) for k in range(1, len(self.depths) + 1)}
        parts |= {f"depth_{k}": loss.detach() for k, loss in enumerate(losses, start=1)}
        if losses:
            extra = extra + torch.stack(losses).mean()
        return (1 - a) * plain + a * extra, {"next_token": plain.detach(), **parts}

    def resting(self) -> list[nn.Parameter]:
        """Modules that a schedule leaves out, too."""
        return [*super().resting(), *self._idle()]

    def _active(self) -> list[Any]:
        return self.depths[: self.config.active(self.progress)]

    def _idle(self) -> list[nn.Parameter]:
        return [p for depth in self.depths[len(self._active()) :] for p in depth.parameters()]

    def _deeper(self, out: BackboneOutput, depth: Any, hidden: Tensor, ids: Tensor) -> Tensor:
        """h^k of a module, [B, L, d], from h^(k-1) and the tokens k further on, ids int64 [B, L]."""
        import torch

        joined = [depth["hidden_norm"](hidden), depth["token_norm"](self.trunk.embedding(ids))]
        return out.apply_layer(depth["layer"], depth["projection"](torch.cat(joined, dim=-1)))

    def ahead(self, model: Any, layout: Layout) -> Iterator[Ahead]:
        """Module k at t, on the drafts of those before it: between t and x_(t+k+1) no true token is read.

        So it is what drafting reaches, and below what the loss says, which is of true tokens. With a leap nothing is
        predicted ahead: a module would want the tokens between.
        """
        from mutor.mtp.drafts import along_text

        following = layout.ids.flatten().clone()
        for found in super().ahead(model, layout):
            following[found.index] = found.logits.argmax(-1)
            yield found
        if self.config.leap == 1:
            draft = len(self.depths)
            yield from along_text(self.trunk, model, self.drafter(draft), draft, layout, following)

    def drafter(self, draft: int) -> Drafter:
        """Modules at the last token, each on the drafts of those before it.

        A module's states of the last tokens were made of drafts, so that they are made anew once the text is known.
        """
        from mutor.mtp.drafts import Drafter, Step, check_reach

        further = self.config.further if self.config.leap == 1 else ()
        check_reach(self, draft, further, f"{len(self.depths)} modules and leap {self.config.leap}")

        def propose(step: Step) -> None:
            window = step.window()
            hidden = window.out.hidden
            for k, depth in enumerate(self.depths[:draft], start=1):
                hidden = self._deeper(window.out, depth, hidden, step.text.gather(1, window.at + k))
                step.choose(self.trunk.logits(self.trunk.norm(window.here(hidden))))

        return Drafter(propose, reads_layers=True, earlier=draft - 1)
