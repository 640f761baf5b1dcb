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

NUMBER = re.compile(r"[-−]?\$?\s*(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?")
LETTER = re.compile(r"answer is:?\s*\(?([A-E])\b", re.IGNORECASE)


def after_hashes(text: str) -> str | None:
    """What follows the last "####" on its line, as GSM8K marks answers; None if nothing does."""
    found = re.findall(r"####[ \t]*([^\n]*)", text)
    return found[-1].strip() or None if found else None


def boxed(text: str) -> str | None:
    r"""The content of the last closed \boxed{...} (or \fbox{...}), braces matched; None if there is none."""
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
    """The last option A to E named by "The answer is X"; None if there is none."""
    found = LETTER.findall(text)
    return str(found[-1]).upper() if found else None


def number(text: str | None) -> Fraction | None:
    """The first number in a text, exact: signs, "$", thousands commas, decimals and a/b are understood."""
    if text is None:
        return None
    plain = text.replace("{,}", ",").replace("\\$", "$").replace("\\!", "").replace("\\,", "")
    match = NUMBER.search(re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", plain))
    if match is None:
        return None
    top, _, bottom = re.sub(r"[$,\s]", "", match[0].replace("−", "-")).partition("/")
    return None if bottom and int(bottom) == 0 else Fraction(top) / int(bottom or 1)


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
    """Normalised or symbolic equality of two LaTeX answers, by the package math-verify (as MATH500 is scored)."""
    if answer is None:
        return False
    if answer.strip() == gold.strip():
        return True
    from math_verify import parse, verify

    ours, theirs = (parse(f"${x}$", parsing_timeout=None) for x in (answer, gold))
    return bool(verify(theirs, ours, timeout_seconds=None))


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
