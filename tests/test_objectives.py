"""Objectives without layers or registers of their own, against loops; their runs, killed or not; how all are listed."""

import json
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mutor.baselines.bag_of_words import BagOfWords, BagOfWordsConfig
from mutor.baselines.next_token import NextToken, NextTokenConfig
from mutor.baselines.same_logits import SameLogits, SameLogitsConfig
from mutor.baselines.token_masking import TokenMasking, TokenMaskingConfig
from test_run import timeless
from transformers import AutoModelForCausalLM

from mutor.checks import from_mapping
from mutor.cli import main
from mutor.config.load import load_scale
from mutor.config.runs import make_spec
from mutor.models.llamagen import LlamaGenConfig, LlamaGenForCausalLM
from mutor.mtp import loss as loss_module
from mutor.mtp.layout import IGNORE, Example, collate
from mutor.mtp.method import Context
from mutor.mtp.settings import Progress
from mutor.registry import METHODS, load
from mutor.results import records
from mutor.streams import stream
from mutor.training.run import RunEnvironment, run
from mutor.training.trainer import MethodTrainer

ROOT = Path(__file__).parent.parent


def attached(cls, model, tools, per_sequence=False, **settings):
    """A method on a model, loud."""
    method = cls(cls.Config(**settings), per_sequence=per_sequence)
    tools.attach(method, model)
    return method


def parts_of_a_batch(method, model, examples):
    """The sum of the losses of two halves of a batch, each divided by what the whole has of its targets."""
    halves = [method.prepare_batch(half, Context()) for half in (examples[:2], examples[2:])]
    counts = {name: sum(targets[name].count for _, targets in halves) for name in halves[0][1]}
    return sum(
        method.compute_loss(model, layout, {n: replace(t, count=counts[n]) for n, t in targets.items()})[0]
        for layout, targets in halves
    )


# token_masking


def test_some_answer_inputs_are_masked_and_all_are_predicted(tiny, tools):
    """By the numbers of the sample's own stream, place by place; in evaluation none is."""
    method, n = attached(TokenMasking, tiny(), tools, rate=0.6), IGNORE
    examples = [Example(np.array([10, 11, 12, 13, 14, 15]), 2, 4), Example(np.array([20, 21, 22, 23]), 1, 9)]
    rows = collate(examples, 0, 10)
    hidden = [stream("masked_inputs", 3, c).random(k) < 0.6 for c, k in ((4, 4), (9, 3))]
    ids = [10, 11, *np.where(hidden[0], 61, [12, 13, 14, 15]), 20, *np.where(hidden[1], 61, [21, 22, 23])]
    got = method.train_layout(rows, Context(seed=3))
    assert got.ids.tolist() == [ids] and {*hidden[0], *hidden[1]} == {True, False}
    assert got.target.tolist() == [[n, 12, 13, 14, 15, n, 21, 22, 23, n]]
    assert torch.equal(method.eval_layout(rows, Context(seed=3)).ids, rows.ids)
    padded = method.train_layout(collate(examples[::-1], 0), Context(seed=3))
    assert padded.ids.tolist() == [[*ids[6:], 0, 0], ids[:6]]


