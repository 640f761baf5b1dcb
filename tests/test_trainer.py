"""Every method under a Trainer: losses are the method's own, whatever words the data have and however it is run."""

import copy
import pickle
from dataclasses import fields

import numpy as np
import pytest
import torch
from test_library import collator_of, trainer_of

import mutor
from mutor.mtp.collator import sequences
from mutor.mtp.layout import Example, collate, lay
from mutor.mtp.passes import layout_of
from mutor.mtp.settings import Context, Progress
from mutor.registry import METHODS, load

pytest.importorskip("accelerate")
RANDOM = np.random.default_rng(0)
DATA = [
    {"input_ids": RANDOM.integers(3, 60, n).tolist(), "prefix_length": p, "index": 7 * k}
    for k, (n, p) in enumerate([(9, 2), (12, 4), (8, 1), (11, 3), (7, 2), (10, 5), (12, 1), (6, 2)])
]
# not trained at all; needs a grid; as mutor and next_token
TRAINED = sorted(METHODS.keys() - {"marginal", "mutor_2d", "mutor_1d", "lora_next_token"})
THREE = pytest.mark.parametrize("name", ["mutor", "parallel_mtp", "sequential_mtp"])


def made(name, model, **settings):
    """The method, attached with a fixed seed."""
    known = {f.name for f in fields(load(METHODS, name, "method").Config)}
    method = mutor.method(name, **({"d_max": 3} if "d_max" in known else {}), **settings)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        method.attach(model)
    return method


def trainer(method, model, folder, **settings):
    """Two steps of four sequences by plain gradient descent, each logged."""
    from transformers import TrainingArguments

    usual = {
        "max_steps": 2, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    options = {
        "train_dataset": DATA,
        **{k: settings.pop(k) for k in ("train_dataset", "eval_dataset") if k in settings},
    }
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False, **{**usual, **settings}
    )
    return mutor.MultiTokenTrainer(model, arguments, method=method, **options)


def losses(trainer):
    """What it logged at each step, but for times."""
    trainer.train()
    left_out = ("grad_norm", "learning_rate", "epoch", "step")
    return [{k: v for k, v in e.items() if k not in left_out} for e in trainer.state.log_history if "loss" in e]


def same(ours, theirs, tolerance=1e-6):
    """Equal losses at each step, by name."""
    assert len(ours) == len(theirs) > 0
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, abs=tolerance, rel=tolerance)


@THREE
def test_the_trainer_goes_as_a_loop_by_hand(tiny, tmp_path, name):
    """The layouts, losses and steps of the method itself, written out."""
    model = tiny("llama", scale=1.0)
    found = losses(trainer(made(name, model), model, tmp_path, max_steps=3))
    model = tiny("llama", scale=1.0).train()
    method, wanted = made(name, model), []
    descent = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):  # an epoch has two
        some = [DATA[n % 8] for n in range(4 * step, 4 * step + 4)]
        epoch = step // 2
        numbers = [epoch * 2**40 + each["index"] for each in some]
        rows = [
            Example(np.array(each["input_ids"]), each["prefix_length"], n)
            for each, n in zip(some, numbers, strict=True)
        ]
        method.progress = Progress(step, 3)
        loss, parts = method.compute_loss(model, method.train_layout(collate(rows, 0), Context(seed=42)))
        descent.zero_grad()
        loss.backward()
        descent.step()
        wanted.append({"loss": float(loss.detach()), **{part: float(value) for part, value in parts.items()}})
    same(found, wanted)


