"""Files and folders that appear complete or not at all, and locks between processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def write(file: Path, writer: Callable[[Path], Any]) -> None:
    """Let `writer` write to a file beside `file`, with its ending, and rename that: complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp{file.suffix}")
    writer(temporary)
    os.replace(temporary, file)


def write_text(file: Path, text: str) -> None:
    """Write a text, complete or not at all."""
    write(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(file: Path, content: Any) -> None:
    """Write as JSON, complete or not at all."""
    write_text(file, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")


@contextlib.contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that gets the name `folder` when it is complete, in the place of what stood there."""
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


@contextlib.contextmanager
def locked(file: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an advisory lock on `file`; a second process waits here, and calls `waiting` before it does.

    The lock ends with the process that holds it, however that ends.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
