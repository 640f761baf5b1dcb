"""results/report.html: claims, tables, figures and provenance of a scale in one file that opens without a network.

Jinja2 fills mutor/results/report.html; DataTables, as the package itables brings it, sorts and searches its tables.
"""

from __future__ import annotations

import base64
import gzip
import importlib.resources
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from mutor.config.schema import Table
from mutor.files import write_text
from mutor.results import claims
from mutor.results.cells import COLUMNS, Evidence, stand_ins
from mutor.results.drawings import collect_artifact, collect_runs
from mutor.results.flops import training_flops
from mutor.results.numbers import is_missing, text
from mutor.results.records import checkpoint_metrics, problem_scores
from mutor.results.render import answer, caption, circumstances, published_shape
from mutor.results.verdict import collect_verdict, elsewhere, three_answers
from mutor.results.verdicts import RULE

PAGE = 100  # rows of a table that are shown at once
SAID_ONCE = ("artifact", "scale", "stands_in_for", "role")  # of a cell, above its table


def collect_report(evidence: Evidence, artifacts: list[str], folder: Path) -> list[Path]:
    """Write report.html from the evidence, and from the figures that are in `folder`."""
    tables = [evidence.table(name) for name in artifacts]
    found = evidence.runs.of_scale(evidence.scale.name)
    here, _ = claims.here_and_elsewhere(claims.claim_frame(evidence))
    specs = [cell.spec for table in tables for cell in evidence.cells(table)]
    page = _environment().from_string((importlib.resources.files("mutor.results") / "report.html").read_text())
    bundle = importlib.resources.files("itables") / "html"
    html = page.render(
        scale=evidence.scale,
        page=PAGE,
        runs=found,
        answers=three_answers(evidence, tables),
        figure=_embedded(drawn) if (drawn := _smaller(folder, "verdict")) else "",
        beside=_grid(three_answers(evidence, tables)[0].table, mark="inside"),
        artifacts=sorted((_artifact(evidence, table, folder) for table in tables), key=lambda one: not one["figures"]),
        stands_in=sorted({part for s in specs for part in s.stands_in_for.split("; ") if part}),
        claims=_grid(claims.shown(here), mark="verdict"),
        rule=RULE,
        elsewhere=elsewhere(evidence),
        missing=_grid(missing(evidence, tables)),
        problems=evidence.runs.problems,
        cost=spent(found),
        run_grid=_grid(_run_frame(found)),
        tables_css=Markup((bundle / "dt_bundle.css").read_text()),
        tables_js=base64.b64encode((bundle / "dt_bundle.js").read_bytes()).decode(),
    )
    file = folder / "report.html"
    write_text(file, html)
    return [file]


def collect_all(
    evidence: Evidence, names: Sequence[str], artifacts: list[str], folder: Path
) -> tuple[list[Path], list[str]]:
    """Build artifacts, and the files "claims", "verdict", "runs" and "report" (of `artifacts`), in this order.

    Returns the files, and the sentences of tables that answer something.
    """
    files, answers = [], []
    for name in names:
        if name == "runs":
            files += collect_runs(evidence, folder)
        elif name == "claims":
            files += claims.collect_claims(evidence, folder)
        elif name == "verdict":
            files += collect_verdict(evidence, artifacts, folder)
        elif name == "report":
            files += collect_report(evidence, artifacts, folder)
        else:
            files += collect_artifact(evidence, evidence.table(name), folder)
            answers += answer(evidence, evidence.table(name))
    return files, answers


def _environment() -> jinja2.Environment:
    found = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters["code"] = lambda text: Markup(re.sub("`(.+?)`", r"<code>\1</code>", str(escape(text))))
    return found


