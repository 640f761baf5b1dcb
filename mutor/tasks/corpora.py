"""Published corpora of problems with worked answers and of summaries: where they are, what their rows mean.

for problem in load(CORPORA["gsm8k"], "test", Origin("folder", "/data")): print(problem.prompt, problem.gold)
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from mutor.files import read_text
from mutor.tasks.formats import PUBLISHED, Problem, Row


@dataclass(frozen=True)
class Corpus:
    """What a training corpus is made of, and how models trained on it are scored."""

    train: tuple[str, str]
    test: tuple[str, str]
    extract: str
    compare: str
    valid: tuple[str, str] | None = None
    benchmark: str = ""
    only: tuple[str, ...] = ()  # values of problem_source that are kept
    more: tuple[str, str] | None = None  # another split to fill up from ...
    more_than: float = 1.0  # ... to this multiple of the size
    shuffled: bool = False  # seed 0, before the first `size` are taken
    size: int | None = None
    max_tokens: int = 512
    new_tokens: int = 512
    learns_prompts: bool = False  # as in pretraining

    def chosen_on(self, source: str) -> tuple[str, str]:
        """Dataset and split that name the best checkpoint: for validation, else the test split, as the paper did.

        source: the kind of `Origin`; generated datasets all have a split for validation.
        """
        return self.valid or ((self.test[0], "valid") if source == "generated" else self.test)


ARRAY = "a JSON array; allowed: one object a line, {...}, or an array in a file that is named .json"
_GSM, _MATH = ("gsm8k", "augmented_gsm8k"), ("math", "augmented_math")
_M1, _M2, _GSM_TEST = ("openmathinstruct-2", "train_1M"), ("openmathinstruct-2", "train_2M"), ("gsm8k", "test")
CORPORA = {
    "gsm8k": Corpus(("gsm8k", "train"), _GSM_TEST, "hashes", "number", benchmark="gsm8k"),
    "1m-gsm": Corpus(_M1, _GSM_TEST, "boxed", "number", benchmark="gsm8k", only=_GSM),
    "2m-gsm": Corpus(_M2, _GSM_TEST, "boxed", "number", benchmark="gsm8k", only=_GSM),
    "1m-gsm-extra": Corpus(_M1, _GSM_TEST, "boxed", "number", benchmark="gsm8k", only=_GSM, more=_M2, more_than=1.4),
    "1m-math": Corpus(
        _M1,
        ("math500", "test"),
        "boxed",
        "mathematics",
        benchmark="math500",
        only=_MATH,
        shuffled=True,
        size=200_000,
        max_tokens=768,
    ),
    "aqua-rat": Corpus(("aqua", "train"), ("aqua", "test"), "letter", "text", ("aqua", "valid"), "aqua-rat"),
    "samsum": Corpus(
        ("samsum", "train"), ("samsum", "test"), "whole", "rouge", ("samsum", "valid"), "samsum", max_tokens=768
    ),
    "dialogsum": Corpus(
        ("dialogsum", "train"),
        ("dialogsum", "test"),
        "whole",
        "rouge",
        ("dialogsum", "valid"),
        "dialogsum",
        max_tokens=768,
    ),
    "mix": Corpus(("mix", "train"), _GSM_TEST, "hashes", "number", benchmark="gsm8k", learns_prompts=True),
    "python": Corpus(
        ("python", "train"), ("python", "test"), "whole", "rouge", ("python", "valid"), "python", new_tokens=16
    ),
    "own": Corpus(("own", "train"), ("own", "test"), "whole", "text", ("own", "valid")),
}


@dataclass(frozen=True)
class Origin:
    """Where rows come from: "hub", "generated", "folder" (`path`: it holds one folder a dataset), "file" (`path`).

    Or "installed": what is part of Python.
    """

    kind: str
    path: str = ""


def problems(corpus: Corpus, split: str, origin: Origin, size: int | None = None) -> list[Problem]:
    """All problems of a corpus's split "train", "valid" or "test", in a fixed order.

    "valid" are those that checkpoints are chosen on (`Corpus.chosen_on`). size: the first so many, of a corpus that is
    shuffled after shuffling. Raises ValueError naming file and line, or dataset and revision, for what can't be read.
    """
    limit = min((x for x in (size, corpus.size if split == "train" else None) if x is not None), default=None)
    # what is generated or installed has no faults to find behind what is asked for
    enough = None if corpus.more or corpus.shuffled or origin.kind not in ("generated", "installed") else limit
    if split == "train":
        found = list(itertools.islice(_kept(corpus.train, origin, corpus.only), enough))
        if corpus.more:
            have = {p.key for p in found}
            extra: list[Problem] = []
            wanted = round((corpus.more_than - 1) * len(found))
            for problem in _kept(corpus.more, origin, corpus.only):
                if len(extra) < wanted and problem.key not in have:
                    extra.append(problem)
            found += extra
    else:
        found = list(_kept(corpus.chosen_on(origin.kind) if split == "valid" else corpus.test, origin))
    if corpus.shuffled and split == "train":
        import numpy as np

        found = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    return found[:limit]


def _kept(where: tuple[str, str], origin: Origin, only: tuple[str, ...] = ()) -> Iterable[Problem]:
    """Problems of a dataset's split; only: of rows with one of these as problem_source, which each row must have."""
    name, split = where
    published = PUBLISHED[name]
    for line, row in _rows(name, split, origin):
        try:
            if only and not isinstance(row["problem_source"], str):
                raise ValueError(
                    f"problem_source is {row['problem_source']!r}, allowed: a text, {only[0]!r} or another"
                )
            if not only or row["problem_source"] in only:
                yield from (replace(problem, where=line) for problem in published.read(row))
        except KeyError as error:
            raise ValueError(f"{line}: field {error} is missing") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{line}: {error if isinstance(row, dict) else _no_object(row)}") from None


