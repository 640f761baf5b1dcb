"""A user's own data: what is right without gold, and what is refused before training, with file and line."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

import mutor.results.records
import mutor.training.run
from mutor.cli import main
from mutor.tasks import standins
from mutor.tasks.text import Text, TextConfig

ROOT = Path(__file__).parent.parent

WORKED = "First 48 / 2 = 24 clips, then 48 + 24.\n#### 72"


def task(folder, train, test, **options):
    """The task of rows written as JSONL, with the tokenizer of the stand-ins."""
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {f"{name}_file": str(folder / f"{name}.jsonl") for name in ("train", "test")}
    return Text(TextConfig(corpus="own", tokens="standin", **files, **options))


def row(prompt, answer, **more):
    """A line of a file."""
    return {"prompt": prompt, "answer": answer, **more}


@pytest.mark.parametrize("compare", ["number", "text", "mathematics"])
def test_without_gold_what_extract_finds_is_right(tmp_path, compare):
    """Not the whole answer, whose first number is 48."""
    own = task(tmp_path, [row("q", WORKED)], [row("p", WORKED)], extract="hashes", compare=compare)
    gold = own.problems["test"][0].gold
    assert gold == "72" and own.problems["test"][0].answer == f" {WORKED}"
    assert own.score("it is\n#### 72", gold)["accuracy"] == 1 and own.score("it is\n#### 48", gold)["accuracy"] == 0


def test_gold_is_kept_and_summaries_are_compared_whole(tmp_path):
    own = task(
        tmp_path, [row("q", "a")], [row("p", "2 + 2 = \\boxed{4}", gold="4.0")], extract="boxed", compare="number"
    )
    assert own.problems["test"][0].gold == "4.0"
    summary = task(tmp_path, [row("q", "a")], [row("p", "They greet.\n#### 2")], extract="hashes", compare="rouge")
    assert summary.problems["test"][0].gold == "They greet.\n#### 2"


@pytest.mark.parametrize(
    ("test", "options", "says"),
    [
        (
            [row("a", "1 #### 1"), row("b", WORKED, gold="73"), row("c", "no mark", gold="3")],
            {"extract": "hashes", "compare": "number"},
            "test.jsonl:2: the answer itself counts as wrong: extract 'hashes' finds '72', gold is '73', compared as "
            "number; so with 2 of 3 problems",
        ),
        (
            [row("a", "no mark")],
            {"extract": "boxed", "compare": "number"},
            "test.jsonl:1: the answer itself counts as wrong: extract 'boxed' finds nothing, gold is nothing",
        ),
        (
            [row("a", "3 + 4 = 7 #### 7", gold="7")],
            {"extract": "whole", "compare": "text"},
            "extract 'whole' finds '3 + 4 = 7 #### 7', gold is '7', compared as text",
        ),
        (
            [row("a", "7"), row("b", "3 apples and 4 are 7")],
            {"extract": "whole", "compare": "number"},
            "test.jsonl:2: gold '3 apples and 4 are 7' has several numbers; write the one that is right as `gold`",
        ),
        ([row("a", "7"), row("b", "7", gold=None)], {}, "test.jsonl:2: field 'gold' is None"),
        ([row("a", "7"), row("b", "7", gold=" ")], {}, "test.jsonl:2: field 'gold' is empty"),
        ([row("a", " \n")], {}, "test.jsonl:1: field 'answer' is empty"),
    ],
)
def test_refused_before_training(tmp_path, test, options, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        task(tmp_path, [row("q", "4")], test, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("gold", ["1/2", "1 1/2", r"\frac{1}{2}", "$1,234.50", "7 apples", "none"])
def test_one_number_is_one(tmp_path, gold):
    assert task(tmp_path, [row("q", "a")], [row("p", gold)], compare="number").problems["test"][0].gold == gold


def test_training_on_what_is_scored_is_refused(tmp_path):
    train = [row("a", "1"), row("b ", "2"), row("c", "3")]
    with pytest.raises(
        ValueError, match=r"train\.jsonl:2: this prompt is scored on, too \(.*test\.jsonl:1\), as are 2"
    ):
        task(tmp_path, train, [row("b", "2"), row("c", "3")]).train(0)
    assert task(tmp_path, train, [row("d", "2")]).train(0).size == 3


def test_training_answers_may_lack_what_extract_finds(tmp_path):
    own = task(tmp_path, [row("q", "no mark")], [row("p", WORKED)], extract="hashes", compare="number")
    assert own.train(0).size == 1 and len(own.data_hash()) == 16
    with pytest.raises(ValueError, match=r"train\.jsonl:1: field 'answer' is empty"):
        task(tmp_path, [row("q", "")], [row("p", "1")]).train(0)


# what a user gets wrong, said by `run` before it begins, and by `plan`

TRAIN, PRETRAINED = ("config/scales/own.yaml: datasets: mine: options: train_file: ",
                     "config/scales/own.yaml: models: mine: pretrained: ")  # fmt: skip
GOOD = {"prompt": "q", "answer": "a"}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """own(pretrained=..., train_file=...): a project in the working folder, its scale with these settings."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for file in ("mine/config.json", "mine/model.safetensors", "mine/tokenizer.json", "taken"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        (tmp_path / f"data/{name}.jsonl").write_text(json.dumps({"prompt": name, "answer": "a"}) + "\n")

    def change(pretrained="mine", **options):
        file = tmp_path / "config/scales/own.yaml"
        content = yaml.safe_load(file.read_text())
        content["models"]["mine"]["pretrained"] = pretrained
        content["datasets"]["mine"]["options"].update(options)
        content["recipes"]["mine"]["batch_size"] = 1
        file.write_text(yaml.safe_dump(content))
        return tmp_path

    return change


