"""Generated stand-ins: right, various, apart from each other, the same every time."""

import functools
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


@functools.cache
def trained(name):
    """As many training problems of a corpus as scale laptop has."""
    return problems(CORPORA[name], "train", GENERATED, 36_000 if name == "mix" else 3000)


@functools.cache
def held_out():
    """What is asked in all held-out splits of all datasets."""
    corpora = [corpus for corpus in CORPORA.values() if corpus.train[0] not in ("own", "python")]
    return {asked(p) for corpus in corpora for split in ("valid", "test") for p in problems(corpus, split, GENERATED)}


def asked(problem):
    return re.sub(r"\s*\n[A-E]\).*", "", problem.prompt, flags=re.DOTALL)


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


@pytest.mark.parametrize("name", [n for n in CORPORA if n not in ("own", "mix", "python")])
def test_gold_answers_are_right(name):
    corpus = CORPORA[name]
    found = trained(name)[:150]
    assert len({p.prompt for p in found}) == len(found)
    if corpus.compare != "rouge":
        assert all(COMPARE[corpus.compare](EXTRACT[corpus.extract](p.answer), p.gold) for p in found)
    assert problems(corpus, "train", GENERATED, 150) == found


@pytest.mark.parametrize("name", [n for n in CORPORA if n not in ("own", "python")])
def test_no_test_problem_is_trained_on(name):
    """Compared by what is asked, over all datasets."""
    assert len(held_out()) > 1000 and not held_out() & {*map(asked, trained(name))}


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
