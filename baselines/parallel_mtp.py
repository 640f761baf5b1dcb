"""Parallel multi-token prediction: one head per further token (Gloeckle et al., arXiv 2404.19737).

trunk --> norm --> output layer            x_(t+1)
  |--> layer 2 --> norm --> output layer   x_(t+2)      all heads read the trunk's last hidden state
  '--> layer 3 --> norm --> output layer   x_(t+3)      before the final norm; norm and output layer are shared

head: layer       a transformer layer of the model's kind, as above
      output      an output layer of its own on norm(hidden state), and nothing else ("Meta's" of arXiv 2509.23186)
      linear      W n, W d x d without bias, of n = norm(hidden state), straight to the output layer (LSE-MTP, arXiv
                  2604.06155, whose public code shows these; W starts as the model's own weights do)
      mlp         n + SiLU(W n + b), W and b start at zero, so that a head starts as the trunk (Medusa, arXiv
                  2401.10774, whose heads have output layers of their own; here the model's is shared)
hidden: weighted  heads read sum_l softmax(w)_l h_l over the first layer's input and all layers' outputs, one w a head
                  (Mehra et al., arXiv 2502.09419). Not found there: one w or many, whether the input counts, norms
                  before the sum (here none), the start. Here w is 10 for the last layer and 0 for the others, which is
                  the ordinary head but for 0.005% a layer; w learns at `hidden_rate` times the recipe's rate, else it
                  would stay there. `uniform`: w starts at 0.
injection         heads read hidden state + k emb(x_(t+1)), one learned k a head (next-token injection, arXiv
                  2509.23186, whose start of k was not found): x_(t+2) is then predicted given x_(t+1)
latent_hidden,    weights of LSE-MTP's losses in the head of x_(t+k), 0.1 there: mean squared differences of what the
latent_token      head feeds the output layer from the trunk's own n_(t+k-1), and from emb(x_(t+k)), neither of which
                  gets a gradient. Here where the head has a target; the source takes the first at all positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mutor.checks import setting
from mutor.mtp.method import Method, ParameterGroup
from mutor.mtp.settings import HeadSettings, TrainingRecipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mutor.mtp.ahead import Ahead
    from mutor.mtp.drafts import Drafter
    from mutor.mtp.layout import Layout
    from mutor.mtp.loss import LossTargets
    from mutor.mtp.passes import BackboneOutput

LAST = 10.0  # the last layer's weight before the softmax, where hidden is "weighted"


@dataclass(frozen=True)
class ParallelMTPConfig(HeadSettings):
    """Settings of parallel_mtp; defaults are the paper's (d_max 2, a 0.1)."""

    d_max: int = setting(2, doc="furthest token predicted; a head for each further token", low=2)
    head: str = setting("layer", doc="what a head is", choices=("layer", "output", "linear", "mlp"))
    hidden: str = setting(
        "last",
        doc="what heads read: the last hidden state, or a learned mean of all layers', which starts as the last, or "
        "as the plain mean",
        choices=("last", "weighted", "uniform"),
    )
    hidden_rate: float = setting(
        10.0, doc="learning rate of that mean's weights, as a multiple of the recipe's", low=0, open_ends=True
    )
    injection: float | None = setting(
        None, doc="heads read the next token's embedding times k, too; k starts here and is learned; none: not"
    )
    latent_hidden: float = setting(0.0, doc="weight of a head's squared distance from the state it stands for", low=0)
    latent_token: float = setting(0.0, doc="weight of a head's squared distance from its target's embedding", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden == "last":
            self._leave_out("with hidden 'last'", hidden_rate=10.0)
        if self.head == "output":  # what it feeds its output layer is the trunk's own state
            self._leave_out("with head 'output'", latent_hidden=0.0, latent_token=0.0)


class ParallelMTP(Method):
    """Loss (1 - a) L_1 + a mean_k L_k, the heads trained one at a time in the memory of one."""

    Config = ParallelMTPConfig
    config: ParallelMTPConfig
    source = "Gloeckle et al., arXiv 2404.19737"
    adds = "a head for each further token: a layer, a matrix, or an output layer"

    @property
    def shortest_answer(self) -> int:  # type: ignore[override]
        """The first head looks a leap beyond the next token."""
        return 1 + self.config.leap

    def add_parameters(self) -> None:
        """A head for each further token, with its weights of layers and of the next token's embedding."""
        import torch
        from torch import nn

        config, trunk = self.config, self.trunk
        self.heads = nn.ModuleList(self._new_head() for _ in config.further)
        added: dict[str, nn.Module] = {"heads": self.heads}
        with torch.device(trunk.embedding.weight.device):
            if config.hidden != "last":
                # what is learned is near zero, where bfloat16 is fine
                sizes = [torch.zeros(len(trunk.layers) + 1) for _ in self.heads]
                added["layer_weights"] = nn.ParameterList(sizes)
            if config.injection is not None:
                added["injection"] = nn.ParameterList(torch.full((1,), config.injection) for _ in self.heads)
        trunk.add(nn.ModuleDict(added))

    def _new_head(self) -> nn.Module:
        trunk = self.trunk
        if self.config.head == "layer":
            return trunk.new_layer()
        if self.config.head == "output":
            return trunk.new_linear(trunk.width, trunk.vocabulary, output=True)
        head = trunk.new_linear(trunk.width, trunk.width, bias=self.config.head == "mlp")
        if self.config.head == "mlp" and not trunk.meta:
            for parameter in head.parameters():
                parameter.detach().zero_()
        return head

    def parameter_groups(self, recipe: TrainingRecipe) -> list[ParameterGroup]:
        """As ever, the weights of layers at their own rate."""
        own = self._part("layer_weights")
        ids = {id(p) for p in own}
        groups = super().parameter_groups(recipe)
        rest = [
            ParameterGroup(tuple(p for p in g.parameters if id(p) not in ids), g.rate, g.decay, g.muon) for g in groups
        ]
        return [*rest, *self.usual_groups(own, self.config.hidden_rate)]

    def targets(self, layout: Layout) -> dict[str, Tensor]:
        """Head k predicts the token k further on."""
        from mutor.mtp.layout import targets_ahead

        return super().targets(layout) | {f"head_{k}": targets_ahead(layout, k) for k in self.config.further}

    def compute_loss(
        self, model: Any, layout: Layout, loss_targets: dict[str, LossTargets] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Each head's loss, latent losses included, is a mean over its own tokens; active heads are averaged."""
        from mutor.mtp.loss import no_loss, one_at_a_time
        from mutor.mtp.segments import within_segments

        loss_targets = loss_targets or self.loss_targets(layout)
        out = self.trunk(model, layout, all_states=self.config.hidden != "last")
        plain = self.cross_entropy(out.normed, loss_targets["next_token"])
        loss_targets = within_segments(
            self.trunk,
            out.normed,
            layout,
            loss_targets,
            {f"head_{k}": k for k in self.config.further},
            self.config.entropy_limit,
        )
        parts, extra = {f"head_{k}": plain.new_zeros(()) for k in self.config.further}, no_loss(self._idle())

        def head_loss(number: int, ahead: int) -> Any:
            targets = loss_targets[f"head_{ahead}"]
            return lambda read: self._head_loss(out, number, ahead, read, targets)

        losses = [head_loss(n, ahead) for n, ahead in enumerate(self.config.further) if n < self._active]
        if losses:
            shared = [*self.trunk.norm.parameters(), *self.trunk.head.parameters()]
            read = self._read(out, layout.ids.roll(-1, dims=1))  # what wraps around stands where no loss is
            mean, values = one_at_a_time(losses, read, [*self._added(), *shared])
            parts |= {f"head_{k}": value for k, value in zip(self.config.further, values, strict=False)}
            extra = extra + mean
        a = self.config.weight(self.progress)
        return (1 - a) * plain + a * extra, {"next_token": plain.detach(), **parts}

    def ahead(self, model: Any, layout: Layout) -> Iterator[Ahead]:
        """Heads at t; with `injection` they read the model's own next token there, not the true one."""
        from mutor.mtp.ahead import read_off
        from mutor.mtp.drafts import along_text

        out = self.trunk(model, layout, all_states=self.config.hidden != "last")
        following = layout.ids.roll(-1, dims=1).flatten()
        for found in read_off(self.trunk, layout, 1, out.normed):
            following[found.index] = found.logits.argmax(-1)
            yield found
        draft = len(self.config.further)
        if self.config.injection is not None and self.config.leap == 1:  # tokens before t are read with the true ones
            yield from along_text(self.trunk, model, self.drafter(draft), draft, layout, following)
            return
        read = self._read(out, following.view_as(layout.ids))
        for number, k in enumerate(self.config.further):
            yield from read_off(self.trunk, layout, k, self._state(out, number, read), logits=self._logits(number))

    def drafter(self, draft: int) -> Drafter:
        """Heads at the last token; with `injection` they read the next token, which is known then."""
        from mutor.mtp.drafts import Drafter, Step, check_reach

        further = ", ".join(map(str, self.config.further))
        check_reach(self, draft, self.config.further, f"heads for {further} tokens ahead")

        def propose(step: Step) -> None:
            window = step.window()
            read = self._read(window.out, step.text.gather(1, window.at + 1))
            for number in range(draft):
                step.choose(self._logits(number)(window.here(self._state(window.out, number, read))))

        return Drafter(propose, reads_layers=True, all_states=self.config.hidden != "last")

    def _read(self, out: BackboneOutput, following: Tensor) -> Tensor:
        """What heads read: [B, L, d] the last hidden state, or [S, B, L, d] all states, the next token's embedding.

        following: int64 [B, L] the tokens x_(t+1).
        """
        import torch

        if self.config.hidden == "last" and self.config.injection is None:
            return out.hidden
        read = list(out.states or (out.hidden,))
        if self.config.injection is not None:
            read.append(self.trunk.embedding(following))
        return torch.stack(read)

    def _state(self, out: BackboneOutput, number: int, read: Tensor) -> Tensor:
        """[B, L, d]: what a head feeds the output layer, from what it reads."""
        import torch
        import torch.nn.functional as F

        config, trunk, head = self.config, self.trunk, self.heads[number]
        states, hidden = read, read
        if read.ndim == 4:
            states = read if config.injection is None else read[:-1]
            hidden = states[-1]
        if config.hidden != "last":
            weights = self._part("layer_weights")[number].float()
            start = torch.zeros_like(weights)
            start[-1] = LAST if config.hidden == "weighted" else 0.0
            share = (start + weights).softmax(0).to(read.dtype)
            hidden = torch.einsum("s,sbld->bld", share, states)
        if config.injection is not None:
            hidden = hidden + self._part("injection")[number] * read[-1]
        if config.head == "layer":
            return trunk.norm(out.apply_layer(head, hidden))
        normed = trunk.norm(hidden)
        if config.head == "output":
            return normed
        return head(normed) if config.head == "linear" else normed + F.silu(head(normed))

    def _logits(self, number: int) -> Callable[[Tensor], Tensor]:
        """The output layer of a head: its own, or the model's."""
        return self.heads[number] if self.config.head == "output" else self.trunk.logits

    def _head_loss(self, out: BackboneOutput, number: int, ahead: int, read: Tensor, targets: LossTargets) -> Tensor:
        from mutor.mtp.loss import head_loss

        state = self._state(out, number, read)
        loss = head_loss(self._logits(number), state, targets, self.trunk.vocabulary)
        apart = [
            (self.config.latent_hidden, lambda: out.normed.flatten(0, 1)[targets.index + ahead - 1]),
            (self.config.latent_token, lambda: self.trunk.embedding(targets.target)),
        ]
        for weight, wanted in apart:
            if weight:
                far = (state.flatten(0, 1)[targets.index] - wanted().detach()).float().pow(2).mean(-1)
                loss = loss + weight * (far * targets.share).sum() / targets.count.clamp(min=1)
        return loss

    def resting(self) -> list[nn.Parameter]:
        """Heads that a schedule leaves out, too."""
        return [*super().resting(), *self._idle()]

    @property
    def _active(self) -> int:
        return self.config.active(self.progress)

    def _part(self, name: str) -> list[nn.Parameter]:
        """One parameter for each head, of what is added under a name."""
        added: Any = self.trunk.added
        return list(added[name]) if name in added else []

    def _idle(self) -> list[nn.Parameter]:
        own = [p for name in ("layer_weights", "injection") for p in self._part(name)[self._active :]]
        return [*own, *(p for head in list(self.heads)[self._active :] for p in head.parameters())]
