"""What a target takes before it runs: settings, seeds done and to do, time, FLOPs, disk and memory.

Times and tokens come from finished runs, of this machine or the committed reference: of the same setting, else of the
same data and model, else of the same model. Where there are none, FLOPs are bounded by what the scale says of the size
of its models and data (`plan`), and GPU hours follow from them. Of a user's own data they are estimated from the files
(sizes.py), and minutes on a CPU from its speed at products of matrices.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mutor.config.runs import Spec, run_cells, specs_of
from mutor.config.schema import Scale, Table
from mutor.registry import TASKS, load
from mutor.results.flops import PEAKS, training_flops
from mutor.results.records import Records, curve

UTILISATION = 0.4  # of the peak; what fine-tuning at these lengths may reach
TRAINED = 3  # numbers a weight has in a checkpoint: itself and AdamW's two means


@dataclass(frozen=True)
class Estimate:
    """What the missing seeds of a setting take together; minutes and flops are None where nothing tells them.

    mark: how sure flops are: "" from runs, "<" at most, "~" about; size: bytes of one saved model, disk: of all.
    """

    spec: Spec
    done: int
    todo: int
    minutes: float | None
    flops: float | None
    mark: str
    size: float
    disk: float

    def __str__(self) -> str:
        texts = ["-", "-"]
        if self.todo:
            texts = ["?" if self.minutes is None else f"{self.minutes:.1f}"]
            texts.append("?" if self.flops is None else f"{self.mark}{self.flops:.1e}" if self.flops else "0")
        return f"{self.done:>5} {self.todo:>5} {texts[0]:>8} {texts[1]:>9}  {self.spec.path}"


def estimates(
    specs: list[Spec], scale: Scale, here: Records, measured: list[dict[str, Any]], speed: Callable[[], float]
) -> list[Estimate]:
    """Of each setting. here: the runs there are; measured: records to judge by; speed: FLOP/s of this machine."""
    out = []
    for spec in specs:
        done = {record["seed"] for record in here.of(spec)} & {*spec.seeds}
        todo = len(spec.seeds) - len(done)
        minutes, (work, mark) = _minutes(spec, measured), _flops(spec, scale, measured)
        if todo and minutes is None and work is not None and "problems" in spec.dataset.plan and not scale.gpus:
            minutes = (work + _answering(spec, scale)) / speed() / UTILISATION / 60
        size = _bytes(spec, scale, measured)
        kept = 2 if load(TASKS, spec.dataset.task, "task").chosen_on(spec.task_config) else 1
        minutes, work = (None if number is None else number * todo for number in (minutes, work))
        out.append(Estimate(spec, len(done), todo, minutes, work, mark, size, size * kept * todo))
    return out


def lines(
    chosen: list[Table],
    scale: Scale,
    here: Records,
    measured: list[dict[str, Any]],
    seeds: tuple[int, ...] | None = None,
) -> list[str]:
    """The plan as printable lines.

    here: the runs that there are; measured: records of this scale to judge by, of this machine or others; seeds: of
    every run, if not the scale's.
    """
    wanted = specs_of([cell for table in chosen for cell in run_cells(table, scale, seeds)])
    found = estimates(wanted, scale, here, measured, functools.cache(products_a_second))
    out = [
        f"scale {scale.name}: {scale.description}",
        f"{'done':>5} {'to do':>5} {'minutes':>8} {'FLOPs':>9}  setting",
        *map(str, found),
    ]
    todo = [one for one in found if one.todo]
    total, flops = sum(one.minutes or 0 for one in todo), sum(one.flops or 0 for one in todo)
    unit = "GPU minutes" if scale.gpus else f"CPU core minutes, {scale.threads} a run"
    sums = [f"{total:.0f} {unit}"] * (total > 0) + [f"{flops:.1e} FLOPs"] * (flops > 0)
    runs = sum(one.todo for one in todo)
    out.append(f"{len(wanted)} settings, {runs} seeded runs to do{': ' * bool(sums)}{', '.join(sums)}")
    out += _shares(chosen, scale, seeds, {one.spec.path: one for one in todo}, unit)
    if measured:
        out.append(f"judged by {len(measured)} finished runs on {', '.join(sorted({r['device'] for r in measured}))}")
    if unknown := sum(one.minutes is None for one in todo):
        out.append(f"{unknown} settings have no run to judge by; scheduled with at most {scale.minutes} minutes each")
    if any(one.mark == "<" for one in todo):
        out.append("<: at most, from the longest sequences allowed; registers add up to as many tokens as answers have")
    if any(one.mark == "~" for one in todo):
        out.append("~: about, with four characters a token; registers add up to as many tokens as answers have")
    if scale.gpus and flops:
        hours = [f"{flops / PEAKS[name] / UTILISATION / 3600:,.0f} hours of {name}" for name in ("A100", "H100")]
        out.append(f"at {UTILISATION:.0%} of the bf16 peak: {' or '.join(hours)}")
    disk, beside = sum(one.disk for one in todo), max((2 * TRAINED * one.size for one in todo), default=0.0)
    out.append(
        f"memory {scale.memory_mb} MB a process; models kept on disk {disk / 1e6:,.0f} MB, and two checkpoints "
        f"of up to {beside / 2e6:,.0f} MB while a run trains"
    )
    out += [f"left out: {problem}" for problem in here.problems]
    return out + _matched(wanted, measured)


def _shares(
    chosen: list[Table], scale: Scale, seeds: tuple[int, ...] | None, todo: dict[str, Estimate], unit: str
) -> list[str]:
    """The minutes to do of each task, and of each table: a setting counts where it is needed first, with its bases."""
    by_task: dict[str, float] = {}
    by_table: dict[str, float] = {}
    left = dict(todo)
    for table in chosen:
        for spec in specs_of(run_cells(table, scale, seeds)):
            if one := left.pop(spec.path, None):
                for shares, name in ((by_task, spec.dataset.task), (by_table, table.name)):
                    shares[name] = shares.get(name, 0.0) + (one.minutes or 0.0)
    return [
        f"by {what}, {unit.split(',')[0]}: {', '.join(f'{name} {minutes:.1f}' for name, minutes in shares.items())}"
        for what, shares in (("task", by_task), ("table", by_table))
        if sum(shares.values())
    ]


def gpu_hours(specs: list[Spec], scale: Scale) -> str:
    """Hours on a GPU that all seeds of settings take together, before anything ran: "at most 2,300 hours of H100"."""
    found = [_flops(spec, scale, []) for spec in specs]
    known = sum(work * len(spec.seeds) for spec, (work, _) in zip(specs, found, strict=True) if work)
    if not known:
        return "not known"
    bound = "at most " if any(mark == "<" for _, mark in found) else ""
    return f"{bound}{known / PEAKS['H100'] / UTILISATION / 3600:,.0f} hours of H100"


def products_a_second() -> float:
    """FLOP/s of this machine: float32 products of matrices, the fastest of three."""
    matrix, seconds = np.ones((1024, 1024), dtype=np.float32), []
    for _ in range(3):
        began = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - began)
    return 2 * 1024**3 / min(seconds)


def _minutes(spec: Spec, measured: list[dict[str, Any]]) -> float | None:
    """Minutes of one seed, over its processes: median seconds a step of the nearest finished runs times the steps.

    Where the plan says how many test problems there are, with the time that answers to them take.
    """
    near, steps = _nearest(spec, measured)
    problems = spec.dataset.plan.get("problems", 0)
    if not near or (steps == 0 and not problems):
        return None
    training = statistics.median([_seconds_a_step(r, steps) for r in near]) * steps if steps else 0.0
    asked = [
        checkpoint["seconds_evaluating"] / next(iter(checkpoint["scores"].values()))["count"]
        for r in measured
        for checkpoint in r["checkpoints"]
        if (r["train_data"], r["model"]) == (spec.data, spec.model) and checkpoint.get("scores") and problems
    ]  # of all methods: the first run's have the time in them that packages take to be read
    return (training + (statistics.median(asked) if asked else 0.0) * problems) / 60


def _seconds_a_step(record: dict[str, Any], steps: float) -> float:
    """Of a finished run; of one much shorter than `steps` without its first step, which takes longer."""
    seconds, count = record["seconds_training"], record["steps"]
    if count < steps / 2:
        logged = [entry for entry in curve(record) if "loss" in entry and "seconds" in entry]
        if len(logged) > 1:
            first, last = logged[0], logged[-1]
            seconds, count = last["seconds"] - first["seconds"], last["step"] - first["step"]
    return seconds * record.get("processes", 1) / count


def _flops(spec: Spec, scale: Scale, measured: list[dict[str, Any]]) -> tuple[float | None, str]:
    """FLOPs of one seed, and the mark of an `Estimate`."""
    if not spec.recipe.trains:
        return 0.0, ""
    near, steps = _nearest(spec, measured)
    counted = [work / r["steps"] for r in near if (work := training_flops(r))]
    if counted and steps:
        return statistics.median(counted) * steps, ""
    parameters = scale.plan.get(spec.model)
    about = spec.dataset.plan
    if parameters is None or "tokens" not in about:
        return None, ""
    recipe = spec.recipe
    sequences = (recipe.steps or 0) * recipe.batch_size or (recipe.epochs or 0) * about.get("examples", math.nan)
    if math.isnan(sequences):
        return None, ""
    return 6.0 * parameters * about["tokens"] * sequences, "~" if "problems" in about else "<"


def _answering(spec: Spec, scale: Scale) -> float:
    """FLOPs of the answers to the test problems, as long as allowed, and of reading their prompts."""
    about, longest = spec.dataset.plan, getattr(spec.task_config, "new_tokens", None) or 0
    return 2.0 * scale.plan.get(spec.model, 0) * (about.get("tokens", 0) + longest) * about.get("problems", 0)


def _nearest(spec: Spec, measured: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], float]:
    """The finished runs most like this one, and how many steps it will take (0: none, or not known)."""
    tests = (
        lambda r: r["path"] == spec.path,
        lambda r: (r["train_data"], r["model"]) == (spec.data, spec.model),
        lambda r: r["model"] == spec.model,
    )
    trains = spec.recipe.trains
    for test in tests:
        near = [r for r in measured if test(r) and (r.get("steps") or not trains)]
        alike = [r["steps"] for r in near if r["train_data"] == spec.data]
        steps = _steps(spec, alike) if trains else 0
        if test is tests[0] and spec.recipe.stop_at is not None:  # they end when they have solved their task
            ended = [r["steps"] for r in near if r["config"]["recipe"]["steps"] == spec.recipe.steps]
            steps = min(steps, statistics.median(ended)) if ended else steps
        if near and (steps or not trains):
            return near, steps
    return [], 0


def _steps(spec: Spec, alike: list[int]) -> float:
    """Steps of a recipe: as it says, as the number of training examples says, or as runs on the same data took."""
    if spec.recipe.steps is not None:
        return spec.recipe.steps
    if "examples" in spec.dataset.plan:
        return spec.recipe.for_size(int(spec.dataset.plan["examples"])).steps or 0
    return statistics.median(alike) if alike else 0


def _bytes(spec: Spec, scale: Scale, measured: list[dict[str, Any]]) -> float:
    same = [r.get("parameters", r["trainable_parameters"]) for r in measured if r["model"] == spec.model]
    width = 2 if spec.model_config.dtype == "bfloat16" else 4
    return width * max([*same, scale.plan.get(spec.model, 0)])


def _matched(wanted: list[Spec], measured: list[dict[str, Any]]) -> list[str]:
    """How much more data next-token prediction may see for the computation of each method, from tokens really fed."""
    out = []
    for data, model in dict.fromkeys((s.data, s.model) for s in wanted):
        rate: dict[str, list[float]] = {}
        for r in measured:
            if (r["train_data"], r["model"]) == (data, model) and r.get("tokens"):
                rate.setdefault(r["method"], []).append(r["tokens"] / r["steps"])
        plain = rate.pop("next_token", None)
        times = {method: statistics.median(found) / statistics.median(plain) for method, found in rate.items() if plain}
        text = ", ".join(f"{method} {ratio:.2f}" for method, ratio in times.items() if ratio > 1.005)
        if text:
            out.append(f"{data}, {model}: tokens fed, times next_token's, so data that next_token may see more: {text}")
    return out
