"""The text task: tokens, prefix and answer, what is scored how, whole runs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mutor.baselines.next_token import NextToken

from mutor.checks import from_mapping
from mutor.config.load import load_scale, load_table
from mutor.config.recipe import Recipe
from mutor.config.runs import cells_of, make_spec, specs_of
from mutor.mtp.method import Context
from mutor.registry import METHODS, load
from mutor.results import records
from mutor.tasks.text import Text, TextConfig
from mutor.training.run import RunEnvironment, run

ROOT = Path(__file__).parent.parent
STANDIN = {"source": "generated", "tokens": "standin"}


@pytest.fixture(scope="module")
def gsm8k():
    """The generated GSM8K stand-in."""
    return Text(TextConfig(corpus="gsm8k", valid_size=20, test_size=30, train_size=200, **STANDIN))


def test_prompt_and_answer_meet_where_they_should(gsm8k):
    """Prefix: beginning token and prompt; answer: its own tokens and the end token; nothing lost on the way."""
    tokenizer, found = gsm8k.tokenizer, gsm8k.problems["test"]
    for (ids, prefix), problem in zip(gsm8k.encode(found), found, strict=True):
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[1:prefix]) == problem.prompt and tokenizer.decode(ids[prefix:-1]) == problem.answer
        assert list(ids[:prefix]) == tokenizer(problem.prompt)["input_ids"]  # as at inference
    assert all(prefix == 1 for _, prefix in gsm8k.encode(found, learn_prompts=True))


def test_no_loss_on_the_prompt_and_registers_in_the_answer_only(gsm8k, tiny):
    from mutor import MuToR
    from mutor.mtp.layout import IGNORE, collate
    from mutor.training.data import Samples

    source = gsm8k.train(0)
    rows = collate(Samples(source, 100, 0).__getitems__(range(6)), gsm8k.pad_id)
    mutor = MuToR.of(d_max=4)
    mutor.attach(tiny("llama", vocab_size=len(gsm8k.tokenizer), max_position_embeddings=512))
    layout = mutor.train_layout(rows, Context(pad_id=gsm8k.pad_id, prefix_lm=True))
    plain = ~layout.register
    for row in range(6):
        prefix = int((~rows.is_target[row] & (rows.segment[row] >= 0)).sum())
        length = int((rows.segment[row] >= 0).sum())
        predicted = (layout.target[row] != IGNORE) & plain[row]
        assert predicted.nonzero().flatten().tolist() == list(range(prefix - 1, length - 1))
        anchors = layout.causal_index[row][layout.register[row] & (layout.target[row] != IGNORE)]
        assert int(anchors.min()) == prefix - 1 and int(anchors.max()) <= length - 2
        assert int(layout.prefix[row].sum()) == prefix


def test_long_examples_are_dropped_and_counted():
    task = Text(TextConfig(corpus="gsm8k", train_size=300, test_size=5, max_tokens=100, **STANDIN))
    lengths = np.array([len(ids) for ids, _ in task.encode(task._problems("train"))])
    source = task.train(0)
    assert source.size == (lengths <= 100).sum() and source.dropped == (lengths > 100).sum() > 0
    with pytest.raises(ValueError, match="max_tokens: all 300 examples are longer than 8 tokens"):
        Text(TextConfig(corpus="gsm8k", train_size=300, test_size=5, max_tokens=8, **STANDIN)).train(0)


def test_what_does_not_fit_the_model_is_refused_before_training(tiny):
    task = Text(TextConfig(corpus="gsm8k", train_size=50, test_size=20, new_tokens=200, **STANDIN))
    task.train(0)
    with pytest.raises(ValueError, match=r"max_tokens: .* right answers have up to \d+ tokens; allowed: 64"):
        task.prepare(tiny("llama", max_position_embeddings=64))
    task.longest = 10  # then those of the held-out problems are
    with pytest.raises(ValueError, match=r"max_tokens: .* right answers have up to \d+ tokens; allowed: 64"):
        task.prepare(tiny("llama", max_position_embeddings=64))
    short = Text(TextConfig(corpus="gsm8k", train_size=50, test_size=20, new_tokens=500, **STANDIN))
    short.train(0)
    with pytest.raises(ValueError, match=r"new_tokens: 500, and the shortest valid prompt has \d+ .*; allowed: 512"):
        short.prepare(tiny("llama", max_position_embeddings=512))
    model, told = tiny("llama", max_position_embeddings=512, eos_token_id=None), []
    task.prepare(model, told.append)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == task.tokenizer.eos_token_id
    assert told == []
    with pytest.raises(ValueError, match="max_tokens: all 20 test prompts have 9 tokens or more"):
        Text(TextConfig(corpus="gsm8k", test_size=20, max_tokens=9, **STANDIN)).examples("test")


def test_prompts_without_room_for_an_answer_count_as_wrong(tiny, tmp_path):
    """They are not asked, and said; all others may answer as long as ever."""
    task = Text(TextConfig(corpus="gsm8k", train_size=50, valid_size=8, test_size=30, new_tokens=200, **STANDIN))
    task.train(0)
    lengths = np.array([prefix for _, prefix in task.examples("test")])
    room = 200 + int(np.sort(lengths)[20])
    fits, told = lengths + 200 <= room, []
    assert 0 < fits.sum() < 30
    model = tiny("llama", vocab_size=len(task.tokenizer), max_position_embeddings=room)
    task.prepare(model, told.append)
    line = f"{30 - fits.sum()} of 30 test prompts leave no room for 200 new tokens in the model's {room} positions"
    assert any(said.startswith(line) for said in told)
    asked = []

    class Knows(NextToken):
        """The right answers."""

        def answer(self, model, prompts):
            out = torch.full((len(prompts.ids), prompts.length), prompts.end_id)
            for row, ids, attended in zip(out, prompts.ids, prompts.attended, strict=True):
                asked.append((int(attended.sum()), prompts.length))
                key = task.tokenizer.decode(ids[attended.bool()], skip_special_tokens=True)
                (gold,) = [p.gold for p in task.problems["test"] if p.prompt == key]
                found = task.tokenizer(f"#### {gold}", add_special_tokens=False)["input_ids"]
                row[: len(found)] = torch.tensor(found)
            return out

    told.clear()
    context = Context(pad_id=task.pad_id, prefix_lm=True)
    metrics, scores = task.evaluate(model, Knows(None), context, "test", 7, tmp_path / "predictions.jsonl", told.append)
    assert sorted(asked) == sorted((n, 200) for n in lengths[fits])
    assert scores["accuracy"].tolist() == fits.tolist() and metrics["accuracy"] == pytest.approx(100 * fits.mean())
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [bool(line["output"]) for line in lines] == fits.tolist() and told[0].startswith(line)


def test_losses_of_right_answers_stop_at_max_tokens(tiny, tools):
    """A problem that is longer counts up to there, a prompt as long as that not at all; a loop says the same."""
    options = {"corpus": "gsm8k", "train_size": 50, "valid_size": 8, "test_size": 12, "new_tokens": 4, **STANDIN}
    whole = Text(TextConfig(**options)).examples("test")
    most = int(np.median([prefix for _, prefix in whole])) + 8
    task = Text(TextConfig(max_tokens=most, **options))
    task.longest = most  # as if it had been trained on
    model, told, losses = tiny("llama", vocab_size=len(task.tokenizer), max_position_embeddings=512), [], []
    with torch.no_grad():
        for ids, prefix in whole:
            logits = tools.plain_logits(model, ids[:most].tolist(), prefix, False)
            for at in range(prefix, min(most, len(ids))):
                losses.append(-torch.log_softmax(logits[at - 1], -1)[ids[at]])
    task.prepare(model, told.append)
    metrics, scores = task.evaluate(model, NextToken(None), Context(pad_id=task.pad_id), "test", 5)
    assert metrics["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    cut = sum(len(ids) > most for ids, _ in whole)
    assert len(scores["accuracy"]) == 12 and cut > 0 and any(prefix >= most for _, prefix in whole)
    assert f"of {cut} of 12 test problems the loss is that of the first {most} tokens" in told


def test_calculator_marks_are_kept_or_stripped(tmp_path):
    row = {"question": "q", "answer": "She sold 48/2 = <<48/2=24>>24 clips.\n#### 24"}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    texts = []
    for calculator in (True, False):
        options = {"corpus": "gsm8k", "source": "folder", "folder": str(tmp_path), "tokens": "standin"}
        task = Text(TextConfig(calculator=calculator, **options))
        ids, prefix = task.train(0).examples(np.array([0]))[0]
        texts.append(task.tokenizer.decode(ids[prefix:-1]))
    assert texts == [" She sold 48/2 = <<48/2=24>>24 clips.\n#### 24", " She sold 48/2 = 24 clips.\n#### 24"]


def test_gold_answers_score_full_marks(gsm8k):
    for problem in gsm8k.problems["test"]:
        assert gsm8k.score(problem.answer, problem.gold) == {"accuracy": 1.0}
        assert gsm8k.score(f"#### {int(problem.gold) + 1}", problem.gold) == {"accuracy": 0.0}
    task = Text(TextConfig(corpus="samsum", valid_size=5, test_size=50, train_size=50, **STANDIN))
    golds = [p.gold for p in task.problems["test"]]
    assert all(task.score(g, g) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0} for g in golds)


def test_answers_that_are_not_compared_in_time_are_wrong_counted_and_said(tiny, impatient):
    task = Text(TextConfig(corpus="1m-math", valid_size=2, test_size=4, new_tokens=256, **STANDIN))
    answers = {p.prompt: p.answer for p in task.problems["test"]}
    endless = task.problems["test"][2].prompt
    answers[endless] = r"\boxed{9^{9^{9^{9}}}}"

    class Fixed(NextToken):
        def answer(self, model, prompts):
            texts = [answers[task.tokenizer.decode(ids, skip_special_tokens=True)] for ids in prompts.ids]
            ids = [[*task.tokenizer(t, add_special_tokens=False)["input_ids"], prompts.end_id] for t in texts]
            return torch.tensor([row + [task.pad_id] * (max(map(len, ids)) - len(row)) for row in ids])

    lines: list[str] = []
    model = tiny("llama", vocab_size=len(task.tokenizer), max_position_embeddings=512)
    context = Context(pad_id=task.pad_id, prefix_lm=True)
    metrics, scores = task.evaluate(model, Fixed(None), context, "test", 4, log=lines.append)
    assert (metrics["accuracy"], metrics["out_of_time"]) == (75.0, 25.0)
    assert scores["accuracy"].tolist() == [True, True, False, True]
    assert scores["out_of_time"].tolist() == [False, False, True, False]
    assert lines[-1] == "1 of 4 answers could not be compared in time and count as wrong"


@pytest.mark.parametrize(
    ("size", "epochs", "steps"), [(7473, 5, 3735), (150_970, 5, 75_485), (167_050, 5, 83_525), (100, 0.5, 5)]
)
def test_epochs_are_of_whole_batches(size, epochs, steps):
    """The published numbers of steps at batch 10."""
    recipe = Recipe(epochs=epochs, batch_size=10, learning_rate=1e-3, eval_every=None).for_size(size)
    assert (recipe.steps, recipe.eval_every) == (steps, size // 10)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epochs": None}, "give either steps or epochs"),
        ({"steps": 3, "epochs": 2}, "give either steps or epochs"),
    ],
)
def test_steps_or_epochs(changes, says):
    with pytest.raises(ValueError, match=says):
        from_mapping(Recipe, {"batch_size": 10, "learning_rate": 1e-3, **changes}, "recipe")
    with pytest.raises(ValueError, match="have no end"):
        Recipe(epochs=2, batch_size=10, learning_rate=1e-3).for_size(None)
    with pytest.raises(ValueError, match="10 is more than the 9 training examples"):
        Recipe(epochs=2, batch_size=10, learning_rate=1e-3).for_size(9)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"corpus": "gsm9k"}, "'gsm9k' is not allowed; allowed: gsm8k, 1m-gsm"),
        ({"corpus": "own"}, "train_file: missing"),
        ({"corpus": "gsm8k", "train_file": "x"}, "goes with corpus 'own'"),
        ({"corpus": "gsm8k", "source": "folder"}, "folder: None does not go with source 'folder'"),
        ({"corpus": "gsm8k", "folder": "x"}, "does not go with source 'hub'"),
        ({"corpus": "gsm8k", "extract": "box"}, "'box' is not allowed; allowed: hashes, boxed"),
    ],
)
def test_wrong_options(options, says):
    with pytest.raises(ValueError, match=says):
        from_mapping(TextConfig, options, "datasets: x: options")


def test_a_method_of_fixed_length_is_refused():
    method = load(METHODS, "teacherless", "m").Config()
    with pytest.raises(ValueError, match="fixed number of tokens"):
        Text.check_settings(TextConfig(corpus="gsm8k"), method, "gsm8k: teacherless")


def test_other_data_than_expected_are_refused():
    options = {"corpus": "samsum", "train_size": 20, "valid_size": 5, "test_size": 5, **STANDIN}
    found = Text(TextConfig(**options)).data_hash()
    assert Text(TextConfig(expect=found, **options)).train(0).size == 20
    with pytest.raises(ValueError, match=f"the data have hash {found}, not abc"):
        Text(TextConfig(expect="abc", **options)).train(0)


def test_revisions_are_written_down_once_and_checked(tmp_path, monkeypatch):
    from mutor.models import hub

    monkeypatch.setattr(hub, "lock_file", lambda: tmp_path / "revisions.json")
    assert hub.known_revision("model", "a/b") is None
    hub.remember("model", "a/b", "123")
    hub.remember("dataset", "a/b", "456")
    hub.remember("model", "a/b", "123")
    assert hub.known_revision("model", "a/b") == "123" == hub.newest_revision("model", "a/b")
    with pytest.raises(ValueError, match=r"model a/b: got revision 124, config/revisions\.json says 123"):
        hub.remember("model", "a/b", "124")
    assert json.loads((tmp_path / "revisions.json").read_text()) == {"model a/b": "123", "dataset a/b": "456"}


def test_a_hub_that_is_not_there_is_explained(monkeypatch, tmp_path):
    from mutor.tasks.corpora import CORPORA, Origin, problems

    with pytest.raises(ValueError, match=r"openai/gsm8k.*hf auth login.*source: folder"):
        problems(CORPORA["gsm8k"], "test", Origin("hub"))


def test_a_whole_run_from_a_shared_base(tmp_path):
    """Base model of one seed, fine-tuned by two seeds; predictions kept; the checkpoint answers by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scale = load_scale(ROOT, "smoke")
    spec = make_spec(scale, "gsm8k", "llama-2x32", "mutor", {"d_max": 4, "a": 0.3}, (7, 8))
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=tmp_path))
    assert len(list((tmp_path / spec.base.path).glob("seed*/metrics.json"))) == 1
    for seed in (7, 8):
        folder = records.seed_folder(tmp_path, spec, seed)
        record = records.read(folder / "metrics.json")
        assert record["examples"] == 96 and record["steps"] == 2 * 12
        lines = [json.loads(line) for line in (folder / "predictions-last.jsonl").read_text().splitlines()]
        right = records.problem_scores(record, "last", "accuracy")
        assert len(lines) == len(right) == 24 and [bool(x["accuracy"]) for x in lines] == right.tolist()
        assert not list(folder.glob("*.answers*"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "last")
    plain = AutoModelForCausalLM.from_pretrained(folder / "last")
    task = Text(spec.task_config)
    prompt = tokenizer(task.problems["test"][0].prompt, return_tensors="pt")
    room = spec.task_config.new_tokens
    with torch.no_grad():
        out = plain.generate(**prompt, max_new_tokens=room, do_sample=False, is_causal=False)
    assert tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True) == lines[0]["output"]


