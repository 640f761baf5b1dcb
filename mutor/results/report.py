"""results/report.html: claims, tables, figures and provenance of a scale in one file that opens without a network.

Jinja2 fills mutor/results/report.html; DataTables, as the package itables brings it, sorts and searches its tables.
"""

from __future__ import annotations

import base64
import importlib.resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from mutor.config.load import load_table
from mutor.config.runs import cells_of, run_cells
from mutor.config.schema import Scale, Table
from mutor.files import write
from mutor.results import claims, records
from mutor.results.cells import COLUMNS, cell_frame
from mutor.results.cost import circumstances
from mutor.results.flops import training_flops
from mutor.results.published import published_rows
from mutor.results.render import published_shape

SAID_ONCE = ("artifact", "scale", "stands_in_for", "role")  # of a cell, above its table


def collect_report(
    root: Path, artifacts: list[str], scale: Scale, runs: records.Records, reported: pd.DataFrame, folder: Path
) -> list[Path]:
    """Write report.html from the runs, and from the figures that are in `folder`."""
    tables = [load_table(root, name) for name in artifacts]
    found = runs.of_scale(scale.name)
    frame = claims.claim_frame(root, scale, runs, reported)
    here = frame["verdict"] != "not at this scale"
    specs = [cell.spec for table in tables for cell in cells_of(table, scale)]
    page = _environment().from_string((importlib.resources.files("mutor.results") / "report.html").read_text())
    bundle = importlib.resources.files("itables") / "html"
    html = page.render(
        scale=scale,
        runs=found,
        artifacts=[_artifact(t, scale, runs, reported, folder) for t in tables],
        stands_in=sorted({s.stands_in_for for s in specs if s.stands_in_for}),
        claims=_grid(claims.shown(frame[here]), mark="verdict"),
        rule=claims.RULE,
        elsewhere=list(dict.fromkeys(zip(frame[~here]["claim"], frame[~here]["source"], strict=True))),
        missing=_grid(missing(tables, scale, runs)),
        problems=runs.problems,
        cost=_cost(found),
        run_grid=_grid(_run_frame(found)),
        tables_css=Markup((bundle / "dt_bundle.css").read_text()),
        tables_js=base64.b64encode((bundle / "dt_bundle.js").read_bytes()).decode(),
    )
    file = folder / "report.html"
    folder.mkdir(parents=True, exist_ok=True)
    write(file, lambda f: f.write_text(html, encoding="utf-8"))
    return [file]


def _environment() -> jinja2.Environment:
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _grid(frame: pd.DataFrame, mark: str | None = None) -> dict[str, Any]:
    """Columns, and rows of (text, value to sort by, class); empty columns are left out."""
    frame = frame[[c for c in frame.columns if not all(_blank(v) for v in frame[c])]] if len(frame) else frame
    rows = []
    for _, row in frame.iterrows():
        marks = [str(v).split()[0] if column == mark else "" for column, v in row.items()]
        orders = [v if isinstance(v, float) else None for v in row]
        rows.append(list(zip(map(_text, row), orders, marks, strict=True)))
    return {"columns": list(frame.columns), "rows": rows}


def _blank(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and pd.isna(value))


def _text(value: Any) -> str:
    if _blank(value):
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1000 or abs(value) >= 1e9 else f"{value:,.0f}"


def _artifact(
    table: Table, scale: Scale, runs: records.Records, reported: pd.DataFrame, folder: Path
) -> dict[str, Any]:
    frame = cell_frame(table, scale, runs, reported)
    shape = published_shape(frame, table)
    columns = ["label", *(c for c in COLUMNS if c not in SAID_ONCE)]
    if frame["role"].nunique() > 1:
        columns.insert(1, "role")
    figures = [
        {"source": _embedded(file), "alt": f"{table.title}, {what}"}
        for name, what in (
            (table.name, "numbers in the table below"),
            (f"{table.name}_curves", "learning curves"),
            (f"{table.name}_samples", "pictures drawn by the last models, a column a class"),
        )
        if (file := _smaller(folder, name))
    ]
    own = {text for text in frame["stands_in_for"] if text}
    notes = [*(circumstances(table, scale, runs.runs) if table.draw == "cost" else ()), *table.notes]
    return {
        "name": table.name,
        "title": table.title,
        "caption": table.caption,
        "notes": notes,
        "figures": figures,
        "stands_in": sorted(own),
        "measured": table.needs_runs,
        "shape": _grid(shape.rename_axis(" ").reset_index()),
        "cells": _grid(frame[columns]),
        "published": _grid(published_rows(reported, table).drop(columns="artifact")),
    }


