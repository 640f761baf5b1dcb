"""What a training step costs: the cases to measure, and their measurements as rows of an artifact. No torch.

python benchmarks/cost.py --scale gpu     measures them, into runs/<scale>/cost/<table>.json
python -m mutor collect rebuttal_latency  draws what was measured
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mutor.config.cost_cases import Case, CostScaling, cases_of, settings_of
from mutor.config.runs import settings_name
from mutor.config.schema import Table
from mutor.files import read_json
from mutor.results.cells import what_ran
from mutor.results.flops import PEAKS

if TYPE_CHECKING:
    import pandas as pd

    from mutor.results.cells import Evidence

UNITS = {
    "ratio": "times",
    "token_ratio": "times",
    "flop_ratio": "times",
    "seconds_per_step": "s",
    "sequences_per_second": "1/s",
    "tokens_per_second": "1/s",
    "utilisation": "percent",
    "peak_memory": "GB",
}


def file_of(runs: Path, scale: str, table: str) -> Path:
    """Where a table's measurements are kept."""
    return Path(runs) / scale / "cost" / f"{table}.json"


def measured(file: Path) -> dict[str, Any]:
    """Measurements so far: {"cases": {key: what was measured, and by what}}; nothing where there is no file.

    Raises ValueError naming a file that is damaged.
    """
    content = read_json(file) if file.exists() else {"cases": {}}
    try:
        for found in content["cases"].values():
            if found["case"] is not None and "seconds" in found:
                metrics_of(found, found["device"] + f"{found['added_parameters']:d}")
    except (TypeError, KeyError, AttributeError, ValueError, ZeroDivisionError):
        raise ValueError(f"{file}: no measurements as benchmarks/cost.py writes them") from None
    return content


def of_case(content: Mapping[str, Any], case: Case) -> dict[str, Any] | None:
    """What was measured of a case as the configuration has it now; content: from `measured`."""
    found = content["cases"].get(case.key)
    return found if found and found["case"] == as_dict(case) and "seconds" in found else None


def _shown(evidence: Evidence, table: Table) -> dict[str, Any]:
    """A table's measurements; damaged ones are left out, and named in `runs.problems`."""
    try:
        return measured(file_of(evidence.runs.runs, evidence.scale.name, table.name))
    except ValueError as error:
        evidence.runs.leave_out(error)
        return {"cases": {}}


def peak_of(device: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device, None where they are not known here."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def metrics_of(found: Mapping[str, Any], device: str) -> dict[str, tuple[float, float | None]]:
    """Metric -> (median, standard deviation over the rounds) of one case.

    found: seconds and reference_seconds a step of each round; sequences, tokens and flops a step, and the
    reference's; peak_memory_bytes.
    """
    seconds, reference = found["seconds"], found["reference_seconds"]
    each: dict[str, list[float]] = {
        "ratio": [a / b for a, b in zip(seconds, reference, strict=True)],
        "token_ratio": [found["tokens"] / found["reference_tokens"]],
        "flop_ratio": [found["flops"] / found["reference_flops"]],
        "seconds_per_step": seconds,
        "sequences_per_second": [found["sequences"] / s for s in seconds],
        "tokens_per_second": [found["tokens"] / s for s in seconds],
    }
    peak = peak_of(device)
    if peak:
        each["utilisation"] = [100 * found["flops"] / s / peak for s in seconds]
    if found.get("peak_memory_bytes"):
        each["peak_memory"] = [found["peak_memory_bytes"] / 1e9]
    return {
        name: (statistics.median(values), statistics.stdev(values) if len(values) > 1 else None)
        for name, values in each.items()
    }


def rows(evidence: Evidence, table: Table) -> Iterator[dict[str, Any]]:
    """Cells of a cost table, one a case and metric; n_seeds counts rounds, 0 where nothing was measured."""
    content = _shown(evidence, table)
    scaling, wanted = cases_of(table, evidence.scale)
    for case in wanted:
        found = of_case(content, case)
        values = metrics_of(found, found["device"]) if found else {}
        row = _described(case, scaling)
        for metric in table.metrics:
            mean, std = values.get(metric, (None, None))
            same = {"role": [case.model], "variant": [case.published], "metric": [metric]}
            yield row | {
                "metric": metric,
                "unit": UNITS[metric],
                "added_params": found["added_parameters"] if found else "",
                "n_seeds": len(found["seconds"]) if found else 0,
                "mean": mean,
                "std": std,
                "reported": None if row["stands_in_for"] else evidence.published(table).beside(same),
                "values": found["seconds"] if found else [],
            }


def _described(case: Case, scaling: CostScaling) -> dict[str, Any]:
    """A case's columns without its numbers; scaling: what is measured in its place."""
    settings, model = settings_of(case), scaling.models.get(case.model, case.model)
    here = [model] * (model != case.model) + _smaller(scaling)
    return {
        "role": case.model,
        "model": model,
        "method": case.method,
        "train_data": case.label if case.value is None else f"{case.label}, {case.sweep_over} {case.value}",
        "benchmark": case.section,
        "d_max": settings.get("d_max", ""),
        "a": settings.get("a", ""),
        "registers": settings.get("registers", ""),
        "placement": settings.get("placement", "all") if case.method == "mutor" else "",
        "settings": settings_name(settings) if settings else "",
        "stands_in_for": "" if model == case.model else f"{case.model} (here {model}, random weights)",
        "label": case.label,
        "ran": what_ran(model, case.model),
        "panel": f"{', '.join(here)} (case: {case.section})" if here else case.section,
        "sweep": case.sweep_over or "",
        "x": case.value,
    }


def _smaller(scaling: CostScaling) -> list[str]:
    """How a scale shrinks the cases, in words."""
    factors = ((scaling.batch, "batch"), (scaling.tokens, "lengths"))
    return [f"{factor:g} x {name}" for factor, name in factors if factor != 1]


def printed(frame: pd.DataFrame, table: Table) -> pd.DataFrame:
    """The cells as .md and .tex name them: by section and case, whose names say the model."""
    return frame.assign(label=frame["panel"] + ": " + frame["train_data"], role="", ran="")


def circumstances(evidence: Evidence, table: Table) -> list[str]:
    """Sentences on the device, the number of rounds, and how the scale shrinks the cases."""
    content = _shown(evidence, table)
    scaling, wanted = cases_of(table, evidence.scale)
    devices = sorted({found["device"] for case in wanted if (found := of_case(content, case))})
    where = f"Measured on {' and '.join(devices)}" if devices else "Not measured yet"
    out = [f"{where}; medians ± standard deviation of n rounds."]
    if smaller := _smaller(scaling):
        out.append(f"Here cases have {' and '.join(smaller)} of what their names say.")
    return out


def as_dict(case: Case) -> dict[str, Any]:
    """A case as JSON gives it back."""
    return json.loads(json.dumps(vars(case)))