def test_a_users_own_model_and_data_through_the_methods_of_its_table(tmp_path, tiny, monkeypatch):
    """The scale and table made for it, with a local model and 200 lines."""
    from mutor.results.cells import Evidence
    from mutor.results.drawings import collect_artifact
    from mutor.results.records import Records
    from mutor.tasks.standins import tokenizer

    model = tiny("llama", vocab_size=len(tokenizer()), max_position_embeddings=128, scale=1.0)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for name, numbers in (("train", range(200)), ("test", range(200, 220))):
        lines = [json.dumps({"prompt": f"{i} + 1 =", "answer": str(i + 1)}) for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    scale = load_scale(ROOT, "own")
    scale.models["mine"] = replace(scale.models["mine"], pretrained=str(tmp_path / "model"))
    files = {f"{name}_file": str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    mine = scale.datasets["mine"]
    scale.datasets["mine"] = replace(mine, options={**mine.options, **files, "new_tokens": 6}, seeds=(1,))
    scale.recipes["mine"] |= {"epochs": 1, "save_every": 10}
    table = load_table(ROOT, "own")
    specs = specs_of(cells_of(table, scale))
    assert {s.method for s in specs} == {row.method for row in table.rows} >= {"mutor", "lora_mutor"}
    for spec in specs:
        run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=tmp_path / "runs", device="cpu"))
    csv, *_ = collect_artifact(Evidence(ROOT, scale, Records(tmp_path / "runs")), table, tmp_path)
    frame = pd.read_csv(csv)
    assert frame["n_seeds"].eq(1).all() and frame["train_data"].eq("train").all() and len(frame) == 14
    assert frame["benchmark"].eq("test.jsonl").all()
    losses = frame[frame["metric"] == "loss"]
    assert losses["mean"].between(0.1, 8).all() and set(losses["unit"]) == {"nats"}