def _rows(name: str, split: str, origin: Origin) -> Iterable[tuple[str, Row]]:
    """(where it stands, row) of a published dataset's split."""
    if origin.kind == "generated":
        from mutor.tasks.standins import rows

        for number, row in enumerate(rows(name, split)):
            yield f"generated {name} {split} row {number}", row
    elif origin.kind == "installed":
        from mutor.tasks.python_sources import rows as installed

        yield from installed(split)
    elif origin.kind == "file":
        yield from read_rows(Path(origin.path))
    elif origin.kind == "folder":
        for file in _files(name, split, Path(origin.path)):
            yield from read_rows(file)
    else:
        yield from _hub(name, split)


def _files(name: str, split: str, folder: Path) -> list[Path]:
    published = PUBLISHED[name]
    for home in (folder / name, folder):
        for pattern in published.files[split]:
            found = sorted(home.glob(pattern))
            if found:
                return found
    raise ValueError(
        f"folder: {folder} has no {split} split of {name}; looked for {', '.join(published.files[split])} "
        f"in {folder / name} and {folder}"
    )


def read_rows(file: Path) -> Iterable[tuple[str, Row]]:
    """(file and line, row) of a .jsonl, .json (a list, or one object a line) or .parquet file."""
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    if file.suffix == ".parquet":
        import pyarrow.parquet

        try:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches()
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{file}: not a readable parquet file: {error}") from None
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"{file}: row {number}", row
        return
    text = read_text(file)
    if file.suffix == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from None
        yield from ((f"{file}: row {i}", row) for i, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{file}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{number}: {_no_json(line, error.msg)}") from None


def _no_json(line: str, why: str) -> str:
    return ARRAY if line.lstrip().startswith("[") else f"not valid JSON: {why}"


def _no_object(row: object) -> str:
    return ARRAY if isinstance(row, list) else f"{json.dumps(row)[:60]} is no JSON object, {{...}}"


def _hub(name: str, split: str) -> Iterable[tuple[str, Row]]:
    from datasets import load_dataset

    from mutor.models.hub import newest_revision

    published = PUBLISHED[name]
    if not published.hub:
        raise ValueError(f"source: {name!r} is not on the hub; allowed: generated")
    try:
        revision = newest_revision("dataset", published.hub)
        data = load_dataset(published.hub, published.hub_name, split=published.hub_splits[split], revision=revision)
    except Exception as error:  # whatever the hub's client raises: no network, no access, no such revision
        raise ValueError(
            f"dataset {published.hub} can't be loaded ({str(error).splitlines()[0]}); if it is gated ask for access on "
            "its page and log in with `hf auth login`, or set `source: folder` and `folder` to a copy of its files"
        ) from error
    yield from ((f"{published.hub} {split} row {i}", row) for i, row in enumerate(data))
