"""What a training step costs: the cases to measure, and their measurements as rows of an artifact. No torch.

python benchmarks/cost.py --scale gpu     measures them, into runs/<scale>/cost/<table>.json
python -m mutor collect rebuttal_latency  draws what was measured
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mutor.accounting import PEAKS
from mutor.checks import choose, from_mapping, setting
from mutor.registry import METHODS, load

UNITS = {
    "ratio": "times", "token_ratio": "times", "flop_ratio": "times", "seconds_per_step": "s",
    "sequences_per_second": "1/s", "tokens_per_second": "1/s", "utilisation": "percent", "peak_memory": "GB",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training step to measure: a method on a model and batch, against another case of its section."""

    section: str = setting(doc="which cases stand together")
    label: str = setting(doc="its name there")
    model: str = setting(doc="role of the model")
    method: str = setting(doc="a registered method")
    settings: dict = setting({}, doc="settings of the method")
    batch: int = setting(doc="sequences a step", low=1)
    tokens: int = setting(256, doc="tokens of every sequence that are fed, without registers", low=2)
    lengths: tuple = setting((), doc="or pairs of prompt and answer tokens, repeated over the batch")
    row_tokens: int | None = setting(None, doc="sequences packed into rows of so many tokens", low=1)
    padded: bool = setting(False, doc="one sequence a row all the same")
    interleaved: bool = setting(False, doc="registers behind their tokens, not behind all tokens")
    one_at_a_time: bool = setting(False, doc="the published fine-tuning recipe: a dense mask, one sequence a pass")
    attention: str = setting(
        "auto", doc="auto: block masks on a GPU, dense ones elsewhere; causal: no mask at all",
        choices=("auto", "dense", "causal"),
    )  # fmt: skip
    against: str = setting(doc="label of the case whose time is 1")
    over: str | None = setting(None, doc="what it is measured over", choices=("d_max", "registers", "tokens", None))
    values: tuple = setting((), doc="values of that", low=1)
    value: int | None = setting(None, doc="the one of this case", low=1)
    published: str = setting("", doc="variant of config/reported.csv that measured the same")

    @property
    def key(self) -> str:
        """Its name in a file of measurements."""
        return f"{self.section} | {self.label}" + ("" if self.value is None else f" | {self.value}")

    def reference(self, among: list[Case]) -> Case:
        """The case it is compared with: of the same value, where that is measured over the same."""
        alike = [case for case in among if (case.section, case.label) == (self.section, self.against)]
        return next((case for case in alike if case.value == self.value), alike[0])


@dataclass(frozen=True, kw_only=True)
class Smaller:
    """How a scale shrinks the cases for its machine."""

    tokens: float = setting(1.0, doc="factor of all lengths and numbers of registers", low=0, open_ends=True)
    batch: float = setting(1.0, doc="factor of all batches", low=0, open_ends=True)
    most: int | None = setting(None, doc="longest sequence that is measured", low=1)
    row_tokens: int | None = setting(None, doc="rows that sequences are packed into", low=1)
    models: dict = setting({}, doc="role -> model of the scale in its place")
    rounds: int = setting(5, doc="times each case takes turns with its reference", low=1)
    seconds: float = setting(1.0, doc="about how long a turn is", low=0)


def load_cases(sections: tuple[Any, ...], where: str) -> tuple[Case, ...]:
    """The cases of a table's sections, each section's keys being defaults of its cases; one a value."""
    out: list[Case] = []
    for section in sections:
        cases = section.get("cases") if isinstance(section, dict) else None
        if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
            raise ValueError(f"{where}: sections: {section!r} is not a mapping with a list of mappings as `cases`")
        common = {key: value for key, value in section.items() if key != "cases"}
        found = []
        for given in cases:
            case = from_mapping(Case, {**common, **given}, f"{where}: {section.get('section')}")
            method = load(METHODS, case.method, f"{where}: {case.label}: method")
            each = [replace(case, value=v) for v in case.values] if case.over else [case]
            for one in each:
                from_mapping(method.Config, settings_of(one), f"{where}: {one.key}: settings")
            found += each
        labels = {case.label for case in found}
        for case in found:
            choose(case.against, labels, f"{where}: {case.key}: against")
        out += found
    return tuple(out)


def settings_of(case: Case) -> dict[str, Any]:
    """Settings of a case's method, with the value it is measured at."""
    own = {} if case.over in (None, "tokens") else {case.over: case.value}
    return {**case.settings, **own}


