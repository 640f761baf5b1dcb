"""Examples to batches with registers, for a Trainer of transformers or any other loop over a data loader.

collator = method.collator(pad_id=0)
Trainer(..., data_collator=collator, callbacks=[collator], compute_loss_func=method.loss_from_outputs)

Offsets come from (seed, epoch, sample) alone: not from the worker, its start method, the batch or its order. So a
resumed run draws as one that was never interrupted. The epoch stands in shared memory, where workers that outlive an
epoch read it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence, Sized
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from mutor.mtp.layout import IGNORE, Example, collate
from mutor.mtp.method import Context, Method
from mutor.mtp.settings import Progress

SAMPLES = 2**40  # numbers of samples in an epoch


def sample_number(example: Mapping[str, Any], epoch: int) -> int:
    """The number that offsets are drawn from: "index" of the example, else a hash of its tokens, in that epoch."""
    index = example.get("index")
    if index is None:
        ids = np.asarray(example["input_ids"], dtype=np.int64)
        index = int.from_bytes(blake2b(ids.tobytes(), digest_size=5).digest())
    return epoch * SAMPLES + int(index) % SAMPLES


class Collator(TrainerCallback):
    """Lays out a batch.

    Takes examples with "input_ids" and "prefix_length", and if there is one "index", the sample's number. Gives
    input_ids, position_ids, attention_mask and labels; a register's label is its target plus the vocabulary size, which
    `loss_from_outputs` takes apart. In a worker process it holds the method without its model.
    """

    def __init__(self, method: Method, context: Context):
        """method: attached to its model."""
        self.method, self.context = method, context
        self._epoch = torch.tensor(-1).share_memory_()
        self._begun = False

    def __getstate__(self) -> dict[str, Any]:
        method = copy.copy(self.method)
        method.trunk = self.method.trunk.facts()  # type: ignore[assignment]  # all that layouts ask of it
        return {**self.__dict__, "method": method}

    def set_epoch(self, epoch: int) -> None:
        """Draw the offsets of this epoch from now on, in all workers; called before the epoch's first batch is."""
        self._epoch.fill_(epoch)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Raises ValueError before the epoch is known, and for sequences that the model or the method can't take."""
        epoch, trunk = int(self._epoch), self.method.trunk
        if epoch < 0:
            raise ValueError(
                "collator: which epoch is it? Make it a callback of the Trainer, too (callbacks=[collator]), or call "
                "collator.set_epoch(epoch) before each epoch; else each would draw the same offsets"
            )
        rows = [Example(np.asarray(e["input_ids"]), int(e["prefix_length"]), sample_number(e, epoch)) for e in examples]
        layout = self.method.train_layout(collate(rows, self.context.pad_id), self.context)
        trunk.check_lengths(layout)
        shift = torch.where(layout.register & (layout.target != IGNORE), trunk.vocabulary, 0)
        labels: Tensor = layout.target + shift
        return {
            "input_ids": layout.ids,
            "position_ids": layout.position,
            "attention_mask": trunk.mask(layout),
            "labels": labels,
        }

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a model that was changed since; a Trainer may evaluate before it trains."""
        self.method.trunk.check_attached()
        self.set_epoch(max(0, int(self._epoch)))

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Refuse data of which no answer is long enough; the first epoch is the resumed one, if there is one."""
        self._begun = False
        dataset = getattr(train_dataloader, "dataset", None)
        if isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset):
            self.method.check_answers(_answers(dataset))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the loss of this step counts for may follow a schedule."""
        self.method.progress = Progress(state.global_step, max(1, state.max_steps))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The next epoch; the Trainer's own count is a fraction where it does not know how long an epoch is."""
        self.set_epoch(int(self._epoch) + 1 if self._begun else int(state.epoch or 0))
        self._begun = True


def _answers(dataset: Any) -> Iterator[int]:
    """Tokens of each answer."""
    for number in range(len(dataset)):
        example = dataset[number]
        yield len(example["input_ids"]) - int(example["prefix_length"])