def said(capsys, *more):
    """The one line that `run` stops with, which `plan` has said, too."""
    assert main(["plan", "--scale", "own"]) == 0
    planned = capsys.readouterr().err
    assert main(["run", "--scale", "own", "--data", "mine", "--model", "mine", "--method", "mutor", *more]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert more or planned == f"not ready: {line[7:]}"
    return line[7:-1]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("data/mine", "there is no folder data/mine"),
        ("/mine", "there is no folder /mine"),
        ("../my/models/mine", "there is no folder ../my/models/mine"),
        ("~/mine", "~/mine begins with ~, which only a shell knows; write /home/me/mine"),
        ("taken", "taken is a file; allowed: a folder, as save_pretrained writes it, or a .gguf file"),
        ("data", "data is a folder without config.json"),
        ("mine.gguf", "'mine.gguf' needs this file, on disk or in an installed package"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(own, capsys, name, says):
    own(pretrained=name)
    assert said(capsys).startswith(PRETRAINED + says)


@pytest.mark.parametrize(
    ("file", "says"),
    [("model.safetensors", "weights: model.safetensors or model.safetensors.index.json"),
     ("tokenizer.json", "tokenizer: tokenizer.json or tokenizer_config.json")],
)  # fmt: skip
def test_a_folder_without_a_part_is_one_line(own, capsys, file, says):
    (own() / "mine" / file).unlink()
    assert said(capsys) == f"{PRETRAINED}mine is a folder without {says}"


def test_a_hub_name_is_looked_up_in_the_cache_where_there_is_no_network(own, capsys, monkeypatch):
    from huggingface_hub import constants

    folder = own(pretrained="some/model")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert main(["plan", "--scale", "own"]) == 0 and capsys.readouterr().err == ""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert said(capsys).startswith(f"{PRETRAINED}some/model of the hub is not in {folder}/hub, and HF_HUB_OFFLINE")
    (folder / "hub/models--some--model/snapshots/1").mkdir(parents=True)
    (folder / "hub/models--some--model/refs").mkdir()
    (folder / "hub/models--some--model/refs/main").write_text("1")
    (folder / "hub/models--some--model/snapshots/1/config.json").write_text("{}")
    assert main(["plan", "--scale", "own"]) == 0 and capsys.readouterr().err == ""


def test_a_hub_that_does_not_answer_is_one_line(own, capsys, monkeypatch):
    from huggingface_hub import constants

    def no_network(spec, seeds, env):
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your internet connection.")

    own(pretrained="some/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(mutor.training.run, "run", no_network)
    assert main(["run", "--scale", "own", "--data", "mine", "--model", "mine", "--method", "mutor"]) == 2
    told = f"{PRETRAINED}some/model can't be had (We couldn't connect to 'https://huggingface.co'.); allowed: "
    assert capsys.readouterr().err == f"error: {told}a model of the hub, with a network, or a local folder\n"


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("data/none.jsonl", "there is no file data/none.jsonl"),
        ("data", "there is no file data"),
        ("~/train.jsonl", "~/train.jsonl begins with ~, which only a shell knows; write /home/me/train.jsonl"),
    ],
)
def test_a_file_that_is_not_there_is_one_line(own, capsys, file, says):
    own(train_file=file)
    assert said(capsys) == TRAIN + says


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([GOOD, {"prompt": "q", "answer": 7}], "2: field 'answer' is 7; allowed: a text"),
        ([GOOD, GOOD, {"prompt": None, "answer": "a"}], "3: field 'prompt' is None; allowed: a text"),
        ([{"prompt": "q"}], "1: field 'answer' is missing"),
        ([GOOD, "q"], '2: "q" is no JSON object, {...}'),
        ([GOOD, None], "2: null is no JSON object, {...}"),
        (
            [[GOOD, GOOD]],
            "1: a JSON array; allowed: one object a line, {...}, or an array in a file that is named .json",
        ),
        ("[\n" + json.dumps(GOOD) + "\n]\n", "1: a JSON array; allowed: one object a line"),
        (json.dumps(GOOD) + "\n{'prompt': 1}\n", "2: not valid JSON: Expecting property name"),
        ("\n", " there is no problem in it"),
        (json.dumps(GOOD).encode("utf-16"), " not UTF-8 at byte 0"),
    ],
)
def test_a_line_that_can_not_be_read_is_named(own, capsys, content, says):
    lines = "".join(json.dumps(row) + "\n" for row in content) if isinstance(content, list) else content
    (own() / "data/train.jsonl").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    assert said(capsys).startswith(f"data/train.jsonl:{says}")


