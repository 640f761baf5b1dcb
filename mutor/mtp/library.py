"""A method in anyone's training loop: what all methods share beside what they are in the suite's own.

method = mutor.method("parallel_mtp", d_max=4)         # or ParallelMTP.of(d_max=4)
method.attach(model)
collator = method.collator(tokenizer.pad_token_id)
Trainer(model, args, train_dataset=data, data_collator=collator, callbacks=[collator],
        compute_loss_func=method.loss_from_outputs).train()
method.export(model, "out")                            # the plain model, what was added beside it, in out/method
method.detach(model)                                   # the plain model again, in place
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from mutor.checks import from_mapping
from mutor.mtp.settings import Context, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from mutor.mtp.backbone import Backbone
    from mutor.mtp.collator import Collator
    from mutor.mtp.layout import Layout

PATIENCE = 1000  # answers in which only next tokens are predicted, from the first on, before training is refused


class Library:
    """Base of `Method`, which has the rest."""

    Config: ClassVar[type]
    config: Any
    trunk: Backbone
    progress: Progress
    trained: ClassVar[bool] = True  # whether there is anything to train
    _short: tuple[int, ...] | None = ()  # lengths of answers so far, all too short; None: one was not
    trunk_settings: Any
    shortest_answer: int
    compute_loss: Any
    loss_targets: Any
    cross_entropy: Any
    check_answers: Any

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """The method with these settings, checked; see `Config`."""
        from mutor.registry import METHODS

        target = f"{cls.__module__}:{cls.__qualname__}"
        name = next((name for name, its in METHODS.items() if its == target), cls.__name__)
        return cls(from_mapping(cls.Config, settings, name))  # type: ignore[call-arg]

    def collator(self, pad_id: int | None, *, seed: int = 0, prefix_lm: bool = False) -> Collator:
        """A data collator for a transformers Trainer, and a callback that tells it the epoch.

        Trainer(..., data_collator=collator, callbacks=[collator]), with `remove_unused_columns=False`. Another loop
        calls `collator.set_epoch(epoch)` before each epoch. What it takes and gives: mutor/mtp/collator.py. pad_id: a
        token that stands where nothing does. Raises ValueError before `attach`, without such a token, and for settings
        that a Trainer can't follow.
        """
        from mutor.mtp.collator import Collator

        self.check_attached()
        name = type(self).__name__
        if not self.trained:
            raise ValueError(f"{name}: it is not trained; ask for its `metrics`")
        if pad_id is None:
            raise ValueError(
                "pad_id: None, the tokenizer has no padding token; allowed: any token, as tokenizer.eos_token_id: no "
                "loss and no token sees it where it is padding"
            )
        for key, usual in {"warm_up": 0.0, "trunk_rate": 1.0, "d_max_schedule": "constant"}.items():
            if (given := getattr(self.config, key, usual)) != usual:
                raise ValueError(f"{key}: {given} is for `python -m mutor run`; a Trainer of transformers can't follow")
        return Collator(self, Context(seed, pad_id, prefix_lm))

    def loss_from_outputs(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """`compute_loss_func` of a transformers Trainer: the loss of the model's last pass on a batch of `collator`.

        outputs: not read, since the pass was heard; labels: int64 [B, L] of the batch. In training the method's own
        loss. In evaluation, which is when the model is in evaluation mode or there are no gradients, that of next
        tokens alone, so that `eval_loss` compares with any other model's. num_items_in_batch: how many next tokens the
        whole batch predicts, of which this is a part: next tokens count as in one batch, other losses are means of the
        parts', weighted by their share of next tokens (`MultiTokenTrainer` counts each by itself). Raises ValueError
        where there was no such pass, and where the first thousand answers are all too short for the method.
        """
        import torch

        self.check_attached()
        heard = self.trunk.listener.take()
        if heard is None:
            raise ValueError(
                f"{type(self).__name__}: {self.trunk.name} has not been called with a batch of method.collator(...) "
                "since the last loss; allowed: the model that it is attached to, not a copy, and one loss for each pass"
            )
        targets = self.loss_targets(heard.layout)
        here = next_targets(heard.layout)
        with heard.autocast():
            if self.trunk.model.training and torch.is_grad_enabled():
                self._watch(here)
                loss = self.compute_loss(heard, heard.layout, targets)[0]
            else:
                loss = self.plain_loss(heard, heard.layout)
        return loss if num_items_in_batch is None else loss * (here.sum() / num_items_in_batch)

    def plain_loss(self, model: Any, layout: Layout) -> Tensor:
        """That of next tokens alone. Raises ValueError for a layout that hides some of them from the model."""
        from mutor.mtp.layout import IGNORE
        from mutor.mtp.loss import LossTargets

        answer = (layout.target[:, :-1] != IGNORE) & ~layout.register[:, :-1]
        if (answer & (layout.ids[:, 1:] >= self.trunk.vocabulary)).any():
            raise ValueError(
                f"{type(self).__name__} hides tokens of what it is trained on, and a stock Trainer would evaluate on "
                "such batches, too; allowed: MultiTokenTrainer, or eval_strategy='no'"
            )
        targets = LossTargets.of(layout.target.masked_fill(layout.register, IGNORE), layout.segment)
        loss: Tensor = self.cross_entropy(self.trunk(model, layout).normed, targets)
        return loss

    def check_attached(self) -> None:
        """Raise ValueError before `attach`, and where the model was changed since."""
        if not hasattr(self, "trunk"):
            raise ValueError(f"{type(self).__name__} is attached to no model; attach first: method.attach(model)")
        self.trunk.check_attached()

    def detach(self, model: Any) -> Any:
        """Make the model the plain one again, in place, and return it: adapters of `trunk: lora` are merged into it.

        What was added is lost (`save_own` keeps it), but for a PeftModel's own adapters, which stay.
        """
        from mutor.mtp import adapters

        self.check_attached()
        self.trunk.remove()
        if self.trunk_settings.trunk == "lora":
            adapters.taken_in(self.trunk.model)
        for parameter in self.trunk.trained_before:
            parameter.requires_grad_(True)
        del self.trunk
        return model

    def _watch(self, answers: Tensor) -> None:
        """Notice answers that are all too short, in a loop that has no Trainer to look at all data before."""
        if self._short is not None:
            self._short += tuple(answers.tolist())
            if len(self._short) >= PATIENCE or max(self._short) >= self.shortest_answer:
                self.check_answers(self._short)
                self._short = None


def next_targets(layout: Layout) -> Tensor:
    """int64 [B]: how many next tokens each row predicts."""
    from mutor.mtp.layout import IGNORE

    return ((layout.target != IGNORE) & ~layout.register).sum(1)