def test_masks_are_as_frequent_as_asked_and_differ(tiny, tools):
    """Between samples, places and seeds."""
    method, found = attached(TokenMasking, tiny(), tools, rate=0.2), []
    rows = collate([Example(np.arange(3, 23), 5, c) for c in range(500)], 0)
    for seed in (0, 1):
        masked = method.train_layout(rows, Context(seed=seed)).ids == 61
        assert not masked[:, :5].any() and 0.18 < float(masked[:, 5:].float().mean()) < 0.22
        assert ((masked[:, 5:].float().mean(0) - 0.2).abs() < 0.08).all()
        found.append(masked)
    assert not torch.equal(*found) and len(found[0].unique(dim=0)) > 300


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("prefix_lm", [False, True])
def test_token_masking_is_a_plain_loop(tiny, tools, family, batch, prefix_lm):
    """Next tokens from inputs of which some are the vector beyond the vocabulary."""
    model, losses = tiny(family), []
    method = attached(TokenMasking, model, tools)
    for span in batch.spans:
        masked = stream("masked_inputs", 5, span.sample).random(len(span.ids) - span.prefix) < 0.5
        ids = [*span.ids[: span.prefix], *np.where(masked, 61, span.ids[span.prefix :]).tolist()]
        logits = tools.plain_logits(model, ids, span.prefix, prefix_lm)
        losses += [-logits[i - 1].log_softmax(-1)[span.ids[i]] for i in range(span.prefix, len(ids))]
    theirs = torch.stack(losses).mean()
    wanted = tools.gradients(model, theirs)
    total, _ = method.compute_loss(model, method.train_layout(batch.rows, Context(seed=5, prefix_lm=prefix_lm)))
    tools.close(total, theirs)
    tools.same_gradients(tools.gradients(model, total), wanted)
    assert wanted["mtp.mask.weight"].abs().sum() > 0 and method.added_parameters(model) == 32


# same_logits


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("max_logits", [None, 4 * 61])
def test_the_same_logits_are_scored_on_later_tokens(tiny, tools, batch, per_sequence, max_logits, monkeypatch):
    """1, w, w^2 times the means over those positions that have a token so far on; at once as in parts."""
    model, losses = tiny(), [[] for _ in range(3)]
    method = attached(SameLogits, model, tools, per_sequence, weight=0.7)
    monkeypatch.setattr(loss_module, "head_loss", partial(loss_module.head_loss, max_logits=max_logits))
    for span in batch.spans:
        logits = tools.plain_logits(model, span.ids, span.prefix, False).log_softmax(-1)
        for k in range(1, 4):
            places = range(span.prefix - 1, len(span.ids) - k)
            found = torch.stack([-logits[i, span.ids[i + k]] for i in places])
            losses[k - 1] += [found.mean()] if per_sequence else [*found]
    means = [torch.stack(each).mean() for each in losses]
    theirs = means[0] + 0.7 * means[1] + 0.49 * means[2]
    wanted = tools.gradients(model, theirs)
    total, parts = method.compute_loss(model, method.train_layout(batch.rows, Context()))
    tools.close(total, theirs)
    tools.same_gradients(tools.gradients(model, total), wanted)
    assert list(parts) == ["next_token", "ahead_2", "ahead_3"] and method.added_parameters(model) == 0
    for part, mean in zip(parts.values(), means, strict=True):
        tools.close(part, mean.detach())


def test_weights_fall_in_thirds_as_published():
    """modded-nanogpt: 1, .5, .25 to 0; then 1, .5 to 0; then 1."""
    config, n = SameLogitsConfig(), 12
    weights = [config.weights(Progress(step, n)) for step in range(n)]
    assert weights == [
        *([1, 0.5, 0.25 * left] for left in (1, 0.75, 0.5, 0.25)),
        *([1, 0.5 * left, 0] for left in (1, 0.75, 0.5, 0.25)),
        *[[1, 0, 0]] * 4,
    ]
    constant = SameLogitsConfig(d_max=4, weight=0.1, weight_schedule="constant")
    assert constant.weights(Progress(11, n)) == pytest.approx([1, 0.1, 0.01, 0.001])
    assert SameLogitsConfig(d_max=2, weight=1).weights(Progress(1, 4)) == [1, 0.5]


