"""Tables in Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from mutor.config.runs import Spec
from mutor.config.schema import Table
from mutor.registry import TASKS, load, resolve
from mutor.results.cells import Evidence, stand_ins
from mutor.results.numbers import is_missing, text

CHOSEN = {  # by what names the best checkpoint, see Task.chosen_on
    "valid": "chosen on validation problems",
    "test": "chosen on the test problems themselves, as in the paper",
    "": "the last one, as there are no validation problems",
}
PATH_ONLY = "Path only at this scale: it shows that every step works, from prompt to cell, and nothing of the methods."
MARKDOWN = str.maketrans({"|": r"\|", "\\": r"\\", "<": "&lt;", "\n": " "})
LATEX = str.maketrans(
    {char: f"\\{char}" for char in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "±": r"$\pm$", "\n": " "}
    | {char: rf"\ensuremath{{{char}}}" for char in "<>|"}
)
DIGITS = {
    "fraction": 3,
    "score": 2,
    "times": 2,
    "tokens": 2,
    "passes": 2,
    "s": 4,
    "nats": 4,
    "1/s": 0,
    "GB": 2,
}  # by unit, behind the point; others: 1


def printed_cells(evidence: Evidence, table: Table) -> pd.DataFrame:
    """The cells that stand in .md and .tex, under the names that they have there."""
    frame = evidence.frame(table)
    return resolve(table.drawing.printed)(frame, table) if table.drawing.printed else frame


def first_metric(frame: pd.DataFrame, table: Table) -> pd.DataFrame:
    """The cells of the table's first metric."""
    return frame[frame["metric"] == table.metrics[0]]


def rates_ahead(frame: pd.DataFrame, table: Table) -> pd.DataFrame:
    """The rates that a figure over how far ahead has."""
    return frame[frame["metric"].str.match("(accuracy|accepted)_ahead_")]


def published_shape(evidence: Evidence, table: Table) -> pd.DataFrame:
    """Rows are methods, columns datasets (and metrics, where several are shown): "mean ± std (seeds)".

    What ran stands in the corner, or before each row where models of several roles did. Blank is what a method that
    ran does not measure, a token further ahead than it predicts.
    """
    return evidence.once("shape", table.name, lambda: _shape(printed_cells(evidence, table), table))


def unmeasured(cells: pd.DataFrame) -> pd.Series:
    """Of each cell, whether a method that ran does not measure it."""
    seeds = pd.to_numeric(cells["n_seeds"], errors="coerce")
    return (seeds == 0) & (seeds.groupby([cells["label"], cells["data"]]).transform("max") > 0)


def _shape(cells: pd.DataFrame, table: Table) -> pd.DataFrame:
    several_roles, several_metrics = (cells[column].nunique() > 1 for column in ("role", "metric"))
    blank = unmeasured(cells)
    shown: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}  # in the order in which they come up, as the rows are
    for row, without in zip(cells.to_dict("records"), blank, strict=True):
        name = f"{row['ran']}: {row['label']}" if several_roles else row["label"]
        column = row["metric"]
        if table.needs_runs:
            column = f"{row['data']} {row['metric'] if several_metrics else ''}".strip() or row["metric"]
        columns[column] = None
        shown.setdefault(name, {})[column] = "" if without else _text(row)
    texts = [[row.get(column, "") for column in columns] for row in shown.values()]
    corner = "" if several_roles else "; ".join(dict.fromkeys(cells["ran"]))
    return pd.DataFrame(texts, index=pd.Index(shown, name=corner), columns=list(columns), dtype=object)


def _text(row: Mapping[Any, Any]) -> str:
    """A cell in words: "99.5 ± 0.3 (n=3) [published 98]"."""
    published = "" if is_missing(row["reported"]) else f" [published {row['reported']:g}]"
    if is_missing(row["n_seeds"]):  # a setting, or worked out
        return f"{text(row['mean'], '.2f')}{published}" if row["unit"] == "1e9 FLOP" else text(row["mean"], "g")
    if not row["n_seeds"]:
        return "not run"
    if is_missing(row["mean"]):
        return ""
    form = f".{DIGITS.get(row['unit'], 1)}f"
    if not is_missing(row["n_solved"]):
        return solved(row) + (f", mean {text(row['mean'], form)}{published}" if published else "")
    spread = "" if is_missing(row["std"]) else f" ± {text(row['std'], form)}"
    return f"{text(row['mean'], form)}{spread} (n={row['n_seeds']}){published}"


def solved(row: Mapping[Any, Any]) -> str:
    """Seeds that solve a cell's task, with the exact interval of their share: "9 of 10 solved (56 to 100%)"."""
    share = f"{row['solved_low']:.0f} to {row['solved_high']:.0f}%"
    return f"{row['n_solved']:.0f} of {row['n_seeds']} solved ({share})"


