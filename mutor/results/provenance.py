"""What made a run: the code it depends on, the commit, versions of packages, the platform."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "accelerate", "numpy")
# code that decides which runs there are and how they are shown, not what comes out of one
NOT_IN_RESULTS = (
    "mutor",
    "mutor.__main__",
    "mutor.cli",
    "mutor.config",
    "mutor.registry",
    "mutor.checks",
    "mutor.results",
    "mutor.files",
)


def meaning(file: Path) -> str:
    """Hash of what a Python file does: comments, docstrings and formatting do not count."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            assert isinstance(body, list)
            body[0] = ast.Pass()
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


def code_hashes(root: Path, *starts: str) -> dict[str, str]:
    """module -> hash of what it does, of the modules `starts` and all of this project that they import, anywhere."""
    found: dict[str, str] = {}
    todo = list(starts)
    while todo:
        name = todo.pop()
        file = _module_file(root, name)
        if (
            name in found
            or name in NOT_IN_RESULTS
            or name.startswith(("mutor.config.", "mutor.results."))
            or not file.exists()
        ):
            continue
        found[name] = meaning(file)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return dict(sorted(found.items()))


def _module_file(root: Path, name: str) -> Path:
    stem = root / Path(*name.split("."))
    return stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")


def changed_code(record: dict[str, Any], root: Path) -> list[str]:
    """Modules whose meaning differs from when the record was made."""
    changed = []
    for name, was in record.get("code", {}).items():
        file = _module_file(root, name)
        if not file.exists() or meaning(file) != was:
            changed.append(name)
    return changed


def provenance(root: Path) -> dict[str, Any]:
    """What made a run: commit, versions, platform."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "git_commit": _git(root, "rev-parse", "HEAD"),
        "git_changed": bool(_git(root, "status", "--porcelain", "-uno")),
        "versions": versions,
        "platform": platform.platform(),
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
