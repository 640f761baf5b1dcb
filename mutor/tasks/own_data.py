"""A user's own problems: what is right where they do not say so, and what they are refused for before any training.

found = with_gold(as_prompts(problems(corpus, "test", Origin("file", "test.jsonl")), tokenizer), corpus)
check_answers(found, corpus, score)
check_apart(training, {"test": found})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mutor.tasks.corpora import CORPORA, Corpus, Origin, problems
from mutor.tasks.formats import Problem
from mutor.tasks.scoring import EXTRACT, FRACTION, NUMBER


def check_file(file: Path) -> None:
    """Raise ValueError, naming file and line, for a file of problems that can't be read or has none."""
    if not problems(CORPORA["own"], "train", Origin("file", str(file))):
        raise ValueError(f"{file}: there is no problem in it")


def as_prompts(found: Sequence[Problem], tokenizer: Any) -> list[Problem]:
    """Chats as prompt and answer: the prompt is what the tokenizer's chat template makes of all but the last message.

    Without the beginning token where the tokenizer puts it, too. The answer keeps the white space that the template has
    before it. Raises ValueError for a tokenizer without a template, and with file and line for what a template refuses.
    """
    return [_as_prompt(problem, tokenizer) if problem.messages else problem for problem in found]


def _as_prompt(problem: Problem, tokenizer: Any) -> Problem:
    if not tokenizer.chat_template:
        raise ValueError(
            f"{problem.where}: `messages` need a chat template, and the tokenizer {tokenizer.name_or_path!r} has none; "
            "allowed: prompt and answer, or a chat model"
        )
    messages = [dict(message) for message in problem.messages]
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # of the template's own, and of jinja's many kinds
        raise ValueError(f"{problem.where}: the chat template refuses it: {str(error).splitlines()[0]}") from None
    rest = whole.removeprefix(prompt)
    space = rest[: len(rest) - len(rest.lstrip())] if rest.lstrip().startswith(problem.answer) else ""
    bos = tokenizer.bos_token
    if bos and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        prompt = prompt.removeprefix(bos)
    return replace(problem, prompt=prompt, answer=space + problem.answer)


def with_gold(found: Sequence[Problem], corpus: Corpus) -> list[Problem]:
    """Problems without gold get what `extract` finds in their answer: the whole answer where it is scored by ROUGE."""
    extract = EXTRACT["whole" if corpus.compare == "rouge" else corpus.extract]
    return [p if p.gold else replace(p, gold=extract(p.answer) or "") for p in found]


def check_answers(found: Sequence[Problem], corpus: Corpus, score: Callable[[str, str], dict[str, float]]) -> None:
    """Raise ValueError, naming the first, unless all answers of the problems to score on are right themselves.

    score: (output, gold) -> accuracy, 0 or 1. A gold with several numbers is refused where numbers are compared, as
    only one of them would count. ROUGE has no right and wrong.
    """
    if corpus.compare == "rouge":
        return
    for problem in found:
        if corpus.compare == "number" and len(NUMBER.findall(FRACTION.sub("1", problem.gold))) > 1:
            raise ValueError(
                f"{problem.where}: gold {_short(problem.gold)} has several numbers; write the one that is right as "
                f"`gold`, or say by `extract` where it stands (here {corpus.extract!r})"
            )
    wrong = [p for p in found if score(p.answer, p.gold)["accuracy"] != 1]
    if wrong:
        first = wrong[0]
        raise ValueError(
            f"{first.where}: the answer itself counts as wrong: extract {corpus.extract!r} finds "
            f"{_short(EXTRACT[corpus.extract](first.answer))}, gold is {_short(first.gold)}, compared as "
            f"{corpus.compare}; so with {len(wrong)} of {len(found)} problems"
        )


def check_apart(training: Sequence[Problem], held_out: Mapping[str, Sequence[Problem]]) -> None:
    """Raise ValueError for training problems with the prompt of one that is scored on; split -> problems."""
    for found in held_out.values():
        asked = {p.prompt.strip(): p.where for p in found}
        shared = [p for p in training if p.prompt.strip() in asked]
        if shared:
            raise ValueError(
                f"{shared[0].where}: this prompt is scored on, too ({asked[shared[0].prompt.strip()]}), as are "
                f"{len(shared)} of {len(training)} training prompts; take them out of one of the files"
            )


def _short(text: str | None) -> str:
    return "nothing" if not text else repr(text if len(text) <= 60 else f"{text[:57]}...")
