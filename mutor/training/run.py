"""Train and evaluate one setting, its seeds one after the other in one process.

Each seed passes three stages. A killed run goes on from what the last finished one has left:

    checkpoints/    while it trains; gone afterwards
    last/, best/    the plain models, and step<n>/ where the recipe keeps some; last/training.json the learning curve
                    last/method/: what the method added to the model, where it adds something
    metrics.json    scores of the reloaded models: the run is done

A recipe of no steps has no first stage: the model that the run starts from is saved and scored.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from mutor.config.runs import Spec
from mutor.files import damage, locked, remove_folder, sweep, write_json
from mutor.registry import TASKS, load
from mutor.results import provenance, records
from mutor.tasks.task import Log, Task
from mutor.training.devices import agreed, choose_device, is_main, processes
from mutor.training.seed import RunEnvironment, SeedRun


def run(spec: Spec, seeds: tuple[int, ...], env: RunEnvironment) -> None:
    """Finish every seed of a setting and write its index.json; finished seeds are left alone.

    Raises ValueError, before any training, for what the configuration got wrong.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the runs beside this one
    if processes() > 1:
        choose_device(env.device)
    todo = []
    for seed in seeds if is_main() else ():
        if records.finished(env.runs, spec, seed) and env.rerun_stale:
            record = records.read(records.seed_folder(env.runs, spec, seed) / "metrics.json")
            if provenance.changed_code(record, env.root):
                _set_aside(records.seed_folder(env.runs, spec, seed))
        if not records.finished(env.runs, spec, seed):
            todo.append(seed)
    todo = agreed(todo)
    if todo:
        if spec.base:
            _run_base(spec.base, tuple(dict.fromkeys(map(spec.base_seed_of, todo))), env)
        _run(spec, todo, env)
    if is_main():
        write_index(spec, seeds, env.runs)


def _run_base(base: Spec, seeds: tuple[int, ...], env: RunEnvironment) -> None:
    """Finish the base models of these seeds; one that was cleaned up, or is not as it was saved, is trained again."""
    for seed in seeds if is_main() else ():
        folder = records.seed_folder(env.runs, base, seed)
        if records.finished(env.runs, base, seed):
            record = records.read(folder / "metrics.json")
            wrong = damage(folder / "last") if (folder / "last").exists() else "it was cleaned up"
            if not wrong and records.weights_hash(folder / "last") != record["weights_hash"]:
                wrong = "its weights are not those of its record"
            if wrong:
                _speaker(env.label)(f"base model {folder / 'last'}: {wrong}; it is trained again")
                _set_aside(folder)
    if agreed(any(not records.finished(env.runs, base, seed) for seed in seeds)):
        run(base, seeds, env)


def write_index(spec: Spec, seeds: tuple[int, ...], runs: Path) -> None:
    """index.json of a setting: its finished seeds, what the workflow waits for."""
    folders = {seed: records.seed_folder(runs, spec, seed) / "metrics.json" for seed in seeds}
    content = {"config_hash": spec.config_hash, "seeds": {str(s): f.stat().st_size for s, f in folders.items()}}
    home = Path(runs) / spec.path
    with locked(home / ".lock"):  # nobody else writes an index now, so what is half-written is of the dead
        sweep(home)
        write_json(home / "index.json", content)


def _run(spec: Spec, seeds: list[int], env: RunEnvironment) -> None:
    import torch
    import transformers

    torch.set_num_threads(env.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from mutor.models.build import tokenizer

    device = choose_device(env.device)
    task_class: type[Task] = load(TASKS, spec.dataset.task, "task")
    task = task_class(
        spec.task_config, tokenizer(spec.model_config) if task_class.needs_tokenizer(spec.task_config) else None
    )
    task.prepare_assets(env.runs / spec.scale / "assets", device, _speaker(f"{env.label}{spec.data}"))
    for number, seed in enumerate(seeds, start=1):
        head = f"{env.label}{spec.data} {spec.model} {spec.method} {spec.name}"
        log = _speaker(f"{head} seed {seed} ({number}/{len(seeds)})")
        folder = records.seed_folder(env.runs, spec, seed)
        with _locked(folder, log):
            if agreed(not records.finished(env.runs, spec, seed)):
                if is_main():
                    _clear_foreign(folder, spec, log)
                SeedRun(spec, seed, task, device, env, log).finish()


def _clear_foreign(folder: Path, spec: Spec, log: Log) -> None:
    """Keep what belongs to this configuration; set aside a record of another one, drop its checkpoints.

    A record that can't be read is made again, from the models where they are whole.
    """
    mark, record = folder / "config_hash", folder / "metrics.json"
    if record.exists():
        try:
            records.read(record)
        except ValueError as error:
            log(f"{error}; it is made again")
    if mark.exists() and mark.read_bytes() == spec.config_hash.encode():
        return
    if records.models(folder) or record.exists():
        log(f"{mark} names another configuration; what was made under it is set aside")
    _set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(spec.config_hash)


def _set_aside(folder: Path) -> None:
    """Delete a run's models and rename its record, last: without one they would count as a new run's."""
    for part in records.models(folder):
        remove_folder(part)
    for file in folder.glob("predictions-*"):
        file.unlink()
    record = folder / "metrics.json"
    if record.exists():
        number = 1 + len(list(folder.glob("metrics.superseded-*.json")))
        record.rename(folder / f"metrics.superseded-{number}.json")


def _locked(folder: Path, log: Log) -> contextlib.AbstractContextManager[None]:
    """Keep two runs from working on one seed: the second waits, and then finds it finished."""
    if not is_main():
        return contextlib.nullcontext()
    return locked(folder / ".lock", lambda: log("another process is working on this run; waiting for it"))


def _speaker(head: str) -> Log:
    """Print progress, at most a line every ten seconds, but always a score; one process does."""
    last = [0.0]

    def log(line: str) -> None:
        now = time.monotonic()
        if is_main() and ("left" not in line or now - last[0] > 10):
            last[0] = now
            print(f"{head}: {line}", flush=True)

    return log
