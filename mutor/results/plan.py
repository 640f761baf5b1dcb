"""What a target takes before it runs: settings, seeds done and to do, time, FLOPs, disk and memory.

Times and tokens come from finished runs, of this machine or the committed reference: of the same setting, else of the
same data and model, else of the same model. Where there are none, FLOPs are bounded by what the scale says of the size
of its models and data (`plan`), and GPU hours follow from them.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from mutor.config.runs import Spec, run_cells, specs_of
from mutor.config.schema import Scale, Table
from mutor.results.flops import PEAKS, training_flops
from mutor.results.records import Records

UTILISATION = 0.4  # of the peak; what fine-tuning at these lengths may reach


def lines(
    chosen: list[Table], scale: Scale, runs: Path, reference: Path, seeds: tuple[int, ...] | None = None
) -> list[str]:
    """The plan as printable lines.

    reference: folder of committed runs, used where `runs` has none alike; seeds: of every run, if not the scale's.
    """
    here = Records(runs)
    measured = here.of_scale(scale.name) or Records(reference / scale.name / "runs").of_scale(scale.name)
    wanted = specs_of([cell for table in chosen for cell in run_cells(table, scale, seeds)])
    out = [
        f"scale {scale.name}: {scale.description}",
        f"{'done':>5} {'to do':>5} {'minutes':>8} {'FLOPs':>9}  setting",
    ]
    total, flops, bounded, unknown, todo_all, disk = 0.0, 0.0, False, 0, 0, 0.0
    for spec in wanted:
        done = {record["seed"] for record in here.of(spec)}
        todo = [s for s in spec.seeds if s not in done]
        minutes, (work, at_most) = _minutes(spec, measured), _flops(spec, scale, measured)
        todo_all += len(todo)
        disk += len(todo) * 2 * _bytes(spec, scale, measured)
        texts = ["-", "-"]
        if todo:
            texts = ["?" if minutes is None else f"{minutes * len(todo):.1f}"]
            texts.append("?" if work is None else f"{'<' * at_most}{work * len(todo):.1e}")
            unknown += minutes is None
            bounded |= at_most
            total += (minutes or 0) * len(todo)
            flops += (work or 0) * len(todo)
        out.append(f"{len(done & {*spec.seeds}):>5} {len(todo):>5} {texts[0]:>8} {texts[1]:>9}  {spec.path}")
    unit = "GPU minutes" if scale.gpus else f"CPU core minutes, {scale.threads} a run"
    sums = [f"{total:.0f} {unit}"] * (total > 0) + [f"{flops:.1e} FLOPs"] * (flops > 0)
    out.append(f"{len(wanted)} settings, {todo_all} seeded runs to do{': ' * bool(sums)}{', '.join(sums)}")
    if measured:
        out.append(f"judged by {len(measured)} finished runs on {', '.join(sorted({r['device'] for r in measured}))}")
    if unknown:
        out.append(f"{unknown} settings have no run to judge by; scheduled with at most {scale.minutes} minutes each")
    if bounded:
        out.append("<: at most, from the longest sequences allowed; registers add up to as many tokens as answers have")
    if scale.gpus and flops:
        hours = [f"{flops / PEAKS[name] / UTILISATION / 3600:,.0f} hours of {name}" for name in ("A100", "H100")]
        out.append(f"at {UTILISATION:.0%} of the bf16 peak: {' or '.join(hours)}")
    out.append(f"memory {scale.memory_mb} MB a process; models kept on disk {disk / 1e6:,.0f} MB")
    out += [f"left out: {problem}" for problem in here.problems]
    return out + _matched(wanted, measured)


def _minutes(spec: Spec, measured: list[dict[str, Any]]) -> float | None:
    """Minutes of one seed, over its processes: median seconds a step of the nearest finished runs times the steps."""
    near, steps = _nearest(spec, measured)
    seconds = [r["seconds_training"] * r.get("processes", 1) / r["steps"] for r in near]
    return statistics.median(seconds) * steps / 60 if steps else None


def _flops(spec: Spec, scale: Scale, measured: list[dict[str, Any]]) -> tuple[float | None, bool]:
    """FLOPs of one seed, and whether they are a bound rather than an estimate."""
    near, steps = _nearest(spec, measured)
    counted = [work / r["steps"] for r in near if (work := training_flops(r))]
    if counted and steps:
        return statistics.median(counted) * steps, False
    parameters = scale.plan.get(spec.model)
    about = spec.dataset.plan
    if parameters is None or "tokens" not in about:
        return None, False
    recipe = spec.recipe
    sequences = (recipe.steps or 0) * recipe.batch_size or (recipe.epochs or 0) * about.get("examples", math.nan)
    return (None, False) if math.isnan(sequences) else (6.0 * parameters * about["tokens"] * sequences, True)


def _nearest(spec: Spec, measured: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], float]:
    """The finished runs most like this one, and how many steps it will take (0: not known)."""
    tests = (
        lambda r: r["path"] == spec.path,
        lambda r: (r["train_data"], r["model"]) == (spec.data, spec.model),
        lambda r: r["model"] == spec.model,
    )
    for test in tests:
        near = [r for r in measured if test(r) and r.get("steps")]
        alike = [r["steps"] for r in near if r["train_data"] == spec.data]
        steps = spec.recipe.steps or (statistics.median(alike) if alike else 0)
        if near and test is tests[0]:  # which may have ended when they had solved their task
            steps = min(steps, statistics.median(alike))
        if near and steps:
            return near, steps
    return [], 0


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
