"""MuToR as a library: a stock transformers Trainer, three lines, a plain checkpoint."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from baselines.next_token import NextTokenConfig
from mutor import MuToR
from mutor.mtp.backbone import Backbone
from mutor.mtp.collator import SAMPLES, sample_number
from mutor.mtp.layout import Example, collate
from mutor.mtp.method import Context, Method
from mutor.registry import METHODS, load

pytest.importorskip("accelerate")


def copies(number, seed=0):
    """Three random tokens, then the same three in the answer."""
    rng = np.random.default_rng(seed)
    some = rng.integers(3, 13, (number, 3))
    return [
        {"input_ids": [*map(int, s), 1, *map(int, s), 2], "prefix_length": 4, "index": n} for n, s in enumerate(some)
    ]


def trainer_of(mutor, model, folder, data, collator, **settings):
    """The README's use."""
    from transformers import Trainer, TrainingArguments

    usual = {"save_strategy": "no", "logging_steps": 5, "remove_unused_columns": False, "disable_tqdm": True}
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], dataloader_pin_memory=False, **{**usual, **settings}
    )
    return Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collator,
        callbacks=[collator],
        compute_loss_func=mutor.loss_from_outputs,
    )


def collator_of(mutor, epoch=0, **settings):
    """A collator that knows its epoch."""
    collator = mutor.collator(0, **settings)
    collator.set_epoch(epoch)
    return collator


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("prefix_lm", [False, True])
def test_a_stock_trainer_learns_and_exports_a_plain_model(tiny, tmp_path, family, prefix_lm):
    """The loss falls, the register moves, anyone can load the result."""
    from transformers import AutoModelForCausalLM

    model = tiny(family, scale=1.0)
    keys = set(model.state_dict())
    mutor = MuToR.of(d_max=3, a=0.3)
    mutor.attach(model)
    start = model.mtp["registers"].weight.detach().clone()
    trainer = trainer_of(
        mutor,
        model,
        tmp_path / "run",
        copies(256),
        mutor.collator(0, prefix_lm=prefix_lm),
        max_steps=40,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 8 and losses[-1] < 0.7 * losses[0]
    assert float((model.mtp["registers"].weight - start).detach().abs().max()) > 1e-3
    mutor.export(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([copies(1)[0]["input_ids"]])
    assert set(plain.state_dict()) == keys
    assert torch.equal(plain(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "settings", [{}, {"offsets": "mixed", "register_embedding": "per_offset"}, {"d_min": 9, "d_max": 9}]
)
@pytest.mark.parametrize("prefix_lm", [False, True])
def test_the_collated_loss_equals_the_methods_own(tiny, tools, family, implementation, settings, prefix_lm):
    """collator, stock forward, loss_from_outputs: the same number as losses() and the same gradients."""
    if family == "gemma2" and implementation == "sdpa":
        implementation = None  # as the family has it
    model, mutor = tiny(family, attn_implementation=implementation), MuToR.of(**{"d_max": 4, "a": 0.4, **settings})
    tools.attach(mutor, model)
    rng = np.random.default_rng(0)
    data = [
        {"input_ids": rng.integers(3, 60, n), "prefix_length": p, "index": 11 * n} for n, p in [(9, 2), (6, 4), (8, 1)]
    ]
    model.train()
    inputs = collator_of(mutor, seed=5, prefix_lm=prefix_lm)(data)
    labels = inputs.pop("labels")
    ours = mutor.loss_from_outputs(model(**inputs), labels)
    rows = collate([Example(e["input_ids"], e["prefix_length"], e["index"]) for e in data], 0)
    theirs, _ = mutor.compute_loss(model, mutor.train_layout(rows, Context(seed=5, prefix_lm=prefix_lm)))
    tools.close(ours, theirs)
    tools.same_gradients(tools.gradients(model, ours), tools.gradients(model, theirs))


def test_gradient_accumulation_is_a_mean(tiny, tmp_path):
    """Two equal micro-batches of one, or one batch of two: the same step. Trainer leaves the division to the loss."""
    weights = []
    for size, steps in [(2, 1), (1, 2)]:
        model, mutor = tiny(), MuToR.of(d_max=3)
        mutor.attach(model)
        sample = {"input_ids": [5, 6, 7, 1, 5, 6, 7, 2], "prefix_length": 4, "index": 3}
        trainer_of(
            mutor,
            model,
            tmp_path,
            [sample, sample],
            mutor.collator(0),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
        ).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["next_token", "teacherless", "parallel_mtp", "sequential_mtp", "mutor", "token_order", "next_latent", "joint_mtp"],
)
def test_every_method_exports_the_plain_model(tiny, tools, tmp_path, name):
    """No method's parameters leave with the model."""
    from transformers import AutoModelForCausalLM

    model, ids = tiny("gemma"), torch.tensor([[5, 6, 7, 8]])
    cls = load(METHODS, name, "method")
    method = cls(cls.Config())
    wanted = model(ids).logits
    tools.attach(method, model)
    method.export(model, tmp_path)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(plain(ids).logits, wanted)


def test_the_lines_of_the_readme_run_as_they_stand(tiny, tmp_path, monkeypatch):
    """The code block of the README, with a tiny model in place of the hub's."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    model = tiny("llama")
    before = model.state_dict()["lm_head.weight"].clone()
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: model)
    monkeypatch.chdir(tmp_path)
    examples = [{"input_ids": [1, 2, 3, 4, 5, 6], "prefix_length": 2} for _ in range(8)]
    exec(code, {"dataset": examples})
    monkeypatch.undo()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not torch.equal(plain.lm_head.weight, before) and not hasattr(plain, "mtp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_scales_its_logits_in_its_own_way_is_refused(tiny, monkeypatch, dtype):
    """In bfloat16 two passes of a large model differ by some percent, and that is no reason to refuse it."""
    model = tiny("llama", scale=1.0).to(dtype)
    probe = Backbone.probe
    monkeypatch.setattr(Backbone, "probe", lambda self, layout: probe(self, layout) * 1.02)
    if dtype == torch.float32:
        with pytest.raises(ValueError, match="can't be rebuilt from its final norm"):
            Backbone(model)
    else:
        Backbone(model)
    monkeypatch.undo()
    Backbone(model)
    own = type(model).forward

    def scaled(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        out.logits = out.logits * 1.02
        return out

    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(ValueError, match="can't be rebuilt from its final norm"):
        Backbone(model)


PLAIN = [{"input_ids": [*range(3 + n, 23 + n)], "prefix_length": 2} for n in range(12)]


def draws(loader, collator, epochs=3):
    """The offset of each sequence, by epoch: where its first register stands, which is behind token 1."""
    found = []
    for epoch in range(epochs):
        collator.set_epoch(epoch)
        found.append([int(line[20]) for batch in loader for line in batch["position_ids"]])
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
    # persistent ones under spawn get the collator once, before the first epoch
    for settings in (
        {},
        {"persistent_workers": True},
        {"persistent_workers": True, "multiprocessing_context": "spawn"},
    ):
        again = mutor.collator(0)
        loader = DataLoader(data, batch_size=4, collate_fn=again, num_workers=2, **settings)
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
        again([{"input_ids": list(range(65)) * 2, "prefix_length": 2}])


class Seen(list):
    """The offsets that a Trainer's batches were given, in their order."""

    def watch(self, collator):
        given = collator.__class__.__call__

        class Watching(collator.__class__):
            def __call__(watching, examples):
                batch = given(watching, examples)
                first, length = batch["position_ids"], len(examples[0]["input_ids"])
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


def test_evaluation_is_next_token_predictions_own(tiny, tmp_path):
    """eval_loss is the plain model's loss, before training and during it, whatever a."""
    model, mutor = tiny("llama", scale=1.0), MuToR.of(d_max=3, a=0.7)
    mutor.attach(model)
    data = copies(16)
    trainer = trainer_of(
        mutor,
        model,
        tmp_path,
        data,
        mutor.collator(0),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
    )

    def plain():
        ids = torch.tensor([e["input_ids"] for e in data])
        with torch.no_grad():
            logits = model.eval()(ids).logits[:, 3:-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 4:].flatten()))

    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain(), rel=1e-5)
    trainer.train()
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert found[-1] == pytest.approx(plain(), rel=1e-5) and len(set(found)) == 2


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
    outputs = model.train()(**batch)
    for _ in range(83):
        mutor.loss_from_outputs(outputs, labels)
    with pytest.raises(ValueError, match=words):
        mutor.loss_from_outputs(outputs, labels)
    longer = [*PLAIN, {"input_ids": list(range(3, 23)), "prefix_length": 1}]
    trainer_of(mutor, model, tmp_path, longer, mutor.collator(0), max_steps=2).train()


def test_the_loss_is_the_methods_own_in_training_with_gradients_alone(tiny):
    """A model in training mode may be scored without gradients, and one in evaluation mode may have them."""
    model, mutor = tiny("llama", scale=1.0), MuToR.of(d_max=3, a=0.7)
    mutor.attach(model)
    batch = collator_of(mutor)(copies(4))
    labels = batch.pop("labels")
    outputs = model.train()(**batch)
    trained = mutor.loss_from_outputs(outputs, labels).detach()
    with torch.no_grad():
        scored = mutor.loss_from_outputs(outputs, labels)
    model.eval()
    assert float(mutor.loss_from_outputs(outputs, labels).detach()) == float(scored) != float(trained)


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
