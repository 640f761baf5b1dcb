"""Extraction and comparison of answers, and the published problems sent through them."""

import json
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import pytest

from mutor.tasks import mathematics
from mutor.tasks.corpora import CORPORA, Origin, problems
from mutor.tasks.formats import PUBLISHED
from mutor.tasks.scoring import COMPARE, EXTRACT, after_hashes, boxed, letter, number, rouge, same_mathematics

DATA = os.environ.get("MUTOR_TEST_DATA")
published = pytest.mark.skipif(not DATA, reason="MUTOR_TEST_DATA names no folder of published files")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18), ("1,234", 1234), ("$1,234.50", Fraction(2469, 2)), ("-7", -7), ("−7", -7), ("$-3", -3), ("-$3", -3),
        ("18.0", 18), ("18.", 18), (".5", Fraction(1, 2)), ("3/4", Fraction(3, 4)), ("18 dollars", 18), ("x = 12", 12),
        (r"\frac{3}{4}", Fraction(3, 4)), (r"-\dfrac{1}{2}", Fraction(-1, 2)), (r"1{,}000", 1000), (r"\$45", 45),
        ("1/0", None), ("none", None), ("", None), (None, None),
        (r"5\frac{1}{2}", Fraction(11, 2)), (r"-5 \dfrac12", Fraction(-11, 2)), ("5 1/2 cups", Fraction(11, 2)),
        (r"5\,\frac{1}{2}", Fraction(11, 2)), ("51/2", Fraction(51, 2)), (r"1\,000", 1000),
        (r"\tfrac 34", Fraction(3, 4)), (r"72\text{ clips}", 72), ("15%", 15), (r"15\%", 15), (r"90^\circ", 90),
        (r"3 \times 4 = 12", 12), ("5 - 3 = 2", 2), ("5 + 3 = 8 clips", 8), ("48/2 = <<48/2=24>>24", 24),
        (r"3 \times 4", None), ("5 - 3", None), ("5 - -3", None), ("2^{3}", None), ("10-12", None),
        (r"\sqrt{16}", None), (r"2\sqrt{3}", None), (r"2\pi", None), (r"\frac{a}{2}", None), ("6/3/2", None),
        ("3 = x", None), (r"90^{\circ}", 90), ("$5/hour", 5), ("5-day", 5), ("**72**", 72), ("72 (24 + 48)", 72),
        ("2 hours 30 minutes", 2), (r"\left(-3\right)", -3), pytest.param("9" * 5000, None, id="5000 digits"),
    ],
)  # fmt: skip
def test_numbers(text, value):
    assert number(text) == value


@lru_cache
def strict_match():
    """The filter by which lm-eval's task gsm8k finds answers."""
    import yaml
    from lm_eval.filters.extraction import RegexFilter
    from lm_eval.tasks import __file__ as home

    task = yaml.safe_load((Path(home).parent / "gsm8k" / "gsm8k.yaml").read_text())
    strict = next(f for f in task["filter_list"] if f["name"] == "strict-match")["filter"][0]
    return RegexFilter(strict["regex_pattern"])


def lm_evals(text):
    """What lm-eval takes from a text."""
    ((found,),) = strict_match().apply([[text]], [{}])
    return found.rstrip(".")


@pytest.mark.parametrize(
    ("text", "theirs", "ours"),
    [
        ("#### 72", "72", 72), ("#### 1,234.", "1,234", 1234), ("#### -7", "-7", -7), ("so\n#### 72 clips", "72", 72),
        ("#### 1\n\nQuestion: x\n\nAnswer: y\n#### 2", "1", 1), ("#### 1 #### 2", "1", 1), ("####\n#### 72", "72", 72),
        ("#### 72 (24 + 48)", "72", 72), ("72", "[invalid]", None),
        # read in another way, as `number` says
        ("#### 5 - 3 = 2", "5", 2), ("#### 5 1/2", "5", Fraction(11, 2)), ("#### $72", "[invalid]", 72),
        ("####72", "[invalid]", 72),
    ],
)  # fmt: skip
def test_marked_answers_as_lm_eval_reads_them(text, theirs, ours):
    """Of several marks the first."""
    assert lm_evals(text) == theirs
    assert number(after_hashes(text)) == ours


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 4\n#### 72", "72"), ("####72 \nmore", "72"), ("#### 1\n#### 2", "1"), ("no mark 72", None), ("####", None),
        ("#### \n72", None), ("####\n#### 3", "3"), ("#### 1 #### 2", "1"),
    ],
)  # fmt: skip
def test_after_hashes(text, answer):
    assert after_hashes(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{72}", "72"), (r"\boxed{\frac{1}{2}} cm", r"\frac{1}{2}"), (r"\boxed{1} then \boxed{ 2 }", "2"),
        (r"\boxed{a{b{c}}d}", "a{b{c}}d"), (r"\fbox{3}", "3"), (r"\boxed {4}", "4"), (r"\boxed{5", None), ("5", None),
        (r"\boxed{6} and \boxed{7", "6"),
    ],
)  # fmt: skip
def test_boxed(text, answer):
    assert boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\nThe answer is B", "B"), ("the answer is (c).", "C"), ("The answer is: D", "D"), ("The answer is F", None),
        ("The answer is A. No, the answer is E", "E"), ("The answer is Alone", None), ("B", None),
        ("The answer is a bit tricky", None), ("The answer is (B", "B"), ("the answer is d.\nDone", "D"),
        ("The answer is B because e is a letter", "B"), ("The answer is e.g. 5", None),
    ],
)  # fmt: skip
def test_letter(text, answer):
    assert letter(text) == answer


