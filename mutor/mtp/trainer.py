"""A Trainer of transformers for any method of the suite.

method = mutor.method("parallel_mtp", d_max=4)
method.attach(model)
MultiTokenTrainer(model, args, method=method, train_dataset=data, eval_dataset=more, processing_class=tokenizer).train()
method.export(model, "out")

It trains as a stock Trainer does with `method.collator` and `method.loss_from_outputs`, and beyond that

- each loss of a batch in parts, or shared by processes, is exactly that of one batch;
- no logits are computed where nothing is predicted;
- each loss is logged: next_token, register, head_2, ..;
- evaluation is on plain rows: eval_loss is that of next tokens; accuracy_ahead_k says how often x_(t+k) is predicted
  from the tokens up to t, accepted_ahead_k how often decoding would accept the drafts up to it (mutor/mtp/ahead.py).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from mutor.mtp.adapters import base_model
from mutor.mtp.ahead import EXAMPLES, Tally
from mutor.mtp.loss import LossTargets
from mutor.mtp.method import Method
from mutor.mtp.passes import layout_of
from mutor.mtp.trials import evaluating

RATES = ("accuracy_ahead_", "accepted_ahead_")


class MultiTokenTrainer(Trainer):
    """Trains a model with a method that is attached to it.

    pad_id: as of `Method.collator`; by default that of `processing_class`, or of the model's configuration. prefix_lm:
    prompts are read in both directions. All else is the Trainer's. Raises ValueError for a model that the method is not
    attached to, and as `Method.collator` does.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        *,
        method: Method,
        pad_id: int | None = None,
        prefix_lm: bool = False,
        callbacks: list[Any] | None = None,
        processing_class: Any = None,
        **options: Any,
    ):
        method.check_attached()
        if method.trunk.model is not base_model(model):
            raise ValueError(
                f"{type(method).__name__} is attached to another model; attach it to this one: method.attach(model)"
            )
        for name in ("data_collator", "compute_loss_func"):
            if options.get(name) is not None:
                raise ValueError(f"{name}: it is the method's own; leave it out, or take transformers' Trainer")
        args = copy.copy(args) if args is not None else TrainingArguments("trainer_output")
        args.remove_unused_columns = False  # the collator reads them
        if pad_id is None:
            said = (getattr(each, "pad_token_id", None) for each in (processing_class, method.trunk.config))
            pad_id = next((each for each in said if each is not None), None)
        self.method = method
        self._collator = method.collator(pad_id, seed=args.seed, prefix_lm=prefix_lm)
        self._parts: dict[str, Tensor] = {}
        self._logged_at = 0
        super().__init__(
            model,
            args,
            data_collator=self._collator,
            compute_loss_func=method.loss_from_outputs,
            callbacks=[self._collator, *(callbacks or ())],
            processing_class=processing_class,
            **options,
        )
        if self.args.n_gpu > 1:
            raise ValueError(f"{self.args.n_gpu} GPUs in one process; start it by `torchrun` or `accelerate launch`")

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The parts of a batch; each loss is divided by how many of its targets the whole batch has."""
        parts, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if parts:
            each = [self.method.loss_targets(layout_of(part["position_ids"])) for part in parts]
            counts = torch.stack([torch.stack([t.count for t in targets.values()]) for targets in each]).sum(0)
            totals = self.accelerator.reduce(counts.to(device), "sum")
            for part, targets in zip(parts, each, strict=True):
                of_all = zip(targets.items(), totals, strict=True)
                part["loss_targets"] = {name: replace(some, count=total) for (name, some), total in of_all}
        return parts, items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The method's loss in training, with gradients; else that of next tokens."""
        targets: dict[str, LossTargets] | None = inputs.pop("loss_targets", None)
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        layout = layout_of(inputs["position_ids"])
        with self.accelerator.autocast():
            if targets is None:
                return self.method.plain_loss(model, layout)
            loss, parts = self.method.compute_loss(model, layout, targets)
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0) + value
        return loss * self.accelerator.num_processes  # gradients are averaged over them

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Without logits where only the loss is asked for."""
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Of plain rows."""
        with _plain_rows(self):
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Of plain rows."""
        with _plain_rows(self):
            return super().get_test_dataloader(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Also how well it predicts further tokens, on the first examples."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        ahead = {f"{metric_key_prefix}_{name}": value for name, value in self._ahead(dataloader)}
        return output._replace(metrics={**(output.metrics or {}), **ahead})

    @torch.no_grad()
    def _ahead(self, dataloader: Any) -> Iterator[tuple[str, float]]:
        tally, seen, model = Tally(), 0, self.accelerator.unwrap_model(self.model)
        with evaluating(base_model(model)), self.accelerator.autocast():
            for batch in dataloader:
                layout = layout_of(self._prepare_inputs(batch)["position_ids"])
                if seen >= EXAMPLES or int(layout.segment.max()) > 0:  # a packed row is no text to go on with
                    break
                seen += len(layout.ids)
                for found in self.method.ahead(model, layout):
                    tally.add(found, layout)
        yield from ((name, value) for name, value in tally.metrics().items() if name.startswith(RATES))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Each loss beside their sum."""
        if "loss" in logs and self._parts:
            sums = self.accelerator.reduce(torch.stack([v.double() for v in self._parts.values()]), "sum").tolist()
            steps = max(1, self.state.global_step - self._logged_at)
            logs |= {name: value / steps for name, value in zip(self._parts, sums, strict=True)}
            self._parts, self._logged_at = {}, self.state.global_step
        super().log(logs, start_time)


@contextlib.contextmanager
def _plain_rows(trainer: MultiTokenTrainer) -> Iterator[None]:
    """Inside, the trainer's data loaders give what is evaluated on."""
    trainer.data_collator = trainer._collator.plain()
    try:
        yield
    finally:
        trainer.data_collator = trainer._collator
