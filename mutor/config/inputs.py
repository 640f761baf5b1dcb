"""What runs read that may not be there, found before the first of them starts: files, folders, pretrained models.

for line in missing(specs_of(cells)): print(line)

Nothing is downloaded, and neither torch nor a network is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from mutor.config.runs import Spec
from mutor.registry import TASKS, load, resolve


def missing(specs: Iterable[Spec]) -> list[str]:
    """What is wrong with the files, folders and models that settings name, a line each; empty where all are there."""
    inputs = {where: (value, check) for spec in specs for where, value, check in _inputs(spec)}
    said = []
    for where, (value, check) in inputs.items():
        try:
            _expanded(value)
            check(value)
        except ValueError as error:
            told = str(error).removeprefix("pretrained: ")
            said.append(told if told.startswith(f"{value}:") else f"{where}: {told}")
    return list(dict.fromkeys(said))


def _inputs(spec: Spec) -> Iterable[tuple[str, str, Callable[[str], Any]]]:
    """(key of the setting, its value, what refuses a value that is not there) of all that a run and its base read."""
    where = f"config/scales/{spec.scale}.yaml"
    for field in fields(spec.task_config):
        value, kind = getattr(spec.task_config, field.name), field.metadata.get("on_disk")
        if kind and value is not None:
            yield f"{where}: datasets: {spec.data}: options: {field.name}", value, partial(_there, kind)
    if spec.model_config.pretrained is not None:
        from mutor.models.build import check_pretrained

        needed = load(TASKS, spec.dataset.task, where).needs_tokenizer(spec.task_config)
        check = partial(check_pretrained, spec.model_config, needed)
        yield f"{where}: models: {spec.model}: pretrained", spec.model_config.pretrained, lambda name: check()
    if spec.base:
        yield from _inputs(spec.base)


def _expanded(value: str) -> None:
    if value.startswith("~"):
        raise ValueError(f"{value} begins with ~, which only a shell knows; write {Path(value).expanduser()}")


def _there(kind: str, value: str) -> None:
    found = Path(value)
    if kind == "folder" and not found.is_dir():
        raise ValueError(f"there is no folder {value}")
    if kind != "folder" and not found.is_file():
        raise ValueError(f"there is no file {value}")
    if ":" in kind:
        resolve(kind)(found)
