"""Bag of words: a second output layer says which tokens come soon, in any order (Mahajan et al., arXiv 2510.14751).

trunk --> norm --> output layer            x_(t+1)
              '--> another output layer    the set {x_(t+2), .., x_(t+d_max)}

FSP-BoW of the paper, future summary prediction; d_max is its tau. The loss is L_next_token + weight x L_bag. L_bag is
a binary cross entropy, a mean over the vocabulary (weight times its size makes it a sum) and over the positions that
have a token two ahead.

The paper weights by tf-idf; how: not found. Here a token that comes n times counts n idf, one that does not come idf,
with idf = 1 + ln((1 + N) / (1 + N_token)) and N_token of N training examples having it in their answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mutor.checks import setting
from mutor.mtp.method import Method

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from torch import Tensor

    from mutor.mtp.layout import Layout
    from mutor.mtp.loss import LossTargets

READ = 10_000  # training examples that idf is computed of, the first ones


@dataclass(frozen=True)
class BagOfWordsConfig:
    """Settings of bag_of_words; the paper's d_max is 12 or 100, its weight 1."""

    d_max: int = setting(12, doc="furthest token of the bag: x_(t + d_max)", low=2)
    weight: float = setting(1.0, doc="weight of the bag's loss, beside 1 of next-token", low=0, open_ends=True)
    weighting: str = setting(
        "uniform", doc="what a token of the bag counts: 1, or tf-idf", choices=("uniform", "tf_idf")
    )


class BagOfWords(Method):
    """Next-token prediction, and one output layer for the bag of tokens behind the next."""

    Config = BagOfWordsConfig
    config: BagOfWordsConfig
    source = "Mahajan et al., arXiv 2510.14751"
    adds = "an output layer"
    shortest_answer = 2
    idf: Tensor | None = None  # float32 [V]

    def add_parameters(self) -> None:
        """An output layer as wide as the model's own."""
        from torch import nn

        trunk = self.trunk
        self.bag = trunk.new_linear(trunk.width, trunk.head.weight.shape[0], output=True)
        trunk.add(nn.ModuleDict({"bag": self.bag}))

    def read_examples(self, examples: Iterable[tuple[np.ndarray, int]]) -> None:
        """Count in how many answers each token stands, for tf-idf."""
        import itertools

        import torch

        if self.config.weighting == "uniform":
            return
        count, found = 0, torch.zeros(self.bag.out_features)
        for ids, prefix in itertools.islice(examples, READ):
            count += 1
            found[torch.from_numpy(ids[prefix:]).unique()] += 1
        self.idf = 1 + torch.log((1 + count) / (1 + found))

    def loss_targets(self, layout: Layout) -> dict[str, LossTargets]:
        """The next tokens; and int64 [N, d_max - 1] the tokens of each bag, -100 where there are fewer."""
        from dataclasses import replace

        import torch

        from mutor.mtp.layout import targets_ahead
        from mutor.mtp.loss import LossTargets

        ahead = [targets_ahead(layout, k) for k in range(2, self.config.d_max + 1)]
        bag = LossTargets.of(ahead[0], layout.segment, self.per_sequence)
        tokens = torch.stack([each.flatten()[bag.index] for each in ahead], dim=-1)
        return super().loss_targets(layout) | {"bag": replace(bag, target=tokens)}

    def compute_loss(
        self, model: Any, layout: Layout, loss_targets: dict[str, LossTargets] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L_next_token + weight L_bag, each a mean over its own positions."""
        from mutor.mtp.loss import head_loss

        loss_targets = loss_targets or self.loss_targets(layout)
        normed = self.trunk(model, layout).normed
        plain = self.cross_entropy(normed, loss_targets["next_token"])
        bag = head_loss(self.bag, normed, loss_targets["bag"], self.bag.out_features, self._binary_cross_entropy)
        return plain + self.config.weight * bag, {"next_token": plain.detach(), "bag": bag.detach()}

    def _binary_cross_entropy(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """[n]: a mean over the vocabulary, of logits [n, V] and the tokens of each bag [n, d_max - 1].

        As if no token came, in one pass over the vocabulary, and what changes for those that do.
        """
        import torch.nn.functional as F

        from mutor.mtp.layout import IGNORE

        token = tokens.clamp(min=0)
        there, same = tokens != IGNORE, tokens[:, :, None] == tokens[:, None, :]
        first = there & ~same.tril(-1).any(-1)
        times = same.sum(-1) if self.config.weighting == "tf_idf" else 1
        weights, absent = self._weights(logits), F.softplus(logits)
        here = logits.gather(1, token)
        change = weights[token] * (times * F.softplus(-here) - F.softplus(here)) * first
        return (absent @ weights + change.sum(-1)) / logits.shape[1]

    def _weights(self, logits: Tensor) -> Tensor:
        """float32 [V]: what each token counts where it comes once, or not."""
        if self.config.weighting == "uniform":
            return logits.new_ones(logits.shape[1])
        if self.idf is None:
            raise ValueError("weighting: 'tf_idf' needs to know the training data; call read_examples first")
        self.idf = self.idf.to(logits.device)
        return self.idf
