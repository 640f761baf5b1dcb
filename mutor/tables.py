"""Artifacts from run records: a tidy CSV (one row a cell, the same columns in all), Markdown, LaTeX, figures.

collect_artifact(load_table(root, "figure4"), scale, Records(runs), read_reported(file), folder)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from mutor import cost, results
from mutor.accounting import attention_exceeds_feed_forward, layer_flops, tipping_point
from mutor.checks import choose
from mutor.config import Cell, Scale, Table, cells
from mutor.registry import TASKS, load
from mutor.stats import summarise
from mutor.tasks.corpora import CORPORA

COLUMNS = [
    "artifact", "scale", "role", "model", "method", "train_data", "benchmark", "metric", "unit", "d_max", "a",
    "registers", "placement", "iterations", "epochs", "register_embedding", "added_params", "n_seeds", "mean", "std",
    "ci_low", "ci_high", "reported", "reported_difference", "stands_in_for",
]  # fmt: skip
PUBLISHED_SETTINGS = ("d_max", "a", "registers", "placement", "register_embedding")


def read_reported(file: Path) -> pd.DataFrame:
    """The published values, config/reported.csv, as texts."""
    return pd.read_csv(file, dtype=str, keep_default_na=False)


def collect_artifact(
    table: Table, scale: Scale, runs: results.Records, reported: pd.DataFrame, folder: Path
) -> list[Path]:
    """Build all files of one table or figure from whatever runs exist; returns them.

    What is wrong with a record, which is then left out, stands below the table.
    """
    frame = cell_frame(table, scale, runs, reported)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{table.name}.{ending}" for ending in ("csv", "md", "tex")]
    write(files[0], lambda f: frame[COLUMNS].to_csv(f, index=False, lineterminator="\n", float_format="%.6g"))
    shown = published_shape(frame, table)
    beside = published_rows(reported, table)
    write(files[1], lambda f: f.write_text(markdown(table, scale, shown, beside, runs)))
    write(files[2], lambda f: f.write_text(latex(table, scale, shown)))
    if table.draw == "solve_rates":
        from mutor.plots import curves, solve_rates

        files += solve_rates(table, scale, frame, folder)
        files += curves(table, scale, runs, folder)
    if table.draw == "sweep":
        from mutor.plots import sweep

        files += sweep(table, scale, frame, folder)
    if table.draw == "cost":
        from mutor.plots import costs

        files += costs(table, scale, frame, folder)
    if table.draw == "images":
        from mutor.plots import samples, sweep

        files += sweep(table, scale, frame, folder)
        files += samples(table, scale, runs, folder)
    return files


def write(file: Path, writer: Callable[[Path], Any]) -> None:
    """Write a file under another name and rename it, so that a half-written one never stands there."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp{file.suffix}")
    writer(temporary)
    os.replace(temporary, file)


def cell_frame(table: Table, scale: Scale, runs: results.Records, reported: pd.DataFrame) -> pd.DataFrame:
    """One row a cell, in the table's order, with COLUMNS and for drawing: label, values, chance, data, path."""
    if table.draw == "flops":
        rows = list(_flops_rows(table, scale, reported))
    elif table.draw == "cost":
        rows = list(cost.rows(table, scale, runs.runs, reported))
    else:
        found = cells(table, scale)
        if table.needs_runs:
            rows = [_cell_row(table, cell, runs, reported) for cell in found]
        else:
            rows = [_settings_row(table, cell) for cell in found]
        if not rows:
            roles = {f"{row.model} on {row.train_data}" for row in table.rows}
            raise ValueError(
                f"{table.name}: scale {scale.name!r} has nothing in the place of {', '.join(sorted(roles))}"
            )
    return pd.DataFrame(rows, columns=[*COLUMNS, "label", "values", "chance", "data", "path"])


def cell_records(cell: Cell, runs: results.Records) -> list[dict[str, Any]]:
    """The records that a cell is made of: all seeds there are, or as many as the source has."""
    return runs.of(cell.spec)[: cell.row.max_seeds]


