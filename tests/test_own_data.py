"""A user's own data: what is right without gold, and what is refused before training, with file and line."""

import json
import re

import pytest

from mutor.tasks.text import Text, TextConfig

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
