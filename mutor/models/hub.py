"""Revisions of what is downloaded from the hub: written down the first time, asked for ever after.

config/revisions.json maps "dataset openai/gsm8k" or "model google/gemma-2b" to a commit of its repository. It is made
by the first download and belongs into version control, so that everyone's runs read the same files.
"""

from __future__ import annotations

from pathlib import Path

from mutor.config.load import find_root
from mutor.files import locked, read_json, write_json


def lock_file() -> Path:
    """config/revisions.json of the project."""
    return find_root() / "config/revisions.json"


def _revisions() -> dict[str, str]:
    file = lock_file()
    if not file.exists():
        return {}
    found = read_json(file)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"{file}: expected a mapping of repositories to revisions")
    return found


def known_revision(kind: str, repository: str) -> str | None:
    """The revision written down for a "dataset" or "model"; None before its first download."""
    return _revisions().get(f"{kind} {repository}")


def remember(kind: str, repository: str, revision: str) -> None:
    """Write down a revision at the first download. Raises ValueError if another one stands there."""
    with locked(lock_file().with_name(".revisions.lock")):  # several runs may come here at once
        known = known_revision(kind, repository)
        if known is None:
            write_json(lock_file(), _revisions() | {f"{kind} {repository}": revision})
    if known not in (None, revision):
        raise ValueError(
            f"{kind} {repository}: got revision {revision}, config/revisions.json says {known}; delete that line there "
            "to take the new one, whose results are another experiment's"
        )


def newest_revision(kind: str, repository: str) -> str:
    """The revision written down, or the hub's newest, which is then written down."""
    from huggingface_hub import HfApi

    known = known_revision(kind, repository)
    if known is None:
        known = str(HfApi().repo_info(repository, repo_type=kind).sha)
        remember(kind, repository, known)
    return known
