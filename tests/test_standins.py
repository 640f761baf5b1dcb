"""Generated stand-ins: right, various, apart from each other, the same every time."""

import itertools
import re
from collections import Counter
from fractions import Fraction

import pytest

from mutor.tasks import standins
from mutor.tasks.corpora import CORPORA, Origin, problems
from mutor.tasks.scoring import COMPARE, EXTRACT

GENERATED = Origin("generated")


def first(name, split, count=400):
    """The first rows of a split."""
    return list(itertools.islice(standins.rows(name, split), count))


def test_worked_solutions_are_right():
    """Every line's arithmetic, the chain from line to line, and the last number against the gold answer."""
    for row in first("gsm8k", "train"):
        *lines, last = row["answer"].split("\n")
        results = []
        for line in lines:
            a, sign, b, c = re.search(r"(\d+) ([-+*/]) (\d+) = (\d+)", line).groups()
            exact = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": Fraction(int(a), int(b))}
            assert exact[sign] == int(c) and (not results or int(a) == results[-1])
            results.append(int(c))
        assert last == f"#### {results[-1]}" and results[-1] > 0
        given = set(re.findall(r"\d+", row["question"])) | {"2", "3"}  # doubles, triples, twice
        numbers = [re.search(r"(\d+) [-+*/] (\d+)", line).groups() for line in lines]
        assert set(numbers[0]) <= given and all(b in given for _, b in numbers)


def test_problems_vary():
    rows = first("gsm8k", "train", 2000)
    steps = Counter(row["answer"].count("\n") for row in rows)
    assert set(steps) == set(range(2, 9)) and max(steps.values()) < 0.4 * len(rows)
    wordings = Counter(re.sub(r"\d+", "N", row["question"].split(".")[0]) for row in rows)
    assert len(wordings) > 1000


@pytest.mark.parametrize("name", [n for n in CORPORA if n not in ("own", "mix")])
def test_gold_answers_are_right(name):
    corpus = CORPORA[name]
    found = problems(corpus, "train", GENERATED, 150)
    assert len({p.prompt for p in found}) == len(found)
    if corpus.compare != "rouge":
        assert all(COMPARE[corpus.compare](EXTRACT[corpus.extract](p.answer), p.gold) for p in found)
    assert problems(corpus, "train", GENERATED, 150) == found


@pytest.mark.parametrize("name", [n for n in CORPORA if n != "own"])
def test_no_test_problem_is_trained_on(name):
    """Compared by what is asked, over all datasets."""
    held_out = {
        re.sub(r"\s*\n[A-E]\).*", "", p.prompt, flags=re.DOTALL)
        for other in CORPORA.values()
        if other.train[0] not in ("own",)
        for split in ("valid", "test")
        for p in problems(other, split, GENERATED)
    }
    trained = problems(CORPORA[name], "train", GENERATED, 36_000 if name == "mix" else 3000)  # as scale laptop has
    assert not held_out & {re.sub(r"\s*\n[A-E]\).*", "", p.prompt, flags=re.DOTALL) for p in trained}


def test_equations_have_their_roots():
    for row in first("math500", "test", 300):
        asked = row["problem"]
        if "=" in asked:
            side, other = re.search(r"\$([^$]*=[^$]*)\$", asked)[1].split("=")
            left, right = (eval(re.sub(r"(\d+)[xyzt]", rf"\1*({row['answer']})", text)) for text in (side, other))
            assert left == right, asked


def test_tokenizer_keeps_texts_and_single_digits():
    tokenizer = standins.tokenizer()
    assert len(tokenizer) <= 1024
    for text in ("Ann has 72 apples.\n#### 72", r"\boxed{\frac{1}{2}}", "Größe – 価格\t\u2028"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == text
    assert all(len(re.findall(r"\d", token)) <= 1 for token in tokenizer.get_vocab())