@pytest.mark.parametrize("name", TRAINED)
def test_a_stock_trainer_and_parts_of_a_batch_give_the_same(tiny, tmp_path, name):
    """Whole batches under both Trainers; single sequences, whose losses are counted together."""
    found = {}
    for which in ("one batch", "parts", "stock"):
        model = tiny("llama", scale=1.0)
        method = made(name, model)
        if which == "stock":
            like = trainer(method, model, tmp_path).args
            given = {k: getattr(like, k) for k in ("max_steps", "per_device_train_batch_size", "learning_rate")}
            stock = trainer_of(
                method, model, tmp_path, DATA, method.collator(0, seed=42), logging_steps=1, optim="sgd",
                max_grad_norm=0.0, lr_scheduler_type="constant", train_sampling_strategy="sequential", **given,
            )  # fmt: skip
            found[which] = [{"loss": each["loss"]} for each in losses(stock)]
            continue
        parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4} if which == "parts" else {}
        found[which] = losses(trainer(method, model, tmp_path, **parts))
    same(found["parts"], found["one batch"], 2e-5)
    same(found["stock"], [{"loss": each["loss"]} for each in found["one batch"]])
    assert {"next_token"} <= found["one batch"][0].keys() and found["one batch"][0] != found["one batch"][1]


@pytest.mark.parametrize("name", ["mutor", "sequential_mtp"])
def test_bfloat16_products_workers_and_checkpointing(tiny, tmp_path, name):
    """Close to float32 in the loss; the same with workers, and with activations computed twice."""
    found = []
    for settings in ({}, {"bf16": True}, {"dataloader_num_workers": 2}, {"gradient_checkpointing": True}):
        model = tiny("llama", scale=1.0)
        found.append(losses(trainer(made(name, model), model, tmp_path, **settings)))
    same(found[1], found[0], 2e-2)
    same(found[2], found[0])
    same(found[3], found[0])
    assert found[1] != found[0]


@THREE
def test_losses_heard_under_bfloat16_products_are_computed_so(tiny, name):
    """A loss function is called outside of the context that the pass had."""
    model = tiny("llama", scale=1.0).train()
    method = made(name, model)
    batch = collator_of(method)(DATA)
    labels = batch.pop("labels")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**batch)
    heard = float(method.loss_from_outputs(outputs, labels).detach())
    with torch.autocast("cpu", torch.bfloat16):
        wanted = float(method.compute_loss(model, layout_of(batch["position_ids"]))[0].detach())
    assert heard == pytest.approx(wanted, rel=1e-6)


def test_a_stock_trainer_does_not_evaluate_on_hidden_tokens(tiny):
    model = tiny()
    method = made("token_masking", model)
    batch = collator_of(method)(DATA)
    labels = batch.pop("labels")
    with pytest.raises(ValueError, match=r"TokenMasking hides tokens .* allowed: MultiTokenTrainer, or eval_strategy"):
        method.loss_from_outputs(model.eval()(**batch), labels)
    batch = collator_of(method)([each for each in DATA if each["prefix_length"] > 1])  # whose first token is no target
    labels = batch.pop("labels")
    with pytest.raises(ValueError, match="TokenMasking hides tokens"):
        method.loss_from_outputs(model(**batch), labels)


IDS = [5, 6, 7, 1, 8, 9, 2]
WORDS = [
    {"prefix_length": 4},
    {"completion_mask": [0, 0, 0, 0, 1, 1, 1]},
    {"assistant_masks": [0, 0, 0, 0, 1, 1, 1], "completion_mask": [0, 0, 0, 1, 1, 1, 1]},
    {"labels": [-100] * 4 + [8, 9, 2]},
    {"completion_mask": [0, 0, 0, 0, 1, 1, 1, 1], "input_ids": [*IDS, 0], "attention_mask": [1] * 7 + [0]},
    {"labels": [-100] * 4 + [8, 9, 2], "prefix_length": 2},
]