def test_a_byte_order_mark_is_no_mistake_and_neither_is_an_array_in_json(own, capsys):
    folder = own(test_file="data/test.json")
    (folder / "data/train.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    (folder / "data/test.json").write_text(json.dumps([GOOD, GOOD], indent=1))
    assert main(["plan", "--scale", "own"]) == 0 and capsys.readouterr().err == ""


def test_a_folder_that_can_not_be_written_is_one_line(own, capsys):
    folder = own()
    assert said(capsys, "--runs", "taken/runs") == (
        f"runs: {folder}/taken/runs can't be a folder, {folder}/taken is a file"
    )
    assert main(["collect", "table10", "--results", "taken"]) == 2
    assert capsys.readouterr().err == f"error: results: {folder}/taken can't be a folder, {folder}/taken is a file\n"


def test_a_finished_run_needs_no_files_and_says_where_it_is(own, capsys, monkeypatch):
    own(pretrained="/gone")
    monkeypatch.setattr(mutor.training.run, "run", lambda spec, seeds, env: None)
    words = ["run", "--scale", "own", "--data", "mine", "--model", "mine", "--method", "next_token"]
    assert main(words) == 2 and "/gone" in capsys.readouterr().err
    monkeypatch.setattr(mutor.results.records, "finished", lambda runs, spec, seed: True)
    assert main([*words, "--seeds", "1", "2"]) == 0
    assert capsys.readouterr().out == "finished: runs/own/mine/mine/next_token/default, seeds 1, 2\n"


# chats

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}"
    "[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def spoken(*texts, **more):
    """A line of a chat: the user's and the assistant's messages, taking turns."""
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)], **more}


