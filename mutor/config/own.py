"""A user's own model and data as a scale, without editing config/scales/own.yaml: what `python -m mutor try` runs.

scale = own_scale(root, "HuggingFaceTB/SmolLM2-135M", {"train_file": "train.jsonl", "test_file": "test.jsonl"}, {})
table = own_table(root, ["mutor"])

Everything that is not given stays as the file says. No torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mutor.checks import choose
from mutor.config.load import load_scale, load_table, scale_content
from mutor.config.recipe import Recipe
from mutor.config.schema import ModelConfig, Row, Scale, Table
from mutor.registry import METHODS
from mutor.tasks.text import TextConfig

NAME = "own"  # of the scale and of its table
OF_SCALE = ("device", "threads", "memory_mb")
QUICK = {"steps": 4, "epochs": None, "log_every": 1, "save_every": 4, "eval_every": None}
ASKED = 8  # test problems of a quick pass


def own_scale(root: Path, model: str, files: Mapping[str, str], settings: Mapping[str, Any]) -> Scale:
    """The scale own with these in the place of what its file says.

    model: name on the hub, or a folder; files: train_file, test_file and, if there is one, valid_file; settings: of the
    recipe, the data, the model or the scale, by their names there, or METHOD.SETTING. Raises ValueError for a name that
    is none of these, and for a value that is not allowed.
    """
    content = scale_content(root, NAME)
    ours, data, recipe = (next(iter(content[part].values())) for part in ("models", "datasets", "recipes"))
    ours["pretrained"] = os.path.abspath(model) if os.path.exists(model) else model
    data["options"] |= {name: os.path.abspath(file) for name, file in files.items()}
    places: dict[str, dict[str, Any]] = dict.fromkeys(OF_SCALE, content)
    for config, place in ((ModelConfig, ours), (TextConfig, data["options"]), (Recipe, recipe)):
        places |= {field.name: place for field in fields(config)}
    for key, value in settings.items():
        method, dot, name = key.partition(".")
        if dot:
            data.setdefault("settings", {}).setdefault(choose(method, METHODS, "--set: method"), {})[name] = value
        else:
            places[choose(key, places, "--set")][key] = value
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in settings:
            recipe[other] = None
    if data["options"].get("compare") == "rouge":
        data["metrics"] = {"accuracy": "rougeL"}
    content["models"] = {_folder_name(model): ours}
    content["datasets"] = {_folder_name(files["train_file"], "train"): data}
    content["description"] = f"{model}, trained on {files['train_file']}, scored on {files['test_file']}"
    return load_scale(root, NAME, content)


def _folder_name(path: str, default: str = "model") -> str:
    """The last part of a path without its ending, as a name of a folder."""
    name = re.sub(r"\.(jsonl?|parquet|gguf)$", "", path.rstrip("/").rpartition("/")[2])
    return re.sub(r"[^\w.+-]", "-", name, flags=re.ASCII).strip(".") or default


def quick(scale: Scale) -> Scale:
    """The same with a few steps, a few problems and one seed: whether everything works, and how long it takes."""
    data = {
        name: replace(d, options={**d.options, "test_size": ASKED, **_fewer(d.options)})
        for name, d in scale.datasets.items()
    }
    recipes = {name: {**recipe, **QUICK} for name, recipe in scale.recipes.items()}
    return replace(scale, datasets=data, recipes=recipes, seeds=scale.seeds[:1])


def _fewer(options: Mapping[str, Any]) -> dict[str, int]:
    return {"valid_size": ASKED} if options.get("valid_file") else {}


def own_table(root: Path, methods: Sequence[str] | None) -> Table:
    """The table own, or of it the rows of some methods, with those that they are compared with.

    A method that has no row there gets one, compared with next_token. Raises ValueError for one that is not registered.
    """
    table = load_table(root, NAME)
    if not methods:
        return table
    rows = {row.label: row for row in table.rows}
    for method in methods:
        choose(method, METHODS, "--methods")
        if method not in {row.method for row in table.rows}:
            first = table.rows[0]
            rows[method] = Row(
                model=first.model, train_data=first.train_data, method=method, label=method, against=("next_token",)
            )
    wanted = [label for label, row in rows.items() if row.method in methods]
    for label in wanted:
        wanted += [other for other in rows[label].against if other not in wanted]
    return replace(table, rows=tuple(row for label, row in rows.items() if label in wanted))


def name_of(scale: Scale) -> str:
    """A folder's name for all that is tried of a model and data: their names, and a hash of what decides the numbers.

    Of files count their contents, of a model's folder the names, sizes and times of its files; seeds, methods and their
    settings do not count.
    """
    (model, config), (data, dataset) = next(iter(scale.models.items())), next(iter(scale.datasets.items()))
    options = {key: _state(key, value) for key, value in dataset.options.items()}
    decides = [_folder_state(str(config.pretrained)), config.revision, config.dtype, config.attention, options]
    text = json.dumps([*decides, scale.recipes[dataset.recipe]], sort_keys=True)
    return f"{model}-{data}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _state(key: str, value: Any) -> Any:
    if not key.endswith("_file"):
        return value
    if not os.path.isfile(value):
        raise ValueError(f"{value}: there is no such file")
    with open(value, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _folder_state(model: str) -> Any:
    if not os.path.isdir(model):
        return model
    files = sorted(file for file in Path(model).iterdir() if file.is_file())
    return [model, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]
