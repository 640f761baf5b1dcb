"""Revisions of what is downloaded from the hub: written down the first time, asked for ever after.

config/revisions.json maps "dataset openai/gsm8k" or "model google/gemma-2b" to a commit of its repository. It is made
by the first download and belongs into version control, so that everyone's runs read the same files.
"""

from __future__ import annotations

import json
from pathlib import Path

from mutor.config.load import find_root
from mutor.files import write_json


def lock_file() -> Path:
    """config/revisions.json of the project."""
    return find_root() / "config/revisions.json"


def _revisions() -> dict[str, str]:
    file = lock_file()
    return json.loads(file.read_text()) if file.exists() else {}


def known_revision(kind: str, repository: str) -> str | None:
    """The revision written down for a "dataset" or "model"; None before its first download."""
    return _revisions().get(f"{kind} {repository}")


def remember(kind: str, repository: str, revision: str) -> None:
    """Write down a revision at the first download. Raises ValueError if another one stands there."""
    known = known_revision(kind, repository)
    if known is None:
        write_json(lock_file(), _revisions() | {f"{kind} {repository}": revision})
    elif known != revision:
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
