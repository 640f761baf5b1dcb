"""Tables and scales expanded to runs: a table names published roles, a scale says what runs in their place."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from mutor.checks import choose, from_mapping, not_default
from mutor.config.recipe import Recipe
from mutor.config.schema import NOT_IN_MODEL, Base, Dataset, ModelConfig, Row, Scale, Table
from mutor.registry import METHODS, TASKS, load

UNITS = {
    "loss": "nats",
    "log_likelihood": "nats",
    "precision": "fraction",
    "recall": "fraction",
    "fid": "score",
    "inception_score": "score",
    "classifier_fid": "score",
    "classifier_score": "score",
    "acceptance_length": "tokens",
    "passes_per_token": "passes",
    "flops_per_token": "1e6 FLOP",
    "speedup": "times",
}


def possible(unit: str) -> tuple[float, float]:
    """The range of a metric in this unit: no interval goes beyond. Log-likelihoods, in nats, have any sign."""
    return {"percent": (0.0, 100.0), "fraction": (0.0, 1.0), "nats": (-math.inf, math.inf)}.get(unit, (0.0, math.inf))


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
    budget_factor: float = 1.0  # how many times longer than the dataset's recipe, which `recipe` has in it
    base: Spec | None = None  # what its model is trained by first
    base_seed: int | None = None  # one base of this seed for all seeds; None: seed by seed
    processes: int = field(default=1, compare=False)  # how it is computed, which does not decide what comes out
    sharded: bool = field(default=False, compare=False)

    @property
    def path(self) -> str:
        """Folder below `runs`: scale/data/model/method/settings."""
        return "/".join([self.scale, self.data, self.model, self.method, self.name])

    @property
    def name(self) -> str:
        """The settings as a name: sorted key=value of what is not default, or `default`."""
        budget_factor = {} if self.budget_factor == 1 else {"budget_factor": self.budget_factor}
        return settings_name({**self.settings, **budget_factor})

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
            "base_seed": self.base_seed,
        }

    def base_seed_of(self, seed: int) -> int:
        """The seed of the base model that a run of this seed starts from."""
        return seed if self.base_seed is None else self.base_seed

    @property
    def config_hash(self) -> str:
        """Hash of everything that differs from a default: runs with another one are another experiment.

        A setting added later, at its default, leaves it as it was.
        """
        model = {k: v for k, v in not_default(self.model_config).items() if k not in NOT_IN_MODEL}
        decides = [
            self.dataset.task,
            not_default(self.task_config),
            model,
            self.method,
            self.settings,
            not_default(self.recipe),
            self.base and self.base.config_hash,
            *([] if self.base_seed is None else [self.base_seed]),
        ]
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
        """Rates are in percent, as published; k tokens ahead, or with k drafts, a metric has the unit without."""
        return UNITS.get(self.metric.partition("_ahead_")[0].partition("_draft_")[0], "percent")

    @property
    def solved_at(self) -> float | None:
        """The rate from which a seed counts as solved, where the task's seeds are counted."""
        solved_at: float | None = load(TASKS, self.spec.dataset.task, "task").solved_at
        return solved_at if self.unit == "percent" else None


def settings_name(settings: Mapping[str, Any]) -> str:
    """Sorted key=value of what is not default, or `default`."""
    texts = {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in settings.items()}
    return ",".join(f"{k}={texts[k]}" for k in sorted(texts)) or "default"


def _task_config(where: str, name: str, dataset: Dataset) -> Any:
    task = load(TASKS, dataset.task, f"{where}: datasets: {name}: task")
    return from_mapping(task.Config, dataset.options, f"{where}: datasets: {name}: options")


def _recipe(where: str, scale: Scale, name: str, model: str | None = None, budget_factor: float = 1.0) -> Recipe:
    dataset = scale.datasets[name]
    own = scale.models[model].recipe_changes if model else {}
    given = scale.recipes[dataset.recipe] or {}
    if not isinstance(given, dict):
        raise ValueError(f"{where}: recipes: {dataset.recipe}: {given!r} is not a mapping of settings")
    values = {**given, **dataset.recipe_changes, **own}
    recipe = from_mapping(Recipe, values, f"{where}: recipes: {dataset.recipe} (for {name})")
    if recipe.epochs is not None:
        changed = replace(recipe, epochs=round(recipe.epochs * budget_factor, 3))
    else:
        changed = replace(recipe, steps=round((recipe.steps or 0) * budget_factor))
    if budget_factor and recipe.trains and not changed.trains:
        raise ValueError(f"{where}: budget_factor: {budget_factor} of the recipe for {name} leaves no step")
    return changed


def _method_config(where: str, method: str, settings: Mapping[str, Any]) -> Any:
    return from_mapping(load(METHODS, method, where).Config, settings, where)


def make_spec(
    scale: Scale,
    data: str,
    model: str,
    method: str,
    settings: Mapping[str, Any],
    seeds: tuple[int, ...] | None = None,
    budget_factor: float = 1.0,
) -> Spec:
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
    recipe = _recipe(where, scale, data, model, budget_factor)
    if recipe.stop_at is not None and not load(TASKS, dataset.task, where).chosen_on(task_config):
        raise ValueError(f"{where}: {data}: stop_at: {recipe.stop_at} is never reached: nothing is validated")
    _check_processes(where, scale, model, recipe, load(METHODS, method, where)(config).trunk_settings.trunk)
    base, base_seed = _base(where, scale, data, model, chosen)
    return Spec(
        scale=scale.name,
        data=data,
        model=model,
        method=method,
        settings=not_default(config),
        dataset=dataset,
        model_config=model_config,
        recipe=recipe,
        task_config=task_config,
        method_config=config,
        seeds=chosen,
        budget_factor=float(budget_factor),
        base=base,
        base_seed=base_seed,
        processes=scale.processes.get(model, 1),
        sharded=model in scale.sharded,
    )


