"""Examples to batches of a method, for a Trainer of transformers or any other loop over a data loader.

collator = method.collator(pad_id=0)
Trainer(..., data_collator=collator, callbacks=[collator], compute_loss_func=method.loss_from_outputs)

An example is "input_ids" and what of them is predicted, in any of these words:

    input_ids         5  6  7  1  8  9  2
    prefix_length     4                        tokens of the prompt
    completion_mask   0  0  0  0  1  1  1      or assistant_masks, as TRL has them
    labels            .  .  .  .  8  9  2      -100 for "."
    none of them                               plain text: all tokens are predicted

With "seq_lengths" [4, 3], or "position_ids" that begin anew (0 1 2 3 0 1 2), it is several sequences, which don't see
each other. Where "attention_mask" is 0 there is no token.

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

from mutor.mtp.layout import IGNORE, Example, lay
from mutor.mtp.passes import batch_of
from mutor.mtp.settings import Context, Progress

SAMPLES = 2**40  # numbers of samples in an epoch
MASKS = ("completion_mask", "assistant_masks")


def sample_number(example: Mapping[str, Any], epoch: int) -> int:
    """The number that offsets are drawn from: "index" of the example, else a hash of its tokens, in that epoch."""
    index = example.get("index")
    if index is None:
        ids = np.asarray(example["input_ids"], dtype=np.int64)
        index = int.from_bytes(blake2b(ids.tobytes(), digest_size=5).digest())
    return epoch * SAMPLES + int(index) % SAMPLES


def sequences(example: Mapping[str, Any], epoch: int = 0) -> list[Example]:
    """The sequences of an example, one or more of a packed row.

    Raises ValueError for one without token ids, or whose columns contradict each other.
    """
    if example.get("input_ids") is None:
        raise ValueError(
            f"examples have no input_ids, but {', '.join(map(str, example)) or 'nothing'}; tokenise them first, and "
            "set TrainingArguments(remove_unused_columns=False)"
        )
    ids = np.asarray(example["input_ids"], dtype=np.int64)
    is_target, starts, there = _is_target(example, ids), _starts(example, ids), _column(example, "attention_mask", ids)
    kept = np.ones(len(ids), bool) if there is None else there != 0
    found = []
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        inside = slice(start, stop)
        own, targets = ids[inside][kept[inside]], is_target[inside][kept[inside]]
        if len(own):
            targets[0] = False  # nothing stands before it
            one = example if len(starts) == 1 else {}
            found.append(_example(own, targets, sample_number({**one, "input_ids": own}, epoch)))
    if not found:
        raise ValueError("an example has no tokens; leave it out")
    return found


def _example(ids: np.ndarray, is_target: np.ndarray, sample: int) -> Example:
    prefix = int(is_target.argmax()) if is_target.any() else len(ids)
    return Example(ids, prefix, sample, None if is_target[prefix:].all() else is_target)


def _column(example: Mapping[str, Any], name: str, ids: np.ndarray) -> np.ndarray | None:
    """A column with a number for each token; None without it."""
    if example.get(name) is None:
        return None
    values = np.asarray(example[name])
    if values.shape != ids.shape:
        raise ValueError(f"{name}: {len(values)} numbers for {len(ids)} input_ids; allowed: one for each")
    return values


def _is_target(example: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
    """bool [T]: what is predicted by all columns that say it."""
    said = np.ones(len(ids), bool)
    if (prefix := example.get("prefix_length")) is not None:
        if not 0 < int(prefix) < len(ids):
            raise ValueError(
                f"prefix_length: {prefix} of {len(ids)} tokens: a sequence needs at least one prefix and one answer "
                "token"
            )
        said &= np.arange(len(ids)) >= int(prefix)
    for name in MASKS:
        if (mask := _column(example, name, ids)) is not None:
            said &= mask != 0
    if (labels := _column(example, "labels", ids)) is not None:
        wrong = (labels != IGNORE) & (labels != ids)
        if wrong.any():
            at = int(wrong.argmax())
            raise ValueError(
                f"labels: {labels[at]} at token {at}, which is {ids[at]}; allowed: the token itself, or {IGNORE}"
            )
        said &= labels != IGNORE
    return said


def _starts(example: Mapping[str, Any], ids: np.ndarray) -> list[int]:
    """Where each sequence of a packed row begins."""
    if (lengths := example.get("seq_lengths")) is not None:
        if sum(lengths) != len(ids):
            raise ValueError(f"seq_lengths: {sum(lengths)} tokens together, and there are {len(ids)} input_ids")
        return [int(n) for n in np.cumsum([0, *lengths[:-1]])]
    if (positions := _column(example, "position_ids", ids)) is None:
        return [0]
    starts = np.flatnonzero(positions == 0)
    since = np.arange(len(ids)) - np.maximum.accumulate(np.where(positions == 0, np.arange(len(ids)), 0))
    if not len(starts) or (positions != since).any():
        raise ValueError("position_ids: allowed: 0, 1, 2 .., beginning with 0 anew for each sequence of a packed row")
    return [int(n) for n in starts]


class Collator(TrainerCallback):
    """Lays out a batch, as mutor/mtp/passes.py draws it. In a worker process it holds the method without its model."""

    def __init__(self, method: Any, context: Context):
        """method: attached to its model."""
        self.method, self.context = method, context
        self._epoch = torch.tensor(-1).share_memory_()
        self._begun, self._plain = False, False

    def __getstate__(self) -> dict[str, Any]:
        method = copy.copy(self.method)
        vars(method).update({name: None for name, value in vars(method).items() if _modules(value)})
        method.trunk = self.method.trunk.facts()  # all that layouts ask of it
        return {**self.__dict__, "method": method}

    def plain(self) -> Collator:
        """One for evaluation: nothing is added to the tokens, nothing hidden, whatever the epoch."""
        other = copy.copy(self)
        other._plain = True
        return other

    def set_epoch(self, epoch: int) -> None:
        """Draw the offsets of this epoch from now on, in all workers; called before the epoch's first batch is."""
        self._epoch.fill_(epoch)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Raises ValueError before the epoch is known, and for sequences that the model or the method can't take."""
        epoch, method = int(self._epoch), self.method
        if epoch < 0 and not self._plain:
            raise ValueError(
                "collator: which epoch is it? Make it a callback of the Trainer, too (callbacks=[collator]), or call "
                "collator.set_epoch(epoch) before each epoch; else each would draw the same offsets"
            )
        rows = [sequences(example, epoch) for example in examples]
        self._check(example for row in rows for example in row)
        laid = lay(rows, self.context.pad_id)
        method.trunk.check_tokens(laid)
        layout = (method.eval_layout if self._plain else method.train_layout)(laid, self.context)
        method.trunk.check_lengths(layout)
        return batch_of(layout)

    def _check(self, examples: Iterator[Example]) -> None:
        """Refuse answers in pieces where there has to be one prompt and one answer behind it."""
        one = "prefix_lm" if self.context.prefix_lm else "behind_prompt" if self.method.behind_prompt else ""
        if one and any(example.is_target is not None for example in examples):
            name = type(self.method).__name__
            raise ValueError(
                f"{name}: with {one} an example is one prompt and one answer behind it, and here tokens behind the "
                "first predicted one are not; allowed: an example for each answer"
            )

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a model that was changed since, and a Trainer that drops columns or can't be heard.

        A Trainer may evaluate before it trains.
        """
        self.method.check_attached()
        if args.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns: True, with which a Trainer drops prefix_length, completion_mask, seq_lengths "
                "and index before the collator sees them; set TrainingArguments(remove_unused_columns=False)"
            )
        if getattr(args, "torch_compile", False):
            raise ValueError(
                "torch_compile: hidden states are heard by hooks and attention is planned from each batch's lengths, "
                "so that a compiled model would be compiled again with each batch; leave it out"
            )
        self.set_epoch(max(0, int(self._epoch)))

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Refuse data of which no answer is long enough; the first epoch is the resumed one, if there is one."""
        self._begun = False
        dataset = getattr(train_dataloader, "dataset", None)
        if isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset):
            self.method.read_examples((each.ids, each.prefix) for each in _all(dataset))
            self.method.check_answers(
                len(each.ids) - each.prefix if each.is_target is None else int(each.is_target.sum())
                for each in _all(dataset)
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the loss of this step counts for may follow a schedule."""
        self.method.progress = Progress(state.global_step, max(1, state.max_steps))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The next epoch; the Trainer's own count is a fraction where it does not know how long an epoch is."""
        self.set_epoch(int(self._epoch) + 1 if self._begun else int(state.epoch or 0))
        self._begun = True


def _modules(value: Any) -> bool:
    """Whether it is a part of the model, or a list of such."""
    return any(isinstance(each, torch.nn.Module) for each in (value if isinstance(value, list) else [value]))


def _all(dataset: Any) -> Iterator[Example]:
    for number in range(len(dataset)):
        yield from sequences(dataset[number])
