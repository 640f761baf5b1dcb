"""Next-latent prediction: a small network predicts the model's own next hidden states (Teoh et al., arXiv 2511.05963).

h_t is the hidden state behind the final norm, f a network that is dropped afterwards, sg no gradient:

    hhat_(t+i) = hhat_(t+i-1) + f(RMSNorm [Emb(x_(t+i)); hhat_(t+i-1)])       hhat_t = h_t,  i = 1 .. horizon
    L_h  = mean_i SmoothL1(hhat_(t+i), sg h_(t+i))
    L_kl = mean_i KL(sg p(. | h_(t+i)) || p(. | hhat_(t+i)))                  the output layer gets no gradient of it
    L    = L_next + lambda_h L_h + lambda_kl L_kl
    f: 2d -> H -> H -> d, GELU between, no biases; H = 128 round(proj_factor 2d / 128)

Masks are those of the authors' code (models/model_nextlat.py). L_h has all states of a sequence, of the prompt too, but
for that of its last token, from which nothing is predicted; L_kl has those from which an answer token is predicted.
Weights of f start like the model's own, where the authors' start from N(0, 0.02), and H is 128 at least. The authors
score star graphs by sampling; the suite's answers are greedy.
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
class NextLatentConfig:
    """Settings of next_latent; defaults are the paper's for star graphs, but for the horizon: path length - 2 there."""

    horizon: int = setting(1, doc="states ahead that are predicted, one from the other", low=1)
    lambda_h: float = setting(1.0, doc="weight of the distance to the states", low=0)
    lambda_kl: float = setting(1.0, doc="weight of the divergence from the states' predictions", low=0)
    proj_factor: float = setting(
        0.5,
        doc="width inside the network, as a share of its input's 2d; the authors' code has 1.0",
        low=0,
        open_ends=True,
    )

    def __post_init__(self) -> None:
        if not self.lambda_h and not self.lambda_kl:
            raise ValueError("lambda_h, lambda_kl: both are 0, which is next_token; allowed: one of them above 0")


