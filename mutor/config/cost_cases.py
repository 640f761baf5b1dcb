"""Training steps to measure: the cases of a cost table, and how a scale shrinks them for its machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mutor.checks import choose, from_mapping, setting
from mutor.registry import ATTENTION, METHODS, load


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
        "auto",
        doc="auto: as in training; dense: a dense mask; flex_attention: a block mask, on a GPU alone",
        choices=("auto", "dense", "flex_attention"),
    )
    against: str = setting(doc="label of the case whose time is 1")
    sweep_over: str | None = setting(
        None, was="over", doc="what it is measured over", choices=("d_max", "registers", "tokens", None)
    )
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
class CostScaling:
    """How a scale shrinks the cases for its machine."""

    tokens: float = setting(1.0, doc="factor of all lengths and numbers of registers", low=0, open_ends=True)
    batch: float = setting(1.0, doc="factor of all batches", low=0, open_ends=True)
    max_tokens: int | None = setting(None, was="most", doc="longest sequence that is measured", low=1)
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
            each = [replace(case, value=v) for v in case.values] if case.sweep_over else [case]
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
    own = {} if case.sweep_over in (None, "tokens") else {case.sweep_over: case.value}
    return {**case.settings, **own}


def cases_of(table: Any, scale: Any) -> tuple[CostScaling, list[Case]]:
    """How a scale shrinks a table's cases, and the cases as it measures them, those beyond its longest sequence left
    out, and on a CPU those of attention that trains on none."""
    scaling = from_mapping(CostScaling, scale.cost, f"config/scales/{scale.name}.yaml: cost")

    def length(tokens: int) -> int:
        return max(8, round(tokens * scaling.tokens))

    out = []
    for case in load_cases(table.sections, f"config/tables/{table.name}.yaml"):
        if scale.device == "cpu" and case.attention in ATTENTION and not ATTENTION[case.attention].cpu_gradients:
            continue
        settings, value = dict(case.settings), case.value
        if case.sweep_over in ("tokens", "registers") and value is not None:
            value = length(value)
        if settings.get("placement") == "random" and "registers" in settings:
            settings["registers"] = length(settings["registers"])
        tokens = value if case.sweep_over == "tokens" and value is not None else length(case.tokens)
        if tokens <= (scaling.max_tokens or tokens):
            lengths = tuple(
                (max(2, round(p * scaling.tokens)), max(4, round(a * scaling.tokens))) for p, a in case.lengths
            )
            smaller = {"batch": max(2, round(case.batch * scaling.batch)), "tokens": tokens, "lengths": lengths}
            rows = case.row_tokens and (scaling.row_tokens or case.row_tokens)
            out.append(replace(case, **smaller, settings=settings, value=value, row_tokens=rows))
    return scaling, out
