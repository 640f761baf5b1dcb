"""What users write in config/, as checked dataclasses: project, scales with models and datasets, tables. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mutor.checks import choose, setting
from mutor.registry import ATTENTION, AUTO, DRAWINGS, Drawing

NOT_IN_MODEL = ("role", "stands_in_for", "recipe_changes", "needs")  # fields that do not change what is trained


@dataclass(frozen=True, kw_only=True)
class Project:
    """config/config.yaml."""

    scale: str = setting("laptop", doc="which file of config/scales to run")
    artifacts: tuple[str, ...] | None = setting(
        None, doc="files of config/tables wanted, instead of all that the scale names"
    )
    seeds: tuple[int, ...] | None = setting(None, doc="seeds of every run, instead of the scale's own", low=0)
    runs: str = setting("runs", doc="folder of the runs")
    results: str = setting(doc="folder of tables and figures; by default that of the scale, `results_folder`")
    rerun_stale: bool = setting(False, doc="run again what was made by older code")
    processes_per_node: int | None = setting(
        None, doc="on a SLURM cluster: models of more processes are spread over nodes, by srun; none: one node", low=1
    )

    def __post_init__(self) -> None:
        for name in ("runs", "results"):
            folder = getattr(self, name)
            if not folder or re.search(r"[{}\n\0]", folder):
                raise ValueError(f"{name}: {folder!r} is not allowed; allowed: a folder without braces in its name")
            if folder.startswith("~"):
                raise ValueError(f"{name}: {folder!r} begins with ~, which only a shell knows; write out the folder")


@dataclass(frozen=True, kw_only=True)
class Base:
    """The run from whose last model the runs on a dataset start."""

    data: str = setting(doc="the dataset it is trained on, one of this scale")
    model: str | None = setting(None, doc="its model, one of this scale; none: the run's own")
    method: str = setting("next_token", doc="the method it is trained by")
    settings: dict = setting({}, doc="settings of that method")
    seed: int | None = setting(None, doc="one base of this seed for all seeds, instead of one each", low=0)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset of a scale, and the settings that each method is run with on it."""

    role: str = setting(doc="the published dataset whose place it takes")
    task: str = setting(doc="a registered task")
    options: dict = setting({}, doc="the task's own settings")
    recipe: str = setting(doc="a recipe of this scale")
    recipe_changes: dict = setting({}, doc="changes of the recipe for this dataset, the same for all methods")
    settings: dict = setting({}, doc="method -> its settings here; a list runs each, an empty one none")
    models: tuple[str, ...] | None = setting(
        None, doc="models that tables run here, instead of all that fill a row's role"
    )
    controls: bool = setting(True, doc="whether rows marked `control` run here")
    seeds: tuple[int, ...] | None = setting(None, doc="seeds here, instead of the scale's", low=0)
    base: str | dict | None = setting(
        None,
        was="base_seed",
        doc="what models are trained by first: a dataset, or a mapping of data, model, method, settings, seed",
    )
    stands_in_for: str = setting("", doc="what is said beside its results when it is not the published dataset")
    plan: dict = setting(
        {}, doc="for `plan` before anything ran: examples, about, tokens of one, at most, and test problems"
    )
    metrics: dict = setting(
        {}, doc="a table's metric -> what is measured in its place; no published values stand beside such data's"
    )
    setting_substitutes: dict = setting(
        {}, was="instead", doc="a setting's name -> a table's value of it -> the value here"
    )
    iterations: int | None = setting(None, doc="the published steps that this recipe's steps represent", low=1)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A file of config/scales."""

    description: str = setting(doc="one line for people")
    device: str = setting("auto", doc="where runs take place", choices=("auto", "cpu", "cuda"))
    threads: int = setting(1, doc="CPU threads a process", low=1)
    gpus: int = setting(0, doc="GPUs a process", low=0)
    memory_mb: int = setting(2000, doc="memory a process is scheduled with", low=100)
    processes: dict = setting(
        {},
        doc="model -> processes that train it together, on one machine or several; losses equal those of one process",
    )
    sharded: tuple[str, ...] = setting(
        (), doc="models of several processes that hold a part of the weights each (FSDP2)"
    )
    minutes: int = setting(60, doc="longest time a run with its seeds is scheduled with", low=1)
    seeds: tuple[int, ...] = setting((42, 43, 44), doc="seeds of every run", low=0)
    max_seeds: dict = setting(
        {},
        doc="table -> only so many of the seeds for its rows, or a mapping: label of a row, or others -> so many; "
        "0: the scale does without the row",
    )
    path_only: tuple[str, ...] = setting(
        (),
        doc="tables that show only that every step works, from prompt to cell: nothing is concluded from them, "
        "and one seed does where max_seeds says no more",
    )
    artifacts: tuple[str, ...] = setting(doc="the tables and figures of this scale, names of files in config/tables")
    models: dict = setting({}, doc="name -> model")
    datasets: dict = setting({}, doc="name -> dataset")
    recipes: dict = setting({}, doc="name -> recipe")
    plan: dict = setting({}, doc="for `plan` before anything ran: model -> parameters")
    cost: dict = setting({}, doc="how cases of cost tables are shrunk, see mutor/config/cost_cases.py")
    name: str = setting("", doc="the file's name")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Some cells of a table: a method on a model and dataset, by role."""

    model: str = setting(doc="role of the model")
    train_data: str | list = setting(doc="role of the training data; a list makes a row for each")
    method: str = setting(doc="a registered method")
    settings: dict = setting({}, doc="settings on top of the dataset's own for this method")
    label: str = setting("", doc="name in figures, by default the method's")
    against: tuple[str, ...] = setting(
        (), doc="with draw verdict: labels of rows that it is compared with, on the same problems; the first decides"
    )
    control: bool = setting(False, doc="a control, run only on datasets with `controls`")
    budget_factor: float = setting(
        1.0, was="longer", doc="trained so many times longer than the dataset's recipe says", low=0
    )
    iterations: int | None = setting(None, doc="scored after so many of the published steps", low=1)
    max_seeds: int | None = setting(None, doc="only so many of the seeds, where the source has no more", low=1)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A file of config/tables: one table or figure."""

    title: str = setting(doc="title of the artifact")
    caption: str = setting(doc="what it shows; also the caption in reports")
    draw: str = setting("table", doc="how it is drawn, one of DRAWINGS in mutor/registry.py")
    metrics: tuple[str, ...] = setting(doc="metrics, one cell each")
    checkpoint: str = setting("last", doc="which checkpoint's numbers are shown", choices=("last", "best"))
    reported: tuple[str, ...] = setting((), doc="artifacts of config/reported.csv whose values stand beside")
    notes: tuple[str, ...] = setting((), doc="notes printed below")
    rows: tuple = setting(doc="the rows")
    sweep_over: str | None = setting(
        None, was="over", doc="with draw sweep: the setting on its axis", choices=("d_max", "a", None)
    )
    x_if_absent: float = setting(0.0, was="without", doc="with draw sweep: where methods without that setting stand")
    shapes: dict = setting({}, doc="with draw flops: role of a model -> widths of its layers")
    lengths: tuple[int, ...] = setting((), doc="with draw flops: sequence lengths", low=1)
    models: dict = setting({}, doc="with draw cost: role -> model of the published size, with random weights")
    sections: tuple = setting((), doc="with draw cost: groups of cases, see mutor/config/cost_cases.py: Case")
    name: str = setting("", doc="the file's name")

    def __post_init__(self) -> None:
        choose(self.draw, DRAWINGS, "draw")

    @property
    def drawing(self) -> Drawing:
        """How its cells come about and how they are shown."""
        return DRAWINGS[self.draw]

    @property
    def needs_runs(self) -> bool:
        """Whether its numbers come from runs, not from configuration, arithmetic or measured costs."""
        return self.drawing.made_of == "runs"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model of a scale: an architecture built from scratch, or a pretrained one by name or folder."""

    role: str = setting(doc="the published model whose place it takes")
    stands_in_for: str = setting("", doc="what is said beside its results when it is not the published model")
    architecture: str | None = setting(
        None, doc="a transformers model type, built from scratch: gpt2, llama, qwen3, ..."
    )
    config: dict = setting({}, doc="arguments of the architecture's transformers config")
    init: str = setting(
        "model", doc="initialisation from scratch: the model's own, or 1/sqrt(fan-in)", choices=("model", "fan_in")
    )
    embedding_std: float = setting(1.0, doc="with init fan_in: standard deviation of the embeddings", low=0)
    pretrained: str | None = setting(
        None, doc="hub name or folder of a pretrained model; a quantised .gguf file, or package/file.gguf"
    )
    revision: str | None = setting(None, doc="hub revision of the pretrained model")
    needs: tuple = setting((), doc="Python packages without which nothing of it is run")
    dtype: str = setting(
        "float32",
        doc="of weights and training; mixed: float32 weights, bfloat16 products on a GPU",
        choices=("float32", "bfloat16", "mixed"),
    )
    recipe_changes: dict = setting({}, doc="changes of every recipe for this model, the same for all methods")
    attention: str = setting(AUTO, doc="one of mutor/registry.py: ATTENTION; auto: the fastest exact one, see there")

    def __post_init__(self) -> None:
        choose(self.attention, (AUTO, *ATTENTION), "attention")
        if (self.architecture is None) == (self.pretrained is None):
            raise ValueError("give either architecture (from scratch) or pretrained (hub name or folder)")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Widths of one decoder layer."""

    width: int = setting(doc="of the hidden state", low=1)
    query: int = setting(doc="of all query heads together", low=1)
    key_value: int = setting(doc="of all key heads together, and of all value heads", low=1)
    feed_forward: int = setting(doc="inside the feed-forward layer, which has three matrices", low=1)