class NextLatent(Method):
    """Loss L_1 + lambda_h L_h + lambda_kl L_kl; gradients flow through predicted states, not through their targets."""

    Config = NextLatentConfig
    config: NextLatentConfig
    source = "Teoh et al., arXiv 2511.05963"
    adds = "a network of three matrices and a norm"

    def add_parameters(self) -> None:
        """The network f."""
        import torch
        from torch import nn

        trunk, width = self.trunk, self.trunk.width
        inner = 128 * max(1, round(self.config.proj_factor * 2 * width / 128))
        with torch.device(trunk.embedding.weight.device):
            norm = nn.RMSNorm(2 * width, eps=1e-5)
        linear = [trunk.new_linear(*sizes) for sizes in ((2 * width, inner), (inner, inner), (inner, width))]
        self.dynamics = nn.Sequential(norm, linear[0], nn.GELU(), linear[1], nn.GELU(), linear[2])
        trunk.add(nn.ModuleDict({"dynamics": self.dynamics}))

    def targets(self, layout: Layout) -> dict[str, Tensor]:
        """From where which state is predicted, as its place in the flattened [B x L]: all, and those with a target."""
        import torch

        from mutor.mtp.layout import IGNORE, further_on

        found = super().targets(layout)
        tokens, predicts = (layout.segment >= 0) & ~layout.register, layout.target != IGNORE
        last = tokens & ~predicts
        last[:, :-1] &= layout.segment[:, 1:] != layout.segment[:, :-1]
        place = torch.arange(layout.ids.numel()).view(layout.ids.shape)
        for i in range(1, self.config.horizon + 1):
            kinds = {f"latent_{i}": tokens & ~last} | ({f"kl_{i}": predicts} if self.config.lambda_kl else {})
            for name, wanted in kinds.items():
                ahead = further_on(place.masked_fill(~wanted, IGNORE), layout.segment, i)
                found[name] = ahead.masked_fill(~tokens, IGNORE)
        return found

    def compute_loss(
        self, model: Any, layout: Layout, loss_targets: dict[str, LossTargets] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Each step ahead is a mean over its own states; steps are averaged."""
        import torch
        from torch.nn.functional import smooth_l1_loss

        loss_targets = loss_targets or self.loss_targets(layout)
        normed, ids = self.trunk(model, layout).normed, layout.ids.flatten()
        plain = self.cross_entropy(normed, loss_targets["next_token"])
        states = normed.flatten(0, 1)
        wanted, predicted, here = states.detach(), states, None
        distances, scored = [], []
        for i in range(1, self.config.horizon + 1):
            step = loss_targets[f"latent_{i}"]
            # what is predicted further on is predicted from among the states before
            predicted = predicted.index_select(0, step.index if here is None else torch.searchsorted(here, step.index))
            token, here = self.trunk.embedding(ids[step.target]), step.index
            predicted = self._next(predicted, token)
            apart = smooth_l1_loss(predicted.float(), wanted[step.target].float(), reduction="none").mean(-1)
            distances.append((apart * step.share).sum() / step.count.clamp(min=1))
            if self.config.lambda_kl:
                kl = loss_targets[f"kl_{i}"]
                scored.append((predicted.index_select(0, torch.searchsorted(here, kl.index)), kl))
        parts = {"latent": torch.stack(distances).mean()}
        total = plain + self.config.lambda_h * parts["latent"]
        if self.config.lambda_kl:
            parts["kl"] = self._divergence(wanted, scored)
            total = total + self.config.lambda_kl * parts["kl"]
        return total, {"next_token": plain.detach(), **{name: part.detach() for name, part in parts.items()}}

    def _next(self, state: Tensor, token: Tensor) -> Tensor:
        """The state behind a token, from the state before it and the token's embedding, all [n, d]."""
        import torch

        return state + self.dynamics(torch.cat([token, state], dim=-1))

    def ahead(self, model: Any, layout: Layout) -> Iterator[Ahead]:
        """The output layer on predicted states, each from the draft of the one before it: no true token is read."""
        from mutor.mtp.ahead import on_drafts

        def state(_: Tensor, hidden: Tensor, drafts: Tensor) -> Tensor:
            for token in self.trunk.embedding(drafts).unbind(1):
                hidden = self._next(hidden, token)
            return hidden

        normed = self.trunk(model, layout).normed
        yield from on_drafts(self.trunk, layout, normed, 1 + self.config.horizon, state)

    def _divergence(self, states: Tensor, scored: list[tuple[Tensor, LossTargets]]) -> Tensor:
        """L_kl. states: [B x L, d]; scored: by step the predictions [n, d] of some, whose places are its `target`.

        What a state itself says is computed once for all steps that predict it.
        """
        import torch

        from mutor.mtp.loss import head_loss

        places, steps = scored[0][1].target, len(scored)  # one step ahead predicts all that any step does
        predicted = scored[0][0].new_zeros(len(places), steps, states.shape[1])
        weight = torch.zeros(len(places), steps, device=states.device)
        for step, (some, targets) in enumerate(scored):
            at = (torch.searchsorted(places, targets.target), torch.full_like(targets.index, step))
            predicted = predicted.index_put(at, some)
            weight = weight.index_put(at, targets.share / targets.count.clamp(min=1) / steps)

        def divergence(true: Tensor, number: Tensor) -> Tensor:
            true, said = true.log_softmax(-1), self._frozen_logits(predicted[number]).log_softmax(-1)
            likely = true.exp()
            apart = (likely * true).sum(-1, keepdim=True) - (likely[:, None] * said).sum(-1)
            return (apart * weight[number]).sum(-1)

        numbers = torch.arange(len(places), device=states.device)
        once, count = torch.ones_like(weight[:, 0]), torch.ones_like(scored[0][1].count)  # `weight` has all that counts
        targets = replace(scored[0][1], index=places, target=numbers, share=once, count=count)
        truth = torch.no_grad()(self.trunk.logits)
        return head_loss(truth, states[None], targets, (1 + steps) * self.trunk.vocabulary, divergence)

    def _frozen_logits(self, normed: Tensor) -> Tensor:
        """The model's logits, as if its output layer were not trained."""
        trained = [p for p in self.trunk.head.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            return self.trunk.logits(normed)
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def drafter(self, draft: int) -> Drafter:
        """Hidden states rolled on from the last one, each with the draft before it."""
        from mutor.mtp.drafts import Drafter, Step, check_reach

        check_reach(self, draft, range(2, self.config.horizon + 2), f"horizon {self.config.horizon}")

        def propose(step: Step) -> None:
            state, token = step.normed, step.following
            for _ in range(draft):
                state = self._next(state, self.trunk.embedding(token))
                token = step.choose(self.trunk.logits(state))

        return Drafter(propose)

    def step_flops(self, layout: Layout, loss_targets: dict[str, LossTargets]) -> int:
        """f on each predicted state, whose logits go back to it alone; those of true states are computed once."""
        moves = [len(each.index) for name, each in loss_targets.items() if name.startswith("latent_")]
        scored = [len(each.index) for name, each in loss_targets.items() if name.startswith("kl_")]
        matrices = sum(p.numel() for p in self.dynamics.parameters() if p.ndim == 2)
        own = 6 * matrices * (sum(moves) - int((layout.segment >= 0).sum()))
        heads = self.trunk.head.weight.numel() * (4 * sum(scored) + 2 * sum(scored[:1]))
        return super().step_flops(layout, {"next_token": loss_targets["next_token"]}) + own + heads
