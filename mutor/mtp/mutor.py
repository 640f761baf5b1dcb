"""MuToR: registers between the tokens, each predicting a token further on (NeurIPS 2025, arXiv 2505.10518).

method = MuToR.of(d_max=4, a=0.3)
method.attach(model)                                  # any Hugging Face causal LM; adds one vector
collator = method.collator(tokenizer.pad_token_id)    # lays out registers, anew in each epoch
Trainer(model, args, train_dataset=data, data_collator=collator, callbacks=[collator],
        compute_loss_func=method.loss_from_outputs).train()   # or MultiTokenTrainer(model, args, method=method, ...)
method.export(model, "out")                           # the plain model, registers dropped
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mutor.checks import setting
from mutor.mtp.method import Context, Method
from mutor.mtp.settings import AheadSettings
from mutor.streams import stream

if TYPE_CHECKING:
    from torch import Tensor

    from mutor.mtp.ahead import Ahead
    from mutor.mtp.drafts import Drafter
    from mutor.mtp.layout import Example, Layout, TokenBatch
    from mutor.mtp.loss import LossTargets


@dataclass(frozen=True)
class MuToRConfig(AheadSettings):
    """Settings of MuToR; defaults are the paper's for GSM8K (d_max 4, a 0.3)."""

    d_max: int = setting(4, doc="largest offset: the furthest register target is x_(t + d_max)", low=1)
    a: float = setting(0.3, doc="weight of the register loss", low=0, high=1, open_ends=True)
    d_min: int = setting(1, doc="smallest offset (star graphs: 2)", low=1)
    offsets: str = setting(
        "sequence",
        doc="one offset drawn per sequence, or per register; or registers of all offsets behind each token",
        choices=("sequence", "mixed", "all"),
    )
    placement: str = setting(
        "all", doc="registers behind all tokens, every n-th, or n random ones", choices=("all", "every", "random")
    )
    registers: int = setting(1, doc="the n of placement 'every' and 'random'", low=1)
    register_embedding: str = setting("shared", doc="one vector, or one per offset", choices=("shared", "per_offset"))
    register_init: str = setting(
        "mean", doc="mean input embedding, or as the model's own rows", choices=("mean", "model")
    )
    register_scaled: bool = setting(True, doc="scaled as the model scales its tokens (Gemma: sqrt(d))")
    register_lora: int = setting(
        0, doc="rank of adapters that act at registers alone, on a frozen trunk; 0: none", low=0
    )
    register_targets: str = setting(
        "true", doc="'shuffled' over the batch: a control that must not help", choices=("true", "shuffled")
    )

    def __post_init__(self) -> None:
        if self.d_max < self.d_min:
            raise ValueError(f"d_max: {self.d_max} is below d_min {self.d_min}; allowed: d_max >= d_min")
        super().__post_init__()
        if self.trunk != "frozen":
            self._leave_out(f"with trunk {self.trunk!r}", register_lora=0)
        if self.placement == "all" and self.registers != 1:
            raise ValueError(f"registers: {self.registers} means nothing with placement 'all'; leave it out")


