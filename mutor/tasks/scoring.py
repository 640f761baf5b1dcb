"""Answers out of texts, and whether they are right: pure functions of strings.

>>> number(after_hashes("She sold 48 + 24 = 72 clips.\\n#### 72"))
Fraction(72, 1)
>>> boxed("so the total is \\\\boxed{\\\\frac{1}{2}}")
'\\\\frac{1}{2}'
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from mutor.tasks.mathematics import equal

FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
NUMBER = re.compile(
    r"(?P<sign>[-−]?)\$?\s*(?:(?P<whole>\d[\d,]*)\s+(?=\d+\s*/\s*\d))?"
    r"(?P<top>\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*(?P<bottom>\d+))?"
)
# a number before one of these, or with one of those beside it, is a part of a calculation
OPERATOR = re.compile(r"[ \t]*[-−+*×·/÷^][ \t({$−-]*\.?\d")
COMMAND = re.compile(r"\\(?:[dt]?frac|sqrt|pi|times|cdot|div|pm)(?![a-zA-Z])")
LETTER = re.compile(r"(?i:answer is):?\s*\(?([A-E]\b|[a-e](?=\)|[.,;!]?\s*$))", re.MULTILINE)
DIGITS = 4000  # Python reads no longer integers


def after_hashes(text: str) -> str | None:
    """What follows the first "####" on its line, as GSM8K marks answers; None if nothing follows any.

    The first, as the parsers of GSM8K's authors and of the paper and the strict match of lm-evaluation-harness take it:
    a model that goes on with another problem has answered before.
    """
    marked = (part.partition("\n")[0].strip() for part in text.split("####")[1:])
    return next(filter(None, marked), None)


def boxed(text: str) -> str | None:
    r"""The content of the last closed \boxed{...} (or \fbox{...}), braces matched; None if there is none.

    The last, as MATH is scored, in the paper too. For GSM8K the paper takes the first, up to its first "}".
    """
    best = None
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                best = text[match.end() : end].strip()
                break
    return best


def letter(text: str) -> str | None:
    """The last option A to E named by "The answer is X"; None if there is none.

    A small letter counts in brackets or at the end of a sentence: "The answer is a bit tricky" names none.
    """
    found = LETTER.findall(text)
    return str(found[-1]).upper() if found else None


def number(text: str | None) -> Fraction | None:
    r"""The number that a text states, exact; None if there is none.

    Understood are signs, "$", thousands commas, decimals, a/b, \frac{a}{b} and mixed numbers. Words and units pass, so
    "15\%" is 15. Of several numbers it is the first, of an equation the right side: 12 of `3 \times 4 = 12`. What is
    left to calculate is no number, as `3 \times 4` or `2\sqrt{3}`.

    The paper compares answers without their commas, as numbers in intention, as texts in effect. There 72.0 is not 72.
    Its parser, like the strict match of lm-evaluation-harness, takes what looks like a number behind "#### ": 5 of
    `#### 5 - 3 = 2`, which states 2, and nothing of `#### $72`.
    """
    if text is None:
        return None
    plain = re.sub(r"\\!|\\[,;: ](?=\d{3})", "", text.replace("{,}", ",").replace("\\$", "$"))
    plain = re.sub(r"\^\s*\{?\\circ\}?|\\[,;: ]", " ", plain)
    side = FRACTION.sub(r" \1\2/\3\4 ", plain).rpartition("=")[2]
    match = NUMBER.search(side)
    if match is None or len(match[0]) > DIGITS or COMMAND.search(side) or OPERATOR.match(side, match.end()):
        return None
    whole, top = (Fraction((match[name] or "0").replace(",", "")) for name in ("whole", "top"))
    bottom = int(match["bottom"] or 1)
    if bottom == 0:
        return None
    return (whole + top / bottom) * (-1 if match["sign"] else 1)


def same_number(answer: str | None, gold: str) -> bool:
    """Whether an extracted answer is the gold number; texts without numbers are compared as they are."""
    if answer is None:
        return False
    ours, theirs = number(answer), number(gold)
    return answer.strip() == gold.strip() if theirs is None else ours == theirs


def same_text(answer: str | None, gold: str) -> bool:
    """Equal up to white space at the ends."""
    return answer is not None and answer.strip() == gold.strip()


def same_mathematics(answer: str | None, gold: str) -> bool:
    """Normalised or symbolic equality of two LaTeX answers, by the package math-verify (as MATH500 is scored).

    Raises TimeoutError for a comparison that does not end.
    """
    if answer is None:
        return False
    return answer.strip() == gold.strip() or equal(answer, gold)


def rouge(output: str, gold: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L F-measures, 0 to 1, by the package rouge-score, with its stemmer."""
    scores = _rouge_scorer().score(gold, output)
    return {name: float(value.fmeasure) for name, value in scores.items()}


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


# how an answer is found in a text, and compared with the gold answer
EXTRACT: dict[str, Callable[[str], str | None]] = {
    "hashes": after_hashes,
    "boxed": boxed,
    "letter": letter,
    "whole": lambda text: text.strip() or None,
}
COMPARE: dict[str, Callable[[str | None, str], bool]] = {
    "number": same_number,
    "text": same_text,
    "mathematics": same_mathematics,
}
