"""Token masking: some of the answer's inputs are hidden, all of it is predicted (Frydenlund, arXiv 2503.10542).

ids       Q  Q  A  m  C  m  E        a masked input is a learned vector in the token's place
target    .  A  B  C  D  E  .        as ever: what was hidden is predicted, too

So an answer token can't always be read off the one before it. The model is scored as it is, without masks.

Which rate and which mask the paper had: not found. The mask is a vector of its own, dropped at export: a padding token
would be taken for what it else means (of some tokenizers the end, of images a code).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mutor.checks import setting
from mutor.mtp.method import Context, Method
from mutor.streams import stream

if TYPE_CHECKING:
    from torch import Tensor

    from mutor.mtp.layout import Layout, TokenBatch


@dataclass(frozen=True)
class TokenMaskingConfig:
    """Settings of token_masking."""

    rate: float = setting(0.5, doc="share of the answer's inputs that are masked", low=0, high=1, open_ends=True)
    mask_init: str = setting("mean", doc="mean input embedding, or as the model's own rows", choices=("mean", "model"))


class TokenMasking(Method):
    """Next-token prediction of the answer from inputs of which some are masked, anew for each sample."""

    Config = TokenMaskingConfig
    config: TokenMaskingConfig
    source = "Frydenlund, arXiv 2503.10542"
    adds = "an input vector"

    def add_parameters(self) -> None:
        """One vector, fed where the input id is the vocabulary size."""
        from torch import nn

        self.trunk.add(nn.ModuleDict({"mask": self.trunk.extra_rows(1, self.config.mask_init)}))

    def train_layout(self, rows: TokenBatch, context: Context) -> Layout:
        """The plain rows with masks in the place of some answer tokens; targets are the tokens."""
        from dataclasses import replace

        layout = self.eval_layout(rows, context)
        hidden = masked_inputs(rows, self.config.rate, context.seed)
        return replace(layout, ids=layout.ids.masked_fill(hidden, self.trunk.vocabulary))


def masked_inputs(rows: TokenBatch, rate: float, seed: int) -> Tensor:
    """bool [B, T]: which answer tokens are masked: a function of the seed, the sample's number and the place in it."""
    import torch

    out = torch.zeros_like(rows.is_target)
    for row, (segment, is_target) in enumerate(zip(rows.segment, rows.is_target, strict=True)):
        for number in segment[is_target].unique():
            at = (is_target & (segment == number)).nonzero()[:, 0]
            draws = stream("masked_inputs", seed, int(rows.sample[row, at[0]])).random(len(at))
            out[row, at] = torch.from_numpy(draws < rate)
    return out