class MuToR(Method):
    """Multi-token prediction with registers."""

    Config = MuToRConfig
    config: MuToRConfig
    source = "Gerontopoulos et al., arXiv 2505.10518"
    adds = "an input vector, or one per offset"

    @property
    def shortest_answer(self) -> int:  # type: ignore[override]
        """The register behind the last prefix token looks d_min ahead."""
        return self.config.d_min

    def add_parameters(self) -> None:
        """One vector (or one per offset), fed where the input id is the vocabulary size or above."""
        from torch import nn

        config, trunk = self.config, self.trunk
        count = 1 if config.register_embedding == "shared" else self.different_offsets
        rows = trunk.extra_rows(count, config.register_init, scaled=config.register_scaled)
        added: dict[str, nn.Module] = {"registers": rows}
        if config.register_lora:
            from mutor.mtp.gated import gated_lora

            added["adapters"] = gated_lora(trunk, config.register_lora)
        trunk.add(nn.ModuleDict(added))
        if not trunk.meta:
            self._check_invariant()

    @property
    def different_offsets(self) -> int:
        """How many different offsets there are."""
        return (self.config.d_max - self.config.d_min) // self.config.leap + 1

    def offsets(self, samples: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Each token's offset and that offset's number from 0, int64 [B, T]. samples: [B, T] their numbers."""
        from mutor.mtp.registers import offsets

        config, mixed = self.config, self.config.offsets == "mixed"
        reach = config.reach(context.progress)
        found = offsets(samples, seed=context.seed, d_min=config.d_min, d_max=reach, mixed=mixed, leap=config.leap)
        return found, (found - config.d_min) // config.leap

    def train_layout(self, rows: TokenBatch, context: Context) -> Layout:
        """Regular tokens first, registers behind; offsets from the samples' numbers and `context.seed`, or all."""
        import torch

        from mutor.mtp import registers as r
        from mutor.mtp.layout import beside

        config = self.config
        placed = r.placed(
            r.anchors(rows.segment, rows.is_target),
            rows.segment,
            rows.sample,
            placement=config.placement,
            registers=config.registers,
            seed=context.seed,
        )
        base = self.eval_layout(rows, context)
        if config.offsets != "all":
            return self._with_registers(base, rows, placed, *self.offsets(rows.sample, context), context.seed)
        reach = range(config.d_min, config.reach(context.progress) + 1, config.leap)
        filled = [(torch.full_like(rows.ids, d), torch.full_like(rows.ids, n)) for n, d in enumerate(reach)]
        return beside([self._with_registers(base, rows, placed, *each, context.seed) for each in filled], base)

    def _with_registers(
        self, base: Layout, rows: TokenBatch, placed: Tensor, offset: Tensor, number: Tensor, seed: int
    ) -> Layout:
        """A register behind each token that is `placed`, bool [B, T], and has a target at its offset, int64 [B, T]."""
        from mutor.mtp import registers as r
        from mutor.mtp.layout import with_registers

        target, exists = r.targets(rows.ids, rows.segment, rows.is_target, offset)
        has_register = placed & exists
        if self.config.register_targets == "shuffled":
            target = _shuffled(target, has_register, seed, int(rows.sample.max()))
        number = number if self.config.register_embedding == "per_offset" else offset * 0
        return with_registers(base, has_register, offset, target, number + self.trunk.vocabulary)

    def tokens(self, example: Example) -> int:
        """Its own tokens, and its registers."""
        answer, many = len(example.ids) - example.prefix, self.config.registers
        more = {"all": answer, "every": -(-answer // many), "random": min(many, answer)}[self.config.placement]
        return len(example.ids) + more * (self.different_offsets if self.config.offsets == "all" else 1)

    def targets(self, layout: Layout) -> dict[str, Tensor]:
        """Next tokens of the regular tokens, and the registers' own."""
        from mutor.mtp.layout import IGNORE

        return super().targets(layout) | {"register": layout.target.masked_fill(~layout.register, IGNORE)}

    def compute_loss(
        self, model: Any, layout: Layout, loss_targets: dict[str, LossTargets] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(1 - a) L_next_token + a L_register (paper, eq. 5), each a mean over its own tokens."""
        from mutor.mtp.segments import within_segments

        loss_targets = loss_targets or self.loss_targets(layout)
        normed = self.trunk(model, layout).normed
        limit = self.config.entropy_limit
        loss_targets = within_segments(self.trunk, normed, layout, loss_targets, {"register": None}, limit)
        tokens = normed.detach() if self.config.trunk == "frozen" else normed  # nothing trained reaches them
        plain, extra = (
            self.cross_entropy(tokens, loss_targets["next_token"]),
            self.cross_entropy(normed, loss_targets["register"]),
        )
        a = self.config.weight(self.progress)
        return (1 - a) * plain + a * extra, {"next_token": plain.detach(), "register": extra.detach()}

    @property
    def reach(self) -> range:
        """The distances k, each of which is an offset that a register is trained with."""
        return range(self.config.d_min, self.config.d_max + 1, self.config.leap)

    def ahead(self, model: Any, layout: Layout) -> Iterator[Ahead]:
        """Next tokens by the tokens; x_(t+k) by a register behind t, for each k from 2 that is a trained offset.

        It stands behind every t, whatever the placement in training.
        """
        import torch

        from mutor.mtp.ahead import at_registers, positions, read_off, registers_behind

        yield from super().ahead(model, layout)
        asked = [k for k in self.reach if k > 1]
        if not asked or not len(index := positions(layout, asked[0])):
            return
        each = self.config.register_embedding == "per_offset"
        ids = self.trunk.vocabulary + index.new_tensor([self.reach.index(k) * each for k in asked])
        fed = registers_behind(layout, index, ids.expand(len(index), -1), asked)  # all in one pass
        normed = at_registers(self.trunk(model, fed).normed, fed, len(asked))
        for number, k in enumerate(asked):
            there = torch.isin(index, positions(layout, k))
            yield from read_off(self.trunk, layout, k, normed[there, number], index[there])

    def drafter(self, draft: int) -> Drafter:
        """Registers behind the last token, one for each draft: parallel, so none knows what another says."""
        config, each = self.config, self.config.register_embedding == "per_offset"
        from mutor.mtp.drafts import Drafter, Step, check_reach

        check_reach(self, draft, self.reach, f"d_min {config.d_min}, d_max {config.d_max}, leap {config.leap}")

        def propose(step: Step) -> None:
            for normed in step.at_registers.unbind(1):
                step.choose(self.trunk.logits(normed))

        asked = range(2, draft + 2)
        return Drafter(propose, tuple((self.trunk.vocabulary + self.reach.index(k) * each, k) for k in asked))

    def _check_invariant(self) -> None:
        """Refuse, by name, a model whose tokens change with registers beside them or with their order in the row."""
        import torch

        from mutor.mtp.layout import Example, collate, regular, with_registers
        from mutor.mtp.trials import carrying, why_not

        trunk = self.trunk
        length = 8
        ids = (torch.arange(length) * 7 + 3) % trunk.vocabulary
        rows = collate([Example(ids.numpy(), 3)], 0)
        base = regular(rows)
        has_register = torch.arange(length)[None] % 2 == 1
        fed = with_registers(
            base, has_register, torch.ones_like(rows.ids), rows.ids, torch.full_like(rows.ids, trunk.vocabulary)
        )
        backwards = torch.arange(fed.ids.shape[1]).flip(0)
        alone, beside = trunk.probe(base), trunk.probe(fed)
        turned = trunk.probe(fed.take(backwards)).flip(1)  # a mixer that minds the order sees registers as neighbours
        change = max(float((alone - beside[:, :length]).abs().max()), float((beside - turned).abs().max()))
        tolerance = (1e-3 if alone.dtype == torch.float32 else 5e-2) * float(alone.abs().max())
        if not change <= tolerance or carrying(trunk.config):  # fresh weights may hide how much
            why = why_not(trunk.model) or "some of its layers mix tokens by their order in the row"
            raise ValueError(
                f"{trunk.name} ({trunk.config.model_type}) can't hold registers: its tokens change by {change:.3g} "
                f"when registers stand beside them or the row is reordered: {why}"
            )


def _shuffled(target: Tensor, has_register: Tensor, seed: int, sample: int) -> Tensor:
    """Targets permuted among all registers of the batch: same marginals, no meaning."""
    import torch

    order = stream("shuffled_targets", seed, sample).permutation(int(has_register.sum()))
    out = target.clone()
    out[has_register] = target[has_register][torch.from_numpy(order)]
    return out
