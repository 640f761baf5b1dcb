"""Train and evaluate one setting, its seeds one after the other in one process.

Each seed passes three stages, each finished whole or not at all, so a killed run goes on where it was:

    checkpoints/    while it trains; gone afterwards
    last/, best/    the plain models, and step<n>/ where the recipe keeps some; last/training.json the learning curve
    metrics.json    scores of the reloaded plain models: the run is done

Where a launcher started several processes, all train and score while they train; one decides, writes, and scores at
the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mutor.config.runs import Spec
from mutor.files import complete_folder, locked, write_json
from mutor.registry import METHODS, TASKS, answers_under, load
from mutor.results import provenance, records
from mutor.training.devices import agreed, choose_device, is_main, processes


@dataclass(frozen=True)
class RunEnvironment:
    """Where and how runs take env: folders, device, threads a process, and how progress is said."""

    root: Path
    runs: Path
    device: str = "cpu"
    threads: int = 1
    label: str = ""
    rerun_stale: bool = False


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
    """Finish the base models of these seeds; one whose model was cleaned up is trained again."""
    for seed in seeds if is_main() else ():
        folder = records.seed_folder(env.runs, base, seed)
        if records.finished(env.runs, base, seed) and not (folder / "last").exists():
            _set_aside(folder)
    if agreed(any(not records.finished(env.runs, base, seed) for seed in seeds)):
        run(base, seeds, env)


def write_index(spec: Spec, seeds: tuple[int, ...], runs: Path) -> None:
    """index.json of a setting: its finished seeds, what the workflow waits for."""
    folders = {seed: records.seed_folder(runs, spec, seed) / "metrics.json" for seed in seeds}
    content = {"config_hash": spec.config_hash, "seeds": {str(s): f.stat().st_size for s, f in folders.items()}}
    write_json(Path(runs) / spec.path / "index.json", content)


def _run(spec: Spec, seeds: list[int], env: RunEnvironment) -> None:
    import torch
    import transformers

    torch.set_num_threads(env.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from mutor.models.build import tokenizer

    device = choose_device(env.device)
    task_class = load(TASKS, spec.dataset.task, "task")
    own = tokenizer(spec.model_config) if getattr(spec.task_config, "tokens", None) == "model" else None
    task = task_class(spec.task_config, own)
    if hasattr(task, "prepare_assets"):
        task.prepare_assets(env.runs / spec.scale / "assets", device, _speaker(f"{env.label}{spec.data}"))
    for number, seed in enumerate(seeds, start=1):
        head = f"{env.label}{spec.data} {spec.model} {spec.method} {spec.name}"
        log = _speaker(f"{head} seed {seed} ({number}/{len(seeds)})")
        folder = records.seed_folder(env.runs, spec, seed)
        with _locked(folder, log):
            if agreed(not records.finished(env.runs, spec, seed)):
                _seed(spec, seed, folder, task, device, env, log)


def _seed(
    spec: Spec, seed: int, folder: Path, task: Any, device: str, env: RunEnvironment, log: Callable[[str], None]
) -> None:
    import torch

    from mutor.mtp.method import Context

    # read before training, in which a file may be edited
    code = provenance.run_code(env.root, spec.method, spec.dataset.task, spec.as_dict()["base"])
    if is_main():
        _clear_foreign(folder, spec)
    context = Context(seed=seed, pad_id=task.pad_id, prefix_lm=task.prefix_lm)
    method = load(METHODS, spec.method, "method")(spec.method_config, per_sequence=spec.recipe.loss_mean == "sequence")
    if agreed(not (folder / "last/training.json").exists()):
        base = records.seed_folder(env.runs, spec.base, spec.base_seed_of(seed)) / "last" if spec.base else None
        _train(spec, seed, folder, base, task, method, context, device, log)
    if not is_main():
        return  # and wait at the next seed, if there is one
    training = json.loads((folder / "last/training.json").read_text())
    checkpoints = _evaluate(spec, folder, task, method, context, device, training, log)
    log("  ".join(f"{k} {v:.1f}" for k, v in checkpoints[-1]["metrics"].items() if k != "loss"))
    memory = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    record = {
        "version": records.VERSION,
        "scale": spec.scale,
        "train_data": spec.data,
        "model": spec.model,
        "train_data_name": task.describe(spec.task_config),
        "train_data_role": spec.dataset.role,
        "model_role": spec.model_config.role,
        "stands_in_for": spec.stands_in_for,
        "method": spec.method,
        "settings": spec.settings,
        "seed": seed,
        "config": spec.as_dict(),
        "config_hash": spec.config_hash,
        "checkpoints": checkpoints,
        "curve": training["curve"],
        "steps": training["steps"],
        "tokens": training["tokens"],
        "seconds_training": training["seconds"],
        "examples": training["examples"],
        "examples_dropped": training["examples_dropped"],
        "parameters": training["parameters"],
        "trainable_parameters": training["trainable_parameters"],
        "added_parameters": training["added_parameters"],
        "peak_memory_bytes": memory,
        "device": device_name(device),
        "threads": env.threads,
        "processes": processes(),
        "started": training["started"],
        "finished": _now(),
        "resumed": training["resumed"],
        "data_hash": task.data_hash(),
        "code": code,
        "weights_hash": training["weights_hash"],
        **provenance.provenance(env.root),
    }
    write_json(folder / "metrics.json", record)


def _train(
    spec: Spec,
    seed: int,
    folder: Path,
    base: Path | None,
    task: Any,
    method: Any,
    context: Any,
    device: str,
    log: Callable[[str], None],
) -> None:
    from mutor.models.build import build, initialiser
    from mutor.mtp.backbone import evaluating
    from mutor.training.data import Samples
    from mutor.training.trainer import MethodTrainer

    started, source = _now(), task.train(seed)
    recipe = spec.recipe.for_size(source.size)
    if source.dropped:
        log(f"{source.size} training examples; {source.dropped} longer ones dropped")
    model = build(spec.model_config, vocabulary=task.vocabulary, seed=seed, base=base)
    task.prepare(model)
    method.attach(model, initialiser(spec.model_config))
    selection_metric = task.selection_metric
    best: dict[str, float] = {}

    def export(name: str, training: Callable[[Path], dict[str, Any]] | None = None) -> None:
        state = trainer.whole_state()  # from all processes
        if not is_main():
            return
        with complete_folder(folder / name) as target:
            method.export(model, target, state)
            if task.tokenizer is not None:
                task.tokenizer.save_pretrained(target)
            if training is not None:
                write_json(target / "training.json", training(target))

    def score(model: Any) -> dict[str, float]:
        with evaluating(model):
            metrics, _ = task.evaluate(model, method, context, "valid", recipe.eval_batch_size)
        metrics = agreed(metrics)  # rounding may differ between devices; what follows from them may not
        step = trainer.state.global_step
        if metrics[selection_metric] > best.get(selection_metric, _best_so_far(trainer, selection_metric)):
            best[selection_metric] = metrics[selection_metric]
            export("best", lambda target: {"step": step, selection_metric: metrics[selection_metric]})
        if step in recipe.keep_steps:
            export(f"step{step}")
        return metrics

    assert recipe.steps is not None
    samples = Samples(source, recipe.steps * recipe.batch_size, seed)
    trainer = MethodTrainer(
        model,
        method,
        recipe,
        samples,
        context,
        folder / "checkpoints",
        seed=seed,
        score=score,
        selection_metric=selection_metric,
        log=log,
        device=device,
        autocast=spec.model_config.dtype != "float32",
        sharded=spec.sharded and processes() > 1,
    )
    resumed = trainer.resume()
    curve = [entry for entry in trainer.state.log_history if "loss" in entry or f"eval_{selection_metric}" in entry]
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    training = {
        "curve": curve,
        "steps": trainer.state.global_step,
        "seconds": round(trainer.seconds(), 3),
        "tokens": next((e["tokens"] for e in reversed(curve) if "tokens" in e), 0),
        "started": started,
        "resumed": resumed,
        "added_parameters": method.added_parameters(model),
        "parameters": sum(size for size, _ in sizes),
        "trainable_parameters": sum(size for size, trained in sizes if trained),
        "examples": source.size,
        "examples_dropped": source.dropped,
    }
    export("last", lambda target: {**training, "weights_hash": _weights_hash(target)})
    if is_main():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _best_so_far(trainer: Any, selection_metric: str) -> float:
    scores = (entry.get(f"eval_{selection_metric}") for entry in trainer.state.log_history)
    return max((score for score in scores if score is not None), default=float("-inf"))


def _evaluate(
    spec: Spec,
    folder: Path,
    task: Any,
    method: Any,
    context: Any,
    device: str,
    training: dict[str, Any],
    log: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Test metrics and scores of the best, the kept and the last checkpoint, as anyone would load them."""
    from transformers import AutoModelForCausalLM

    from mutor.models.build import torch_dtype

    best = json.loads((folder / "best/training.json").read_text()) if (folder / "best").exists() else None
    same = best is None or best["step"] == training["steps"]
    found = []
    kept = [(f"step{step}", step) for step in spec.recipe.keep_steps if (folder / f"step{step}").exists()]
    for name, step in (("best", best and best["step"]), *kept, ("last", training["steps"])):
        if name == "best" and same:
            continue
        began = time.monotonic()
        plain: Any = AutoModelForCausalLM.from_pretrained(
            folder / name,
            dtype=torch_dtype(spec.model_config),
            attn_implementation=answers_under(spec.model_config.attention),
        )
        plain.to(device)
        plain.eval()
        metrics, scores = task.evaluate(
            plain, method, context, "test", spec.recipe.eval_batch_size, folder / f"predictions-{name}.jsonl", log
        )
        names = ["best", "last"] if name == "last" and same else [name]
        seconds = round(time.monotonic() - began, 3)
        packed = {metric: records.pack(values) for metric, values in scores.items()}
        found.append(
            {"names": names, "step": step, "metrics": metrics, "scores": packed, "seconds_evaluating": seconds}
        )
    return found


