"""Whether an answer is the gold answer, by each way of comparing."""

import pytest

from mutor.tasks.scoring import COMPARE, EXTRACT, number


@pytest.mark.parametrize(
    ("how", "answer", "gold", "right"),
    [
        ("number", "72", "72.0", True), ("number", "$1,000", "1000", True), ("number", "71", "72", False),
        ("number", None, "72", False), ("number", "none", "72", False), ("number", "72", "none", False),
        ("number", " none", "none ", True), ("number", "many", "none", False), ("number", None, "none", False),
        ("text", " B ", "B", True), ("text", "A", "B", False), ("text", None, "B", False), ("text", "b", "B", False),
        ("mathematics", " x ", "x", True), ("mathematics", None, "x", False), ("mathematics", "y", "x", False),
        ("mathematics", "2", "1+1", True),
    ],
)  # fmt: skip
def test_comparing(how, answer, gold, right):
    assert COMPARE[how](answer, gold) is right


@pytest.mark.parametrize(
    ("text", "value"), [(r"1,\!000", 1000), (r"1\,000", 1000), (r"-\$5", -5), (r"1{,}000{,}000", 1_000_000)]
)
def test_numbers_as_they_are_set_in_latex(text, value):
    assert number(text) == value


def test_the_whole_text_is_an_answer():
    assert EXTRACT["whole"](" so it is \n") == "so it is" and EXTRACT["whole"](" \n") is None
