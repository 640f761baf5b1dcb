"""What to run: config.yaml, scales and tables, checked and expanded to runs, without importing torch.

    project = load_project(root, {"scale": "smoke"})
    scale = load_scale(root, project.scale)
    for cell in cells(load_table(root, "figure4"), scale): print(cell.spec.path)

A table names published roles (gemma-2b, star_graph); a scale says which model and dataset stand there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mutor.accounting import Shape
from mutor.checks import choose, from_mapping, not_default, setting
from mutor.cost import Smaller, load_cases
from mutor.models.build import ModelConfig
from mutor.recipe import Recipe
from mutor.registry import METHODS, TASKS, load

NOT_IN_MODEL = ("role", "stands_in_for", "recipe_changes")  # said of a model that do not make it another one
UNITS = {
    "loss": "nats", "log_likelihood": "nats", "precision": "fraction", "recall": "fraction", "fid": "score",
    "inception_score": "score", "classifier_fid": "score", "classifier_score": "score",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Project:
    """config/config.yaml."""

    scale: str = setting("laptop", doc="which file of config/scales to run")
    artifacts: tuple[str, ...] | None = setting(
        None, doc="files of config/tables wanted, instead of all that the scale names"
    )
    seeds: tuple[int, ...] | None = setting(None, doc="seeds of every run, instead of the scale's own", low=0)
    runs: str = setting("runs", doc="folder of the runs")
    results: str = setting("results", doc="folder of tables and figures")
    rerun_stale: bool = setting(False, doc="run again what was made by older code")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset of a scale, and the settings that each method is run with on it."""

    role: str = setting(doc="the published dataset whose place it takes")
    task: str = setting(doc="a registered task")
    options: dict = setting({}, doc="the task's own settings")
    recipe: str = setting(doc="a recipe of this scale")
    recipe_changes: dict = setting({}, doc="changes of the recipe for this dataset, the same for all methods")
    settings: dict = setting({}, doc="method -> its settings here; a list runs each")
    models: tuple[str, ...] | None = setting(
        None, doc="models that tables run here, instead of all that fill a row's role"
    )
    controls: bool = setting(True, doc="whether rows marked `control` run here")
    seeds: tuple[int, ...] | None = setting(None, doc="seeds here, instead of the scale's", low=0)
    base: str | None = setting(None, doc="a dataset that models are first trained on, next-token, seed by seed")
    base_seed: int | None = setting(None, doc="one base model of this seed for all seeds, instead of one each", low=0)
    stands_in_for: str = setting("", doc="what is said beside its results when it is not the published dataset")
    plan: dict = setting({}, doc="for `plan` before anything ran: examples, about, and tokens of one, at most")
    metrics: dict = setting({}, doc="a table's metric -> what is measured in its place")
    instead: dict = setting({}, doc="a setting's name -> a table's value of it -> the value here")
    iterations: int | None = setting(None, doc="published steps that the recipe's stand for", low=1)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A file of config/scales."""

    description: str = setting(doc="one line for people")
    device: str = setting("auto", doc="where runs take place", choices=("auto", "cpu", "cuda"))
    threads: int = setting(1, doc="CPU threads a process", low=1)
    gpus: int = setting(0, doc="GPUs a process", low=0)
    memory_mb: int = setting(2000, doc="memory a process is scheduled with", low=100)
    processes: dict = setting({}, doc="model -> processes that train it together, on one machine, with one's losses")
    sharded: tuple[str, ...] = setting(
        (), doc="models of several processes that hold a part of the weights each (FSDP2)"
    )
    minutes: int = setting(60, doc="longest time a run with its seeds is scheduled with", low=1)
    seeds: tuple[int, ...] = setting((42, 43, 44), doc="seeds of every run", low=0)
    max_seeds: dict = setting({}, doc="table -> only so many of the seeds for its rows")
    artifacts: tuple[str, ...] = setting(doc="the tables and figures of this scale, names of files in config/tables")
    models: dict = setting({}, doc="name -> model")
    datasets: dict = setting({}, doc="name -> dataset")
    recipes: dict = setting({}, doc="name -> recipe")
    plan: dict = setting({}, doc="for `plan` before anything ran: model -> parameters")
    cost: dict = setting({}, doc="how cases of cost tables are shrunk for the machine, see mutor/cost.py: Smaller")
    name: str = setting("", doc="the file's name")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Some cells of a table: a method on a model and dataset, by role."""

    model: str = setting(doc="role of the model")
    train_data: str | list = setting(doc="role of the training data; a list makes a row for each")
    method: str = setting(doc="a registered method")
    settings: dict = setting({}, doc="settings on top of the dataset's own for this method")
    label: str = setting("", doc="name in figures, by default the method's")
    control: bool = setting(False, doc="a control, run only on datasets with `controls`")
    longer: float = setting(1.0, doc="trained so many times longer than the dataset's recipe says", low=0)
    iterations: int | None = setting(None, doc="scored after so many of the published steps", low=1)
    max_seeds: int | None = setting(None, doc="only so many of the seeds, where the source has no more", low=1)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A file of config/tables: one table or figure."""

    title: str = setting(doc="title of the artifact")
    caption: str = setting(doc="what it shows; also the caption in reports")
    draw: str = setting(
        "table", doc="how it is drawn", choices=("table", "solve_rates", "sweep", "images", "flops", "settings", "cost")
    )
    metrics: tuple[str, ...] = setting(doc="metrics, one cell each")
    checkpoint: str = setting("last", doc="which checkpoint's numbers are shown", choices=("last", "best"))
    reported: tuple[str, ...] = setting((), doc="artifacts of config/reported.csv whose values stand beside")
    notes: tuple[str, ...] = setting((), doc="notes printed below")
    rows: tuple = setting(doc="the rows")
    over: str | None = setting(None, doc="with draw sweep: the setting on its axis", choices=("d_max", "a", None))
    without: float = setting(0.0, doc="with draw sweep: where methods without that setting stand")
    shapes: dict = setting({}, doc="with draw flops: role of a model -> widths of its layers")
    lengths: tuple[int, ...] = setting((), doc="with draw flops: sequence lengths", low=1)
    models: dict = setting({}, doc="with draw cost: role -> model of the published size, with random weights")
    sections: tuple = setting((), doc="with draw cost: groups of cases, see mutor/cost.py: Case")
    name: str = setting("", doc="the file's name")

    @property
    def needs_runs(self) -> bool:
        """Whether its numbers come from runs, not from configuration or arithmetic alone."""
        return self.draw not in ("flops", "settings", "cost")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One setting: everything that decides a run but its seed."""

    scale: str
    data: str
    model: str
    method: str
    settings: dict[str, Any]  # what differs from the method's defaults
    dataset: Dataset
    model_config: ModelConfig
    recipe: Recipe
    task_config: Any
    method_config: Any
    seeds: tuple[int, ...] = field(compare=False)
    longer: float = 1.0  # how many times longer than the dataset's recipe, which `recipe` has in it
    base: Spec | None = None  # what its model is trained by first, seed by seed or with `dataset.base_seed`
    processes: int = field(default=1, compare=False)  # how it is computed, which does not decide what comes out
    sharded: bool = field(default=False, compare=False)

    @property
    def path(self) -> str:
        """Folder below `runs`: scale/data/model/method/settings."""
        return "/".join([self.scale, self.data, self.model, self.method, self.name])

    @property
    def name(self) -> str:
        """The settings as a name: sorted key=value of what is not default, or `default`."""
        longer = {} if self.longer == 1 else {"longer": self.longer}
        return settings_name({**self.settings, **longer})

    def as_dict(self) -> dict[str, Any]:
        """Everything that decides the numbers, as plain values."""
        return {
            "task": self.dataset.task,
            "task_options": asdict(self.task_config),
            "model": {k: v for k, v in asdict(self.model_config).items() if k not in NOT_IN_MODEL},
            "method": self.method,
            "settings": asdict(self.method_config),
            "recipe": asdict(self.recipe),
            "base": self.base and self.base.as_dict(),
            "base_seed": self.dataset.base_seed,
        }

    def base_seed_of(self, seed: int) -> int:
        """The seed of the base model that a run of this seed starts from."""
        return seed if self.dataset.base_seed is None else self.dataset.base_seed

    @property
    def config_hash(self) -> str:
        """Hash of everything that differs from a default: runs with another one are another experiment.

        A setting added later, at its default, leaves it as it was.
        """
        model = {k: v for k, v in not_default(self.model_config).items() if k not in NOT_IN_MODEL}
        decides = [
            self.dataset.task, not_default(self.task_config), model, self.method, self.settings,
            not_default(self.recipe), self.base and self.base.config_hash,
            *([] if self.dataset.base_seed is None else [self.dataset.base_seed]),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def stands_in_for(self) -> str:
        """What to say beside a result that is not the published experiment; empty if it is."""
        return "; ".join(s for s in (self.model_config.stands_in_for, self.dataset.stands_in_for) if s)


@dataclass(frozen=True)
class Cell:
    """One number of a table: a run's metric, averaged over seeds."""

    row: Row
    spec: Spec
    metric: str  # as the table names it
    checkpoint: str  # which of a record's checkpoints: best, last, step<n>

    @property
    def measured(self) -> str:
        """The metric that is measured for it: another one where something stands in."""
        return self.spec.dataset.metrics.get(self.metric, self.metric)

    @property
    def iterations(self) -> int | None:
        """Steps after which it is scored, if the recipe counts steps."""
        return int(self.checkpoint[4:]) if self.checkpoint.startswith("step") else self.spec.recipe.steps

    @property
    def unit(self) -> str:
        """Rates are in percent, as published."""
        return UNITS.get(self.metric, "percent")


def settings_name(settings: Mapping[str, Any]) -> str:
    """Sorted key=value of what is not default, or `default`."""
    texts = {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in settings.items()}
    return ",".join(f"{k}={texts[k]}" for k in sorted(texts)) or "default"


def find_root(start: Path | None = None) -> Path:
    """The project's folder: the nearest one upwards, from here or from this file, that has config/config.yaml."""
    for base in (start or Path.cwd(), Path(__file__).parent):
        for folder in (base, *base.parents):
            if (folder / "config" / "config.yaml").exists():
                return folder
    raise ValueError("no config/config.yaml found in this folder or above it; call from the project's folder")


def read_yaml(file: Path) -> dict[str, Any]:
    """A file of settings; ValueError where it is not YAML or no mapping."""
    try:
        content = yaml.load(
            file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )  # libyaml's is ten times faster
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds {content!r}, expected a mapping of settings")
    return content


def load_project(root: Path, changes: Mapping[str, Any] | None = None) -> Project:
    """config/config.yaml with `changes` (what Snakemake's --config gives) on top."""
    changes = dict(changes or {})
    if isinstance(changes.get("artifacts"), str):
        changes["artifacts"] = [part for part in changes["artifacts"].split(",") if part]
    if isinstance(changes.get("seeds"), list):  # --config seeds=[1,2] arrives as texts
        changes["seeds"] = [int(s) if isinstance(s, str) and s.isdecimal() else s for s in changes["seeds"]]
    project = from_mapping(Project, {**read_yaml(root / "config/config.yaml"), **changes}, "config/config.yaml")
    choose(project.scale, scales(root), "scale")
    for name in project.artifacts or ():
        choose(str(name), tables(root), "artifacts")
    return project


def scales(root: Path) -> list[str]:
    """Names of the scales there are."""
    return sorted(file.stem for file in (root / "config/scales").glob("*.yaml"))


def tables(root: Path) -> list[str]:
    """Names of the tables and figures there are."""
    return sorted(file.stem for file in (root / "config/tables").glob("*.yaml"))


def load_scale(root: Path, name: str) -> Scale:
    """A scale with its models, datasets and recipes checked."""
    choose(name, scales(root), "scale")
    where = f"config/scales/{name}.yaml"
    scale = from_mapping(Scale, {**read_yaml(root / where), "name": name}, where)
    for artifact in scale.artifacts:
        choose(str(artifact), tables(root), f"{where}: artifacts")
    for key in scale.plan:
        choose(key, scale.models, f"{where}: plan")
    for name, allowed in (("max_seeds", tables(root)), ("processes", list(scale.models))):
        for key, value in getattr(scale, name).items():
            choose(key, allowed, f"{where}: {name}")
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{where}: {name}: {key}: {value!r} is not allowed; allowed: 1, 2, ...")
    for key in scale.sharded:
        choose(str(key), scale.models, f"{where}: sharded")
        if scale.processes.get(key, 1) == 1:
            raise ValueError(f"{where}: sharded: {key!r} has 1 process; allowed: models with 2 or more in `processes`")
    for key, value in scale.models.items():
        scale.models[key] = from_mapping(ModelConfig, value, f"{where}: models: {key}")
    for key in from_mapping(Smaller, scale.cost, f"{where}: cost").models.values():
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
            choose(about, ("examples", "tokens"), f"{here}: plan")
        scale.datasets[key] = dataset
    for dataset_name, dataset in scale.datasets.items():  # a wrong value is found even if no table asks for it
        if dataset.base is not None:
            base = choose(dataset.base, scale.datasets, f"{where}: datasets: {dataset_name}: base")
            if scale.datasets[base].base is not None:
                raise ValueError(
                    f"{where}: datasets: {dataset_name}: base: {base!r} has a base itself; allowed: one without"
                )
        _task_config(where, dataset_name, dataset)
        _recipe(where, scale, dataset_name)
        for asked, here in dataset.instead.items():
            if not isinstance(here, dict):
                raise ValueError(
                    f"{where}: datasets: {dataset_name}: instead: {asked}: {here!r} is not a mapping of values"
                )
        for method, variants in dataset.settings.items():
            for variant in variants if isinstance(variants, list) else [variants]:
                _method_config(f"{where}: datasets: {dataset_name}: settings: {method}", method, variant or {})
    _check_roles(root, scale, where)
    return scale


def _check_roles(root: Path, scale: Scale, where: str) -> None:
    """Raise ValueError for a role that no table asks for: misspelt, its cells would be left out without a word."""
    rows = [row for name in tables(root) for row in _parts(read_yaml(root / f"config/tables/{name}.yaml"), "rows")]
    data = [name for row in rows for name in _listed(row.get("train_data"))]
    bases = {dataset.base for dataset in scale.datasets.values()}
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
    choose(name, tables(root), "table")
    where = f"config/tables/{name}.yaml"
    table = from_mapping(Table, {**read_yaml(root / where), "name": name}, where)
    rows = []
    for number, given in enumerate(table.rows, start=1):
        row = from_mapping(Row, given, f"{where}: row {number}")
        choose(row.method, METHODS, f"{where}: row {number}: method")
        data = row.train_data if isinstance(row.train_data, list) else [row.train_data]
        rows += [replace(row, train_data=name) for name in data]
    shapes = {role: from_mapping(Shape, shape, f"{where}: shapes: {role}") for role, shape in table.shapes.items()}
    models = {
        role: from_mapping(ModelConfig, model, f"{where}: models: {role}") for role, model in table.models.items()
    }
    load_cases(table.sections, where)
    return replace(table, rows=tuple(rows), shapes=shapes, models=models)


def _task_config(where: str, name: str, dataset: Dataset) -> Any:
    task = load(TASKS, dataset.task, f"{where}: datasets: {name}: task")
    return from_mapping(task.Config, dataset.options, f"{where}: datasets: {name}: options")


def _recipe(where: str, scale: Scale, name: str, model: str | None = None, longer: float = 1.0) -> Recipe:
    dataset = scale.datasets[name]
    own = scale.models[model].recipe_changes if model else {}
    given = scale.recipes[dataset.recipe] or {}
    if not isinstance(given, dict):
        raise ValueError(f"{where}: recipes: {dataset.recipe}: {given!r} is not a mapping of settings")
    values = {**given, **dataset.recipe_changes, **own}
    recipe = from_mapping(Recipe, values, f"{where}: recipes: {dataset.recipe} (for {name})")
    if recipe.epochs is not None:
        return replace(recipe, epochs=round(recipe.epochs * longer, 3))
    return replace(recipe, steps=round((recipe.steps or 0) * longer))


def _method_config(where: str, method: str, settings: Mapping[str, Any]) -> Any:
    return from_mapping(load(METHODS, method, where).Config, settings, where)


def make_spec(
    scale: Scale, data: str, model: str, method: str, settings: Mapping[str, Any],
    seeds: tuple[int, ...] | None = None, longer: float = 1.0,
) -> Spec:  # fmt: skip
    """One setting of a scale, by the names of its dataset and model, checked."""
    where = f"config/scales/{scale.name}.yaml"
    dataset = scale.datasets[choose(data, scale.datasets, f"{where}: dataset")]
    model_config = scale.models[choose(model, scale.models, f"{where}: model")]
    config = _method_config(f"{data}: {method}", method, settings)
    task_config = _task_config(where, data, dataset)
    load(TASKS, dataset.task, where).check_settings(task_config, config, f"{data}: {method}")
    chosen = next(s for s in (seeds, dataset.seeds, scale.seeds) if s is not None)
    if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0:
        raise ValueError(
            f"{where}: {data}: seeds: {list(chosen)} is not allowed; allowed: one or more, different, from 0"
        )
    recipe = _recipe(where, scale, data, model, longer)
    _check_processes(where, scale, model, recipe, method)
    base = None
    if dataset.base is not None:
        if model_config.pretrained is not None:
            raise ValueError(f"{where}: datasets: {data}: base: {dataset.base!r} is for models built from scratch")
        base_seeds = chosen if dataset.base_seed is None else (dataset.base_seed,)
        base = make_spec(scale, dataset.base, model, "next_token", {}, base_seeds)
    return Spec(
        scale=scale.name, data=data, model=model, method=method, settings=not_default(config), dataset=dataset,
        model_config=model_config, recipe=recipe, task_config=task_config, method_config=config, seeds=chosen,
        longer=float(longer), base=base, processes=scale.processes.get(model, 1), sharded=model in scale.sharded,
    )  # fmt: skip


def _check_processes(where: str, scale: Scale, model: str, recipe: Recipe, method: str) -> None:
    """Raise ValueError for a setting that the model's processes can't train together."""
    count = scale.processes.get(model, 1)
    if recipe.accumulate % count:
        raise ValueError(
            f"{where}: processes: {model}: {count} can't share the parts of a batch equally, accumulate: "
            f"{recipe.accumulate}; allowed: numbers that divide it"
        )
    if model in scale.sharded:
        allowed = (
            ("optimizer", recipe.optimizer, ("adamw",)),
            ("dtype", scale.models[model].dtype, ("float32", "bfloat16")),
            ("method", method, tuple(name for name in METHODS if load(METHODS, name, where).shardable)),
        )
        for key, value, fine in allowed:
            if value not in fine:
                raise ValueError(f"{where}: sharded: {model}: {key}: {value!r} can't be; allowed: {', '.join(fine)}")


def cells(table: Table, scale: Scale, seeds: tuple[int, ...] | None = None) -> list[Cell]:
    """All cells of a table at a scale, in the table's order: rows, then datasets, then variants, then metrics.

    A row whose roles the scale does not fill has no cells there.
    """
    out = []
    for row in table.rows:
        limits = [n for n in (row.max_seeds, scale.max_seeds.get(table.name)) if n is not None]
        row = replace(row, max_seeds=min(limits, default=None))
        for data, dataset in scale.datasets.items():
            if dataset.role != row.train_data or (row.control and not dataset.controls):
                continue
            for model, model_config in scale.models.items():
                if model_config.role != row.model or (dataset.models is not None and model not in dataset.models):
                    continue
                variants = dataset.settings.get(row.method) or {}
                for variant in variants if isinstance(variants, list) else [variants]:
                    settings = {**variant, **row.settings}
                    for key in settings.keys() & dataset.instead.keys():
                        settings[key] = dataset.instead[key].get(settings[key], settings[key])
                    spec = make_spec(scale, data, model, row.method, settings, seeds, row.longer)
                    spec = replace(spec, seeds=spec.seeds[: row.max_seeds])
                    checkpoint = _checkpoint(f"{table.name}, {data}", table, row, spec)
                    out += [Cell(row, spec, metric, checkpoint) for metric in table.metrics]
    return out


def _checkpoint(where: str, table: Table, row: Row, spec: Spec) -> str:
    """Which checkpoint a row shows: the table's, or the one after as large a share of the published steps."""
    if row.iterations is None:
        return table.checkpoint
    if spec.dataset.iterations is None or spec.recipe.steps is None:
        raise ValueError(f"{where}: iterations: {row.iterations} needs the dataset's iterations and a recipe in steps")
    share = row.iterations / (spec.dataset.iterations * row.longer)
    step = round(share * spec.recipe.steps)
    if abs(share - 1) < 0.01:
        return "last"
    if step not in spec.recipe.keep:
        raise ValueError(f"{where}: iterations: {row.iterations} are {step} steps here; kept: {spec.recipe.keep}")
    return f"step{step}"


def run_cells(table: Table, scale: Scale, seeds: tuple[int, ...] | None = None) -> list[Cell]:
    """The cells of a table that runs have to fill."""
    return cells(table, scale, seeds) if table.needs_runs else []


def specs(all_cells: list[Cell]) -> list[Spec]:
    """The settings that cells need, each once with all seeds that any cell needs, base models first."""
    found: dict[str, Spec] = {}
    for spec in [*(c.spec.base for c in all_cells if c.spec.base), *(c.spec for c in all_cells)]:
        before = found[spec.path].seeds if spec.path in found else ()
        found[spec.path] = replace(spec, seeds=tuple(dict.fromkeys((*before, *spec.seeds))))
    return list(found.values())
