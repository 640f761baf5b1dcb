"""What a next-token model knows of the tokens after the next, without training: it is summed over those between.

    p(x_(t+2) | x_<=t) = sum over v of p(v | x_<=t) p(x_(t+2) | x_<=t, v)

(Mehra, Garcia, Mauch, arXiv 2502.09419: "numerical marginalisation"; how many v they keep is not known here, so it is a
setting.) v are the likeliest `candidates`, or all. Further ahead the sum is over paths of tokens: the likeliest
`candidates` continuations of the paths that were kept for the token before, so that each k has as many paths; or all
paths. What is left out is left out at every k, and the prediction is normalised over what is there.

One pass serves all t and all v: the candidates stand behind the tokens as registers do, each seeing the tokens up to t
and itself. Paths of two tokens and more each have a copy of the text's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mutor.checks import setting
from mutor.mtp.method import Method, ParameterGroup
from mutor.mtp.settings import TrainingRecipe

if TYPE_CHECKING:
    from torch import Tensor

    from mutor.mtp.ahead import Ahead
    from mutor.mtp.layout import Layout

TOGETHER, IN_A_ROW = 4096, 1024  # candidates in one forward pass and behind one row: memory, attention grow with them
PATHS = 2**17  # that a sum may have


@dataclass(frozen=True)
class MarginalConfig:
    """Settings of marginalisation."""

    candidates: int = setting(8, doc="tokens, or paths of tokens, that are summed over; 0: all, the exact sum", low=0)
    horizon: int = setting(2, doc="furthest token predicted: x_(t + horizon)", low=2, high=4)


class Marginal(Method):
    """Next-token prediction that is not trained; the model is that of another run, or pretrained."""

    Config = MarginalConfig
    config: MarginalConfig
    source = "Mehra et al., arXiv 2502.09419"
    adds = "nothing; it needs no training"
    trained = False

    def add_parameters(self) -> None:
        """Nothing. Raises ValueError for more candidates than tokens, or more paths than can be summed over."""
        count, most, size = self.config.candidates, self.config.horizon - 1, self.trunk.vocabulary
        if count > size:
            raise ValueError(f"candidates: {count} of a vocabulary of {size}; allowed: 1 to {size}, or 0 for all")
        if not count and size**most > PATHS:
            raise ValueError(
                f"candidates: 0, all, are {size**most} paths of {most} tokens in a vocabulary of {size}; allowed: up "
                f"to {PATHS} paths, or candidates from 1, or a smaller horizon"
            )

    def parameter_groups(self, recipe: TrainingRecipe) -> list[ParameterGroup]:
        """Raises ValueError: nothing is trained."""
        raise ValueError("marginal: it is not trained; allowed: a recipe of 0 steps, and a base or a pretrained model")

    def ahead(self, model: Any, layout: Layout) -> Iterator[Ahead]:
        """Next tokens, and sums over the tokens between."""
        from mutor.mtp.ahead import positions, read_off

        normed = self.trunk(model, layout).normed
        yield from read_off(self.trunk, layout, 1, normed)
        index, each = positions(layout, 2), self.config.candidates or self.trunk.vocabulary
        stretch = index % layout.ids.shape[1] // max(1, IN_A_ROW // each)  # the same one of all rows goes together
        for part in index[stretch.argsort(stable=True)].split(max(1, TOGETHER // each)):
            if len(part):
                part = part.sort().values
                yield from self._sums(model, layout, part, normed.flatten(0, 1)[part])

    def _sums(self, model: Any, layout: Layout, index: Tensor, normed: Tensor) -> Iterator[Ahead]:
        """The predictions from the tokens of `index`, int64 [n]; normed: [n, d] their hidden states.

        A path is none, one or more tokens behind t: ids int64 [n, K, m], hidden states [n, K, d] of the last of them,
        and probabilities [n, K].
        """
        import torch

        from mutor.mtp.ahead import Ahead, positions, rows_at_once

        hidden, ids = normed[:, None], index.new_zeros(len(index), 1, 0)
        weight = torch.ones(len(index), 1, device=index.device)
        for k in range(1, self.config.horizon + 1):
            parts = []
            rows = max(1, rows_at_once(self.trunk, hidden) // hidden.shape[1])
            for some in torch.arange(len(index), device=index.device).split(rows):
                total, further = self._sum(hidden[some], weight[some], k < self.config.horizon)
                if k > 1:
                    yield Ahead(k, index[some], total.log(), weight[some].sum(1))
                parts.append(further)
            left = torch.isin(index, positions(layout, k + 1))
            if k == self.config.horizon or not left.any():
                return
            weight, found = (torch.cat(values)[left] for values in zip(*parts, strict=True))
            index, path = index[left], (found // self.trunk.vocabulary)[..., None].expand(-1, -1, ids.shape[2])
            ids = torch.cat([ids[left].gather(1, path), found[..., None] % self.trunk.vocabulary], dim=2)
            hidden = self._behind(model, layout, index, ids)

    def _sum(self, hidden: Tensor, weight: Tensor, further: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The sum over paths of weight [n, K] times the next token's probabilities, [n, V].

        Also, if `further`, the paths one token longer that are kept: their probabilities and their numbers, path times
        V plus token, [n, K'].
        """
        import torch

        from mutor.mtp.ahead import rows_at_once

        rows = rows_at_once(self.trunk, hidden)
        total = hidden.new_zeros(len(hidden), self.trunk.vocabulary, dtype=torch.float32)
        kept, numbers = weight[:, :0], weight[:, :0].long()
        most = self.config.candidates or hidden.shape[1] * self.trunk.vocabulary
        for start in range(0, hidden.shape[1], rows):
            part = slice(start, start + rows)
            probability = self.trunk.logits(hidden[:, part]).softmax(-1)
            total += (weight[:, None, part] @ probability)[:, 0]
            if further:
                joint = (weight[:, part, None] * probability).flatten(1)
                first = start * self.trunk.vocabulary
                number = torch.arange(first, first + joint.shape[1], device=joint.device).expand(len(joint), -1)
                kept, numbers = torch.cat([kept, joint], 1), torch.cat([numbers, number], 1)
                kept, order = kept.topk(min(most, kept.shape[1]))
                numbers = numbers.gather(1, order)
        return total.clamp(min=torch.finfo(total.dtype).tiny), (kept, numbers)

    def _behind(self, model: Any, layout: Layout, index: Tensor, ids: Tensor) -> Tensor:
        """[n, K, d]: normed hidden states of the last token of each path; ids: int64 [n, K, m] behind each of `index`.

        Paths of one token share a pass with the tokens that they see; longer ones have a copy of the cache each.
        """
        import torch

        from mutor.mtp.ahead import at_registers, registers_behind
        from mutor.mtp.drafts import text_parts

        if ids.shape[2] == 1:
            found = []
            for some in ids[..., 0].split(TOGETHER, dim=1):
                fed = registers_behind(layout, index, some, [2] * some.shape[1])
                found.append(at_registers(self.trunk(model, fed).normed, fed, some.shape[1]))
            return torch.cat(found, dim=1)
        paths, where = ids.flatten(0, 1), index.repeat_interleave(ids.shape[1])
        parts = list(text_parts(layout, where))
        states = torch.cat([part.behind(self.trunk, model, paths[part.where]) for part in parts])
        return states[torch.cat([part.where for part in parts]).argsort()].unflatten(0, ids.shape[:2])