@THREE
def test_masks_labels_and_lengths_say_the_same(tiny, name):
    """The same text in all words: the same batch, so the same loss."""
    method = made(name, tiny())
    wanted = collator_of(method)([{"input_ids": IDS, **WORDS[0]}])
    for words in WORDS[1:]:
        found = collator_of(method)([{"input_ids": IDS, **words}])
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_text_without_a_prompt_and_answers_in_pieces():
    """All tokens but the first; or those that a mask says, by hand."""
    (plain,) = sequences({"input_ids": IDS})
    assert (plain.prefix, plain.is_target) == (1, None)
    (turns,) = sequences({"input_ids": IDS, "completion_mask": [1, 0, 1, 1, 0, 1, 0]})
    assert turns.is_target.tolist() == [False, False, True, True, False, True, False]
    layout = mutor.method("next_token").eval_layout(lay([[turns]], 0), Context())
    assert layout.target.tolist() == [[-100, 7, 1, -100, 9, -100, -100]]


@THREE
@pytest.mark.parametrize("words", ["seq_lengths", "position_ids"])
def test_packed_rows_have_the_loss_of_their_sequences(tiny, name, words):
    """No sequence sees another, and none predicts another's tokens."""
    model = tiny("llama").train()
    method, found = made(name, model), []
    alone = [{k: v for k, v in each.items() if k != "index"} for each in DATA[:4]]
    lengths = [len(each["input_ids"]) for each in alone]
    packed = {
        "input_ids": [token for each in alone for token in each["input_ids"]],
        "completion_mask": [i >= e["prefix_length"] for e in alone for i in range(len(e["input_ids"]))],
        "seq_lengths": lengths,
        "position_ids": [i for length in lengths for i in range(length)],
    }
    packed.pop({"seq_lengths": "position_ids", "position_ids": "seq_lengths"}[words])
    for rows in (alone, [packed]):
        batch = collator_of(method)(rows)
        labels = batch.pop("labels")
        found.append(float(method.loss_from_outputs(model(**batch), labels).detach()))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ({"text": "3 + 4"}, "no input_ids, but text; tokenise them first"),
        ({"input_ids": IDS, "completion_mask": [0, 1]}, "completion_mask: 2 numbers for 7 input_ids"),
        ({"input_ids": IDS, "labels": [*IDS[1:], -100]}, "labels: 6 at token 0, which is 5; allowed: the token itself"),
        ({"input_ids": IDS, "prefix_length": 7}, "prefix_length: 7 of 7 tokens"),
        ({"input_ids": IDS, "seq_lengths": [3, 3]}, "seq_lengths: 6 tokens together, and there are 7"),
        ({"input_ids": IDS, "position_ids": [0, 1, 2, 0, 2, 3, 4]}, "position_ids: allowed: 0, 1, 2"),
        ({"input_ids": []}, "an example has no tokens"),
    ],
)
def test_examples_that_contradict_themselves_are_refused(example, words):
    with pytest.raises(ValueError, match=words) as error:
        sequences(example)
    assert "\n" not in str(error.value)


def test_one_prompt_and_one_answer_where_there_has_to_be(tiny):
    """A prefix that is read in both directions would see answers; pauses stand behind one prompt."""
    turns = {"input_ids": IDS, "completion_mask": [0, 1, 0, 0, 1, 1, 1]}
    for name, settings, words in [
        ("mutor", {"prefix_lm": True}, "with prefix_lm"),
        ("pause", {}, "with behind_prompt"),
    ]:
        collator = collator_of(made(name, tiny()), **settings)
        with pytest.raises(ValueError, match=f"{words} an example is one prompt and one answer"):
            collator([turns])
        collator([DATA[0]])


