"""Figures of what methods know of the tokens further on, and what that is worth in decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mutor.config.schema import Table
from mutor.mtp.method import Method
from mutor.registry import METHODS, load
from mutor.results.cells import Evidence
from mutor.results.decoding import drafts
from mutor.results.figures import (
    DASHES,
    MARKERS,
    ROW,
    around,
    broken_line,
    colour_of,
    counted,
    foot,
    side_by_side,
    title_of,
    wrapped,
)
from mutor.results.records import curve


def ahead(evidence: Evidence, table: Table) -> Figure:
    """Accuracy, and drafts that are the model's own, over how far ahead: mean a line, its interval, every seed a point.

    What is not trained is dashed and grey.
    """
    frame = evidence.frame(table)
    figure, axes = side_by_side(2, (4, 4.2), 2.5)
    shown = {"accuracy": "accuracy of x_(t+k) (%)", "accepted": "drafts of x_(t+2) .. x_(t+k) all its own (%)"}
    looks = _looks(frame)
    for axis, (name, words) in zip(axes, shown.items(), strict=True):
        rows = frame[frame["metric"].str.startswith(f"{name}_ahead_")]
        far = rows["metric"].str.rpartition("_")[2].astype(int)
        for label, look in looks.items():
            mine = rows[(rows["label"] == label) & (rows["n_seeds"] > 0)]
            mean = mine["mean"].astype(float)
            named = counted(label, mine) if len(mine) else label
            axis.plot(far[mine.index], mean, ms=5, lw=1.3, label=named, **look)
            axis.errorbar(
                far[mine.index], mean, yerr=around(mine), fmt="none", color=look["color"], capsize=2, lw=0.8, alpha=0.6
            )
            for k, values in zip(far[mine.index], mine["values"], strict=True):
                axis.plot([k] * len(values), values, ".", color=look["color"], ms=3, alpha=0.7)
        axis.update_datalim([(2, 0), (2, 1)])  # so that there is room above the highest
        axis.autoscale_view()
        axis.set(xlabel="how many tokens ahead, k", ylabel=words, ylim=(0, None))
        axis.set(xticks=sorted(set(far)), xlim=(min(far) - 0.2, max(far) + 0.2))
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    figure.suptitle(wrapped(title_of(evidence, table, ""), 110), fontsize=10)
    foot(figure, frame, 2)
    return figure


def ahead_curves(evidence: Evidence, table: Table) -> Figure:
    """The same while models are trained, on validation texts: a panel for each draft, a line a seed."""
    frame = evidence.frame(table)
    names = sorted({name for name in frame["metric"] if name.startswith("accepted_ahead_")})
    figure, axes = side_by_side(len(names), (3.2, 3.4), 2.6)
    looks = _looks(frame)
    cells = {frame["label"].iloc[number]: cell for number, cell in enumerate(evidence.cells(table))}
    curves = {label: [curve(record) for record in evidence.runs.of(cell.spec)] for label, cell in cells.items()}
    for axis, name in zip(axes, names, strict=False):
        for label in cells:
            look = {**looks[label], "lw": 1.1, "ms": 4}
            runs = [[(e["step"], e[f"eval_{name}"]) for e in curve if f"eval_{name}" in e] for curve in curves[label]]
            if any(runs):
                axis.plot(*broken_line(runs), label=label, **look)
        axis.update_datalim([(0, 0), (0, 1)])
        axis.autoscale_view()
        axis.set(xlabel="step", ylabel=f"{name.replace('_', ' ')} (%, validation)", ylim=(0, None))
    handles = {line.get_label(): line for axis in axes for line in axis.get_legend_handles_labels()[0]}
    if handles:
        figure.legend(handles=list(handles.values()), fontsize=7, loc="outside right center")
    figure.suptitle(wrapped(title_of(evidence, table, "; while training"), 30 + 40 * min(len(names), ROW)), fontsize=10)
    foot(figure, frame, min(len(names), ROW))
    return figure


def _looks(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """How each setting is drawn, by label: a colour a method, a marker a setting of it; untrained grey and dashed."""
    rows = frame.drop_duplicates("label").to_dict("records")
    trained = {row["method"] for row in rows if row["iterations"] != 0}
    seen, looks = dict.fromkeys(trained, 0), {}
    for row in rows:
        method = row["method"]
        if method not in seen:
            looks[row["label"]] = {"color": "#777777", "ls": "--", "marker": "x"}
            continue
        number = seen[method]
        style = DASHES[number // 2 % len(DASHES)]  # so that a method's settings differ in more than their markers
        looks[row["label"]] = {"color": colour_of(method), "ls": style, "marker": MARKERS[number % len(MARKERS)]}
        seen[method] += 1
    return looks


def decoding(evidence: Evidence, table: Table) -> Figure:
    """Over the number of drafts, a row of panels a dataset: tokens a pass; speed-up by the clock, and dashed by FLOPs.

    Every seed is a point. A method without drafts of its own is dashed grey: they are looked up in the text.
    """
    methods = [load(METHODS, cell.spec.method, "method") for cell in evidence.cells(table)]
    frame = evidence.frame(table)
    frame = frame.assign(looked_up=[method.drafter is Method.drafter for method in methods])
    groups, looks = list(dict.fromkeys(frame["data"])), _looks(frame)
    size = (10.5, 1 + 3.3 * len(groups))
    figure, grid = plt.subplots(max(len(groups), 1), 2, figsize=size, squeeze=False, layout="constrained")
    for axes, group in zip(grid, groups, strict=False):
        for label, rows in frame[frame["data"] == group].groupby("label", sort=False):
            grey = {"color": "#777777", "ls": "--"} if rows["looked_up"].all() else {}
            _draft_lines(axes, rows, counted(str(label), rows), looks[str(label)] | grey)
        axes[1].axhline(1, color="#555555", lw=0.8)
        for axis, name in zip(axes, ("tokens a verifying pass", "speed-up (dashed: by FLOPs)"), strict=True):
            axis.set(xlabel="drafts a pass", ylabel=name)
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0].set_title(group, loc="left")
        if axes[0].lines:
            axes[1].legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        else:
            axes[0].text(0.5, 0.5, "not run", transform=axes[0].transAxes, ha="center", color="#777777")
    figure.suptitle(wrapped(title_of(evidence, table, ""), 120), fontsize=10)
    foot(figure, frame, 2)
    return figure


def _draft_lines(axes: Sequence[Axes], rows: pd.DataFrame, label: str, look: dict[str, Any]) -> None:
    """A method's line in both panels of `decoding`: means, every seed a point, and the ideal by FLOPs."""
    cells = {row["metric"]: row for row in rows.to_dict("records")}
    numbers = drafts(rows)
    for axis, name in zip(axes, ("acceptance_length", "speedup"), strict=True):
        found = [cells[f"{name}_draft_{k}"] for k in numbers]
        for k, cell in zip(numbers, found, strict=True):
            axis.plot([k] * len(cell["values"]), cell["values"], look["marker"], color=look["color"], ms=3.5, alpha=0.6)
        if found:
            axis.plot(numbers, [cell["mean"] for cell in found], **look, lw=1.4, ms=4, label=label)
    plain, ideal = cells["flops_per_token_draft_0"]["values"], []
    for k in numbers:
        seeds = zip(plain, cells[f"flops_per_token_draft_{k}"]["values"], strict=True)
        ideal.append(sum(without / with_drafts for without, with_drafts in seeds) / len(plain))
    axes[1].plot(numbers, ideal, ".", color=look["color"], ls=(0, (2, 2)), lw=0.8, ms=3)