def markdown(evidence: Evidence, table: Table) -> str:
    """The table in Markdown, with what stands in for what, notes and the published values."""
    heading = table.drawing.heading.format(scale=evidence.scale)
    parts = [f"# {table.title}", ""]
    if said := answer(evidence, table):
        parts += [f"**{plain(said[0])}**", "", *(f"- {plain(sentence)}" for sentence in said[1:]), ""]
    parts += [heading, "", caption(evidence, table), ""]
    if about := circumstances(evidence, table):
        parts += [" ".join(about), ""]
    if table.needs_runs:
        parts += [_numbers(printed_cells(evidence, table)), ""]
    parts += [grid(published_shape(evidence, table)), ""]
    specs = [cell.spec for cell in evidence.cells(table)]
    parts += [f"- Stands in for {plain(words)}." for words in stand_ins(evidence.frame(table))]
    parts += [f"- {note}" for note in table.notes]
    parts += [f"- Left out: {plain(problem)}" for problem in _problems(evidence, specs)]
    beside = evidence.published(table).frame
    if len(beside):
        order = "role variant method d_max a train_data metric epochs iterations value seeds source"
        columns = [name for name in order.split() if beside[name].ne("").any()]
        parts += ["", "Published values:", "", grid(beside[columns].set_index("role"))]
    return "\n".join(parts) + "\n"


def caption(evidence: Evidence, table: Table) -> str:
    """What a table shows, and what its best checkpoints were chosen on, as their records say or new runs would."""
    chosen: dict[str, dict[str, None]] = {}
    for cell in [cell for cell in evidence.cells(table) if cell.checkpoint == "best"]:
        task, config = load(TASKS, cell.spec.dataset.task, "task"), cell.spec.task_config
        now = task.chosen_on(config)
        for split in {record.get("chosen_on", now) for record in evidence.records_of(cell)} or {now}:
            chosen.setdefault(split, {})[task.describe(config)] = None
    texts = [CHOSEN[split] + f" ({', '.join(names)})" * (len(chosen) > 1) for split, names in chosen.items()]
    best = f" The best checkpoint is {'; '.join(texts)}." if chosen else ""
    return f"{PATH_ONLY} " * evidence.path_only(table) + table.caption + best


def answer(evidence: Evidence, table: Table) -> list[str]:
    """Sentences that answer what a table asks, the first one in short, where its drawing has some."""
    return resolve(table.drawing.answer)(evidence, table) if table.drawing.answer else []


def circumstances(evidence: Evidence, table: Table) -> list[str]:
    """Sentences on how a table's numbers were made, where its drawing has some."""
    return resolve(table.drawing.about)(evidence, table) if table.drawing.about else []


def _numbers(cells: pd.DataFrame) -> str:
    """What the numbers are, with units: "accuracy, percent, mean ± ..."; and whose the published ones are."""
    names: dict[str, list[str]] = {}
    counted = cells["solved_at"].notna()
    for metric, unit in dict(zip(cells[~counted]["metric"], cells[~counted]["unit"], strict=True)).items():
        names.setdefault(unit, []).append(metric)
    units = "; ".join(f"{', '.join(metrics)}, {unit}" for unit, metrics in names.items())
    said = [f"{units}, mean ± standard deviation over seeds (n = seeds)."] if units else []
    for metric, least in dict(zip(cells[counted]["metric"], cells[counted]["solved_at"], strict=True)).items():
        said.append(f"{metric}: seeds that reach {least:g}%, with the exact 95% interval of their share of all seeds.")
    beside = (cells["stands_in_for"] != "") & cells["reported"].notna()
    published = " Published: of the models and data that are stood in for." if beside.any() else ""
    return " ".join(said) + published


def _problems(evidence: Evidence, specs: list[Spec]) -> list[str]:
    """What is wrong with records of these settings, files named from the folder of runs."""
    folder = evidence.runs.runs
    paths = tuple({f"{folder / spec.path}/" for spec in specs})
    return [p.replace(f"{folder}/", "") for p in evidence.runs.problems if p.startswith(paths)]


def plain(value: Any) -> str:
    """A text for Markdown, as it is read: what is no row, no HTML and no escape of it stays none."""
    return str(value).translate(MARKDOWN)


def grid(frame: pd.DataFrame, shown: Callable[[Any], str] = plain) -> str:
    """A frame in Markdown, its index in the first column; `shown` writes a cell, and leaves Markdown that is one."""
    head = [shown(frame.index.name or ""), *map(shown, frame.columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in zip(frame.index, frame.to_numpy(), strict=True):
        lines.append("| " + " | ".join([shown(name), *map(shown, row)]) + " |")
    return "\n".join(lines)


def latex(evidence: Evidence, table: Table) -> str:
    """The table in LaTeX (booktabs)."""
    shown = published_shape(evidence, table)
    words = [
        f"{table.title}. Scale: {evidence.scale.name}. {caption(evidence, table)}",
        *circumstances(evidence, table),
    ]
    words += [_numbers(printed_cells(evidence, table))] if table.needs_runs else []
    words += [f"Stands in for {text}." for text in stand_ins(evidence.frame(table))]
    escaped = shown.map(latex_text)
    escaped.index, escaped.columns = [latex_text(i) for i in shown.index], [latex_text(c) for c in shown.columns]
    body = [" & ".join([latex_text(shown.index.name), *escaped.columns]) + r" \\", r"\midrule"]
    body += [" & ".join([str(i), *row]) + r" \\" for i, row in zip(escaped.index, escaped.to_numpy(), strict=True)]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'r' * len(shown.columns)}}}",
        r"\toprule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{latex_text(' '.join(words))}}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def latex_text(value: Any) -> str:
    """A text for LaTeX, as it is read."""
    return str(value).translate(LATEX)
