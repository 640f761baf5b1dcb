"""Batches for a Trainer: offsets of seed, epoch and sample alone, and what is refused before it trains."""

import hashlib
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mutor.baselines.next_token import NextTokenConfig
from test_library import collator_of, trainer_of

from mutor import MuToR
from mutor.mtp.collator import SAMPLES, sample_number
from mutor.mtp.layout import Example
from mutor.mtp.method import Context, Method
from mutor.mtp.passes import layout_of

PLAIN = [{"input_ids": [*range(3 + n, 23 + n)], "prefix_length": 2} for n in range(12)]


def draws(loader, collator, epochs=3):
    """The offset of each sequence, by epoch: where its first register stands, which is behind token 1."""
    found = []
    for epoch in range(epochs):
        collator.set_epoch(epoch)
        found.append([int(line[20]) for batch in loader for line in layout_of(batch["position_ids"]).position])
    return found


@pytest.mark.parametrize("numbered", [False, True])
def test_offsets_depend_on_seed_epoch_and_sample_alone(tiny, numbered):
    """Not on workers, how they start and how long they live, nor on the order of samples."""
    from torch.utils.data import DataLoader

    mutor = MuToR.of(d_max=9)
    mutor.attach(tiny())
    data = [{**e, "index": n} for n, e in enumerate(PLAIN)] if numbered else PLAIN
    collator = mutor.collator(0)
    wanted = draws(DataLoader(data, batch_size=4, collate_fn=collator), collator)
    assert all(1 <= d <= 9 for epoch in wanted for d in epoch) and all(len(set(epoch)) > 3 for epoch in wanted)
    assert wanted[0] != wanted[1] != wanted[2] != wanted[0]
    # persistent ones under spawn get the collator once, before the first epoch, and have another seed of hash()
    spawned = {"persistent_workers": True, "multiprocessing_context": "spawn", "num_workers": 1}
    for settings in ({}, {"persistent_workers": True}, *([] if numbered else [spawned])):
        again = mutor.collator(0)
        loader = DataLoader(data, batch_size=4, collate_fn=again, **{"num_workers": 2, **settings})
        assert draws(loader, again) == wanted
    backwards = DataLoader(data[::-1], batch_size=3, collate_fn=collator)
    assert [epoch[::-1] for epoch in draws(backwards, collator)] == wanted
    assert draws(DataLoader(data, 4, collate_fn=(other := mutor.collator(0, seed=1))), other) != wanted


def test_a_pickled_collator_leaves_the_model_behind(tiny):
    """What a worker that is spawned has to receive."""
    import pickle

    model, mutor = tiny(), MuToR.of(d_max=6)
    mutor.attach(model)
    collator = collator_of(mutor, epoch=2)
    pickled = pickle.dumps(collator)
    assert len(pickled) < 20_000 < 4 * sum(p.numel() for p in model.parameters())
    again = pickle.loads(pickled)
    for name, value in collator(PLAIN).items():
        assert torch.equal(again(PLAIN)[name], value)
    with pytest.raises(ValueError, match="64"):
        again([{"input_ids": list(range(50)) * 2, "prefix_length": 2}])


@pytest.mark.parametrize("wrong", [61, 62, -1])
def test_an_id_that_is_no_token_is_refused(tiny, wrong):
    """A tokenizer with more tokens than the model: beyond its vocabulary of 61 stand registers, which it would be read
    as. In the suite's own batches, too, and in what is only evaluated."""
    mutor = MuToR.of(d_max=2)
    mutor.attach(tiny())
    ids = [3, wrong, 4, 5]
    for collator in (collator_of(mutor), mutor.collator(0).plain()):
        with pytest.raises(
            ValueError, match=f": {wrong} is no token of this model, which has 61; take its own tokenizer"
        ):
            collator([{"input_ids": ids, "prefix_length": 2}])
    with pytest.raises(ValueError, match=f": {wrong} is no token of this model"):
        mutor.prepare_batch([Example(np.array(ids), 2)], Context(pad_id=70))
    layout, _ = mutor.prepare_batch([Example(np.array(ids[2:]), 1), Example(np.arange(4), 1)], Context(pad_id=70))
    assert int(layout.ids.max()) >= 61  # registers and padding may be


class Seen(list):
    """The offsets that a Trainer's batches were given, in their order."""

    def watch(self, collator):
        given = collator.__class__.__call__

        class Watching(collator.__class__):
            def __call__(watching, examples):
                batch = given(watching, examples)
                first, length = layout_of(batch["position_ids"]).position, len(examples[0]["input_ids"])
                self.append(list(zip([e["input_ids"][0] for e in examples], first[:, length].tolist(), strict=True)))
                return batch

        collator.__class__ = Watching
        return collator


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_draws_as_one_that_was_not_interrupted(tiny, tmp_path, workers):
    """Three epochs of three steps, resumed within the second: the same weights bit for bit, and no epoch as another."""
    ends, seen = [], []
    for checkpoint in (None, str(tmp_path / "checkpoint-5")):
        model, mutor = tiny("llama", scale=1.0), MuToR.of(d_max=9)
        mutor.attach(model)
        seen.append(Seen())
        collator = mutor.collator(0) if workers else seen[-1].watch(mutor.collator(0))
        trainer_of(
            mutor,
            model,
            tmp_path,
            PLAIN,
            collator,
            num_train_epochs=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=bool(workers),
            save_strategy="steps",
            save_steps=5,
            learning_rate=1e-2,
        ).train(resume_from_checkpoint=checkpoint)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)
    if not workers:
        epochs = [dict(chain(*seen[0][start : start + 6])) for start in (0, 6, 12)]
        assert all(len(epoch) == 12 for epoch in epochs) and epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert seen[0][10:] == seen[1]