def _cell_row(table: Table, cell: Cell, runs: results.Records, reported: pd.DataFrame) -> dict[str, Any]:
    spec = cell.spec
    task = load(TASKS, spec.dataset.task, "task")
    found = cell_records(cell, runs)
    measured = [results.checkpoint_metrics(record, cell.checkpoint) for record in found]
    for metrics in measured:
        choose(cell.measured, metrics, f"{table.name}: metric on {spec.data}")
    values = [metrics[cell.measured] for metrics in measured]
    scores = [results.problem_scores(record, cell.checkpoint, cell.measured) for record in found]
    summary = summarise(values, scores, rate=cell.unit == "percent")
    row = _described(table, cell)
    published = _published(reported, table, cell, row["train_data"])
    stands_in = spec.stands_in_for
    difference = None if published is None or summary.mean is None or stands_in else summary.mean - published
    return row | {
        "added_params": found[0]["added_parameters"] if found else "", "n_seeds": summary.n_seeds,
        "mean": summary.mean, "std": summary.std, "ci_low": summary.ci_low, "ci_high": summary.ci_high,
        "reported": published, "reported_difference": difference, "values": values,
        "chance": task.chance(spec.task_config) if hasattr(task, "chance") else None,
    }  # fmt: skip


def _described(table: Table, cell: Cell) -> dict[str, Any]:
    """A cell's columns without its numbers."""
    spec = cell.spec
    task = load(TASKS, spec.dataset.task, "task")
    settings = {key: getattr(spec.method_config, key, "") for key in PUBLISHED_SETTINGS}
    if settings["placement"] == "all":
        settings["registers"] = ""
    return {
        "artifact": table.name, "scale": spec.scale, "role": spec.model_config.role, "model": spec.model,
        "method": spec.method + (f" ({_extra(spec)})" if _extra(spec) else ""),
        "train_data": task.describe(spec.task_config), "benchmark": task.scored_on(spec.task_config),
        "metric": cell.measured, "unit": cell.unit, **settings,
        "iterations": cell.iterations, "epochs": spec.recipe.epochs, "stands_in_for": spec.stands_in_for,
        "label": cell.row.label or _label(spec), "data": spec.data, "path": spec.path,
    }  # fmt: skip


def _settings_row(table: Table, cell: Cell) -> dict[str, Any]:
    """One setting of a run, by name: of its recipe, its method or its task; nothing where it has none of that name."""
    spec = cell.spec
    places = (spec.recipe, spec.method_config, spec.task_config, CORPORA.get(getattr(spec.task_config, "corpus", "")))
    values = [getattr(place, cell.metric, None) for place in places]
    row = _described(table, cell)
    text = f"{row['label'].split(', d_max')[0]} on {row['train_data']}"
    value = next((v for v in values if v is not None), None)
    return row | {"mean": value, "n_seeds": "", "unit": "", "reported": None, "label": text}