def _clear_foreign(folder: Path, spec: Spec) -> None:
    """Keep what belongs to this configuration; set aside a record of another one, drop its checkpoints."""
    mark = folder / "config_hash"
    if mark.exists() and mark.read_text() == spec.config_hash:
        return
    _set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(spec.config_hash)


def _set_aside(folder: Path) -> None:
    record = folder / "metrics.json"
    if record.exists():
        number = 1 + len(list(folder.glob("metrics.superseded-*.json")))
        record.rename(folder / f"metrics.superseded-{number}.json")
    for file in folder.glob("predictions-*"):
        file.unlink()
    for part in (folder / "checkpoints", folder / "last", folder / "best", *folder.glob("step*")):
        shutil.rmtree(part, ignore_errors=True)


def _locked(folder: Path, log: Callable[[str], None]) -> contextlib.AbstractContextManager[Any]:
    """Keep two runs from working on one seed: the second waits, and then finds it finished."""
    if not is_main():
        return contextlib.nullcontext()
    return locked(folder / ".lock", lambda: log("another process is working on this run; waiting for it"))


def _speaker(head: str) -> Callable[[str], None]:
    """Print progress, at most a line every ten seconds, but always a score; one process does."""
    last = [0.0]

    def log(line: str) -> None:
        now = time.monotonic()
        if is_main() and ("left" not in line or now - last[0] > 10):
            last[0] = now
            print(f"{head}: {line}", flush=True)

    return log


def _weights_hash(folder: Path) -> str:
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def device_name(device: str) -> str:
    """What a person calls the device."""
    import platform

    import torch

    if device == "cuda":
        return str(torch.cuda.get_device_name())
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"cpu ({line.partition(':')[2].strip()})"
    return f"cpu ({platform.processor() or platform.machine()})"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
