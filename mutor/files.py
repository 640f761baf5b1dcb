"""Files and folders that appear complete or not at all, that are known to be whole, and locks between processes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


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


def check_writable(folder: Path, key: str) -> None:
    """Raise ValueError for a folder, which may not be there yet, that no file can be written to; key: its setting."""
    there = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not there.is_dir():
        raise ValueError(f"{key}: {folder} can't be a folder, {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{key}: {folder} can't be written, {there} is not yours to write to")


def read_text(file: Path) -> str:
    """A file of UTF-8 text, without a byte order mark. Raises ValueError naming the file and what is wrong with it."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}") from None


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises ValueError naming the file and what is wrong with it."""
    text = read_text(file)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = "empty" if not error.doc.strip() else f"not JSON at line {error.lineno}: {error.msg}"
        raise ValueError(f"{file}: {what}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of thousands of digits
        raise ValueError(f"{file}: not JSON that can be read: {error}") from None


@contextlib.contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that is sealed and named `folder` when it is complete, in the place of what stood there."""
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    seal(temporary)
    remove_folder(folder)
    temporary.rename(folder)


def seal(folder: Path) -> None:
    """Write a folder's manifest.json, the size and hash of each of its files: the last file that it gets."""
    files = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
    files.pop(MANIFEST, None)
    write_json(folder / MANIFEST, {name: {"bytes": f.stat().st_size, "sha256": _hash(f)} for name, f in files.items()})


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder: the first file that is missing or not as it was sealed; None if all are."""
    try:
        sealed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, made in sealed.items():
            size, wanted = (folder / name).stat().st_size, made["bytes"]
            if size != wanted:
                return f"{name} has {size} bytes of {wanted}"
            if _hash(folder / name) != made["sha256"]:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} can't be read"
    return None


def _hash(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def remove_folder(folder: Path) -> None:
    """Delete a folder, if it is there; a process that is killed meanwhile leaves nothing under its name."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete what killed processes left half-written or half-deleted in a folder that nobody else works in."""
    for rest in (*folder.glob(".*.part"), *folder.glob(".*.removed")):
        shutil.rmtree(rest, ignore_errors=True)
    for file in folder.glob(".*.tmp*"):
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(file: Path, waiting: Callable[[], None] = lambda: None, wait: bool = True) -> Iterator[None]:
    """Hold an advisory lock on `file`; a second process waits here, and calls `waiting` before it does.

    The lock ends with the process that holds it, however that ends. Raises BlockingIOError where a process is not to
    `wait`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
