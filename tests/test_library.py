"""MuToR as a library: a stock transformers Trainer, three lines, a plain checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mutor import MuToR
from mutor.mtp.backbone import Backbone
from mutor.mtp.layout import Example, collate
from mutor.mtp.method import Context
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
    "settings",
    [
        {},
        {"offsets": "mixed", "register_embedding": "per_offset"},
        {"offsets": "all", "placement": "every", "registers": 2},
        {"d_min": 9, "d_max": 9},
    ],
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


def test_the_lines_of_the_readme_run_as_they_stand(tiny, tmp_path, monkeypatch, capsys):
    """Both code blocks, with a tiny model in place of the hub's: trained, saved, loaded, decoded with drafts."""
    from transformers import AutoModelForCausalLM

    readme = (Path(__file__).parent.parent / "README.md").read_text()
    train, decode = (block.split("```")[0] for block in readme.split("```python\n")[1:])
    monkeypatch.chdir(tmp_path)
    model = tiny("llama")
    model.save_pretrained("tiny")
    names = {"dataset": [{"input_ids": [1, 2, 3, 4, 5, 6], "prefix_length": 2} for _ in range(8)], "prompt": [7, 8, 9]}
    exec(train.replace("HuggingFaceTB/SmolLM2-135M", "tiny"), names)
    plain = AutoModelForCausalLM.from_pretrained("plain")
    assert not torch.equal(plain.lm_head.weight, model.lm_head.weight) and not hasattr(plain, "mtp")
    exec(decode, names)
    done = names["done"]
    wanted = plain.generate(torch.tensor([names["prompt"]]), max_new_tokens=32, eos_token_id=None, do_sample=False)
    assert done.ids[0].tolist() == wanted[0, 3:].tolist()
    assert capsys.readouterr().out.endswith(f"{done.acceptance_length} tokens a pass\n") and len(done.accepted[0]) < 32


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


def test_the_loss_is_the_methods_own_in_training_with_gradients_alone(tiny):
    """A model in training mode may be scored without gradients, and one in evaluation mode may have them."""
    model, mutor = tiny("llama", scale=1.0), MuToR.of(d_max=3, a=0.7)
    mutor.attach(model)
    batch = collator_of(mutor)(copies(4))
    labels = batch.pop("labels")

    def loss():
        return float(mutor.loss_from_outputs(model(**batch), labels).detach())

    model.train()
    trained = loss()
    with torch.no_grad():
        scored = loss()
    model.eval()
    assert loss() == pytest.approx(scored, rel=1e-6) and abs(scored - trained) > 1e-3