def base_of(where: str, name: str, dataset: Dataset) -> Base | None:
    """What a dataset says of the run that its runs start from; a name alone is a dataset's."""
    given = {"data": dataset.base} if isinstance(dataset.base, str) else dataset.base
    return None if given is None else from_mapping(Base, given, f"{where}: datasets: {name}: base")


def _base(where: str, scale: Scale, data: str, model: str, seeds: tuple[int, ...]) -> tuple[Spec | None, int | None]:
    """The run that those of a dataset and model start from, and its seed if it is one for all."""
    base = base_of(where, data, scale.datasets[data])
    if base is None:
        return None, None
    here = f"{where}: datasets: {data}: base"
    theirs = choose(base.model or model, scale.models, f"{here}: model")
    ours, other = scale.models[model], scale.models[theirs]
    for name in ("architecture", "config", "pretrained", "revision"):
        if getattr(ours, name) != getattr(other, name):
            raise ValueError(
                f"{here}: model: {theirs!r} is not {model!r}, its {name} differs; allowed: the same network"
            )
    spec = make_spec(scale, base.data, theirs, base.method, base.settings, seeds if base.seed is None else (base.seed,))
    return spec, base.seed


def _check_processes(where: str, scale: Scale, model: str, recipe: Recipe, trunk: str) -> None:
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
            ("trunk", trunk, ("trained", "frozen")),  # adapters are merged into whole weights
        )
        for key, value, fine in allowed:
            if value not in fine:
                raise ValueError(f"{where}: sharded: {model}: {key}: {value!r} can't be; allowed: {', '.join(fine)}")


def cells_of(table: Table, scale: Scale, seeds: tuple[int, ...] | None = None) -> list[Cell]:
    """All cells of a table at a scale, in the table's order: rows, then datasets, then variants, then metrics.

    A row whose roles the scale does not fill, or to which it gives no seed, has no cells there.
    """
    out = []
    for row in table.rows:
        limits = [n for n in (row.max_seeds, _most_seeds(scale, table, row)) if n is not None]
        row = replace(row, max_seeds=min(limits, default=None))
        if row.max_seeds == 0:
            continue
        for data, dataset in scale.datasets.items():
            if dataset.role != row.train_data or (row.control and not dataset.controls):
                continue
            for model, model_config in scale.models.items():
                if model_config.role != row.model or (dataset.models is not None and model not in dataset.models):
                    continue
                variants = dataset.settings.get(row.method)
                for variant in variants if isinstance(variants, list) else [variants]:
                    settings = {**(variant or {}), **row.settings}
                    for key in settings.keys() & dataset.setting_substitutes.keys():
                        settings[key] = dataset.setting_substitutes[key].get(settings[key], settings[key])
                    spec = make_spec(scale, data, model, row.method, settings, seeds, row.budget_factor)
                    spec = replace(spec, seeds=spec.seeds[: row.max_seeds])
                    checkpoint = _checkpoint(f"{table.name}, {data}", table, row, spec)
                    out += [Cell(row, spec, metric, checkpoint) for metric in table.metrics]
    return out


def _most_seeds(scale: Scale, table: Table, row: Row) -> int | None:
    """How many seeds a scale gives a row: the table's number, or the one at the row's label or method, or at others.

    One where nothing is concluded.
    """
    given = scale.max_seeds.get(table.name, 1 if table.name in scale.path_only else None)
    return given.get(row.label or row.method, given.get("others")) if isinstance(given, dict) else given


def _checkpoint(where: str, table: Table, row: Row, spec: Spec) -> str:
    """Which checkpoint a row shows: the table's, or the one after as large a share of the published steps."""
    if row.iterations is None:
        return table.checkpoint
    if spec.dataset.iterations is None or spec.recipe.steps is None:
        raise ValueError(f"{where}: iterations: {row.iterations} needs the dataset's iterations and a recipe in steps")
    share = row.iterations / (spec.dataset.iterations * row.budget_factor)
    step = round(share * spec.recipe.steps)
    if abs(share - 1) < 0.01:
        return "last"
    if step not in spec.recipe.keep_steps:
        raise ValueError(f"{where}: iterations: {row.iterations} are {step} steps here; kept: {spec.recipe.keep_steps}")
    return f"step{step}"


def run_cells(table: Table, scale: Scale, seeds: tuple[int, ...] | None = None) -> list[Cell]:
    """The cells of a table that runs have to fill; not those of a model whose packages are not installed."""
    cells = cells_of(table, scale, seeds) if table.needs_runs else []
    return [cell for cell in cells if all(map(find_spec, cell.spec.model_config.needs))]


def specs_of(all_cells: list[Cell]) -> list[Spec]:
    """The settings that cells need, each once with all seeds that any cell needs, what others start from first."""
    found: dict[str, Spec] = {}
    levels = [[c.spec for c in all_cells]]
    while bases := [spec.base for spec in levels[-1] if spec.base]:
        levels.append(bases)
    for spec in [spec for level in reversed(levels) for spec in level]:
        before = found[spec.path].seeds if spec.path in found else ()
        found[spec.path] = replace(spec, seeds=tuple(dict.fromkeys((*before, *spec.seeds))))
    return list(found.values())
