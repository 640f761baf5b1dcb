"""Joint multi-token prediction: a short attention over the true tokens between (Ahn et al., arXiv 2503.21801).

    z_0 .. z_D = LayerNorm(Emb(x_t .. x_(t+D)) + gamma h_t)           D = horizon, h_t behind the final norm
    out_i      = attention of z_i to z_0 .. z_i, no feed-forward layer, a learned bias for each pair and head
    p(x_(t+1+i)) = Output(RMSNorm(out_i + h_t))                       i = 1 .. D
    L = L_next + weight mean_i L_i

Equations, gamma of 0.1, at most 4 heads, biases of 0, and the positions are those of NextLat's authors' implementation
(models/model_mtp_jtp.py): from each token, prompts' included, answer tokens alone are predicted. There the next token
comes from out_0, so that the deployed model keeps the attention. Here it comes from h_t, as the model itself predicts
it, and what is exported is plain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mutor.checks import setting
from mutor.mtp.method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from mutor.mtp.ahead import Ahead
    from mutor.mtp.drafts import Drafter
    from mutor.mtp.layout import Layout
    from mutor.mtp.loss import LossTargets


@dataclass(frozen=True)
class JointMTPConfig:
    """Settings of joint_mtp; defaults are the authors', the horizon is path length - 2 on star graphs."""

    horizon: int = setting(1, doc="tokens predicted beyond the next", low=1)
    weight: float = setting(1.0, doc="weight of their loss beside that of next-token", low=0, open_ends=True)


class JointMTP(Method):
    """Loss L_1 + weight mean_i L_i; the token i + 1 ahead is predicted from h_t and the i true tokens between."""

    Config = JointMTPConfig
    config: JointMTPConfig
    source = "Ahn et al., arXiv 2503.21801"
    adds = "an attention without feed-forward layer, and two norms"

    def add_parameters(self) -> None:
        """Two norms, four matrices, gamma and the biases [heads, D, D + 1]."""
        import torch
        from torch import nn

        trunk, width, ahead = self.trunk, self.trunk.width, self.config.horizon
        heads = min(4, trunk.config.num_attention_heads)
        self.heads = next(n for n in range(heads, 0, -1) if width % n == 0)
        with torch.device(trunk.embedding.weight.device):
            parts = {"combine": nn.LayerNorm(width), "norm": nn.RMSNorm(width, eps=1e-5)}
            bare = {"gamma": torch.tensor([0.1]), "bias": torch.zeros(self.heads, ahead, ahead + 1)}
        linear = {name: trunk.new_linear(width, width) for name in ("query", "key", "value", "output")}
        self.planner, self.bare = nn.ModuleDict({**parts, **linear}), nn.ParameterDict(bare)
        trunk.add(nn.ModuleDict({"planner": self.planner, "bare": self.bare}))

    def targets(self, layout: Layout) -> dict[str, Tensor]:
        """Head i + 1 predicts the token i + 1 further on; `planned`: the tokens from which any does."""
        import torch

        from mutor.mtp.layout import further_on

        ahead = range(1, self.config.horizon + 1)
        heads = {f"head_{i + 1}": further_on(layout.target, layout.segment, i) for i in ahead}
        planned = torch.stack(list(heads.values())).amax(0)
        return super().targets(layout) | heads | {"planned": planned}

    def compute_loss(
        self, model: Any, layout: Layout, loss_targets: dict[str, LossTargets] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Each head's loss is a mean over its own tokens; heads are averaged."""
        import torch

        loss_targets = loss_targets or self.loss_targets(layout)
        normed, ids = self.trunk(model, layout).normed, layout.ids.flatten()
        plain = self.cross_entropy(normed, loss_targets["next_token"])
        planned, horizon = loss_targets["planned"].index, self.config.horizon
        # tokens beyond a sequence are seen by no entry that predicts something
        between = planned[:, None] + torch.arange(horizon + 1, device=ids.device)
        tokens = self.trunk.embedding(ids[between.clamp(max=len(ids) - 1)])
        states = self.plan(normed.flatten(0, 1).index_select(0, planned), tokens)
        losses = {}
        for i in range(1, horizon + 1):
            targets = loss_targets[f"head_{i + 1}"]
            targets = replace(targets, index=torch.searchsorted(planned, targets.index))
            losses[f"head_{i + 1}"] = self.cross_entropy(states[None, :, i - 1], targets)
        total = plain + self.config.weight * torch.stack(list(losses.values())).mean()
        return total, {"next_token": plain.detach(), **{name: loss.detach() for name, loss in losses.items()}}

    def plan(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """[N, D, d]: normed states for x_(t+2) .. x_(t+1+D), from h_t [N, d] and Emb(x_t .. x_(t+D)) [N, D + 1, d]."""
        import torch

        part = self.planner
        entries = part["combine"](tokens + self.bare["gamma"] * hidden[:, None])

        def split(some: Tensor) -> Tensor:  # [N, heads, entries, width of a head]
            return some.unflatten(2, (self.heads, -1)).transpose(1, 2)

        query, key, value = (
            split(part["query"](entries[:, 1:])),
            split(part["key"](entries)),
            split(part["value"](entries)),
        )
        scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5 + self.bare["bias"]
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(2)  # entry i sees 0 .. i
        out = scores.masked_fill(later, -torch.inf).softmax(-1) @ value
        return part["norm"](part["output"](out.transpose(1, 2).flatten(2)) + hidden[:, None])

    def ahead(self, model: Any, layout: Layout) -> Iterator[Ahead]:
        """The attention over the drafts of the tokens between, which are its own, but for that of the next token."""
        import torch
        import torch.nn.functional as F

        from mutor.mtp.ahead import on_drafts

        horizon, ids = self.config.horizon, layout.ids.flatten()

        def state(index: Tensor, hidden: Tensor, drafts: Tensor) -> Tensor:
            count = drafts.shape[1]  # entries behind these are seen by none that is read
            between = F.pad(torch.cat([ids[index, None], drafts], dim=1), (0, horizon - count))
            return self.plan(hidden, self.trunk.embedding(between))[:, count - 1]

        normed = self.trunk(model, layout).normed
        yield from on_drafts(self.trunk, layout, normed, 1 + horizon, state)

    def drafter(self, draft: int) -> Drafter:
        """The attention at the last token over the drafts of those between."""
        from mutor.mtp.drafts import Drafter, Step, check_reach

        horizon = self.config.horizon
        check_reach(self, draft, range(2, horizon + 2), f"horizon {horizon}")

        def propose(step: Step) -> None:
            for number in range(draft):  # what stands behind the entry that is read is not seen by it
                between = step.text.gather(1, step.last[:, None] + step.text.new_tensor(range(horizon + 1)))
                step.choose(self.trunk.logits(self.plan(step.normed, self.trunk.embedding(between))[:, number]))

        return Drafter(propose)

    def step_flops(self, layout: Layout, loss_targets: dict[str, LossTargets]) -> int:
        """Of the attention: queries and outputs for D entries of each planned token, keys and values for D + 1."""
        scored = {name: each for name, each in loss_targets.items() if name != "planned"}
        planned, horizon, width = len(loss_targets["planned"].index), self.config.horizon, self.trunk.width
        tokens, entries = int((layout.segment >= 0).sum()), planned * (4 * horizon + 2)
        pairs = planned * horizon * (horizon + 3) // 2
        return super().step_flops(layout, scored) + 6 * width**2 * (entries - 4 * tokens) + 12 * width * pairs