def _grid(frame: pd.DataFrame, mark: str | None = None) -> dict[str, Any]:
    """Columns, and rows of (text, value to sort by, class); empty columns are left out.

    All cells of a column have a value to sort by, if only "", or None: DataTables never ends where the first row's cell
    has one and none of those that are added later.
    """
    columns = {name: values for name in frame if not all(map(is_missing, values := frame[name].tolist()))}
    found = {name: [v if isinstance(v, float) and v == v else None for v in columns[name]] for name in columns}
    numeric = {name for name in columns if any(v is not None for v in found[name])}
    orders = {name: ["" if v is None and name in numeric else v for v in found[name]] for name in columns}
    marks = {name: [str(v).split()[0] if name == mark else "" for v in columns[name]] for name in columns}
    cells = [list(zip(map(text, columns[name]), orders[name], marks[name], strict=True)) for name in columns]
    rows = list(zip(*cells, strict=True))
    return {"columns": list(columns), "rows": rows[:PAGE], "more": _packed(rows[PAGE:])}


def _packed(rows: Sequence[Sequence[tuple[str, float | str | None, str]]]) -> str:
    """Rows beyond a page's first, as DataTables adds them: JSON, compressed, in base64; empty without any."""
    if not rows:
        return ""
    cells = [
        [
            escape(words) if order is None else {"display": escape(words), "@data-order": order}
            for words, order, _ in row
        ]
        for row in rows
    ]
    return base64.b64encode(gzip.compress(json.dumps(cells).encode(), mtime=0)).decode()


def _artifact(evidence: Evidence, table: Table, folder: Path) -> dict[str, Any]:
    frame, shape = evidence.frame(table), published_shape(evidence, table)
    columns = ["label", *(c for c in COLUMNS if c not in SAID_ONCE)]
    if frame["role"].nunique() > 1:
        columns.insert(1, "role")
    figures = [
        {"source": _embedded(file), "alt": f"{table.title}, {figure.shows}"}
        for figure in table.drawing.figures
        if (file := _smaller(folder, f"{table.name}{figure.suffix}"))
    ]
    return {
        "name": table.name,
        "title": table.title,
        "caption": caption(evidence, table),
        "notes": [*circumstances(evidence, table), *table.notes],
        "figures": figures,
        "stands_in": stand_ins(frame),
        "measured": table.needs_runs,
        "shape": _grid(shape.reset_index(names=str(shape.index.name or " "))),
        "cells": _grid(frame[columns]),
        "published": _grid(evidence.published(table).frame.drop(columns="artifact")),
    }


def _smaller(folder: Path, name: str) -> Path | None:
    """A figure as .svg or .png, whichever is smaller: a drawing of a thousand runs is too large for a page."""
    files = [file for ending in ("svg", "png") if (file := folder / f"{name}.{ending}").exists()]
    return min(files, key=lambda file: file.stat().st_size, default=None)


def _embedded(file: Path) -> str:
    kind = {".svg": "svg+xml", ".png": "png"}[file.suffix]
    return f"data:image/{kind};base64," + base64.b64encode(file.read_bytes()).decode()


def missing(evidence: Evidence, tables: list[Table]) -> pd.DataFrame:
    """Settings without all their seeds, what they are missing in, and the command that fills them."""
    rows: dict[str, dict[str, Any]] = {}
    for table in tables:
        command = f"snakemake --cores all {evidence.home}/{table.name}.csv --config scale={evidence.scale.name}"
        specs = {cell.spec.path: cell.spec for cell in evidence.cells(table) if table.needs_runs}
        for spec in specs.values():
            lacking = sorted(set(spec.seeds) - {r["seed"] for r in evidence.runs.of(spec)})
            if lacking:
                row = rows.setdefault(spec.path, {"setting": spec.path, "seeds": set(), "artifacts": []})
                row["seeds"] |= {*lacking}
                row["artifacts"].append(table.name)
                row["command"] = command
    for row in rows.values():
        row |= {"seeds": ", ".join(map(str, sorted(row["seeds"]))), "artifacts": ", ".join(row["artifacts"])}
    return pd.DataFrame(list(rows.values()))


def _run_frame(found: list[dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for r in found:
        metrics = checkpoint_metrics(r, "last")
        scored = [m for m in metrics if problem_scores(r, "last", m) is not None] or list(metrics)[:2]
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


def spent(found: list[dict[str, Any]]) -> str:
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