def test_weights_follow_the_steps_of_a_run(tmp_path):
    """What is minimised is the sum of the logged parts by the weights of the step; also where a run goes on."""
    spec = make_spec(load_scale(ROOT, "smoke"), "g2x3", "gpt2-2x32", "same_logits", {}, (7,))
    spec = replace(spec, base=None, recipe=replace(spec.recipe, steps=6, log_every=1, eval_every=6, save_every=6))
    run(spec, (7,), RunEnvironment(root=ROOT, runs=tmp_path))
    record = records.read(records.seed_folder(tmp_path, spec, 7) / "metrics.json")
    curve = [entry for entry in record["curve"] if "ahead_3" in entry]
    assert len(curve) == 6
    for step, entry in enumerate(curve):
        parts = [entry[name] for name in ("next_token", "ahead_2", "ahead_3")]
        wanted = np.dot(spec.method_config.weights(Progress(step, 6)), parts)
        assert entry["loss"] == pytest.approx(wanted, rel=1e-5)


def test_the_same_logits_are_computed_once(tiny, tools, batch):
    """So a step costs what next-token prediction's does."""
    model = tiny()
    method, plain = attached(SameLogits, model, tools), NextToken(NextTokenConfig())
    plain.attach(tiny())
    layout, seen = method.train_layout(batch.rows, Context()), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output[..., 0].numel()))
    method.compute_loss(model, layout)
    assert seen[-1] == sum(len(span.ids) - span.prefix for span in batch.spans)  # behind the forward's own single one
    targets = plain.loss_targets(layout)
    assert method.step_flops(layout, method.loss_targets(layout)) == plain.step_flops(layout, targets)


# bag_of_words


def bag_by_hand(logits, ids, prefix, d_max, idf=None):
    """[positions]: in a loop over places and the vocabulary."""
    found = []
    for i in range(prefix - 1, len(ids) - 2):
        bag, terms = ids[i + 2 : i + d_max + 1], []
        for v in range(logits.shape[1]):
            p = torch.sigmoid(logits[i, v].double())
            term = -torch.log(p if v in bag else 1 - p)
            terms.append(term if idf is None else term * idf[v] * max(1, bag.count(v)))
        found.append(torch.stack(terms).mean())
    return found


@pytest.mark.parametrize("weighting", ["uniform", "tf_idf"])
def test_a_bag_of_words_is_a_binary_cross_entropy(tiny, tools, weighting):
    """Tokens 2 to d_max on, each once; with tf-idf as often as they come, and rare ones more."""
    model, data = tiny(scale=2.0), [([10, 11, 12, 13, 13, 14, 12], 2), ([20, 21, 12], 1), ([30, 31], 1)]
    method = attached(BagOfWords, model, tools, d_max=3, weight=0.3, weighting=weighting)
    idf = None
    if weighting == "tf_idf":
        method.read_examples((np.array(ids), prefix) for ids, prefix in data)
        df = {12: 2, 13: 1, 14: 1, 21: 1, 31: 1}
        idf = [1 + np.log(4 / (1 + df.get(v, 0))) for v in range(61)]
    bags, plain = [], []
    for ids, prefix in data:
        seen = []
        hook = model.model.norm.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output[0]))
        logits = tools.plain_logits(model, ids, prefix, False)
        hook.remove()
        plain += [F.cross_entropy(logits[i - 1], torch.tensor(ids[i])) for i in range(prefix, len(ids))]
        bags += bag_by_hand(seen[0] @ model.mtp["bag"].weight.T, ids, prefix, 3, idf)
    assert len(bags) == 4 + 1
    theirs = torch.stack(plain).mean() + 0.3 * torch.stack(bags).mean().float()
    wanted = tools.gradients(model, theirs)
    layout = method.train_layout(collate([Example(np.array(ids), p) for ids, p in data], 0, 12), Context())
    total, parts = method.compute_loss(model, layout)
    tools.close(total, theirs)
    tools.close(parts["bag"], torch.stack(bags).mean().float().detach())
    tools.same_gradients(tools.gradients(model, total), wanted)
    assert method.added_parameters(model) == 32 * 61
    bag = method.loss_targets(layout)["bag"]
    assert bag.target.tolist() == [[13, 13], [13, 14], [14, 12], [12, IGNORE], [12, IGNORE]]


