"""What to run: config.yaml, scales and tables, checked and expanded to runs, without importing torch.

    project = load_project(root, {"scale": "smoke"})
    scale = load_scale(root, project.scale)
    for cell in cells_of(load_table(root, "figure4"), scale): print(cell.spec.path)

A table names published roles (gemma-2b, star_graph); a scale says which model and dataset stand there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from mutor.checks import choose, from_mapping
from mutor.config.cost_cases import CostScaling, load_cases
from mutor.config.runs import _method_config, _recipe, _task_config, base_of
from mutor.config.schema import Dataset, ModelConfig, Project, Row, Scale, Shape, Table
from mutor.files import read_text
from mutor.registry import METHODS

CODE = Path(__file__).parents[2]  # the folder that has the package: a checkout, or where packages are installed
INSTALLED = CODE / "mutor/project"  # what a wheel has of config/


def find_root(start: Path | None = None) -> Path:
    """The project's folder, of config/, runs and results: the nearest one upwards, or the checkout of this file.

    Without any, the folder itself, where an installed package brings its own config/.
    """
    here = start or Path.cwd()
    for folder in (here, *here.parents, CODE):
        if (folder / "config/config.yaml").exists() and (folder / "config/scales").is_dir():
            return folder
    if not INSTALLED.is_dir():
        raise ValueError("no config/config.yaml found in this folder or above it; call from the project's folder")
    return here


def config_folder(root: Path) -> Path:
    """The folder of config.yaml, scales, tables, claims and published values: the project's, or the installed one."""
    return root / "config" if (root / "config/config.yaml").exists() else INSTALLED


_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times faster


