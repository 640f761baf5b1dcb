"""`python -m mutor try MODEL TRAIN TEST`: does a method help this model on these data? One command, no YAML.

attempt(root, own_scale(root, model, files, settings), own_table(root, None), Path("tries"), quick=True)

The runs, records and tables are those of the scale own; one setting is trained after the other, in this process. What
is finished is not made again. All lies in a folder of its own, named by model, data and settings.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from mutor.config import own
from mutor.config.load import CODE
from mutor.config.runs import Spec, run_cells, specs_of
from mutor.config.schema import Scale, Table
from mutor.registry import TASKS, load
from mutor.results.plan import lines
from mutor.results.records import Records
from mutor.results.sizes import sized


def attempt(root: Path, scale: Scale, table: Table, out: Path, *, quick: bool = False) -> list[str]:
    """Check, plan, train and score every setting, and print the verdict; what a method is refused for is told with it.

    out: folder of all tries; quick: only a few steps and problems of one seed, in a folder beside, and how long the
    whole takes. Returns what methods were refused for. Raises ValueError where nothing can be trained.
    """
    scale = sized(scale)
    folder = out / own.name_of(scale)
    specs = specs_of(run_cells(table, scale))
    _check(specs[0])
    _print_plan(table, scale, folder)
    if not quick:
        refused = _run(specs, scale, folder)
        _print_verdict(root, table, scale, folder)
    else:
        few = own.quick(scale)
        todo = specs_of(run_cells(table, few))
        refused = _run(todo, few, folder / "quick")
        asked = min(own.ASKED, int(scale.datasets[specs[0].data].plan["problems"]))
        print(
            f"\n{len(todo) - len(refused)} of {len(todo)} settings work: {own.QUICK['steps']} steps of training, "
            f"answers to {asked} problems. That says nothing of the methods. The whole takes, by what these took:"
        )
        _print_plan(table, scale, folder)
        print("\nThe same command without --quick does it.")
    print("".join(f"\nrefused: {words}" for words in refused))
    return refused


def _check(spec: Spec) -> None:
    """Raise ValueError for a model that is not there, and for data that are wrong, before anything is trained."""
    from mutor.models.build import check_pretrained, tokenizer

    task = load(TASKS, spec.dataset.task, "task")
    needed = task.needs_tokenizer(spec.task_config)
    try:
        check_pretrained(spec.model_config, needed)
    except ValueError as error:
        raise ValueError(f"MODEL: {error}") from None
    own_words = tokenizer(spec.model_config) if needed else None
    task(spec.task_config, own_words).data_hash()


def _print_plan(table: Table, scale: Scale, folder: Path) -> None:
    here, quick = Records(folder / "runs"), Records(folder / "quick" / "runs")
    print("\n".join(lines([table], scale, here, here.of_scale(scale.name) or quick.of_scale(scale.name))), flush=True)


def _run(specs: list[Spec], scale: Scale, folder: Path) -> list[str]:
    """Train and score settings, as `python -m mutor run` does; returns what methods were refused for."""
    from mutor.training.run import run
    from mutor.training.seed import RunEnvironment

    env = RunEnvironment(root=CODE, runs=folder / "runs", device=scale.device, threads=scale.threads)
    refused = []
    for number, spec in enumerate(specs, start=1):
        try:
            run(spec, spec.seeds, replace(env, label=f"[{number}/{len(specs)}] "))
        except (ValueError, FloatingPointError) as error:
            if number == 1:  # the model as it is: what is wrong is not the method
                raise
            refused.append(f"{spec.method}: {error}")
        gc.collect()  # the model before is gone before the next one is loaded
    return refused


def _print_verdict(root: Path, table: Table, scale: Scale, folder: Path) -> None:
    from mutor.results.cells import Evidence
    from mutor.results.report import collect_all

    evidence = Evidence(root, scale, Records(folder / "runs"))
    evidence.once("table", table.name, lambda: table)
    page = ["report"] if find_spec("itables") else []  # a package of the workflow's, which runs do without
    files, answers = collect_all(evidence, [table.name, "runs", *page], [table.name], folder)
    print("".join(f"\n{sentence}\n" for sentence in answers))
    names = ", ".join(file.name for file in files)
    print(f"In {folder}: {names}; every answer in runs/*/*/*/*/*/*/predictions-last.jsonl")