def chat(folder, train, test, template=TEMPLATE, **options):
    """The task of rows, with a tokenizer that has this chat template and puts its beginning token before each text."""
    tokenizer = copy.deepcopy(standins.tokenizer())
    tokenizer.chat_template, tokenizer.name_or_path = template, "someone/base"
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {f"{name}_file": str(folder / f"{name}.jsonl") for name in ("train", "test")}
    return Text(TextConfig(corpus="own", **files, **options), tokenizer)


def test_a_chat_is_a_prompt_of_the_template_and_the_last_answer(tmp_path):
    """Tokens are the template's own: one beginning token, and the white space that it has before an answer."""
    asked = spoken("Hello", "Hi.", "3 + 4 = ?", "It is 7 #### 7")
    own = chat(tmp_path, [row("q", "4 #### 4"), spoken("x", "y")], [asked], extract="hashes", compare="number")
    problem = own.problems["test"][0]
    assert problem.prompt == "[user] Hello\n[assistant] Hi.\n[user] 3 + 4 = ?\n[assistant]"
    assert problem.answer == " It is 7 #### 7" and problem.gold == "7" and own.score("#### 7", "7") == {"accuracy": 1}
    ids, prefix = own.encode([problem])[0]
    words = own.tokenizer
    assert own.tokenizer.decode(ids[:prefix]) == f"<bos>{problem.prompt}"
    whole = words(words.apply_chat_template(asked["messages"], tokenize=False), add_special_tokens=False)["input_ids"]
    assert ids[:-1].tolist() == whole[:-1] and ids[-1] == words.eos_token_id  # in the place of the last line's end
    assert [p.prompt for p in own._training] == ["q", "[user] x\n[assistant]"]


def test_white_space_is_the_templates(tmp_path):
    own = chat(tmp_path, [row("q", "4")], [spoken("a", "b ")], TEMPLATE.replace("[assistant]{%", "[assistant] {%"))
    assert own.problems["test"][0].prompt.endswith("[assistant] ") and own.problems["test"][0].answer == "b"


def test_chats_are_kept_apart_like_prompts(tmp_path):
    with pytest.raises(ValueError, match=r"train\.jsonl:1: this prompt is scored on, too"):
        chat(tmp_path, [spoken("a", "1")], [spoken("a", "2")]).train(0)


@pytest.mark.parametrize(
    ("line", "template", "says"),
    [
        (spoken("a", "b"), None,
         "test.jsonl:1: `messages` need a chat template, and the tokenizer 'someone/base' has none; allowed: prompt"),
        ({"messages": [{"role": r, "content": r} for r in ("user", "system", "assistant")]}, TEMPLATE,
         "test.jsonl:1: the chat template refuses it: system comes first"),
        (spoken("a"), TEMPLATE, "test.jsonl:1: allowed beside gold: either prompt and answer, or messages, a list"),
        (spoken("a", "b", answer="b"), TEMPLATE, "test.jsonl:1: allowed beside gold: either prompt and answer, or"),
        (spoken("a", "b", "c"), TEMPLATE, "test.jsonl:1: the last message has role 'user'; allowed: assistant"),
        (spoken("a", " "), TEMPLATE, "test.jsonl:1: message 2 is {'role': 'assistant', 'content': ' '}; allowed: a"),
        (spoken(None, "b"), TEMPLATE, "test.jsonl:1: message 1 is {'role': 'user', 'content': None}; allowed: a"),
        ({"messages": ["a", "b"]}, TEMPLATE, "test.jsonl:1: message 1 is 'a'; allowed: a role and a content, both"),
        (spoken("a", "b", gold=7), TEMPLATE, "test.jsonl:1: field 'gold' is 7; allowed: a text"),
    ],
)  # fmt: skip
def test_chats_that_are_none_are_refused(tmp_path, line, template, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        chat(tmp_path, [row("q", "4")], [line], template)
    assert "\n" not in str(error.value)