def _flops_rows(table: Table, scale: Scale, reported: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Cells that are computed, not run: FLOPs of a layer by model and length, and both tipping points."""
    for role, shape in table.shapes.items():
        found = []
        for length in table.lengths:
            attention, feed_forward = layer_flops(shape, length)
            values = (attention, feed_forward, attention + feed_forward)
            found += [(f"{length} tokens", m, v / 1e9, "1e9 FLOP") for m, v in zip(table.metrics, values, strict=True)]
        for rule in (tipping_point, attention_exceeds_feed_forward):
            found.append(("tipping points", rule.__name__, rule(shape), "tokens"))
        for label, metric, value, unit in found:
            same = reported[
                reported["artifact"].isin(table.reported) & (reported["model"] == role) & (reported["metric"] == metric)
                & (reported["variant"] == f"sequence_length={label.removesuffix(' tokens')}")
            ]  # fmt: skip
            published = float(same["value"].iloc[0]) if len(same) else None
            yield dict.fromkeys(COLUMNS, "") | {
                "artifact": table.name, "scale": scale.name, "role": role, "model": role, "benchmark": label,
                "metric": metric, "unit": unit, "mean": value, "reported": published, "label": label,
                "reported_difference": None if published is None else value - published, "data": "", "path": "",
            }  # fmt: skip


def _extra(spec: Any) -> str:
    """Settings that have no column of their own."""
    rest = {k: v for k, v in spec.settings.items() if k not in PUBLISHED_SETTINGS and k != "d_min"}
    return ", ".join(f"{k}={v}" for k, v in sorted(rest.items()))


def _label(spec: Any) -> str:
    d_max = getattr(spec.method_config, "d_max", None)
    return spec.method if d_max is None else f"{spec.method}, d_max {d_max}"


def _published(reported: pd.DataFrame, table: Table, cell: Cell, name: str) -> float | None:
    """The published value of the same cell: equal in all that the source states.

    A model trained longer than its dataset's recipe says is compared with the published one trained as much longer.
    """
    spec = cell.spec
    rows = reported[
        reported["artifact"].isin(table.reported)
        & (reported["method"] == spec.method)
        & reported["train_data"].isin([name, cell.row.train_data])
        & (reported["metric"] == cell.metric)
    ]
    if cell.row.iterations is not None:
        rows = rows[rows["iterations"] == str(cell.row.iterations)]
    if spec.model_config.role in set(rows["model"]):
        rows = rows[rows["model"] == spec.model_config.role]
    if len(rows) and rows["epochs"].ne("").all():
        epochs = rows["epochs"].astype(float)
        rows = rows[(epochs / epochs.min() - spec.longer).abs() < 0.1]
    for setting in ("d_max", "a", "register_embedding", "placement"):
        ours = getattr(spec.method_config, setting, "")
        words = {"all": "every_token", "every": "every_second_token"} if setting == "placement" else {}
        rows = rows[rows[setting].isin(["", words.get(ours, f"{ours}")])]
    return float(rows["value"].iloc[0]) if len(rows) else None


def published_rows(reported: pd.DataFrame, table: Table) -> pd.DataFrame:
    """All published values that belong to a table."""
    return reported[reported["artifact"].isin(table.reported)]


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


def markdown(table: Table, scale: Scale, shown: pd.DataFrame, beside: pd.DataFrame, runs: results.Records) -> str:
    """The table in Markdown, with what stands in for what, notes and the published values."""
    where = f"Scale: {scale.name} ({scale.description})."
    if table.draw == "flops":
        where = "Worked out from widths and lengths; nothing is trained."
    parts = [f"# {table.title}", "", where, "", table.caption, ""]
    if table.draw == "cost":
        parts += [" ".join(cost.circumstances(table, scale, runs.runs)), ""]
    if table.needs_runs:
        parts += [f"{_metrics(table, scale)}, mean ± standard deviation over seeds (n = seeds).", ""]
    parts += [grid(shown), ""]
    shown_specs = [cell.spec for cell in cells(table, scale)]
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
    units = {cell.measured: cell.unit for cell in cells(table, scale)}
    if table.draw == "solve_rates":
        units = {table.metrics[0]: units.get(table.metrics[0], "percent")}
    names: dict[str, list[str]] = {}
    for metric, unit in units.items():
        names.setdefault(unit, []).append(metric)
    return "; ".join(f"{', '.join(metrics)}, {unit}" for unit, metrics in names.items())


def _problems(specs: list[Any], runs: results.Records) -> list[str]:
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
    lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{l{'r' * len(shown.columns)}}}", r"\toprule", *body,
             r"\bottomrule", r"\end{tabular}",
             rf"\caption{{{_escape(table.title)}. Scale: {_escape(scale.name)}. {_escape(table.caption)}}}",
             r"\end{table}"]  # fmt: skip
    return "\n".join(lines) + "\n"


def _escape(text: Any) -> str:
    out = str(text).replace("\\", r"\textbackslash{}")
    for char in "&%$#_{}":
        out = out.replace(char, "\\" + char)
    return out.replace("±", r"$\pm$")


def collect_runs(runs: results.Records, scale: str, folder: Path) -> list[Path]:
    """runs.csv: one row a seeded run, every setting and metric, and what made it."""
    rows = []
    for record in runs.of_scale(scale):
        flat = {k: v for k, v in record.items() if isinstance(v, (str, int, float, bool)) or v is None}
        flat |= {f"setting.{k}": v for k, v in record["config"]["settings"].items()}
        flat |= {f"recipe.{k}": v for k, v in record["config"]["recipe"].items()}
        flat |= {f"version.{k}": v for k, v in record["versions"].items()}
        for checkpoint in record["checkpoints"]:
            for name in checkpoint["names"]:
                flat |= {f"{name}.{k}": v for k, v in checkpoint["metrics"].items()}
                flat[f"{name}.step"] = checkpoint["step"]
        rows.append(flat)
    file = folder / "runs.csv"
    folder.mkdir(parents=True, exist_ok=True)
    write(file, lambda f: pd.DataFrame(rows).to_csv(f, index=False, lineterminator="\n"))
    return [file]
