"""What a target takes before it runs: settings, seeds done and to do, time, disk and memory.

Times come from finished runs: of the same setting, else of the same data and model, else of the same scale; where
there are none, the scale's own bound is shown.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from mutor import results
from mutor.config import Scale, Spec, Table, run_cells, specs


def lines(chosen: list[Table], scale: Scale, runs: Path) -> list[str]:
    """The plan as printable lines."""
    wanted = specs([cell for table in chosen for cell in run_cells(table, scale)])
    measured = _measured(runs, scale.name)
    out = [f"scale {scale.name}: {scale.description}", f"{'done':>5} {'to do':>5} {'minutes':>8}  setting"]
    total, unknown, todo_all, disk = 0.0, 0, 0, 0
    for spec in wanted:
        todo = [s for s in spec.seeds if not results.finished(runs, spec, s)]
        minutes = _minutes(spec, measured)
        todo_all += len(todo)
        disk += len(todo) * 2 * _bytes(spec, measured)
        if not todo:
            text = "-"
        elif minutes is None:
            unknown += 1
            text = "?"
        else:
            total += minutes * len(todo)
            text = f"{minutes * len(todo):.1f}"
        out.append(f"{len(spec.seeds) - len(todo):>5} {len(todo):>5} {text:>8}  {spec.path}")
    unit = f"GPU minutes on {scale.gpus} GPUs a run" if scale.gpus else f"CPU core minutes, {scale.threads} a run"
    out.append(f"{len(wanted)} settings, {todo_all} seeded runs to do: {total:.0f} {unit}")
    if unknown:
        out.append(
            f"{unknown} settings have no finished run to judge by; scheduled with at most {scale.minutes} minutes each"
        )
    out.append(f"memory {scale.memory_mb} MB a run; models kept on disk {disk / 1e6:.0f} MB")
    return out


def _measured(runs: Path, scale: str) -> list[dict[str, Any]]:
    found = []
    for file in sorted((runs / scale).glob("*/*/*/*/seed*/metrics.json")):
        try:
            record = results.read(file)
        except ValueError:
            continue
        record["path"] = "/".join(file.parts[-7:-2])
        found.append(record)
    return found


def _minutes(spec: Spec, measured: list[dict[str, Any]]) -> float | None:
    """Minutes of one seed: median seconds a step of the nearest finished runs times the steps."""
    tests = (
        lambda r: r["path"] == spec.path,
        lambda r: (r["train_data"], r["model"]) == (spec.data, spec.model),
        lambda r: r["model"] == spec.model,
    )
    for test in tests:
        near = [r for r in measured if test(r) and r["steps"]]
        alike = [r["steps"] for r in near if r["train_data"] == spec.data]
        steps = spec.recipe.steps or (statistics.median(alike) if alike else None)
        if near and steps:
            return statistics.median(r["seconds_training"] / r["steps"] for r in near) * steps / 60
    return None


def _bytes(spec: Spec, measured: list[dict[str, Any]]) -> int:
    same = [r["trainable_parameters"] for r in measured if r["model"] == spec.model]
    return 4 * max(same, default=0)
