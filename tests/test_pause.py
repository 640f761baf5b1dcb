"""Pause tokens against plain loops, and the checkpoint that holds them as anybody would load it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mutor.baselines.next_token import NextToken, NextTokenConfig
from mutor.baselines.pause import Pause, PauseConfig, with_pauses
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mutor.checks import from_mapping
from mutor.config.load import load_scale
from mutor.config.runs import make_spec
from mutor.models.llamagen import LlamaGenConfig, LlamaGenForCausalLM
from mutor.mtp.answers import Prompts
from mutor.mtp.layout import IGNORE, Example, collate
from mutor.mtp.method import Context
from mutor.mtp.teacher_forcing import teacher_forced_scores
from mutor.results import records
from mutor.tasks.formats import Problem
from mutor.tasks.harness import evaluate
from mutor.tasks.text import Text, TextConfig
from mutor.training.run import RunEnvironment, run

ROOT = Path(__file__).parent.parent
BOTH = pytest.mark.parametrize("prefix_lm", [False, True])
EXAMPLES = [(np.array([10, 11, 12, 13, 14]), 2), (np.array([20, 21, 22]), 1)]


def paused(model, tools, pauses=3):
    """The method attached to a model."""
    method = Pause(PauseConfig(pauses=pauses))
    tools.attach(method, model)
    return method


def exported(method, model, folder):
    """The plain checkpoint, loaded, and the method that takes it."""
    method.export(model, folder / "last")
    method.save_own(model, folder / "last/method")
    plain, info = AutoModelForCausalLM.from_pretrained(folder / "last", output_loading_info=True)
    assert not any(info.values()) and not (folder / "last/method").exists()
    again = Pause(method.config)
    assert again.load_own(plain, folder / "last/method") is plain
    return plain.eval(), again


def test_the_picture_packed_and_padded(tiny, tools):
    """Behind each prompt of a row, positions and targets moved on; the last pause predicts, the others nothing."""
    method, n = paused(tiny(), tools), IGNORE
    examples = [Example(ids, prefix, 7 * i) for i, (ids, prefix) in enumerate(EXAMPLES)]
    got = method.train_layout(collate(examples, 9, 8), Context(pad_id=9, prefix_lm=True))
    assert got.ids.tolist() == [[10, 11, 61, 61, 61, 12, 13, 14, 20, 61, 61, 61, 21, 22]]
    assert got.position.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5]]
    assert got.target.tolist() == [[n, n, n, n, 12, 13, 14, n, n, n, n, 21, 22, n]]
    assert got.segment.tolist() == [[0] * 8 + [1] * 6] and got.causal_index.tolist() == [[*range(14)]]
    assert got.prefix.tolist() == [[i < 5 or 7 < i < 12 for i in range(14)]]
    rows = with_pauses(collate([*examples, Example(np.array([30, 31, 32, 33, 34, 35, 36, 37]), 7, 1)], 9, 8), 1, 61, 9)
    assert rows.ids.tolist() == [[10, 11, 61, 12, 13, 14, 20, 61, 21, 22], [*range(30, 37), 61, 37, 9]]
    assert rows.segment.tolist() == [[0] * 6 + [1] * 4, [0] * 9 + [-1]]
    rows = with_pauses(collate(examples, 9), 2, 61, 9)
    assert rows.ids.tolist() == [[10, 11, 61, 61, 12, 13, 14], [20, 61, 61, 21, 22, 9, 9]]
    assert rows.position.tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 0, 0]]
    assert rows.segment.tolist() == [[0] * 7, [0] * 5 + [-1] * 2] and rows.sample.tolist() == [
        [0] * 7,
        [7] * 5 + [0] * 2,
    ]
    assert rows.is_target.tolist() == [[False] * 4 + [True] * 3, [False] * 3 + [True] * 2 + [False] * 2]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
@BOTH
def test_it_is_a_plain_loop_behind_the_pauses(tiny, tools, family, batch, prefix_lm):
    """Each answer token from prompt, pauses and the tokens before it; one sequence at a time."""
    model, losses = tiny(family), []
    method = paused(model, tools)
    for span in batch.spans:
        ids, start = [*span.ids[: span.prefix], 61, 61, 61, *span.ids[span.prefix :]], span.prefix + 3
        logits = tools.plain_logits(model, ids, start, prefix_lm)
        losses += [-logits[i - 1].log_softmax(-1)[ids[i]] for i in range(start, len(ids))]
    theirs = torch.stack(losses).mean()
    wanted = tools.gradients(model, theirs)
    total, _ = method.compute_loss(model, method.train_layout(batch.rows, Context(prefix_lm=prefix_lm)))
    tools.close(total, theirs)
    tools.same_gradients(tools.gradients(model, total), wanted)
    assert wanted["mtp.pause.weight"].abs().sum() > 0 and method.added_parameters(model) == 32


def test_no_loss_on_the_pauses_but_the_last(tiny, tools):
    """The gradient at the logits, by way of the states they are made of."""
    model, seen = tiny(), []
    method = paused(model, tools)

    def keep(module, args, output):
        output.retain_grad()
        seen.append(output)

    hook = model.model.norm.register_forward_hook(keep)
    rows = collate([Example(*EXAMPLES[0])], 0)
    method.compute_loss(model, method.train_layout(rows, Context()))[0].backward()
    hook.remove()
    assert (seen[0].grad[0].abs().sum(-1) > 0).tolist() == [False] * 4 + [True] * 3 + [False]


def test_packed_rows_have_room_for_the_pauses(tiny, tools):
    """No row is longer than it was to be, and the loss is that of padded rows."""
    model, rng = tiny(), np.random.default_rng(0)
    method = paused(model, tools, 5)
    examples = [Example(rng.integers(3, 60, n), p, c) for c, (n, p) in enumerate([(12, 3), (9, 2), (7, 4), (6, 1)])]
    packed, targets = method.prepare_batch(examples, Context(), 24)
    assert len(packed.ids) == 3 and packed.ids.shape[1] <= 24 and int((packed.ids == 61).sum()) == 20
    tools.close(
        method.compute_loss(model, packed, targets)[0],
        method.compute_loss(model, *method.prepare_batch(examples, Context()))[0],
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_is_a_plain_model_with_one_token_more(tiny, tools, family, tied, tmp_path):
    """The same logits, bit for bit; the pause is its last token, and `generate` never writes it."""
    model = tiny(family, tie_word_embeddings=tied)
    method, ids = paused(model, tools), torch.tensor([[5, 6, 7, 61, 61, 61, 8]])
    drawn = torch.get_rng_state()
    plain, again = exported(method, model, tmp_path)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert type(plain) is type(model) and plain.dtype == model.dtype and plain.config.pauses == 3
    assert plain.get_input_embeddings().weight.shape[0] == plain.config.vocab_size == model.config.vocab_size + 1 == 62
    tied_weights = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert tied_weights == tied and (tied or not plain.get_output_embeddings().weight[61].any())
    with torch.no_grad():
        assert torch.equal(plain(ids).logits[..., :61], model(ids).logits)
    mine = method.answer(model, prompts := Prompts(ids[:, :3], torch.ones_like(ids[:, :3]), 4))
    assert torch.equal(again.answer(plain, prompts), mine) and torch.equal(method.answer(plain, prompts), mine)
    fed = ids[:, :6]
    stock = plain.generate(
        fed, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(fed), eos_token_id=None
    )
    assert torch.equal(stock[:, 6:], mine)


def test_a_checkpoint_keeps_the_dtype_of_its_model(tiny, tools, tmp_path):
    model = tiny("gemma").to(torch.bfloat16)
    plain, _ = exported(paused(model, tools), model, tmp_path)
    assert plain.dtype == plain.config.dtype == torch.bfloat16
    rows = torch.cat([model.get_input_embeddings().weight, model.mtp["pause"].weight])
    assert torch.equal(plain.get_input_embeddings().weight, rows)


def test_a_loud_pause_is_never_written_and_takes_no_probability(tiny, tools, tmp_path):
    """Its logit is the largest at each step, in a model of tied weights."""
    model = tiny("gpt2", tie_word_embeddings=True)
    method = paused(model, tools, 1)
    with torch.no_grad():
        model.mtp["pause"].weight.copy_(
            300 * model(torch.tensor([[5, 61]]), output_hidden_states=True).hidden_states[-1][:, -1]
        )
    plain, again = exported(method, model, tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert int(plain(torch.cat([ids, torch.tensor([[61]])], 1)).logits[0, -1].argmax()) == 61
    found = again.answer(plain, Prompts(ids, torch.ones_like(ids), 5))
    assert torch.equal(found, method.answer(model, Prompts(ids, torch.ones_like(ids), 5))) and int(found.max()) < 61
    examples = [(np.array([5, 6, 7, *found[0].tolist()]), 3)]
    right, loss = teacher_forced_scores(plain, again, Context(), examples, 1)
    assert right.all() and loss == teacher_forced_scores(model, method, Context(), examples, 1)[1]
    plain.generation_config.suppress_tokens = None
    assert 61 in plain.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)[0].tolist()


@BOTH
def test_answers_behind_padded_prompts(tiny, tools, prefix_lm, tmp_path):
    """As alone; they end at the end token."""
    model = tiny("llama")
    plain, method = exported(paused(model, tools), model, tmp_path)
    ids = torch.tensor([[0, 0, 7, 9], [8, 3, 11, 50]])
    attended = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    got = method.answer(plain, Prompts(ids, attended, 6, prefix_lm=prefix_lm))
    for line, here, answer in zip(ids, attended, got.tolist(), strict=True):
        prompt = [*line[here == 1].tolist(), 61, 61, 61]
        for token in answer:  # the whole sequence again
            logits = tools.plain_logits(plain, prompt, int(here.sum()) + 3, prefix_lm)[-1, :61]
            assert int(logits.argmax()) == token
            prompt.append(token)
    end = got[0, 2].item()
    ended = method.answer(plain, Prompts(ids, attended, 6, end, pad_id=33, prefix_lm=prefix_lm))
    for whole, short in zip(got.tolist(), ended.tolist(), strict=True):
        stop = whole.index(end) + 1 if end in whole else 6
        assert short == whole[:stop] + [33] * (6 - stop)


def test_the_harness_gets_answers_behind_the_pauses(tiny, tools, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(61)}, unk_token="<3>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<0>", bos_token="<1>", eos_token="<2>")
    model = tiny("llama")
    plain, method = exported(paused(model, tools), model, tmp_path)
    found = [Problem("<9> <5> <8>", "", ""), Problem("<8>", "", "")]
    settings = {"new_tokens": 4, "batch_size": 2, "prefix_lm": False}
    outputs, _ = evaluate(plain, method, words, "words", found, lambda out, gold: {"right": 0.0}, **settings)
    for problem, output in zip(found, outputs, strict=True):
        fed = torch.tensor([words(problem.prompt)["input_ids"] + [61] * 3])
        answer = plain.generate(fed, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(fed))[
            0, fed.shape[1] :
        ]
        assert output == words.decode(answer, skip_special_tokens=True) != ""


def test_adapters_beside_the_pause(tiny, tools, tmp_path):
    """It is trained with them, and saved in the plain model that they are merged into."""
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    method = Pause(PauseConfig(pauses=2))
    method.attach(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in trained - {"base_model.model.mtp.pause.weight"}) and len(trained) > 1
    plain, _ = exported(method, model, tmp_path)
    ids = torch.tensor([[5, 6, 61, 61]])
    with torch.no_grad():
        tools.close(plain(ids).logits[..., :61], model(ids).logits)


def star_graphs(method, settings, **recipe):
    """Some steps at the smoke scale, from a new model."""
    spec = make_spec(load_scale(ROOT, "smoke"), "g2x3", "gpt2-2x32", method, settings, (7,))
    return replace(spec, base=None, recipe=replace(spec.recipe, **recipe))


def test_without_pauses_it_is_next_token_bit_for_bit(tmp_path):
    """A whole run: weights, learning curve, test scores, the saved files."""
    found, folders = [], []
    for method, settings in (("next_token", {}), ("pause", {"pauses": 0}), ("pause", {"pauses": 2})):
        spec = star_graphs(method, settings, steps=6, eval_every=3, log_every=3, save_every=6)
        run(spec, (7,), RunEnvironment(root=ROOT, runs=tmp_path))
        folders.append(records.seed_folder(tmp_path, spec, 7))
        record = records.read(folders[-1] / "metrics.json")
        curve = [{k: v for k, v in entry.items() if k != "seconds"} for entry in record["curve"]]
        kept = ("weights_hash", "steps", "tokens", "parameters", "trainable_parameters", "added_parameters")
        checkpoints = [(c["names"], c["step"], c["metrics"], c["scores"]) for c in record["checkpoints"]]
        found.append((curve, checkpoints, {key: record[key] for key in kept}))
    assert found[0] == found[1] and found[0][2]["weights_hash"] != found[2][2]["weights_hash"]
    for name in ("last/model.safetensors", "last/config.json", "last/generation_config.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert found[2][2]["added_parameters"] == 32
    assert found[2][2]["tokens"] == found[0][2]["tokens"] + 2 * 6 * 16


def test_flops_are_those_of_the_rows_with_pauses_in_them(tiny, tools):
    method, model = paused(tiny(), tools), tiny()
    plain = NextToken(NextTokenConfig())
    plain.attach(model)
    longer = [Example(np.insert(ids, prefix, [5] * 3), prefix + 3) for ids, prefix in EXAMPLES]
    ours = method.prepare_batch([Example(*example) for example in EXAMPLES], Context())
    theirs = plain.prepare_batch(longer, Context())
    assert method.step_flops(*ours) == plain.step_flops(*theirs) > 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pauses": -1}, r"pauses: -1 is out of range, allowed: \[0, inf\]"),
        ({"pause_init": "zero"}, "'zero' is not allowed; allowed: mean, model"),
        ({"pauses": 0, "pause_init": "model"}, "pause_init: 'model' means nothing with pauses 0; leave it out"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        from_mapping(PauseConfig, settings, "pause")


def test_images_are_refused_by_name():
    """Their vocabulary is codes and classes, and all positions are cells."""
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    model = LlamaGenForCausalLM(LlamaGenConfig(codes=8, classes=3, rows=2, columns=2, **small))
    with pytest.raises(
        ValueError, match=r"pauses: 10 can't be with LlamaGenForCausalLM: its output layer has 8 tokens"
    ):
        Pause(PauseConfig()).attach(model)
    Pause(PauseConfig(pauses=0)).attach(model)


def test_a_checkpoint_of_another_number_of_pauses_is_refused(tiny, tools, tmp_path):
    model = tiny()
    plain, _ = exported(paused(model, tools), model, tmp_path)
    for pauses in (0, 4):
        with pytest.raises(ValueError, match=f"last: pauses: 3 in its config.json, not {pauses}"):
            Pause(PauseConfig(pauses=pauses)).load_own(plain, tmp_path / "last/method")


def test_prompts_need_room_for_the_pauses(tiny):
    """What fits the model alone may not fit with pauses; said before training."""
    task = Text(
        TextConfig(
            corpus="gsm8k",
            train_size=30,
            valid_size=4,
            test_size=20,
            new_tokens=20,
            source="generated",
            tokens="standin",
        )
    )
    task.train(0)
    longest = max(task.longest, *(len(ids) for split in task.problems for ids, _ in task.examples(split)))
    model, told = tiny("llama", vocab_size=len(task.tokenizer), max_position_embeddings=longest + 4), []
    task.prepare(model, told.append, 4)
    assert told == []
    with pytest.raises(ValueError, match=f"up to {longest + 5} tokens; allowed: {longest + 4}"):
        task.prepare(model, None, 5)
    lengths, asked = np.array([prefix for _, prefix in task.examples("test")]), []

    class Asked(NextToken):
        behind_prompt = longest + 4 - 20 - int(np.sort(lengths)[10])

        def answer(self, model, prompts):
            asked.append(int(prompts.attended.sum(1).max()))
            return prompts.ids.new_full((len(prompts.ids), prompts.length), task.tokenizer.eos_token_id)

    task.evaluate(model, Asked(NextTokenConfig()), Context(pad_id=task.pad_id), "test", 20)
    assert max(asked) == np.sort(lengths)[10] < lengths.max()


def test_pauses_that_do_not_fit_are_refused_before_training(tmp_path):
    spec = make_spec(load_scale(ROOT, "smoke"), "gsm8k", "llama-2x32", "pause", {"pauses": 250}, (7,))
    with pytest.raises(ValueError, match=r"max_tokens: .* right answers have up to \d+ tokens; allowed: 256"):
        run(replace(spec, base=None), (7,), RunEnvironment(root=ROOT, runs=tmp_path))
    assert not list(tmp_path.rglob("checkpoints"))