def _smaller(folder: Path, name: str) -> Path | None:
    """A figure as .svg or .png, whichever is smaller: a drawing of a thousand runs is too large for a page."""
    files = [file for ending in ("svg", "png") if (file := folder / f"{name}.{ending}").exists()]
    return min(files, key=lambda file: file.stat().st_size, default=None)


def _embedded(file: Path) -> str:
    kind = {".svg": "svg+xml", ".png": "png"}[file.suffix]
    return f"data:image/{kind};base64," + base64.b64encode(file.read_bytes()).decode()


def missing(tables: list[Table], scale: Scale, runs: records.Records) -> pd.DataFrame:
    """Settings without all their seeds, what they are missing in, and the command that fills them."""
    rows: dict[str, dict[str, Any]] = {}
    for table in tables:
        for cell in run_cells(table, scale):
            spec = cell.spec
            lacking = sorted(set(spec.seeds) - {r["seed"] for r in runs.of(spec)})
            if lacking:
                row = rows.setdefault(spec.path, {"setting": spec.path, "seeds": "", "artifacts": "", "command": ""})
                row["seeds"] = ", ".join(map(str, lacking))
                row["artifacts"] = ", ".join(dict.fromkeys([*filter(None, row["artifacts"].split(", ")), table.name]))
                row["command"] = f"snakemake --cores all results/{table.name}.csv --config scale={scale.name}"
    return pd.DataFrame(list(rows.values()))


def _run_frame(found: list[dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for r in found:
        metrics = records.checkpoint_metrics(r, "last")
        scored = [m for m in metrics if records.problem_scores(r, "last", m) is not None] or list(metrics)[:2]
        rows.append(
            {
                "run": r["path"],
                "seed": r["seed"],
                "last checkpoint": ", ".join(f"{m} {metrics[m]:.4g}" for m in scored),
                "steps": float(r.get("steps") or 0),
                "tokens": float(r.get("tokens") or 0),
                "FLOPs": training_flops(r),
                "minutes": r.get("seconds_training", 0) / 60,
                "peak memory (MB)": r.get("peak_memory_bytes", 0) / 1e6,
                "device": r.get("device"),
                "threads": r.get("threads"),
                "started": r.get("started"),
                "commit": (r.get("git_commit") or "")[:10],
                "torch": r["versions"].get("torch"),
                "transformers": r["versions"].get("transformers"),
                "stand-in": "yes" if r.get("stands_in_for") else "no",
            }
        )
    return pd.DataFrame(rows)


def _cost(found: list[dict[str, Any]]) -> str:
    """Hours by device, and FLOPs, of all runs."""
    hours: dict[str, float] = {}
    for r in found:
        device, took = str(r.get("device")), r.get("seconds_training", 0) / 3600
        cpu = device.startswith("cpu")
        name = f"core hours on {device}" if cpu else f"GPU hours on {device}"
        hours[name] = hours.get(name, 0) + took * r.get("processes", 1) * (r.get("threads", 1) if cpu else 1)
    if not hours:
        return "Nothing has run yet."
    total = sum(filter(None, map(training_flops, found)))
    texts = [f"{value:.2f} {name}" for name, value in sorted(hours.items())]
    return f"Training took {'; '.join(texts)}; {total:.2e} FLOPs, counted as 6 x parameters x tokens."