def test_idf_needs_the_training_data(tiny, tools):
    method = attached(BagOfWords, model := tiny(), tools, weighting="tf_idf")
    layout = method.train_layout(collate([Example(np.arange(3, 9), 2)], 0), Context())
    with pytest.raises(ValueError, match="weighting: 'tf_idf' needs to know the training data; call read_examples"):
        method.compute_loss(model, layout)
    few = attached(BagOfWords, tiny(), tools)
    few.read_examples(iter([(np.arange(3, 9), 2)]))
    assert few.idf is None  # nothing is read for uniform weights


def test_a_bag_costs_one_more_output_layer(tiny, tools, batch):
    method, plain = attached(BagOfWords, tiny(), tools), NextToken(NextTokenConfig())
    plain.attach(tiny())
    layout = method.train_layout(batch.rows, Context())
    more = method.step_flops(layout, method.loss_targets(layout)) - plain.step_flops(layout, plain.loss_targets(layout))
    assert more == 6 * 61 * 32 * sum(len(span.ids) - span.prefix - 1 for span in batch.spans)


# all of them


@pytest.mark.parametrize("cls", [TokenMasking, SameLogits, BagOfWords])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_parts_of_a_batch_add_up(tiny, tools, batch, cls, per_sequence):
    model = tiny()
    method = attached(cls, model, tools, per_sequence)
    examples = [span.example() for span in batch.spans]
    whole, _ = method.compute_loss(model, *method.prepare_batch(examples, Context()))
    tools.close(parts_of_a_batch(method, model, examples), whole)


@pytest.mark.parametrize("cls", [TokenMasking, SameLogits, BagOfWords])
def test_images_have_an_output_layer_of_codes_alone(cls):
    """A layer that a method adds is one, too, though the vocabulary is larger; all that is trained gets a gradient."""
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    model = LlamaGenForCausalLM(LlamaGenConfig(codes=8, classes=3, rows=2, columns=2, **small))
    method = cls(cls.Config(**({"d_max": 3} if cls is BagOfWords else {})))
    method.attach(model)
    layout = method.train_layout(collate([Example(np.array([9, 1, 7, 3, 0]), 1)], 0), Context())
    method.compute_loss(model, layout)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if cls is BagOfWords:
        assert model.mtp["bag"].weight.shape == (8, 16)
        assert any(p is model.mtp["bag"].weight for p in method.trunk.tables())


RUNS = {
    "pause": {"pauses": 2},
    "token_masking": {},
    "same_logits": {},
    "bag_of_words": {"d_max": 3, "weighting": "tf_idf"},
}


@pytest.mark.parametrize("method", RUNS)
def test_a_killed_run_goes_on_to_the_same_plain_model(method, tmp_path, monkeypatch):
    """Losses fall; the checkpoint loads as a stock model; a run killed between two checkpoints ends the same."""
    spec = make_spec(load_scale(ROOT, "smoke"), "g2x3", "gpt2-2x32", method, RUNS[method], (7,))
    changes = {"steps": 8, "eval_every": 4, "log_every": 2, "save_every": 2, "learning_rate": 0.01, "muon_rate": 0.01}
    spec = replace(spec, base=None, recipe=replace(spec.recipe, **changes))
    save = MethodTrainer._save_checkpoint

    def killed(self, *args):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        save(self, *args)

    found = []
    for runs, steps in (("whole", [None]), ("killed", [killed, None])):
        env = RunEnvironment(root=ROOT, runs=tmp_path / runs)
        for step in steps:
            with monkeypatch.context() as patch:
                if step is None:
                    run(spec, (7,), env)
                    continue
                patch.setattr(MethodTrainer, "_save_checkpoint", step)
                with pytest.raises(KeyboardInterrupt):
                    run(spec, (7,), env)
        found.append(records.seed_folder(env.runs, spec, 7))
    whole, again = (json.loads((folder / "metrics.json").read_text()) for folder in found)
    assert timeless(whole) == timeless(again) and again["resumed"] and not whole["resumed"]
    names = [entry for entry in whole["curve"] if "loss" in entry]
    assert all(names[-1][part] < names[0][part] for part in names[0] if part in ("next_token", "bag", "ahead_3"))
    plain, info = AutoModelForCausalLM.from_pretrained(found[0] / "last", output_loading_info=True)
    assert not any(info.values()) and type(plain).__name__ == "GPT2LMHeadModel"
    assert plain.config.vocab_size == 14 + (method == "pause")


