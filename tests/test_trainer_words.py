"""What MultiTokenTrainer logs and tells in evaluation, and what it takes without being told."""

import numpy as np
import pytest
import torch
from test_trainer import DATA, losses, made, trainer

import mutor
from mutor.mtp.layout import Example, collate
from mutor.mtp.settings import Context

pytest.importorskip("accelerate")


@pytest.mark.parametrize("name", ["mutor", "parallel_mtp", "token_masking", "pause", "lora_mutor"])
def test_evaluation_is_plain_and_says_how_far_it_sees(tiny, tmp_path, name):
    """eval_loss of next tokens on unmasked rows; rates by depth are those of `metrics`."""
    model = tiny("llama", scale=1.0)
    method = made(name, model)
    found = trainer(method, model, tmp_path, eval_dataset=DATA, per_device_eval_batch_size=8).evaluate()
    examples = [(np.array(each["input_ids"]), each["prefix_length"]) for each in DATA]
    with torch.no_grad():
        layout = method.eval_layout(collate([Example(*each) for each in examples], 0), Context())
        logits = model.eval()(**{"input_ids": layout.ids, "position_ids": layout.position}).logits[..., :61]
        rates = method.metrics(model, examples, Context(), 8)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), layout.target.flatten())
    assert found["eval_loss"] == pytest.approx(float(wanted), rel=1e-5)
    ahead = {k.removeprefix("eval_"): v for k, v in found.items() if "_ahead_" in k}
    assert ahead == {k: pytest.approx(v) for k, v in rates.items() if k.startswith(("accuracy", "accepted"))}
    assert f"accuracy_ahead_{3 if name in ('mutor', 'parallel_mtp') else 1}" in ahead


def test_predictions_are_logits_of_plain_rows(tiny, tmp_path):
    """`predict` gives the logits of rows without registers, but for keys that are left out."""
    model = tiny("llama", scale=1.0)
    like = trainer(made("mutor", model), model, tmp_path, per_device_eval_batch_size=8)
    with torch.no_grad():
        ids = torch.tensor([[*each["input_ids"], *[0] * (12 - len(each["input_ids"]))] for each in DATA])
        place = torch.tensor([[*range(len(e["input_ids"])), *[0] * (12 - len(e["input_ids"]))] for e in DATA])
        wanted = model.eval()(input_ids=ids, position_ids=place).logits
    found = like.predict(DATA)
    assert found.predictions.shape[:2] == ids.shape and "test_loss" in found.metrics
    for row, logits, each in zip(found.predictions, wanted.numpy(), DATA, strict=True):
        length = len(each["input_ids"])
        assert np.abs(row[:length, :61] - logits[:length, :61]).max() < 1e-4
    assert not np.size(like.predict(DATA, ignore_keys=["logits"]).predictions)
    few = like.evaluation_loop(like.get_eval_dataloader(DATA[:4]), "some")
    assert few.num_samples == 4 and {"eval_loss", "eval_accuracy_ahead_2"} <= few.metrics.keys()
    assert few.predictions is not None
    again = like.evaluation_loop(like.get_eval_dataloader(eval_dataset=DATA[:4]), "some", prediction_loss_only=True)
    assert again.predictions is None and again.metrics == pytest.approx(few.metrics)


def test_how_far_it_sees_is_told_of_the_first_texts(tiny, tmp_path, monkeypatch):
    """Of so many at least, in whole batches; of packed rows nothing, as they are no text to go on with."""
    model = tiny("llama", scale=1.0)
    method = made("parallel_mtp", model)
    like = trainer(method, model, tmp_path, per_device_eval_batch_size=2)
    examples = [(np.array(each["input_ids"]), each["prefix_length"]) for each in DATA]
    with torch.no_grad():
        rates = {n: method.metrics(model.eval(), examples[:n], Context(), 8) for n in (2, 4, 6)}
    name = "accuracy_ahead_2"
    for count in (3, 4):
        monkeypatch.setattr("mutor.mtp.trainer.EXAMPLES", count)
        assert like.evaluate(DATA)[f"eval_{name}"] == pytest.approx(rates[4][name])
    packed = {
        "input_ids": [token for each in DATA[:2] for token in each["input_ids"]],
        "seq_lengths": [len(each["input_ids"]) for each in DATA[:2]],
    }
    assert not any("_ahead_" in key for key in like.evaluate([packed]))
    assert any("_ahead_" in key for key in like.evaluate([{"input_ids": packed["input_ids"]}]))


def test_without_arguments_it_is_as_a_trainer_of_transformers(tiny, tmp_path, monkeypatch):
    """But for the columns, which its collator reads; arguments that are given stay as they are."""
    from transformers import TrainingArguments

    monkeypatch.chdir(tmp_path)
    model = tiny()
    method = made("mutor", model)
    found = mutor.MultiTokenTrainer(model, method=method, pad_id=0)
    assert (found.args.output_dir, found.args.remove_unused_columns) == ("trainer_output", False)
    given = TrainingArguments("out", use_cpu=True, report_to=[])
    assert mutor.MultiTokenTrainer(model, given, method=method, pad_id=0).args.output_dir == "out"
    assert given.remove_unused_columns


def test_losses_logged_are_means_of_the_steps_since(tiny, tmp_path):
    """Of two steps the mean of what each one logs alone; other words are logged without losses."""
    found = {}
    for every in (1, 2):
        model = tiny("llama", scale=1.0)
        like = trainer(made("mutor", model), model, tmp_path, max_steps=4, logging_steps=every)
        found[every] = losses(like)
        like.log({"other": 1.0})
        assert like.state.log_history[-1].keys() == {"other", "epoch", "step"}
    for number, two in enumerate(found[2]):
        first, second = found[1][2 * number : 2 * number + 2]
        assert two == pytest.approx({name: (first[name] + second[name]) / 2 for name in two}, rel=1e-4)