def test_an_iterable_that_ends_begins_a_new_epoch(tiny, tmp_path):
    """There the Trainer's count of epochs is a fraction of all steps."""
    from torch.utils.data import IterableDataset

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(PLAIN[:4])

    model, mutor = tiny("llama", scale=1.0), MuToR.of(d_max=9)
    mutor.attach(model)
    collator = (seen := Seen()).watch(mutor.collator(0))
    trainer_of(mutor, model, tmp_path, Stream(), collator, max_steps=6, per_device_train_batch_size=2).train()
    epochs = [[*chain(*seen[start : start + 2])] for start in (0, 2, 4)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_without_an_epoch_there_is_no_batch(tiny):
    """All epochs would draw the same, and nobody would know."""
    mutor = MuToR.of()
    mutor.attach(tiny())
    with pytest.raises(ValueError, match=r"callbacks=\[collator\].*set_epoch") as error:
        mutor.collator(0)(PLAIN)
    assert "\n" not in str(error.value)


def test_data_without_room_for_a_register_are_refused(tiny, tmp_path):
    """With the lengths: before a Trainer's first step, and in any other loop after a thousand answers."""
    words = "MuToR: the longest answer has 18 tokens, and below 19 .*; allowed: longer answers, or d_min of at most 18"
    model, mutor = tiny("llama"), MuToR.of(d_min=19, d_max=20)
    mutor.attach(model)
    trainer = trainer_of(mutor, model, tmp_path, PLAIN, mutor.collator(0), max_steps=2)
    with pytest.raises(ValueError, match=words) as error:
        trainer.train()
    assert trainer.state.global_step == 0 and "\n" not in str(error.value)
    batch = collator_of(mutor)(PLAIN)
    labels = batch.pop("labels")
    model.train()
    for _ in range(83):
        mutor.loss_from_outputs(model(**batch), labels)
    with pytest.raises(ValueError, match=words):
        mutor.loss_from_outputs(model(**batch), labels)
    longer = [*PLAIN, {"input_ids": list(range(3, 23)), "prefix_length": 1}]
    trainer_of(mutor, model, tmp_path, longer, mutor.collator(0), max_steps=2).train()


def test_words_on_answers_that_are_too_short():
    mutor, plain = MuToR.of(d_min=3, d_max=4), Method(NextTokenConfig())
    plain.shortest_answer = 3
    mutor.check_answers([])  # nothing is known
    mutor.check_answers([0, 0])
    mutor.check_answers([1, 3])
    with pytest.raises(ValueError, match=r"longer answers, or d_min of at most 2$"):
        mutor.check_answers([1, 2])
    with pytest.raises(ValueError, match=r"Method: the longest answer has 1 tokens, .* allowed: longer answers$"):
        plain.check_answers([1])


def test_a_sample_is_its_tokens_however_they_are_kept():
    """Lists, and arrays of any width, so that a data set that was saved and read again draws the same offsets."""
    tokens = [3, 70, 5]
    kept = [tokens, np.array(tokens, dtype=np.int32), np.array(tokens, dtype=np.uint8), torch.tensor(tokens)]
    numbers = {sample_number({"input_ids": ids, "prefix_length": 1}, 2) for ids in kept}
    assert len(numbers) == 1 and numbers != {sample_number({"input_ids": [3, 70, 6], "prefix_length": 1}, 2)}
    assert sample_number({"input_ids": tokens, "index": 7}, 2) == 2 * SAMPLES + 7
    five_bytes = hashlib.blake2b(np.array(tokens, dtype=np.int64).tobytes(), digest_size=5).hexdigest()
    assert numbers == {2 * SAMPLES + int(five_bytes, 16)}


def test_an_epoch_that_was_set_stays_when_a_trainer_begins(tiny):
    """It may evaluate first; then it is the first epoch."""
    mutor = MuToR.of()
    mutor.attach(tiny())
    arguments = SimpleNamespace(remove_unused_columns=False)
    for given, wanted in ((None, 0), (0, 0), (5, 5)):
        collator = mutor.collator(0)
        assert int(collator._epoch) == -1
        if given is not None:
            collator.set_epoch(given)
        collator.on_init_end(arguments, None, None)
        assert int(collator._epoch) == wanted
        collator.on_epoch_begin(None, SimpleNamespace(epoch=3.0), None)  # of a run that goes on
        assert int(collator._epoch) == 3
        collator.on_epoch_begin(None, SimpleNamespace(epoch=3.5), None)
        assert int(collator._epoch) == 4


def test_a_batch_attends_to_all_but_padding(tiny):
    """Of each row, packed ones too; answers in pieces are no matter where nothing needs them whole."""
    mutor = MuToR.of(d_max=2)
    mutor.attach(tiny())
    collator = collator_of(mutor)
    pieces = {"input_ids": [3, 4, 5, 6], "completion_mask": [0, 1, 0, 1]}
    batch = collator([{"input_ids": [3, 4, 5, 6, 7, 8, 9], "seq_lengths": [4, 3]}, pieces])
    layout = layout_of(batch["position_ids"])
    assert set(layout.segment[0].tolist()) >= {0, 1}
    assert torch.equal(batch["attention_mask"], (layout.segment != -1).long())
