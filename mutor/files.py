"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_text(file: Path, text: str) -> None:
    """Write whole or not at all: to a temporary file beside it, then renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def write_json(file: Path, content: Any) -> None:
    """Write as JSON, whole or not at all."""
    write_text(file, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")


def write(file: Path, writer: Callable[[Path], Any]) -> None:
    """Write a file under another name and rename it, so that a half-written one never stands there."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp{file.suffix}")
    writer(temporary)
    os.replace(temporary, file)