@pytest.mark.parametrize(
    ("ours", "gold", "equal"),
    [
        (r"\frac{1}{2}", "0.5", True), (r"\dfrac12", r"\frac{1}{2}", True), ("x^2+2x+1", "(x+1)^2", True),
        (r"2\sqrt{2}", r"\sqrt{8}", True), (r"\frac{1}{2}", r"\frac{1}{3}", False), ("11", "1", False),
        (r"(3, 4)", "(3,4)", True), (None, "1", False), ("nothing", "7", False),
    ],
)  # fmt: skip
def test_mathematics(ours, gold, equal):
    assert same_mathematics(ours, gold) is equal


def test_comparisons_that_do_not_end_are_ended(impatient):
    for endless in ("2^{2^{100}}", "9^{9^{9^{9}}}", "100000000!"):
        with pytest.raises(TimeoutError, match=r"no result in 1 s"):
            same_mathematics(endless, "12")
    assert same_mathematics(r"\frac12", "0.5")  # by another process


def test_mathematics_in_threads():
    """Where alarms can't be set; each gets the answer to its own question."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(same_mathematics, [rf"\frac{{{i}}}{{2}}" for i in range(8)], ["1.5"] * 8))
    assert found == [i == 3 for i in range(8)]


def test_a_comparing_process_that_is_gone_is_replaced():
    assert same_mathematics(r"\frac12", "0.5")
    process, _ = mathematics._worker()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert same_mathematics(r"\frac12", "0.5") and mathematics._worker()[0].pid != process.pid


def test_without_math_verify_no_answer_is_called_wrong(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('none here')")
    monkeypatch.syspath_prepend(tmp_path)
    mathematics._worker.cache_clear()
    with pytest.raises(RuntimeError, match="the process that compares answers failed"):
        same_mathematics(r"\frac12", "0.5")


def answers_right(corpus, found, change=lambda problem: problem.answer):
    """Share of problems whose worked answer, as `change` gives it, is scored right."""
    extract, compare = EXTRACT[corpus.extract], COMPARE[corpus.compare]
    return sum(compare(extract(change(p)), p.gold) for p in found) / len(found)


def plus_one(problem):
    """The worked answer with one more than the gold number."""
    return f"{problem.answer.rpartition('####')[0]}#### {number(problem.gold) + 1}"


@published
def test_published_gold_answers_are_right_and_others_wrong():
    gsm8k = problems(CORPORA["gsm8k"], "test", Origin("folder", DATA))
    assert len(gsm8k) == 1319 and len(problems(CORPORA["gsm8k"], "train", Origin("folder", DATA))) == 7473
    assert answers_right(CORPORA["gsm8k"], gsm8k) == 1 and answers_right(CORPORA["gsm8k"], gsm8k, plus_one) == 0
    assert all(lm_evals(p.answer) == p.gold and number(lm_evals(p.answer)) is not None for p in gsm8k)
    aqua = problems(CORPORA["aqua-rat"], "valid", Origin("folder", DATA))
    assert len(aqua) == 254 and answers_right(CORPORA["aqua-rat"], aqua) == 1
    turned = answers_right(CORPORA["aqua-rat"], aqua, lambda p: p.answer[:-1] + chr(65 + (ord(p.gold) - 64) % 5))
    assert turned == 0
    assert "\nA)32400\nB)6000\nC)600\n" in aqua[0].prompt and aqua[0].answer.endswith("\nThe answer is A")


@published
def test_published_summaries_against_themselves_and_each_other():
    found = problems(CORPORA["dialogsum"], "valid", Origin("folder", DATA))
    assert len(found) == 500
    for problem in found[:20]:
        assert rouge(problem.gold, problem.gold) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    pairs = list(zip(found, found[1:] + found[:1], strict=True))
    assert sum(rouge(a.gold, b.gold)["rouge2"] for a, b in pairs) / 500 < 0.08


def test_rouge_by_hand():
    """Two of three words in order, one of two bigrams."""
    assert rouge("the cat sat", "the cat ran") == pytest.approx({"rouge1": 2 / 3, "rouge2": 1 / 2, "rougeL": 2 / 3})


def test_rouge_compares_stems():
    """Without them no word of the first two pairs is found."""
    assert rouge("dogs running", "dog runs") == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert rouge("They visited", "visiting") == pytest.approx({"rouge1": 2 / 3, "rouge2": 0.0, "rougeL": 2 / 3})
    assert rouge("dogs", "cat") == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


def test_every_published_row_format():
    """One literal row each, in the field names of the published files."""
    read = {name: PUBLISHED[name].read for name in PUBLISHED}
    math = {"problem": "P", "generated_solution": r"so \boxed{3}", "expected_answer": "3", "problem_source": "math"}
    (one,) = read["openmathinstruct-2"](math)
    assert (one.prompt, one.answer, one.gold) == ("Question: P\n\nAnswer:", r" so \boxed{3}", "3")
    (one,) = read["math500"]({"problem": "P", "solution": "S", "answer": "A"})
    assert (one.prompt, one.answer, one.gold) == ("Question: P\n\nAnswer:", " S", "A")
    (one,) = read["samsum"]({"id": "1", "dialogue": "A: hi\r\nB: ho", "summary": "They greet."})
    assert one.prompt == "Dialogue:\nA: hi\r\nB: ho\n\nSummary:" and one.answer == " They greet."
    three = read["dialogsum"]({"dialogue": "D", "summary1": "x", "summary2": "y", "summary3": "z"})
    assert [p.gold for p in three] == ["x", "y", "z"]
    (one,) = read["own"]({"prompt": "2+2=", "answer": "4"})
    assert (one.prompt, one.answer, one.gold) == ("2+2=", " 4", "")  # found in the answer, by mutor.tasks.own_data


def test_parts_of_a_corpus(tmp_path):
    """Sources are filtered, the extra split fills up to 1.4 times without repeats, sizes cut after shuffling."""
    import pyarrow
    import pyarrow.parquet

    def file(name, count, start, sources):
        rows = [
            {
                "problem": f"p{start + i}",
                "generated_solution": "s",
                "expected_answer": "1",
                "problem_source": sources[i % len(sources)],
            }
            for i in range(count)
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}-00000-of-00001.parquet")

    file("train_1M", 40, 0, ["gsm8k", "math", "augmented_gsm8k", "augmented_math"])
    file("train_2M", 80, 0, ["gsm8k", "math", "augmented_gsm8k", "augmented_math"])
    origin = Origin("folder", str(tmp_path))
    one = [p.prompt for p in problems(CORPORA["1m-gsm"], "train", origin)]
    assert one == [f"Question: p{i}\n\nAnswer:" for i in range(0, 40, 2)]
    extra = [p.prompt for p in problems(CORPORA["1m-gsm-extra"], "train", origin)]
    assert extra[:20] == one and len(extra) == len(set(extra)) == 28
    math = [p.prompt for p in problems(CORPORA["1m-math"], "train", origin)]
    assert sorted(math) != math and {int(m.split("p")[1].split("\n")[0]) % 2 for m in math} == {1}
    assert [p.prompt for p in problems(CORPORA["1m-math"], "train", origin, 5)] == math[:5]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train.jsonl", '{"question": "q", "answer": "#### 1"}\n{"question": "q"', "train.jsonl:2: not valid JSON"),
        ("train.jsonl", '{"question": "q", "answer": "1"}', "train.jsonl:1: answer has no '####'"),
        ("train.jsonl", '{"question": "q"}', "train.jsonl:1: field 'answer' is missing"),
        ("train.jsonl", '["q"]', "train.jsonl:1: "),
        ("train.csv", "", "has no train split of gsm8k; looked for train.jsonl"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(says)):
        problems(CORPORA["gsm8k"], "train", Origin("folder", str(tmp_path)))


@pytest.mark.parametrize(
    ("corpus", "row", "says"),
    [
        ("own", {"prompt": "p", "answer": 7}, "field 'answer' is 7; allowed: a text"),
        ("own", {"prompt": "p", "answer": "3 + 4 = 7", "gold": 7}, "field 'gold' is 7; allowed: a text"),
        ("own", {"prompt": "p", "answer": "7", "gold": None}, "field 'gold' is None; allowed: a text"),
        ("own", ["p", "7"], "a JSON array; allowed: one object a line"),
        ("aqua-rat", {"question": "q", "options": list("abcde"), "rationale": "r", "correct": ""}, "correct is ''"),
        ("aqua-rat", {"question": "q", "options": list("abcde"), "rationale": "r", "correct": "AB"}, "correct is 'AB'"),
        (
            "1m-gsm",
            {"problem": "p", "generated_solution": "s", "expected_answer": "1"},
            "field 'problem_source' is missing",
        ),
    ],
)
def test_a_wrong_row_is_named(tmp_path, corpus, row, says):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=re.escape("rows.jsonl:1: ") + re.escape(says)):
        problems(CORPORA[corpus], "train", Origin("file", str(tmp_path / "rows.jsonl")))


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "train_1M-00000-of-00001.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        problems(CORPORA["1m-gsm"], "train", Origin("folder", str(tmp_path)))


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "a\u2028b", "answer": "#### 1"}\n', encoding="utf-8")
    assert problems(CORPORA["gsm8k"], "train", Origin("folder", str(tmp_path)))[0].prompt.startswith(
        "Question: a\u2028b"
    )