def test_what_is_missing_is_said_with_the_remedy(tiny, tmp_path):
    """Each in one line."""
    from transformers import Trainer, TrainingArguments

    method, model = mutor.method("mutor"), tiny()
    for refused in (lambda: method.collator(0), lambda: method.loss_from_outputs(None, None)):
        with pytest.raises(ValueError, match=r"MuToR is attached to no model; attach first: method.attach\(model\)"):
            refused()
    with pytest.raises(ValueError, match="attach first"):
        trainer(method, model, tmp_path)
    method.attach(model)
    with pytest.raises(ValueError, match=r"pad_id: None.* as tokenizer.eos_token_id"):
        method.collator(None)
    with pytest.raises(ValueError, match="Marginal: it is not trained"):
        made("marginal", tiny()).collator(0)
    collator = method.collator(0)
    for settings, words in [
        ({}, r"remove_unused_columns: True, .*set TrainingArguments\(remove_unused_columns=False\)"),
        ({"remove_unused_columns": False, "torch_compile": True}, "torch_compile: hidden states are heard by hooks"),
    ]:
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **settings)
        with pytest.raises(ValueError, match=words) as error:
            Trainer(model, arguments, train_dataset=DATA, data_collator=collator, callbacks=[collator])
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="MuToR is attached to another model"):
        trainer(method, tiny(), tmp_path)
    for name in ("data_collator", "compute_loss_func"):
        with pytest.raises(ValueError, match=f"^{name}: it is the method's own; leave it out, or take transformers'"):
            mutor.MultiTokenTrainer(model, method=method, pad_id=0, **{name: collator})
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has not been called .*not a copy"):
        method.loss_from_outputs(None, None)
    twin = copy.deepcopy(model)
    batch = collator_of(method)(DATA)
    labels = batch.pop("labels")
    with pytest.raises(ValueError, match="has not been called"):
        method.loss_from_outputs(twin(**batch), labels)


@pytest.mark.parametrize("name", ["mutor", "parallel_mtp", "lora_mutor", "pause"])
def test_detached_it_is_the_plain_model_again(tiny, tools, name):
    """In place: its logits, names of weights, what is trained and how it attends; another method may be attached."""
    model, ids = tiny(), torch.tensor([[5, 6, 7, 8]])
    before, names, attention = model(ids).logits, set(model.state_dict()), model.config._attn_implementation
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    method = made(name, model)
    assert model.config._attn_implementation != attention and hasattr(model, "peft_config") == ("lora" in name)
    assert method.detach(model) is model
    assert set(model.state_dict()) == names and model.config._attn_implementation == attention
    tools.close(model(ids).logits, before)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    with pytest.raises(ValueError, match="attach first"):
        method.detach(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    made("sequential_mtp", model)


def test_detached_trained_adapters_are_in_the_weights(tiny, tools):
    """The model with them, without a trace of peft, so that another method's can be put in."""
    model, ids = tiny(), torch.tensor([[5, 6, 7, 8]])
    before = set(vars(model))
    method = made("lora_mutor", model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    trained = model(ids).logits
    plain = method.detach(model)
    tools.close(plain(ids).logits, trained)
    assert not any("lora" in name for name in plain.state_dict()) and set(vars(plain)) - before <= {"mtp"}
    assert not (tiny()(ids).logits - trained).abs().max() < 1e-2
    made("lora_next_token", plain)


@THREE
def test_what_a_worker_receives_is_small(tiny, name):
    """Neither the model nor what the method added, heads among it; it lays out the same batches."""
    model = tiny()
    method = made(name, model)
    collator = collator_of(method)
    pickled = pickle.dumps(collator)
    assert len(pickled) < 20_000
    again, wanted = pickle.loads(pickled)(DATA), collator(DATA)
    assert all(torch.equal(again[key], wanted[key]) for key in wanted)
    assert method.loss_from_outputs(model.train()(**{k: v for k, v in wanted.items() if k != "labels"}), None) > 0


def test_methods_by_name():
    """The same as the class's own; unknown ones are named."""
    assert mutor.method("parallel_mtp", d_max=4).config == load(METHODS, "parallel_mtp", "m").of(d_max=4).config
    with pytest.raises(ValueError, match="parallel_mtp: unknown key 'dmax', did you mean 'd_max'"):
        mutor.method("parallel_mtp", dmax=4)
    with pytest.raises(ValueError, match="did you mean 'mutor'"):
        mutor.method("mutr")