def cases(table: Any, scale: Any) -> tuple[Smaller, list[Case]]:
    """How a scale shrinks a table's cases, and the cases as it measures them, those beyond its longest sequence left
    out."""
    by = from_mapping(Smaller, scale.cost, f"config/scales/{scale.name}.yaml: cost")

    def length(tokens: int) -> int:
        return max(8, round(tokens * by.tokens))

    out = []
    for case in load_cases(table.sections, f"config/tables/{table.name}.yaml"):
        settings, value = dict(case.settings), case.value
        if case.over in ("tokens", "registers") and value is not None:
            value = length(value)
        if settings.get("placement") == "random" and "registers" in settings:
            settings["registers"] = length(settings["registers"])
        tokens = value if case.over == "tokens" and value is not None else length(case.tokens)
        if tokens <= (by.most or tokens):
            lengths = tuple((max(2, round(p * by.tokens)), max(4, round(a * by.tokens))) for p, a in case.lengths)
            smaller = {"batch": max(2, round(case.batch * by.batch)), "tokens": tokens, "lengths": lengths}
            rows = case.row_tokens and (by.row_tokens or case.row_tokens)
            out.append(replace(case, **smaller, settings=settings, value=value, row_tokens=rows))
    return by, out


def file_of(runs: Path, scale: str, table: str) -> Path:
    """Where a table's measurements are kept."""
    return Path(runs) / scale / "cost" / f"{table}.json"


def measured(file: Path) -> dict[str, Any]:
    """Measurements so far: {"device": ..., "cases": {key: what was measured}}; nothing where there is no file."""
    return json.loads(file.read_text()) if file.exists() else {"device": None, "cases": {}}


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


def rows(table: Any, scale: Any, runs: Path, reported: Any) -> Iterator[dict[str, Any]]:
    """Cells of a cost table, one a case and metric; n_seeds counts rounds, 0 where nothing was measured."""
    content = measured(file_of(runs, scale.name, table.name))
    by, wanted = cases(table, scale)
    for case in wanted:
        found = content["cases"].get(case.key)
        # left by an older configuration
        found = found if found and found["case"] == as_dict(case) and "seconds" in found else None
        values = metrics_of(found, content["device"]) if found else {}
        model = by.models.get(case.model, case.model)
        stands_in = "" if model == case.model else f"{case.model} (here {model}, random weights)"
        settings = settings_of(case)
        for metric in table.metrics:
            mean, std = values.get(metric, (None, None))
            same = reported[
                reported["artifact"].isin(table.reported) & (reported["variant"] == case.published)
                & (reported["model"] == case.model) & (reported["metric"] == metric)
            ]  # fmt: skip
            published = float(same["value"].iloc[0]) if case.published and len(same) and not stands_in else None
            yield {
                "artifact": table.name, "scale": scale.name, "role": case.model, "model": model, "method": case.method,
                "train_data": case.label if case.value is None else f"{case.label}, {case.over} {case.value}",
                "benchmark": case.section, "metric": metric, "unit": UNITS[metric], "d_max": settings.get("d_max", ""),
                "a": settings.get("a", ""), "registers": settings.get("registers", ""),
                "placement": settings.get("placement", "all") if case.method == "mutor" else "", "iterations": "",
                "epochs": "", "register_embedding": "", "added_params": found["added_parameters"] if found else "",
                "n_seeds": len(found["seconds"]) if found else 0, "mean": mean, "std": std, "ci_low": None,
                "ci_high": None, "reported": published,
                "reported_difference": None if published is None or mean is None else mean - published,
                "stands_in_for": stands_in, "label": case.label, "values": found["seconds"] if found else [],
                "chance": None, "data": case.over or "", "path": "" if case.value is None else case.value,
            }  # fmt: skip


def circumstances(table: Any, scale: Any, runs: Path) -> list[str]:
    """Sentences on the device, the number of rounds, and how the scale shrinks the cases."""
    by, wanted = cases(table, scale)
    device = measured(file_of(runs, scale.name, table.name))["device"]
    where = f"Measured on {device}" if device else "Not measured yet"
    out = [f"{where}; medians ± standard deviation of n rounds."]
    if (by.tokens, by.batch) != (1, 1):
        out.append(f"Here lengths are {by.tokens:g} times and batches {by.batch:g} times those named.")
    roles = {case.model: by.models[case.model] for case in wanted if case.model in by.models}
    return out + [f"In the place of {role}: {model}." for role, model in roles.items()]


def as_dict(case: Case) -> dict[str, Any]:
    """A case as JSON gives it back."""
    return json.loads(json.dumps(vars(case)))
