"""What made a run: the code it depends on, the commit, versions of packages, the platform.

A record's `code` names each top-level definition (function, class, constant) that the run reaches, with a hash of
what it does: run_code(root, config) -> {"Backbone": "0f3c...", "MuToR": "51d0...", ...}. A run starts in its method,
its task and its attention masks. From there, all names that a definition uses are followed through the project's
modules. A class is one definition. Statements that do more than define something, in any module that is imported on
the way, count together as ON_IMPORT. Of a module imported as `import a.b`, for its effects, everything counts. Names
are bare: neither moving a definition nor an edit of import lines changes anything.

Not covered: what is found by a text (getattr, importlib); decorators that register what nobody names; packages other
than the project's, whose versions stand beside; and what NOT_IN_RESULTS lists. A method of an object counts where its
class is named, as the trunk's in Method.attach. Two classes whose objects a run is handed, a recipe and a model's
settings, are named in STARTS.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mutor.checks import choose
from mutor.registry import ATTENTION, AUTO, METHODS, TASKS, answers_under
from mutor.results.definitions import module, statement

PACKAGES = ("torch", "transformers", "accelerate", "numpy")
# code that decides which runs there are and how they are kept and shown, not what comes out of one: settings stand in
# a record as they were resolved
NOT_IN_RESULTS = (
    "mutor.checks",
    "mutor.cli",
    "mutor.config.cost_cases",
    "mutor.config.load",
    "mutor.config.runs",
    "mutor.files",
    "mutor.registry",
    "mutor.results",
)
# defaults of settings do not stand in config_hash, and a recipe computes steps
STARTS = ("mutor.training.run:run", "mutor.config.recipe:Recipe", "mutor.config.schema:ModelConfig")
ON_IMPORT = "(on import)"
OLD = "(recorded by module, as earlier versions did)"


def run_code(root: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """name -> hash of every definition that a run of this configuration depends on, and the runs that it starts from.

    config: `config` of a record; of it count method, task, the model's attention, and base. Raises ValueError for a
    method or task that is not registered.
    """
    starts, now = set(STARTS), config
    while now is not None:
        attention = now["model"]["attention"]
        starts |= {METHODS[choose(now["method"], METHODS, "method")], TASKS[choose(now["task"], TASKS, "task")]}
        names = ("blockwise", "sdpa") if attention == AUTO else (attention, answers_under(attention))
        starts |= {ATTENTION[name].mask for name in names if name in ATTENTION}
        now = now["base"]
    return dict(code_hashes(root, *sorted(starts)))


@functools.cache
def code_hashes(root: Path, *starts: str) -> Mapping[str, str]:
    """name -> hash of the definitions `starts` ("module:name") and of all that they name, directly or not.

    Definitions of one name in several modules share one hash, of what each does and of who names it. Read once in a
    process: later edits of a file are not those of the code that runs.
    """
    found: dict[tuple[str, str, int], set[str]] = {}  # name, its module and statement there -> who names it
    imported: set[str] = set()
    todo: list[tuple[str, str | None, str]] = []  # module, what is named there (None: it is imported), who names it
    for start in starts:
        where, _, name = start.partition(":")
        todo.append((where, name, ""))
    while todo:
        where, wanted, user = todo.pop()
        home = None if _left_out(where) else module(root, where)
        if home is None:
            continue
        names = home.definitions if wanted == "" else [wanted] if wanted in home.definitions else []
        numbers = [(name, number) for name in names for number in home.definitions[name]]
        if where not in imported:
            imported.add(where)
            todo.append((where.rpartition(".")[0], None, ""))  # its package runs first
            numbers += [(ON_IMPORT, number) for number in home.effects] + [("", number) for number in home.imports]
        for name, number in numbers:
            if (name, where, number) not in found:
                does = statement(root, where, number)
                todo += [(*named, name) for named in does.names] + [(other, None, name) for other in does.imports]
            found.setdefault((name, where, number), set()).add(user)
    return {name: _together(root, name, found) for name in sorted({name for name, _, _ in found} - {""})}


def _left_out(name: str) -> bool:
    return any(f"{name}.".startswith(f"{other}.") for other in NOT_IN_RESULTS)


def _together(root: Path, name: str, found: Mapping[tuple[str, str, int], set[str]]) -> str:
    """The hash of all statements under a name."""
    places = {(where, number): users for (other, where, number), users in found.items() if other == name}
    digests = {place: statement(root, *place).digest for place in places}
    if len(digests) == 1:
        return next(iter(digests.values()))
    if name != ON_IMPORT and len({where for where, _ in places}) > 1:
        digests = {place: f"{digest} {sorted(places[place])}" for place, digest in digests.items()}
    return hashlib.sha256("\n".join(sorted(digests.values())).encode()).hexdigest()[:12]


def changed_code(record: Mapping[str, Any], root: Path) -> list[str]:
    """Names of the definitions that a record's run would reach now and that are not as they were: others, new or gone.

    [OLD] for a record whose code was recorded in another way; a method or task that is gone says so.
    """
    makers = [record.get("code", {}), *(maker["code"] for maker in record.get("also_made_by", []))]
    if any(not was or any("." in name for name in was) for was in makers):
        return [OLD]
    try:
        now = run_code(root, record["config"])
    except ValueError as error:
        return [str(error)]
    return sorted({name for was in makers for name in was.keys() | now.keys() if was.get(name) != now.get(name)})


def made_by(root: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run of this configuration, as it is now: `code` (see run_code), and as `provenance` has it."""
    return {"code": run_code(root, config), **provenance(root)}


def taken_over(makers: Sequence[Mapping[str, Any]], now: Mapping[str, Any], since: str) -> list[Mapping[str, Any]]:
    """A run's makers so far, and the present one if it is another than the last; since: where it takes over."""
    same = {**makers[-1], "from": ""} == {**now, "from": ""}
    return [*makers] if same else [*makers, {**now, "from": since}]


def other_data(what: str, makers: Sequence[Mapping[str, Any]], data_hash: str | None) -> str | None:
    """That `what` was trained on other data than these; None if it was not."""
    was = makers[-1].get("data_hash")
    return None if was == data_hash else f"{what} was trained on other data (hash {was}, now {data_hash})"


def provenance(root: Path) -> dict[str, Any]:
    """What makes runs: commit, versions, platform."""
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
        if not (root / ".git").exists():  # an installed package may lie in somebody else's repository
            return None
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
