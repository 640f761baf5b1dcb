"""Source files of Python's own standard library: text that every machine has, for models that are pretrained.

for where, row in rows("test"): print(where, row["text"])

Read are the modules at the top of the library whose names do not begin with "_", sorted by name: of ten files the first
is for testing, the second for validation, the others for training. They are cut into pieces of some lines; what a run
has read is in its record's data hash, as the files differ between versions of Python. They are read where they are (PSF
licence) and not copied.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

from mutor.files import read_text

PART = {"test": (0,), "valid": (1,), "train": tuple(range(2, 10))}  # places of a split's files among ten
LINES = {
    "test": (64,),
    "valid": (64,),
    "train": (4, 4, 4, 4, 8, 8, 16, 32, 64),
}  # of pieces, in turn, so that some are short enough


def files(split: str) -> list[Path]:
    """The files of the split "train", "valid" or "test", sorted by name."""
    found = sorted(Path(sysconfig.get_path("stdlib")).glob("[!_]*.py"))
    return [file for number, file in enumerate(found) if number % 10 in PART[split]]


def rows(split: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(file and line, a row with the field text) of each piece that has at least three lines with something on them."""
    for file in files(split):
        lines, at = read_text(file).split("\n"), 0
        for count in cycle(LINES[split]):
            while at < len(lines) and not lines[at].strip():
                at += 1
            if at >= len(lines):
                break
            piece = "\n".join(lines[at : at + count]).rstrip()
            if sum(bool(line.strip()) for line in piece.split("\n")) > 2:
                yield f"{file}:{at + 1}", {"text": piece}
            at += count
