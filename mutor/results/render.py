"""Tables in Markdown and LaTeX."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mutor.config.runs import cells_of
from mutor.config.schema import Scale, Table
from mutor.results import records
from mutor.results.cost import circumstances


def published_shape(frame: pd.DataFrame, table: Table) -> pd.DataFrame:
    """Rows are methods, columns datasets (and metrics, where several are shown): "mean ± std (seeds)"."""
    if table.draw == "cost":
        frame = frame.assign(label=frame["benchmark"] + ": " + frame["train_data"], train_data="", role="")
    planned = not table.needs_runs
    cells = frame[frame["metric"] == table.metrics[0]] if table.draw == "solve_rates" else frame
    metrics = set(cells["metric"])
    several = len(set(cells["role"])) > 1
    names = [f"{row['role']}: {row['label']}" if several else row["label"] for _, row in cells.iterrows()]
    columns = [
        row["metric"] if planned else " ".join([row["train_data"], row["metric"] * (len(metrics) > 1)]).strip()
        for _, row in cells.iterrows()
    ]
    shown = pd.DataFrame("", index=list(dict.fromkeys(names)), columns=list(dict.fromkeys(columns)))
    for name, column, (_, row) in zip(names, columns, cells.iterrows(), strict=True):
        shown.loc[name, column] = _text(row)
    return shown


def _text(row: Any) -> str:
    published = "" if row["reported"] is None or pd.isna(row["reported"]) else f" [published {row['reported']:g}]"
    if row["n_seeds"] == "":
        if row["mean"] is None or pd.isna(row["mean"]):
            return ""
        return f"{row['mean']:.2f}{published}" if row["unit"] == "1e9 FLOP" else f"{row['mean']:g}"
    if not row["n_seeds"]:
        return "not run"
    if row["mean"] is None or pd.isna(row["mean"]):
        return ""
    digits = {"fraction": 3, "score": 2, "times": 2, "s": 4, "1/s": 0, "GB": 2}.get(row["unit"], 1)
    spread = f" ± {row['std']:.{digits}f}" if row["std"] is not None and not pd.isna(row["std"]) else ""
    return f"{row['mean']:.{digits}f}{spread} (n={row['n_seeds']}){published}"


def markdown(table: Table, scale: Scale, shown: pd.DataFrame, beside: pd.DataFrame, runs: records.Records) -> str:
    """The table in Markdown, with what stands in for what, notes and the published values."""
    where = f"Scale: {scale.name} ({scale.description})."
    if table.draw == "flops":
        where = "Worked out from widths and lengths; nothing is trained."
    parts = [f"# {table.title}", "", where, "", table.caption, ""]
    if table.draw == "cost":
        parts += [" ".join(circumstances(table, scale, runs.runs)), ""]
    if table.needs_runs:
        parts += [f"{_metrics(table, scale)}, mean ± standard deviation over seeds (n = seeds).", ""]
    parts += [grid(shown), ""]
    shown_specs = [cell.spec for cell in cells_of(table, scale)]
    stands = {text for s in shown_specs for text in (s.dataset.stands_in_for, s.model_config.stands_in_for)}
    parts += [f"- Stands in for {text}." for text in sorted(filter(None, stands))]
    parts += [f"- {note}" for note in table.notes]
    parts += [f"- Left out: {problem}" for problem in _problems(shown_specs, runs)]
    if len(beside):
        order = "model variant method d_max a train_data metric epochs value seeds source"
        columns = [name for name in order.split() if beside[name].ne("").any()]
        parts += ["", "Published values:", "", grid(beside[columns].set_index("model"))]
    return "\n".join(parts) + "\n"


def _metrics(table: Table, scale: Scale) -> str:
    """What is shown, with units: "accuracy, percent"."""
    units = {cell.measured: cell.unit for cell in cells_of(table, scale)}
    if table.draw == "solve_rates":
        units = {table.metrics[0]: units.get(table.metrics[0], "percent")}
    names: dict[str, list[str]] = {}
    for metric, unit in units.items():
        names.setdefault(unit, []).append(metric)
    return "; ".join(f"{', '.join(metrics)}, {unit}" for unit, metrics in names.items())


def _problems(specs: list[Any], runs: records.Records) -> list[str]:
    """What is wrong with records of these settings, files named from the folder of runs."""
    paths = {f"{runs.runs / spec.path}/" for spec in specs}
    return [p.replace(f"{runs.runs}/", "") for p in runs.problems if any(p.startswith(path) for path in paths)]


def grid(frame: pd.DataFrame) -> str:
    """A frame in Markdown, its index in the first column."""
    head = [str(frame.index.name or ""), *map(str, frame.columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [
        "| " + " | ".join([str(i), *map(str, row)]) + " |" for i, row in zip(frame.index, frame.to_numpy(), strict=True)
    ]
    return "\n".join(lines)


def latex(table: Table, scale: Scale, shown: pd.DataFrame) -> str:
    """The table in LaTeX (booktabs)."""
    escaped = shown.map(_escape)
    escaped.index, escaped.columns = [_escape(i) for i in shown.index], [_escape(c) for c in shown.columns]
    body = [" & ".join(["", *escaped.columns]) + r" \\", r"\midrule"]
    body += [" & ".join([str(i), *row]) + r" \\" for i, row in zip(escaped.index, escaped.to_numpy(), strict=True)]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'r' * len(shown.columns)}}}",
        r"\toprule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{_escape(table.title)}. Scale: {_escape(scale.name)}. {_escape(table.caption)}}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _escape(text: Any) -> str:
    out = str(text).replace("\\", r"\textbackslash{}")
    for char in "&%$#_{}":
        out = out.replace(char, "\\" + char)
    return out.replace("±", r"$\pm$")
