"""Generated stand-ins for the published corpora, in their published row formats, for a machine with nothing.

for row in rows("gsm8k", "test"): print(row["question"], row["answer"])

Every row is a function of its dataset, split and number alone. No prompt of a test or validation split stands in a
training split of any dataset, and none twice in one split.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from mutor.tasks.standin_texts import MAKERS, Row

# split -> rows, in proportion to the published ones as far as a laptop allows; all that are tested on have a validation
# split, where the published ones have none too
SIZES = {
    "gsm8k": {"train": 6000, "test": 1000, "valid": 250},
    "openmathinstruct-2": {"train_1M": 24000, "train_2M": 48000},
    "math500": {"test": 500, "valid": 250},
    "aqua": {"train": 8000, "valid": 250, "test": 250},
    "samsum": {"train": 5000, "valid": 300, "test": 300},
    "dialogsum": {"train": 5000, "valid": 300, "test": 300},
    "mix": {"train": 40000},
}
HELD_OUT = ("valid", "test")


def _asked(row: Row) -> str:
    """What is asked in a row; equal for rows that are the same problem in different formats."""
    return str(row.get("question") or row.get("problem") or row["dialogue"])


def _stream(name: str, split: str) -> Iterator[Row]:
    for number in itertools.count():
        yield MAKERS[name](random.Random(f"{name}/{split}/{number}"))


@lru_cache(maxsize=1)
def _held_out() -> dict[tuple[str, str], list[Row]]:
    """All held-out splits, made in the order of SIZES, each apart from those before it."""
    found: dict[tuple[str, str], list[Row]] = {}
    asked: set[str] = set()
    for name, splits in SIZES.items():
        for split in splits:
            if split in HELD_OUT:
                found[name, split] = list(_first(name, split, asked))
                asked |= {_asked(row) for row in found[name, split]}
    return found


def _first(name: str, split: str, forbidden: Any) -> Iterator[Row]:
    seen: set[str] = set()
    for row in _stream(name, split):
        if len(seen) == SIZES[name][split]:
            return
        key = _asked(row)
        if key not in seen and key not in forbidden:
            seen.add(key)
            yield row


def rows(name: str, split: str) -> Iterator[Row]:
    """The rows of a generated split, in the published format of dataset `name`."""
    held_out = _held_out()
    if (name, split) in held_out:
        return iter(held_out[name, split])
    return _first(name, split, {_asked(row) for found in held_out.values() for row in found})


@lru_cache(maxsize=2)
def tokenizer(kind: str = "standin") -> Any:
    """A byte-level BPE tokenizer of 1,024 tokens trained on the generated corpora; or of bytes.

    kind: "standin", or "bytes": one token for each byte, so for each character of plain English. Digits stand alone.
    Every text survives it unchanged. It puts its beginning token before what it reads, as Llama's and Gemma's do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from mutor.tasks.formats import PUBLISHED

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<bos>", "<eos>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(special + alphabet) if kind == "bytes" else 1024,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    rows = itertools.islice(_stream("mix", "train"), 0 if kind == "bytes" else 4000)
    problems = [p for row in rows for p in PUBLISHED["mix"].read(row)]
    bpe.train_from_iterator([p.prompt + p.answer for p in problems], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
