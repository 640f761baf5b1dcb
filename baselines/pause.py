"""Pause tokens: learned tokens between prompt and answer, from which nothing is predicted (Goyal et al., 2310.02226).

ids       Q  Q  p  p  p  A  B  C      three pauses, all the same new token of the vocabulary
position  0  1  2  3  4  5  6  7
target    .  .  .  .  A  B  C  .      the last pause predicts the first answer token, the others nothing

The paper's fine-tuning on a plain model. The same pauses stand behind each prompt when the model answers. They belong
to the prompt: a prefix-LM reads them in both directions.

The new token is an input alone: no softmax has a logit of it, in training, answers and scores, so that it is never
written and takes no probability from others. A saved checkpoint has one token more than the model had. Its row of the
embedding is the pause; its row of an output layer of its own is zero. The logit that a stock model computes for it
is to be left out, as `generate` does (generation_config.json: suppress_tokens); config.json says how many `pauses`.

How the row starts: not found in the paper, so a setting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mutor.checks import setting
from mutor.mtp.method import Context, Method

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from mutor.mtp.answers import Prompts
    from mutor.mtp.layout import Example, Layout, TokenBatch


@dataclass(frozen=True)
class PauseConfig:
    """Settings of pause; the paper has 10 or 50 pauses, chosen by task."""

    pauses: int = setting(10, doc="pauses behind each prompt; 0 is next_token, bit for bit", low=0)
    pause_init: str = setting("mean", doc="mean input embedding, or as the model's own rows", choices=("mean", "model"))

    def __post_init__(self) -> None:
        if not self.pauses and self.pause_init != "mean":
            raise ValueError(f"pause_init: {self.pause_init!r} means nothing with pauses 0; leave it out")


class Pause(Method):
    """Next-token prediction of the answer behind M pauses."""

    Config = PauseConfig
    config: PauseConfig
    source = "Goyal et al., arXiv 2310.02226"
    adds = "an input vector"
    at_inference = "a plain model with one token more, `pauses` of it behind each prompt"
    keeps_at_inference = True
    _exported = False  # whether the pause is the last token of the vocabulary, else it is one beyond

    @property
    def behind_prompt(self) -> int:  # type: ignore[override]
        """The pauses."""
        return self.config.pauses

    @property
    def pause_id(self) -> int:
        """The id that feeds the pause, the same before and after export; as many tokens have a logit."""
        return self.trunk.vocabulary - self._exported

    def add_parameters(self) -> None:
        """One vector. Raises ValueError for a model whose vocabulary can't have one token more."""
        from torch import nn

        trunk, self._exported = self.trunk, False
        if not self.config.pauses:
            return
        outputs = trunk.head.weight.shape[0]
        if outputs != trunk.vocabulary:
            raise ValueError(
                f"pauses: {self.config.pauses} can't be with {trunk.name}: its output layer has {outputs} tokens and "
                f"its embedding {trunk.vocabulary}, so that a checkpoint can't have one more; allowed: 0"
            )
        trunk.add(nn.ModuleDict({"pause": trunk.extra_rows(1, self.config.pause_init)}))

    def eval_layout(self, rows: TokenBatch, context: Context) -> Layout:
        """The plain rows with the pauses behind each prompt."""
        if self.config.pauses:
            rows = with_pauses(rows, self.config.pauses, self.pause_id, context.pad_id)
        return super().eval_layout(rows, context)

    def tokens(self, example: Example) -> int:
        """Its own tokens, and the pauses."""
        return len(example.ids) + self.config.pauses

    def answer(self, model: Any, prompts: Prompts) -> Tensor:
        """int64 [B, length]: token by token behind the pauses, of the tokens that the model had before it had them.

        model: attached or loaded by this method.
        """
        from dataclasses import replace

        import torch

        from mutor.mtp.answers import decode

        if not self.config.pauses:
            return decode(model, prompts)
        known = self.pause_id
        pauses = prompts.ids.new_full((len(prompts.ids), self.config.pauses), known)
        return decode(
            model,
            replace(
                prompts,
                ids=torch.cat([prompts.ids, pauses], dim=1),
                attended=torch.cat([prompts.attended, torch.ones_like(pauses)], dim=1),
                choose=lambda logits, step: prompts.choose(logits[:, :known], step),
            ),
        )

    def export(self, model: Any, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Save the plain base architecture with the pause as the last token of its vocabulary."""
        import copy

        import torch

        from mutor.mtp.adapters import merged
        from mutor.mtp.backbone import EXTRA

        if not self.config.pauses:
            super().export(model, folder, state)
            return
        model = merged(model)
        whole = model.state_dict() if state is None else state
        row = whole[f"{EXTRA}.pause.weight"]
        state = {name: value for name, value in whole.items() if not name.startswith(f"{EXTRA}.")}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = head.weight is embedding.weight
        more = {id(embedding): row, id(head): row if tied else torch.zeros_like(row)}
        for name, module in model.named_modules():
            for part, value in module.named_parameters(prefix=name, recurse=False) if id(module) in more else ():
                if part in state:
                    last = more[id(module)] if value.ndim == 2 else state[part].new_zeros(1)
                    state[part] = torch.cat([state[part], last.to(state[part])])
        config = copy.deepcopy(model.config)
        config.get_text_config().vocab_size = self.pause_id + 1
        config.pauses = self.config.pauses
        with torch.device("meta"):  # it says what to save, and the weights are in `state`
            longer = type(model)(config).to(model.dtype)
        longer.generation_config = copy.deepcopy(model.generation_config)
        longer.generation_config.suppress_tokens = [self.pause_id]
        longer.save_pretrained(folder, state_dict=state)

    def save_own(self, model: Any, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Nothing: the pause is a part of the plain checkpoint."""

    def load_own(self, model: Any, folder: Path) -> Any:
        """Take a plain checkpoint of this method as it is, the logit of its last token left out; return the model.

        Raises ValueError for a checkpoint with another number of pauses.
        """
        from mutor.mtp.adapters import base_model
        from mutor.mtp.backbone import Backbone

        saved = getattr(base_model(model).config, "pauses", 0)
        if saved != self.config.pauses:
            raise ValueError(f"{folder.parent}: pauses: {saved} in its config.json, not {self.config.pauses}")
        self.trunk = trunk = Backbone(base_model(model))
        if self.config.pauses:
            self._exported, whole = True, trunk.logits
            trunk.logits = lambda normed: whole(normed)[..., :-1]  # type: ignore[method-assign]
        return model


def with_pauses(rows: TokenBatch, count: int, pause_id: int, pad_id: int) -> TokenBatch:
    """Rows with `count` pauses behind each sequence's prompt, and all behind them moved on; padded or packed rows."""
    import torch

    from mutor.mtp.layout import TokenBatch

    first = rows.is_target.clone()  # answer tokens
    first[:, 1:] &= ~rows.is_target[:, :-1]
    index = torch.arange(first.shape[1]) + count * first.cumsum(1)
    shape = len(first), first.shape[1] + count * int(first.sum(1).max())
    row, step = first.nonzero()[:, :1], torch.arange(count)
    behind = index[first][:, None] - count + step

    def laid(values: Tensor, pauses: Tensor | int | bool, padding: int) -> Tensor:
        out = values.new_full(shape, padding).scatter_(1, index, values)
        out[row, behind] = torch.as_tensor(pauses, dtype=values.dtype).expand(behind.shape)
        return out

    start = rows.position[first][:, None]
    return TokenBatch(
        ids=laid(rows.ids, pause_id, pad_id),
        segment=laid(rows.segment, rows.segment[first][:, None], -1),
        position=laid(rows.position + count * rows.is_target, start + step, 0),
        is_target=laid(rows.is_target, False, 0),
        sample=laid(rows.sample, rows.sample[first][:, None], 0),
    )