@pytest.mark.parametrize(
    ("config", "settings", "says"),
    [
        (TokenMaskingConfig, {"rate": 0}, r"rate: 0.0 is out of range, allowed: \(0, 1\)"),
        (TokenMaskingConfig, {"rate": 1}, r"rate: 1.0 is out of range, allowed: \(0, 1\)"),
        (TokenMaskingConfig, {"mask_init": "pad"}, "mask_init: 'pad' is not allowed; allowed: mean, model"),
        (SameLogitsConfig, {"d_max": 1}, r"d_max: 1 is out of range, allowed: \[2, inf\]"),
        (SameLogitsConfig, {"weight": 0}, r"weight: 0 leaves next_token; allowed: \(0, 1\]"),
        (SameLogitsConfig, {"weight_schedule": "linear"}, "'linear' is not allowed; allowed: stages, constant"),
        (SameLogitsConfig, {"weight": 1.5}, r"weight: 1.5 is out of range, allowed: \[0, 1\]"),
        (BagOfWordsConfig, {"d_max": 1}, r"d_max: 1 is out of range, allowed: \[2, inf\]"),
        (BagOfWordsConfig, {"weight": 0}, r"weight: 0.0 is out of range, allowed: \(0, inf\)"),
        (BagOfWordsConfig, {"weighting": "idf"}, "weighting: 'idf' is not allowed; allowed: uniform, tf_idf"),
    ],
)
def test_settings_out_of_range_are_refused(config, settings, says):
    with pytest.raises(ValueError, match=says):
        from_mapping(config, settings, "method")


@pytest.mark.parametrize("cls", [SameLogits, BagOfWords])
def test_answers_of_one_token_are_refused(cls):
    with pytest.raises(ValueError, match="the longest answer has 1 tokens, and below 2 nothing is predicted but next"):
        cls(cls.Config()).check_answers([1, 1])


# python -m mutor methods


def test_methods_are_listed_with_settings_and_sources(capsys):
    """Every one, with each of its settings; whoever adds parameters or answers in its own way says so."""
    assert main(["methods", "--scale", "smoke"]) == 0
    printed = dict(block.split(":", 1) for block in capsys.readouterr().out.strip().split("\n\n"))
    assert list(printed) == list(METHODS)
    base = load(METHODS, "next_token", "method").__mro__[1]
    for name in METHODS:
        method = load(METHODS, name, "method")
        assert method.source and f"source {method.source}" in " ".join(printed[name].split())
        adds = method.add_parameters is not base.add_parameters or "adapters" in method.adds
        assert (method.adds != "nothing") == adds, name
        assert (method.at_inference != base.at_inference) == (
            method.answer is not base.answer or "adapters" in method.adds
        )
        for field in fields(method.Config):
            assert f"{field.name}={field.default}" in printed[name] and field.metadata["doc"] in printed[name]
    assert main(["methods", "pause"]) == 0
    assert capsys.readouterr().out == (
        "pause: Next-token prediction of the answer behind M pauses.\n"
        "    source                      Goyal et al., arXiv 2310.02226\n"
        "    adds                        an input vector\n"
        "    answers by                  a plain model with one token more, `pauses` of it behind each prompt\n"
        "    pauses=10                   pauses behind each prompt; 0 is next_token, bit for bit; [0, inf]\n"
        "    pause_init=mean             mean input embedding, or as the model's own rows; one of mean, model\n\n"
    )
    assert main(["methods", "pauses"]) == 2
    assert "method: 'pauses' is unknown, did you mean 'pause'" in capsys.readouterr().err