class _Loader(_Safe):
    """Safe, and without a word on which of two equal keys counts: it refuses them."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            line = [key for key, _ in node.value if key.value == twice][1].start_mark.line + 1
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice, again in line {line}")
        return dict(super().construct_mapping(node, deep))


def read_yaml(file: Path) -> dict[str, Any]:
    """A file of settings; ValueError where it is not YAML, no mapping, or has a key twice."""
    text = read_text(file)
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds {content!r}, expected a mapping of settings")
    return content


def read_config(root: Path, name: str) -> dict[str, Any]:
    """A file of the configuration: "config.yaml", "claims.yaml", "scales/own.yaml", "tables/own.yaml", ..."""
    return read_yaml(config_folder(root) / name)


def load_project(root: Path, changes: Mapping[str, Any] | None = None) -> Project:
    """config/config.yaml with `changes` (what Snakemake's --config gives) on top."""
    changes = dict(changes or {})
    if isinstance(changes.get("artifacts"), str):
        changes["artifacts"] = [part for part in changes["artifacts"].split(",") if part]
    if isinstance(changes.get("seeds"), list):  # --config seeds=[1,2] arrives as texts
        changes["seeds"] = [int(s) if isinstance(s, str) and s.isdecimal() else s for s in changes["seeds"]]
    if changes.get("rerun_stale") in ("true", "false"):  # so do these words
        changes["rerun_stale"] = changes["rerun_stale"] == "true"
    content = read_config(root, "config.yaml")
    for values in (content, {**content, **changes}):  # what the file says is checked, too, where something replaces it
        if values.get("results") is None:
            values = {**values, "results": results_folder(root, values.get("scale", Project.scale))}
        project = from_mapping(Project, values, "config/config.yaml")
    choose(project.scale, scale_names(root), "scale")
    for name in project.artifacts or ():
        choose(str(name), table_names(root), "artifacts")
    return project


def results_folder(root: Path, scale: str) -> str:
    """Where a scale's tables and figures stand: results, or results/<scale> where config.yaml names another scale."""
    own = read_config(root, "config.yaml").get("scale", Project.scale)
    return "results" if scale == own else f"results/{scale}"


def scale_names(root: Path) -> list[str]:
    """Names of the scales there are."""
    return sorted(file.stem for file in (config_folder(root) / "scales").glob("*.yaml"))


def table_names(root: Path) -> list[str]:
    """Names of the tables and figures there are."""
    return sorted(file.stem for file in (config_folder(root) / "tables").glob("*.yaml"))


def scale_content(root: Path, name: str) -> dict[str, Any]:
    """A file of config/scales as it is written."""
    return read_config(root, f"scales/{choose(name, scale_names(root), 'scale')}.yaml")


def load_scale(root: Path, name: str, content: Mapping[str, Any] | None = None) -> Scale:
    """A scale with its models, datasets and recipes checked; content: what stands in the place of its file's."""
    where = f"config/scales/{name}.yaml"
    scale = from_mapping(Scale, {**(content or scale_content(root, name)), "name": name}, where)
    for key in ("artifacts", "path_only"):
        for artifact in getattr(scale, key):
            choose(str(artifact), table_names(root), f"{where}: {key}")
    for key in scale.plan:
        choose(key, scale.models, f"{where}: plan")
    for name, allowed in (("max_seeds", table_names(root)), ("processes", list(scale.models))):
        for key, value in getattr(scale, name).items():
            choose(key, allowed, f"{where}: {name}")
            numbers = value if name == "max_seeds" and isinstance(value, dict) else {"": value}
            labels = _labels(root, key) if "" not in numbers else [""]
            for label, number in numbers.items():
                choose(label, labels, f"{where}: {name}: {key}")
                here = f"{where}: {name}: {key}{': ' * bool(label)}{label}"
                least = 0 if label else 1
                if not isinstance(number, int) or isinstance(number, bool) or number < least:
                    raise ValueError(f"{here}: {number!r} is not allowed; allowed: {least}, {least + 1}, ...")
    for key in scale.sharded:
        choose(str(key), scale.models, f"{where}: sharded")
        if scale.processes.get(key, 1) == 1:
            raise ValueError(f"{where}: sharded: {key!r} has 1 process; allowed: models with 2 or more in `processes`")
    for kind, named in (("models", scale.models), ("datasets", scale.datasets)):
        for key in named:
            if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", str(key), re.ASCII):
                raise ValueError(
                    f"{where}: {kind}: {key!r} is no name of a folder; allowed: letters, digits and _ . + -"
                )
    for key, value in scale.models.items():
        scale.models[key] = from_mapping(ModelConfig, value, f"{where}: models: {key}")
    for key in from_mapping(CostScaling, scale.cost, f"{where}: cost").models.values():
        choose(key, scale.models, f"{where}: cost: models")
    for key, value in scale.datasets.items():
        dataset = from_mapping(Dataset, value, f"{where}: datasets: {key}")
        here = f"{where}: datasets: {key}"
        choose(dataset.recipe, scale.recipes, f"{here}: recipe")
        for method in dataset.settings:
            choose(method, METHODS, f"{here}: settings")
        for model in dataset.models or ():
            choose(str(model), scale.models, f"{here}: models")
        for about in dataset.plan:
            choose(about, ("examples", "tokens", "problems"), f"{here}: plan")
        scale.datasets[key] = dataset
    for dataset_name, dataset in scale.datasets.items():  # a wrong value is found even if no table asks for it
        _check_base(where, scale, dataset_name)
        _task_config(where, dataset_name, dataset)
        _recipe(where, scale, dataset_name)
        for asked, here in dataset.setting_substitutes.items():
            if not isinstance(here, dict):
                raise ValueError(
                    f"{where}: datasets: {dataset_name}: setting_substitutes: {asked}: {here!r} is not a mapping of "
                    "values"
                )
        for method, variants in dataset.settings.items():
            for variant in variants if isinstance(variants, list) else [variants]:
                _method_config(f"{where}: datasets: {dataset_name}: settings: {method}", method, variant or {})
    _check_roles(root, scale, where)
    return scale


def _labels(root: Path, table: str) -> list[str]:
    """What `max_seeds` may name of a table: the labels of its rows, the methods of those without, and others."""
    rows = _parts(read_config(root, f"tables/{table}.yaml"), "rows")
    return ["others", *(str(row.get("label") or row.get("method")) for row in rows)]


def _check_base(where: str, scale: Scale, name: str) -> None:
    """Raise ValueError for what a dataset's base asks for and is not there, and for bases in a circle."""
    chain = [name]
    while base := base_of(where, chain[-1], scale.datasets[chain[-1]]):
        here = f"{where}: datasets: {chain[-1]}: base"
        chain.append(choose(base.data, scale.datasets, f"{here}: data"))
        if base.model is not None:
            choose(base.model, scale.models, f"{here}: model")
        choose(base.method, METHODS, f"{here}: method")
        _method_config(f"{here}: settings", base.method, base.settings)
        if chain[-1] in chain[:-1]:
            raise ValueError(f"{here}: {' -> '.join(chain)} is a circle; allowed: bases that end in one without")


def _check_roles(root: Path, scale: Scale, where: str) -> None:
    """Raise ValueError for a role that no table asks for: misspelt, its cells would be left out without a word."""
    rows = [row for name in table_names(root) for row in _parts(read_config(root, f"tables/{name}.yaml"), "rows")]
    data = [name for row in rows for name in _listed(row.get("train_data"))]
    found = [base_of(where, name, dataset) for name, dataset in scale.datasets.items()]
    bases = {base.data for base in found if base}
    for kind, parts, asked in (
        ("models", scale.models, [row.get("model") for row in rows]),
        ("datasets", scale.datasets, data),
    ):
        for key, part in parts.items():
            if key not in bases:
                choose(part.role, set(map(str, asked)), f"{where}: {kind}: {key}: role (one of a row of config/tables)")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _parts(content: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The mappings that a file holds under a key; what else is there is refused where the file itself is checked."""
    found = content.get(key)
    listed = list(found.values()) if isinstance(found, Mapping) else found if isinstance(found, list) else []
    return [part for part in listed if isinstance(part, Mapping)]


def load_table(root: Path, name: str) -> Table:
    """A table with its rows checked."""
    choose(name, table_names(root), "table")
    where = f"config/tables/{name}.yaml"
    table = from_mapping(Table, {**read_config(root, f"tables/{name}.yaml"), "name": name}, where)
    rows = []
    for number, given in enumerate(table.rows, start=1):
        row = from_mapping(Row, given, f"{where}: row {number}")
        choose(row.method, METHODS, f"{where}: row {number}: method")
        data = row.train_data if isinstance(row.train_data, list) else [row.train_data]
        rows += [replace(row, train_data=name) for name in data]
    for row in rows:
        for label in row.against:
            choose(label, [other.label for other in rows], f"{where}: row {row.label!r}: against")
    shapes = {role: from_mapping(Shape, shape, f"{where}: shapes: {role}") for role, shape in table.shapes.items()}
    models = {
        role: from_mapping(ModelConfig, model, f"{where}: models: {role}") for role, model in table.models.items()
    }
    load_cases(table.sections, where)
    return replace(table, rows=tuple(rows), shapes=shapes, models=models)
