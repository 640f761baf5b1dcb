"""Rows of the published datasets: where they are, what their fields mean."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mutor.tasks.scoring import after_hashes

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """A prompt, the worked answer to train on (with the space before it), what is right, and where it was read."""

    prompt: str
    answer: str
    gold: str
    where: str = field(default="", compare=False)
    messages: tuple[Mapping[str, str], ...] = ()  # of a chat, the answer among them; its prompt takes a tokenizer

    @property
    def key(self) -> str:
        """Hash of the prompt, by which problems are told apart."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]


def _question(question: str, answer: str, gold: str) -> Problem:
    return Problem(f"Question: {question}\n\nAnswer:", f" {answer}", gold)


def gsm8k(row: Row) -> list[Problem]:
    """openai/gsm8k: question, answer ending in "#### gold"."""
    gold = after_hashes(row["answer"])
    if gold is None:
        raise ValueError("answer has no '####'")
    return [_question(row["question"], row["answer"], gold)]


def openmath(row: Row) -> list[Problem]:
    """nvidia/OpenMathInstruct-2: problem, generated_solution with a box, expected_answer, problem_source."""
    return [_question(row["problem"], row["generated_solution"], row["expected_answer"])]


def math500(row: Row) -> list[Problem]:
    """HuggingFaceH4/MATH-500: problem, solution with a box, answer."""
    return [_question(row["problem"], row["solution"], row["answer"])]


def aqua(row: Row) -> list[Problem]:
    """deepmind/aqua_rat: question, options (one a line), rationale, correct letter."""
    if row["correct"] not in list("ABCDE") or len(row["options"]) != 5:
        raise ValueError(f"correct is {row['correct']!r} of {len(row['options'])} options, allowed: A to E of five")
    asked = "\n".join([row["question"], *row["options"]])
    return [_question(asked, f"{row['rationale']}\nThe answer is {row['correct']}", row["correct"])]


def dialogue(row: Row) -> list[Problem]:
    """SAMSum and DialogSum: dialogue, summary; DialogSum's published test rows have summary1 to summary3."""
    summaries = [row["summary"]] if "summary" in row else [row[f"summary{i}"] for i in (1, 2, 3)]
    return [Problem(f"Dialogue:\n{row['dialogue']}\n\nSummary:", f" {text}", text) for text in summaries]


def pair(row: Row) -> list[Problem]:
    """A user's own row: prompt and answer, joined by a space; gold, where the answer is more than what is scored.

    Without gold it is empty here: what is right is then found in the answer.
    """
    if "messages" in row:
        return [conversation(row)]
    for name in ("prompt", "answer", "gold"):
        if name in row and not isinstance(row[name], str):
            raise ValueError(f"field {name!r} is {row[name]!r}; allowed: a text")
        if name != "prompt" and name in row and not row[name].strip():
            raise ValueError(f"field {name!r} is empty")
    space = "" if row["prompt"][-1:].isspace() else " "
    return [Problem(row["prompt"], space + row["answer"].strip(), row.get("gold", ""))]


def conversation(row: Row) -> Problem:
    """A user's own chat: the last message, the assistant's, is the answer; its prompt takes a tokenizer."""
    messages, gold = row["messages"], row.get("gold", "-")
    if not isinstance(messages, list) or len(messages) < 2 or "prompt" in row or "answer" in row:
        raise ValueError("allowed beside gold: either prompt and answer, or messages, a list of two or more")
    for number, message in enumerate(messages, start=1):
        parts = [message.get(name) for name in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(part, str) and part.strip() for part in parts):
            raise ValueError(f"message {number} is {message!r}; allowed: a role and a content, both texts")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message has role {messages[-1]['role']!r}; allowed: assistant")
    if not isinstance(gold, str) or not gold.strip():
        raise ValueError(f"field 'gold' is {gold!r}; allowed: a text")
    return Problem("", messages[-1]["content"].strip(), row.get("gold", ""), messages=tuple(messages))


def source(row: Row) -> list[Problem]:
    """A piece of a source file: its first two lines, what follows, and of that the first line that is not empty."""
    lines = row["text"].split("\n")
    first, rest = "\n".join(lines[:2]), "\n" + "\n".join(lines[2:])
    return [Problem(first, rest, rest.strip().split("\n")[0].strip())]


def mix(row: Row) -> list[Problem]:
    """A generated row of any of these, named by its field `dataset`."""
    return PUBLISHED[row["dataset"]].read(row)


@dataclass(frozen=True)
class Published:
    """A dataset as it is published. files: split -> names that a local copy may have, patterns allowed."""

    read: Callable[[Row], list[Problem]]
    hub: str = ""
    hub_name: str | None = None
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hub_splits: Mapping[str, str] = field(default_factory=dict)


_SUMMARIES = {
    "train": ("train.jsonl", "train.json", "*.train.jsonl"),
    "valid": ("validation.jsonl", "valid.jsonl", "val.json", "dev.jsonl", "*.dev.jsonl"),
    "test": ("test.jsonl", "test.json", "*.test.jsonl"),
}
PUBLISHED = {
    "gsm8k": Published(
        gsm8k,
        "openai/gsm8k",
        "main",
        {"train": ("train.jsonl",), "test": ("test.jsonl",)},
        {"train": "train", "test": "test"},
    ),
    "openmathinstruct-2": Published(
        openmath,
        "nvidia/OpenMathInstruct-2",
        None,
        {
            "train_1M": ("train_1M*.parquet", "data/train_1M-*.parquet"),
            "train_2M": ("train_2M*.parquet", "data/train_2M-*.parquet"),
        },
        {"train_1M": "train_1M", "train_2M": "train_2M"},
    ),
    "math500": Published(
        math500,
        "HuggingFaceH4/MATH-500",
        None,
        {"test": ("test.jsonl",)},
        {"test": "test"},
    ),
    "aqua": Published(
        aqua,
        "deepmind/aqua_rat",
        "raw",
        {"train": ("train.json",), "valid": ("dev.json",), "test": ("test.json",)},
        {"train": "train", "valid": "validation", "test": "test"},
    ),
    "samsum": Published(
        dialogue,
        "knkarthick/samsum",
        None,
        _SUMMARIES,
        {"train": "train", "valid": "validation", "test": "test"},
    ),
    "dialogsum": Published(
        dialogue,
        "knkarthick/dialogsum",
        None,
        _SUMMARIES,
        {"train": "train", "valid": "validation", "test": "test"},
    ),
    "mix": Published(mix),
    "python": Published(source),
    "own": Published(pair),
}
